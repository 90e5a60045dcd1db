"""The classifier that reads digits, and whose features the Fréchet distance is measured in.

It has seen the real handwritten digits of the training split, in all colours, and nothing that a model drew.
`python -m lcm_jax.evaluation.classifier --out=FILE` trains it anew, in some ten minutes; the weights that come with the
package (`WEIGHTS`) were made so.
"""

import dataclasses
import functools
import pathlib
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.scipy.ndimage import map_coordinates
from jaxtyping import Array, Float, UInt8
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from lcm_jax import cli, compile_cache
from lcm_jax.data.digits import (
    ALL_PAIRS,
    COLOURS,
    DIGIT_NAMES,
    DIGIT_SIZE,
    PLACES,
    SIZE,
    coverage,
    draw,
    load_grids,
    split_pictures,
)
from lcm_jax.errors import UserError
from lcm_jax.models import Flat, Network
from lcm_jax.models.layers import conv
from lcm_jax.models.policy import FP32, Policy

WEIGHTS = pathlib.Path(__file__).parent.parent / "assets" / "digit_classifier.safetensors"
FEATURES = 64
CHUNK = 280  # pictures at once


class DigitClassifier(nnx.Module):
    """Six convolutions, 64 features averaged over the picture, and one linear layer for each question."""

    def __init__(self, config: None, *, policy: Policy = FP32, rngs: nnx.Rngs) -> None:
        del config
        dtype = policy.compute
        self.conv1 = conv(3, 32, stride=2, dtype=dtype, rngs=rngs)
        self.conv2 = conv(32, 32, dtype=dtype, rngs=rngs)
        self.conv3 = conv(32, 64, stride=2, dtype=dtype, rngs=rngs)
        self.conv4 = conv(64, 64, dtype=dtype, rngs=rngs)
        self.conv5 = conv(64, 128, stride=2, dtype=dtype, rngs=rngs)
        self.conv6 = conv(128, FEATURES, dtype=dtype, rngs=rngs)
        self.digit = nnx.Linear(FEATURES, len(DIGIT_NAMES), dtype=dtype, rngs=rngs)
        self.ink = nnx.Linear(FEATURES, len(COLOURS), dtype=dtype, rngs=rngs)
        self.paper = nnx.Linear(FEATURES, len(COLOURS), dtype=dtype, rngs=rngs)

    def __call__(self, images: Float[Array, "b 32 32 3"]) -> tuple[Array, dict[str, Array]]:
        """Takes pictures in [-1, 1]; returns features (b, 64) and logits for "digit", "ink" and "paper"."""
        x = images
        for layer in (self.conv1, self.conv2, self.conv3, self.conv4, self.conv5, self.conv6):
            x = jax.nn.silu(layer(x))
        features = x.mean((1, 2))
        return features, {"digit": self.digit(features), "ink": self.ink(features), "paper": self.paper(features)}


@functools.cache
def _network() -> Network:
    return Network(DigitClassifier, None)


@dataclasses.dataclass(frozen=True)
class Classifier:
    """The trained network; call it with pictures."""

    params: Flat

    def __call__(self, images: UInt8[np.ndarray, "n 32 32 3"]) -> tuple[np.ndarray, np.ndarray]:
        """Returns features (n, 64) float32 and the digits that are read (n,) int."""
        features, digits = [], []
        for start in range(0, len(images), CHUNK):
            part = images[start : start + CHUNK]
            padded = np.concatenate([part, np.zeros((CHUNK - len(part), *part.shape[1:]), part.dtype)])
            f, d = _classify(self.params, padded)
            features.append(np.asarray(f)[: len(part)])
            digits.append(np.asarray(d)[: len(part)])
        return np.concatenate(features), np.concatenate(digits)


@jax.jit
def _classify(params: Flat, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    features, logits = _network().apply(params, images.astype(jnp.float32) / 127.5 - 1.0)
    return features, jnp.argmax(logits["digit"], -1)


def load_classifier(path: pathlib.Path = WEIGHTS) -> Classifier:
    """Loads the weights that come with the package; raises UserError if they are missing or do not fit."""
    try:
        params = load_file(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"{path} can't be read: {error}; it comes with lcm_jax, install that again or train it: "
            f"python -m lcm_jax.evaluation.classifier --out={path}"
        ) from None
    _network().check(params, str(path))
    return Classifier({name: jnp.asarray(array) for name, array in params.items()})


def train_classifier(steps: int = 6000, batch_size: int = 128, seed: int = 0) -> Classifier:
    """Trains on the training split's digits, each time elsewhere, turned and scaled a little, and newly coloured."""
    grids, digits = load_grids()
    pictures = split_pictures(digits)["train"]
    covers, labels = jnp.asarray(coverage(grids[pictures])), jnp.asarray(digits[pictures])
    names = list(COLOURS)
    pairs = jnp.asarray([(names.index(ink), names.index(paper)) for ink, paper in ALL_PAIRS])
    palette = jnp.asarray(list(COLOURS.values()), jnp.float32) / 127.5 - 1.0
    schedule = optax.warmup_cosine_decay_schedule(0.0, 2e-3, min(100, steps // 2), steps)
    optimizer = optax.adamw(schedule, weight_decay=0.05)

    def example(key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        key_picture, key_warp, key_pair = jax.random.split(key, 3)
        chosen = jax.random.randint(key_picture, (batch_size,), 0, len(covers))
        cover = jax.vmap(_warped)(jax.random.split(key_warp, batch_size), covers[chosen])[..., None]
        ink, paper = pairs[jax.random.randint(key_pair, (batch_size,), 0, len(pairs))].T
        front, back = palette[ink][:, None, None], palette[paper][:, None, None]
        return back + cover * (front - back), {"digit": labels[chosen], "ink": ink, "paper": paper}

    def loss(params: Flat, key: jax.Array) -> jax.Array:
        images, answers = example(key)
        _, logits = _network().apply(params, images)
        losses = [
            optax.softmax_cross_entropy_with_integer_labels(logits[name], answers[name]).mean() for name in answers
        ]
        return sum(losses, jnp.float32(0))

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: tuple[Flat, optax.OptState], key: jax.Array) -> tuple[Flat, optax.OptState]:
        params, opt_state = state
        updates, opt_state = optimizer.update(jax.grad(loss)(params, key), opt_state, params)
        return optax.apply_updates(params, updates), opt_state  # pyright: ignore[reportReturnType]

    key_init, key_steps = jax.random.split(jax.random.key(seed))
    params = _network().init(key_init)
    state = params, optimizer.init(params)
    for number in range(steps):
        state = step(state, jax.random.fold_in(key_steps, number))
    return Classifier(state[0])


def _warped(key: jax.Array, cover: Float[Array, "24 24"]) -> Float[Array, "32 32"]:
    """A digit anywhere in a picture, turned by up to 10 degrees and scaled by up to 10 %."""
    key_place, key_turn, key_scale = jax.random.split(key, 3)
    shift = jax.random.uniform(key_place, (2, 1, 1), minval=-PLACES / 2, maxval=PLACES / 2)
    angle = jnp.deg2rad(jax.random.uniform(key_turn, minval=-10.0, maxval=10.0))
    scale = jax.random.uniform(key_scale, minval=0.9, maxval=1.1)
    places = jnp.stack(jnp.meshgrid(jnp.arange(SIZE), jnp.arange(SIZE), indexing="ij")) - (SIZE - 1) / 2
    turn = jnp.array([[jnp.cos(angle), -jnp.sin(angle)], [jnp.sin(angle), jnp.cos(angle)]]) * scale
    places = jnp.einsum("ij,jhw->ihw", turn, places + shift) + (DIGIT_SIZE - 1) / 2
    return map_coordinates(cover, list(places), order=1, cval=0.0)


def real_accuracy(classifier: Classifier) -> float:
    """The share of the real test digits, each drawn in 8 colour pairs and places, that is read right."""
    grids, digits = load_grids()
    pictures = np.repeat(split_pictures(digits)["test"], 8)
    places = np.random.default_rng(0).integers(PLACES, size=(len(pictures), 2)).tolist()
    drawn = [
        draw(grids[picture], *ALL_PAIRS[number % len(ALL_PAIRS)], (row, column))
        for number, (picture, (row, column)) in enumerate(zip(pictures, places, strict=True))
    ]
    return float(np.mean(classifier(np.stack(drawn))[1] == digits[pictures]))


def main(argv: Sequence[str]) -> int:
    """Runs the command; `argv` without the program's name. Returns the exit code."""
    parser = cli.parser("classifier", __doc__)
    parser.add_argument("--out", required=True, type=pathlib.Path, help="the safetensors file to write")
    parser.add_argument("--steps", type=int, default=6000)
    args = parser.parse_args(argv)
    if args.steps < 1:
        raise UserError(f"--steps={args.steps} must be at least 1")
    if args.out.is_dir():
        raise UserError(f"--out={args.out} is a folder; give a file's name in it")
    cli.make_folder("--out", args.out.parent)
    compile_cache.enable()
    classifier = train_classifier(args.steps)
    save_file({name: np.asarray(array) for name, array in classifier.params.items()}, args.out)
    print(f"{args.out}: reads {100 * real_accuracy(classifier):.2f} % of the real test digits")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
