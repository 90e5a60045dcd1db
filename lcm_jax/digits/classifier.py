"""A classifier of the captioned digits, whose features the Fréchet distance is computed in.

It is trained on the real digits of the training split in all colours, never on generated images. A second one, for
models of `italic_digits`, is trained on upright and italic digits and also predicts the style.
`python -m lcm_jax.digits.classifier --out=FILE [--styles]` trains one in about ten minutes; the weights in the
package (`WEIGHTS`, `STYLE_WEIGHTS`) were made this way.
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
from safetensors.numpy import load_file

from lcm_jax import cli
from lcm_jax.digits.dataset import (
    ALL_PAIRS,
    COLOURS,
    DIGIT_NAMES,
    DIGIT_SIZE,
    PLACES,
    SIZE,
    STYLES,
    coverage,
    load_grids,
    render,
    split_images,
)
from lcm_jax.errors import UserError
from lcm_jax.host import compile_cache, files
from lcm_jax.host.images import to_signed
from lcm_jax.interop import weights
from lcm_jax.models import Flat, Network
from lcm_jax.models.layers import conv
from lcm_jax.models.policy import FP32, Policy

_ASSETS = pathlib.Path(__file__).parent.parent / "assets"
WEIGHTS = _ASSETS / "digit_classifier.safetensors"
STYLE_WEIGHTS = _ASSETS / "style_classifier.safetensors"
FEATURES = 64
CHUNK = 280  # images per call


class DigitClassifier(nnx.Module):
    """Six convolutions, 64 features averaged over the image, and one linear head per question."""

    def __init__(self, answers: tuple[tuple[str, int], ...], *, policy: Policy = FP32, rngs: nnx.Rngs) -> None:
        """Creates one head per (question, number of answers) in `answers`."""
        dtype = policy.compute
        self.questions = tuple(question for question, _ in answers)
        self.conv1 = conv(3, 32, stride=2, dtype=dtype, rngs=rngs)
        self.conv2 = conv(32, 32, dtype=dtype, rngs=rngs)
        self.conv3 = conv(32, 64, stride=2, dtype=dtype, rngs=rngs)
        self.conv4 = conv(64, 64, dtype=dtype, rngs=rngs)
        self.conv5 = conv(64, 128, stride=2, dtype=dtype, rngs=rngs)
        self.conv6 = conv(128, FEATURES, dtype=dtype, rngs=rngs)
        for question, count in answers:
            setattr(self, question, nnx.Linear(FEATURES, count, dtype=dtype, rngs=rngs))

    def __call__(self, images: Float[Array, "b 32 32 3"]) -> tuple[Array, dict[str, Array]]:
        """Takes images in [-1, 1]; returns features (b, 64) and logits (b, answers) per question."""
        x = images
        for layer in (self.conv1, self.conv2, self.conv3, self.conv4, self.conv5, self.conv6):
            x = jax.nn.silu(layer(x))
        features = x.mean((1, 2))
        return features, {question: getattr(self, question)(features) for question in self.questions}


@functools.cache
def _network(*, styles: bool) -> Network:
    answers = {"digit": len(DIGIT_NAMES), "ink": len(COLOURS), "paper": len(COLOURS)}
    if styles:
        answers["style"] = len(STYLES)
    return Network(DigitClassifier, tuple(answers.items()))


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A trained network, called with images."""

    params: Flat

    def __call__(self, images: UInt8[np.ndarray, "n 32 32 3"]) -> tuple[np.ndarray, np.ndarray]:
        """Returns features (n, 64) float32 and predicted digits (n,) int."""
        return self._read(images, "digit")

    def styles(self, images: UInt8[np.ndarray, "n 32 32 3"]) -> np.ndarray:
        """Returns predicted styles (n,) int, as indices into STYLES; needs weights that were trained with styles."""
        return self._read(images, "style")[1]

    def _read(self, images: np.ndarray, question: str) -> tuple[np.ndarray, np.ndarray]:
        features, answers = [], []
        for start in range(0, len(images), CHUNK):
            part = images[start : start + CHUNK]
            padded = np.concatenate([part, np.zeros((CHUNK - len(part), *part.shape[1:]), part.dtype)])
            f, logits = _classify(self.params, padded)
            features.append(np.asarray(f)[: len(part)])
            answers.append(np.asarray(logits[question]).argmax(-1)[: len(part)])
        return np.concatenate(features), np.concatenate(answers)


@jax.jit
def _classify(params: Flat, images: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    network = _network(styles="style.kernel" in params)
    return network.apply(params, to_signed(images))


def load_classifier(path: pathlib.Path = WEIGHTS) -> Classifier:
    """Loads a classifier, the packaged one by default; raises UserError if the file is unreadable or does not fit."""
    try:
        params = load_file(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"{path} can't be read: {error}; reinstall lcm_jax, which contains it, or train it: python -m "
            f"lcm_jax.digits.classifier --out={path}"
        ) from None
    _network(styles="style.kernel" in params).check(params, str(path))
    return Classifier({name: jnp.asarray(array) for name, array in params.items()})


def train_classifier(steps: int = 6000, batch_size: int = 128, seed: int = 0, *, styles: bool = False) -> Classifier:
    """Trains a classifier on the training split, with random place, rotation, scale and colours for each example.

    Args:
      styles: whether to make half of the digits italic and to predict the style too.
    """
    grids, digits = load_grids()
    members = split_images(digits)["train"]
    shown = STYLES if styles else STYLES[:1]
    covers = jnp.concatenate([jnp.asarray(coverage(grids[members], style=style)) for style in shown])
    labels, of_style = jnp.tile(digits[members], len(shown)), jnp.repeat(jnp.arange(len(shown)), len(members))
    network = _network(styles=styles)
    names = list(COLOURS)
    pairs = jnp.asarray([(names.index(ink), names.index(paper)) for ink, paper in ALL_PAIRS])
    palette = to_signed(np.array(list(COLOURS.values()), np.uint8))
    schedule = optax.warmup_cosine_decay_schedule(0.0, 2e-3, min(100, steps // 2), steps)
    optimizer = optax.adamw(schedule, weight_decay=0.05)

    def example(key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        key_image, key_warp, key_pair = jax.random.split(key, 3)
        chosen = jax.random.randint(key_image, (batch_size,), 0, len(covers))
        cover = jax.vmap(_warped)(jax.random.split(key_warp, batch_size), covers[chosen])[..., None]
        ink, paper = pairs[jax.random.randint(key_pair, (batch_size,), 0, len(pairs))].T
        front, back = palette[ink][:, None, None], palette[paper][:, None, None]
        answers = {"digit": labels[chosen], "ink": ink, "paper": paper, "style": of_style[chosen]}
        return back + cover * (front - back), answers

    def loss(params: Flat, key: jax.Array) -> jax.Array:
        images, answers = example(key)
        _, logits = network.apply(params, images)
        losses = [
            optax.softmax_cross_entropy_with_integer_labels(logits[name], answers[name]).mean() for name in logits
        ]
        return sum(losses, jnp.float32(0))

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: tuple[Flat, optax.OptState], key: jax.Array) -> tuple[Flat, optax.OptState]:
        params, opt_state = state
        updates, opt_state = optimizer.update(jax.grad(loss)(params, key), opt_state, params)
        return optax.apply_updates(params, updates), opt_state  # pyright: ignore[reportReturnType]

    key_init, key_steps = jax.random.split(jax.random.key(seed))
    params = network.init(key_init)
    state = params, optimizer.init(params)
    for number in range(steps):
        state = step(state, jax.random.fold_in(key_steps, number))
    return Classifier(state[0])


def _warped(key: jax.Array, cover: Float[Array, "24 24"]) -> Float[Array, "32 32"]:
    """Places a digit at random in an image, rotated by up to 10 degrees and scaled by up to 10 %."""
    key_place, key_turn, key_scale = jax.random.split(key, 3)
    shift = jax.random.uniform(key_place, (2, 1, 1), minval=-PLACES / 2, maxval=PLACES / 2)
    angle = jnp.deg2rad(jax.random.uniform(key_turn, minval=-10.0, maxval=10.0))
    scale = jax.random.uniform(key_scale, minval=0.9, maxval=1.1)
    places = jnp.stack(jnp.meshgrid(jnp.arange(SIZE), jnp.arange(SIZE), indexing="ij")) - (SIZE - 1) / 2
    turn = jnp.array([[jnp.cos(angle), -jnp.sin(angle)], [jnp.sin(angle), jnp.cos(angle)]]) * scale
    places = jnp.einsum("ij,jhw->ihw", turn, places + shift) + (DIGIT_SIZE - 1) / 2
    return map_coordinates(cover, list(places), order=1, cval=0.0)


def real_accuracy(classifier: Classifier, style: str = "upright") -> float:
    """Returns the classifier's accuracy on the real test digits, each in 8 colour pairs and places."""
    rendered, digits = _real_test_digits(style)
    return float(np.mean(classifier(rendered)[1] == digits))


def style_accuracy(classifier: Classifier, style: str) -> float:
    """Returns the accuracy of the predicted style on the images of `real_accuracy`."""
    return float(np.mean(classifier.styles(_real_test_digits(style)[0]) == STYLES.index(style)))


def _real_test_digits(style: str) -> tuple[np.ndarray, np.ndarray]:
    grids, digits = load_grids()
    members = np.repeat(split_images(digits)["test"], 8)
    places = np.random.default_rng(0).integers(PLACES, size=(len(members), 2)).tolist()
    rendered = [
        render(grids[member], *ALL_PAIRS[number % len(ALL_PAIRS)], (row, column), style)
        for number, (member, (row, column)) in enumerate(zip(members, places, strict=True))
    ]
    return np.stack(rendered), digits[members]


def main(argv: Sequence[str]) -> int:
    """Runs the command; `argv` without the program's name. Returns the exit code."""
    parser = cli.parser("classifier", __doc__)
    parser.add_argument("--out", required=True, type=pathlib.Path, help="the safetensors file to write")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument(
        "--styles", action="store_true", help="train on upright and italic digits, and classify the style too"
    )
    args = parser.parse_args(argv)
    if args.steps < 1:
        raise UserError(f"--steps={args.steps} must be at least 1")
    if args.out.is_dir():
        raise UserError(f"--out={args.out} is a folder; give a file name")
    files.make_folder("--out", args.out.parent)
    compile_cache.enable()
    classifier = train_classifier(args.steps, styles=args.styles)
    with files.new_file(args.out) as new:
        weights.save(new, {name: np.asarray(array) for name, array in classifier.params.items()}, None)
    print(f"{args.out}: {100 * real_accuracy(classifier):.2f} % of the real test digits classified correctly")
    if args.styles:
        italic = real_accuracy(classifier, "italic")
        upright_style, italic_style = (style_accuracy(classifier, style) for style in STYLES)
        print(
            f"italic digits {100 * italic:.2f} %; style of upright ones {100 * upright_style:.2f} %, of "
            f"italic ones {100 * italic_style:.2f} %"
        )
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
