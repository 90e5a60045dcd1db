"""Input pipeline: batches of images and token ids that depend only on the config, the seed and the step.

Grain shuffles and batches record numbers. Record numbers and random choices are drawn for the global batch; each
process then reads and decodes only its own rows. So batch n does not depend on the number of processes or threads, and
the state of the pipeline is one integer.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np
from jaxtyping import Int32, UInt8

from lcm_jax.data import images, latents
from lcm_jax.data.config import DataConfig
from lcm_jax.data.sources import Source, open_data
from lcm_jax.errors import UserError

Tokenize = Callable[[list[str]], Any]  # captions → int32 (rows, L), or a tree of such arrays


class Prepared(NamedTuple):
    """A square image, and its sizes: int32 (6,), original height and width, top and left of the crop, height and width.

    The crop lies in the resized image.
    """

    pixels: UInt8[np.ndarray, "size size 3"]
    sizes: Int32[np.ndarray, " 6"]


def prepare_image(encoded: bytes, config: DataConfig, place: float = 0.5, mirror: bool = False) -> Prepared:
    """Decodes one image, resizes its shorter side to config.image_size and crops a square.

    Orientation tags are applied; transparency is composited on white. `place` and `mirror` are those of
    `images.square`.

    Raises: BadImage, by the rules in `lcm_jax.data.images`.
    """
    size = config.image_size
    image, (width, height) = images.decode(encoded, size, config.max_pixels)
    pixels, corner = images.square(image, size, config.resize, place, mirror)
    return Prepared(pixels, np.asarray([height, width, *corner, size, size], np.int32))


@dataclasses.dataclass(frozen=True)
class _LoadBatch(grain.transforms.RandomMap):
    """Loads this process's rows of a global batch of record numbers."""

    source: Source
    config: DataConfig
    tokenize: Tokenize
    rows: np.ndarray  # rows of the global batch that this process reads
    sizes: bool  # whether a batch holds the sizes of the images

    def random_map(self, element: np.ndarray, rng: np.random.Generator) -> dict[str, Any]:
        config = self.config
        place, mirror, which = rng.random((3, len(element)))[:, self.rows]  # drawn for all rows, on every process
        if config.crop == "center":
            place = np.full(len(place), 0.5)
        numbers = element[self.rows].tolist()
        rows, sizes, texts = [], [], []
        for i, (image, captions) in enumerate(self.source.read(numbers)):
            if not config.latents:
                try:
                    image = prepare_image(image, config, place[i], config.flip and mirror[i] < 0.5)
                except images.BadImage as error:
                    raise self.source.bad_image(numbers[i], error) from None
            rows.append(image[0])
            sizes.append(image[1])
            texts.append(captions[int(which[i] * len(captions))])
        name = "moments" if config.latents else "image"
        batch = {name: np.stack(rows), "input_ids": self._token_ids(texts, numbers)}
        return {**batch, "sizes": np.stack(sizes)} if self.sizes else batch

    def _token_ids(self, texts: list[str], numbers: list[int]) -> Any:
        try:
            return self.tokenize(texts)
        except UserError:
            for text, number in zip(texts, numbers, strict=True):  # finds the record that failed
                try:
                    self.tokenize([text])
                except UserError as error:
                    raise UserError(f"{self.source.where}: the caption of record {number}: {error}") from None
            raise


class Batches(Iterator[dict[str, np.ndarray]]):
    """An endless iterator of batches; see `batches`."""

    def __init__(self, dataset: grain.IterDataset, identity: dict[str, Any], step: int):
        self._batches = iter(dataset)
        self._identity = identity
        self.set_state({"step": step, **identity})

    def __next__(self) -> dict[str, np.ndarray]:
        return next(self._batches)

    def get_state(self) -> dict[str, Any]:
        """Returns a JSON-serializable dict: the number of the next batch, the seed, and the batch and data set size."""
        return {"step": self._batches.get_state()["next_index"], **self._identity}

    def set_state(self, state: dict[str, Any]) -> None:
        """Seeks to the batch in `state`. Raises UserError if the seed, batch size or data set size differ."""
        for key, value in self._identity.items():
            if state[key] != value:
                raise UserError(f"the saved data position has {key} {state[key]!r}, this run {value!r}")
        self._batches.set_state({"next_index": int(state["step"])})

    def close(self) -> None:
        """Stops the reader threads."""
        self._batches.close()


def batches(
    config: DataConfig,
    *,
    tokenize: Tokenize,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    rows: Sequence[int] | np.ndarray | None = None,
    vae: Mapping[str, Any] | None = None,
    vae_config: Mapping[str, Any] | None = None,
    source: Source | None = None,
    sizes: bool = False,
) -> Batches:
    """Returns an endless iterator over one process's rows of the batches.

    Args:
      config: data set and preprocessing.
      tokenize: captions -> token ids (rows, L) int32, or a tree of such arrays; called from several threads.
      batch_size: global batch size, over all processes.
      seed: 0 <= seed < 2**32. Batch n depends on (config, seed, batch_size, n) only.
      start_step: number of the first batch.
      rows: rows of the global batch that this process reads, in this order; default: all.
      vae: {path: array}, weights of the VAE that must have encoded the data set; used with config.latents only.
      vae_config: config.json of the VAE.
      source: an open data set to read instead of opening that of the config.
      sizes: whether the batches hold the sizes of the images.

    Returns: iterator of {'image': uint8 (B, S, S, 3), 'input_ids': of `tokenize`} with get_state, set_state and close;
      B = number of rows, S = config.image_size. With config.latents, 'moments', float16 (B, h, w, 2C), replaces
      'image'. With `sizes`, there is 'sizes', int32 (B, 6), as in `Prepared`.
    Raises: UserError for a data set that cannot be opened (see `open_data`) or was encoded by another VAE or at
      another size, and, while iterating, for a record that cannot be read or decoded.
    """
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}; it must be positive")
    if not 0 <= seed < 2**32:
        raise UserError(f"seed is {seed}; it must be in 0..{2**32 - 1}")
    source = source or open_data(config)
    if config.latents and vae is not None:
        latents.check(source.metadata, vae, config.image_size, source.where, vae_config)
    if config.latents and sizes and source.read([0])[0][0].sizes is None:
        raise UserError(
            f"{source.where} holds no sizes of the images, on which this model conditions; run lcm_jax.encode again"
        )
    numbers = grain.MapDataset.range(len(source)).seed(seed)
    if config.shuffle:
        numbers = numbers.shuffle()
    rows = np.arange(batch_size) if rows is None else np.asarray(rows)
    loaded = (
        numbers.repeat()
        .batch(batch_size, drop_remainder=True, batch_fn=np.asarray)
        .random_map(_LoadBatch(source, config, tokenize, rows, sizes))
    )
    options = grain.ReadOptions(num_threads=config.threads, prefetch_buffer_size=config.threads)
    identity = {"seed": seed, "batch_size": batch_size, "examples": len(source)}
    return Batches(loaded.to_iter_dataset(options), identity, start_step)
