"""python benchmarks/decoder_strips.py [--sizes=512,1024] [--timed=256] [--rounds=3] [--vae=FOLDER] [--dtype=float32]

Compares the decoder of an autoencoder whole and in strips: memory of the compiled program without weights and image,
for each size in pixels; seconds, in alternation, and the largest difference on a scale of 0 … 255 for each size that
--timed names. The decoder is that of Stable Diffusion and SDXL with random weights, or that of the folder VAE, where
the latents are those of a smooth random image.
"""

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lcm_jax import cli
from lcm_jax.interop.folder import read_folder
from lcm_jax.models import Network, Policy
from lcm_jax.models.vae import AutoencoderKL, VAEConfig

SDXL = VAEConfig(
    block_out_channels=(128, 256, 512, 512),
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    layers_per_block=2,
    scaling_factor=0.13025,
)


def smooth_image(size: int) -> np.ndarray:
    """Returns an image (1, size, size, 3) in [-1, 1] of waves and edges."""
    random, (y, x) = np.random.default_rng(0), np.mgrid[:size, :size] / size
    waves = sum(
        np.sin(2 * np.pi * (a * x + b * y) + c)[..., None] * random.normal(size=3)
        for a, b, c in random.normal(size=(12, 3)) * (6, 6, 3)
    )
    edges = np.where((x + y) % 0.25 < 0.05, 1.0, 0.0)[..., None] * random.normal(size=3)
    return np.tanh(waves / 2 + edges)[None].astype(np.float32)


def main(argv: Sequence[str]) -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="512,1024")
    parser.add_argument("--timed", default="256")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vae")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args(argv)
    sizes, timed = ([int(size) for size in text.split(",") if size] for text in (args.sizes, args.timed))
    policy = Policy.named(args.dtype)
    if args.vae:
        component = read_folder(args.vae).components["vae"]
        network, params = component.network(policy=policy), component.params
    else:
        network = Network(AutoencoderKL, SDXL, policy=policy)
        params = network.init(jax.random.key(0))
    used = {path: jnp.asarray(array, network.used[path].dtype) for path, array in params.items()}
    config: Any = network.config
    functions = {
        in_strips: jax.jit(functools.partial(network.apply, method="to_images", in_strips=in_strips))
        for in_strips in (False, True)
    }
    print("| px | whole, MiB | in strips, MiB | ratio | whole, s | in strips, s | ratio, median (range) | difference |")
    print("|--:|--:|--:|--:|--:|--:|--:|--:|")
    for size in sorted({*sizes, *timed}):
        z = jax.ShapeDtypeStruct((1, size // config.factor, size // config.factor, config.latent_channels), jnp.float32)
        compiled: dict[bool, Any] = {key: function.lower(used, z).compile() for key, function in functions.items()}
        whole, strips = (of.memory_analysis().temp_size_in_bytes / 2**20 for of in compiled.values())
        row = f"| {size} | {whole:,.0f} | {strips:,.0f} | {strips / whole:.2f} |"
        print(row + (times(compiled, network, used, size, args.rounds) if size in timed else " | | | |"), flush=True)
    return 0


def times(compiled: dict[bool, Any], network: Network, params: Any, size: int, rounds: int) -> str:
    """Returns the other columns of a row."""
    image = jnp.asarray(smooth_image(size))
    z = jax.jit(functools.partial(network.apply, method="to_latents"))(params, image, None)
    images = {key: np.asarray(of(params, z)) for key, of in compiled.items()}
    seconds: dict[bool, list[float]] = {key: [] for key in compiled}
    for _ in range(rounds):
        for key, of in compiled.items():
            start = time.perf_counter()
            of(params, z).block_until_ready()
            seconds[key].append(time.perf_counter() - start)
    ratios = [strips / whole for whole, strips in zip(*seconds.values(), strict=True)]
    whole, strips = (statistics.median(of) for of in seconds.values())
    levels = [127.5 * (np.clip(of, -1, 1) + 1) for of in images.values()]
    return (
        f" {whole:.1f} | {strips:.1f} | {statistics.median(ratios):.2f} ({min(ratios):.2f} … {max(ratios):.2f}) | "
        f"{np.abs(levels[0] - levels[1]).max():.4f} |"
    )


if __name__ == "__main__":
    sys.exit(cli.run(main))
