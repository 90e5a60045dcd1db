"""Input pipeline: batches of images and token ids that depend only on the config, the seed and the step.

Grain shuffles and batches record numbers. Record numbers and random choices are drawn for the global batch; each
process then reads and decodes only its own rows. So batch n does not depend on the number of processes or threads, and
the state of the pipeline is one integer.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np
from jaxtyping import UInt8

from lcm_jax.data import images, latents
from lcm_jax.data.config import DataConfig
from lcm_jax.data.sources import Source, open_data
from lcm_jax.errors import UserError

Tokenize = Callable[[list[str]], Any]  # captions → int32 (rows, L), or a tree of such arrays


def prepare_image(
    encoded: bytes, config: DataConfig, place: float = 0.5, mirror: bool = False
) -> UInt8[np.ndarray, "size size 3"]:
    """Decodes one image, resizes its shorter side to config.image_size and crops a square.

    Orientation tags are applied; transparency is composited on white. `place` and `mirror` are those of
    `images.square`.

    Raises: BadImage, by the rules in `lcm_jax.data.images`.
    """
    image = images.decode(encoded, config.image_size, config.max_pixels)
    return images.square(image, config.image_size, config.resize, place, mirror)


@dataclasses.dataclass(frozen=True)
class _LoadBatch(grain.transforms.RandomMap):
    """Loads this process's rows of a global batch of record numbers."""

    source: Source
    config: DataConfig
    tokenize: Tokenize
    rows: np.ndarray  # rows of the global batch that this process reads

    def random_map(self, element: np.ndarray, rng: np.random.Generator) -> dict[str, Any]:
        config = self.config
        place, mirror, which = rng.random((3, len(element)))[:, self.rows]  # drawn for all rows, on every process
        if config.crop == "center":
            place = np.full(len(place), 0.5)
        numbers = element[self.rows].tolist()
        rows, texts = [], []
        for i, (image, captions) in enumerate(self.source.read(numbers)):
            if not config.latents:
                try:
                    image = prepare_image(image, config, place[i], config.flip and mirror[i] < 0.5)
                except images.BadImage as error:
                    raise self.source.bad_image(numbers[i], error) from None
            rows.append(image)
            texts.append(captions[int(which[i] * len(captions))])
        name = "moments" if config.latents else "image"
        return {name: np.stack(rows), "input_ids": self._token_ids(texts, numbers)}

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

    Returns: iterator of {'image': uint8 (B, S, S, 3), 'input_ids': of `tokenize`} with get_state, set_state and close;
      B = number of rows, S = config.image_size. With config.latents, 'moments', float16 (B, h, w, 2C), replaces
      'image'.
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
    numbers = grain.MapDataset.range(len(source)).seed(seed)
    if config.shuffle:
        numbers = numbers.shuffle()
    loaded = (
        numbers.repeat()
        .batch(batch_size, drop_remainder=True, batch_fn=np.asarray)
        .random_map(_LoadBatch(source, config, tokenize, np.arange(batch_size) if rows is None else np.asarray(rows)))
    )
    options = grain.ReadOptions(num_threads=config.threads, prefetch_buffer_size=config.threads)
    identity = {"seed": seed, "batch_size": batch_size, "examples": len(source)}
    return Batches(loaded.to_iter_dataset(options), identity, start_step)
