"""python -m lcm_jax.encode --config=configs/sd15.py --out=data/encoded [--batch=32] [--config.<option>=<value> …]

Encodes all images of config.data with the VAE of config.model.folder, and writes the moments and captions as a data
set that `train` reads with --config.data.latents=True. Training steps then run no encoder, and hosts decode no JPEG
files. Images are resized and cropped as configured; random crops and flips are chosen once per image.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from rich.console import Console

from lcm_jax import cli, config_file
from lcm_jax.config import Config
from lcm_jax.data import latents
from lcm_jax.data.batches import Prepared, prepare_image
from lcm_jax.data.images import BadImage
from lcm_jax.data.sources import Source, open_data
from lcm_jax.data.sources.tfds import prepare
from lcm_jax.errors import UserError, say
from lcm_jax.host import compile_cache, files
from lcm_jax.host.images import to_signed
from lcm_jax.interop.folder import Folder, read_folder
from lcm_jax.models import Policy
from lcm_jax.monitor.progress import Sampling
from lcm_jax.parallel.mesh import BATCH, MeshConfig, make_mesh, split_cpu

_T = TypeVar("_T")


def prepared_images(
    source: Source, config: Config, batch_size: int
) -> Iterator[tuple[list[Prepared], list[list[str]]]]:
    """Yields images with the captions of each, in the data set's order; the last batch may be smaller."""

    def load(number: int, record: tuple[bytes, list[str]]) -> Prepared:
        place, mirror = np.random.default_rng([config.seed, number]).random(2)
        place = place if config.data.crop == "random" else 0.5
        try:
            return prepare_image(record[0], config.data, place, config.data.flip and mirror < 0.5)
        except BadImage as error:
            raise source.bad_image(number, error) from None

    with ThreadPoolExecutor(config.data.threads) as pool:
        for start in range(0, len(source), batch_size):
            numbers = range(start, min(start + batch_size, len(source)))
            records = source.read(numbers)
            yield list(pool.map(load, numbers, records)), [captions for _, captions in records]


def encode(
    config: Config, folder: Folder, source: Source, batch_size: int
) -> Iterator[tuple[latents.Latent, list[str]]]:
    """Yields (latent, captions) of each image; its moments are mean and log-variance of q(z|x).

    Raises: UserError for a record that can't be read or decoded, latents that are not finite, and a batch that the
      devices do not divide.
    """
    mesh = make_mesh(MeshConfig())
    if batch_size % mesh.size:
        raise UserError(f"--batch={batch_size} is not divisible by the {mesh.size} devices")
    network = folder.components["vae"].network(policy=Policy.named(config.model.dtype))
    dtype = network.policy.compute
    params = {path: jnp.asarray(array, dtype) for path, array in folder.components["vae"].params.items()}

    @jax.jit
    def moments(params: dict, images: jax.Array) -> jax.Array:
        mean_and_logvar = network.apply(params, to_signed(images), method="encode")
        return jnp.concatenate(mean_and_logvar, axis=-1).astype(jnp.float16)

    count = 0
    for images, captions in prepared_images(source, config, batch_size):
        pixels = np.stack([image.pixels for image in images])
        padded = np.concatenate([pixels, np.zeros((batch_size - len(pixels), *pixels.shape[1:]), np.uint8)])
        of_all = np.asarray(moments(params, jax.device_put(padded, NamedSharding(mesh, BATCH))))
        finite = np.isfinite(of_all[: len(images)]).all(axis=(1, 2, 3))
        if not finite.all():
            raise UserError(
                f"the VAE of {folder.path} gives latents that are not finite in float16, for image "
                f"{count + int(finite.argmin())} of {source.where}; check the VAE, or try --config.model.dtype=float32"
            )
        count += len(images)
        found = [latents.Latent(of_one, image.sizes) for of_one, image in zip(of_all, images, strict=False)]
        yield from zip(found, captions, strict=True)


def _counted(items: Iterable[_T], done: Callable[[int], None]) -> Iterator[_T]:
    """Yields the items, and calls `done` with how many there were so far."""
    for number, item in enumerate(items, 1):
        yield item
        done(number)


def main(argv: Sequence[str]) -> int:
    """Runs the command; `argv` without the program's name. Returns the exit code."""
    parser = cli.parser("encode", __doc__)
    parser.add_argument("--config", required=True, help="as for train")
    parser.add_argument("--out", required=True, type=cli.folder, help="the folder to write the data set to")
    parser.add_argument("--batch", type=int, default=32, help="images per batch, over all devices (default: 32)")
    args, overrides = parser.parse_with_config(argv)
    config = config_file.load(args.config, overrides)
    if args.batch < 1:
        raise UserError(f"--batch={args.batch}; it must be at least 1")
    if config.data.latents:
        raise UserError("config.data.latents is true; pass the data set that holds the images")
    split_cpu(config.mesh.cpu_devices)
    compile_cache.enable()
    files.make_folder("--out", args.out)
    folder = read_folder(config.model.folder, only=("vae",))
    source = open_data(config.data)
    vae, size = folder.components["vae"], config.data.image_size
    height, width, channels = vae.network().config.latent_shape(size)
    progress = Sampling(len(source), Console(stderr=True))
    builder = latents.Encoded(
        _counted(encode(config, folder, source, args.batch), progress.series("", len(source))),
        shape=(height, width, 2 * channels),
        made={
            "vae": latents.fingerprint(vae.params),
            "vae_config": latents.config_fingerprint(vae.config),
            "image_size": size,
            **{name: getattr(config.data, name) for name in ("resize", "crop", "flip")},
            "seed": config.seed,  # of random crops and of which half is mirrored
        },
        data_dir=str(args.out),
    )
    if builder.data_path.exists():
        raise UserError(f"--out: {builder.data_path} already exists; delete it, or choose another folder")
    with progress:
        prepare(builder)
    if not builder.written:
        raise UserError(f"--out: {builder.data_path} was written by another run in the meantime; choose another folder")
    say(f"Done: {len(source)} images in {builder.data_path}. To train from it, add")
    say(f"  --config.data.directory={builder.data_path} --config.data.latents=True")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
