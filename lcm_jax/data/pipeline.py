"""The input pipeline: batches of pictures and token ids that depend on nothing but the config, the seed and the step.

Grain shuffles and batches record numbers; a batch's numbers and random choices are drawn for the whole batch, and each
process then reads and decodes only its own rows. So batch n is the same whatever the number of processes or threads,
and the whole state of the pipeline is one number.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np
from jaxtyping import Int32, UInt8

from lcm_jax.data import images, latents
from lcm_jax.data.sources.tfds import Source, open_source
from lcm_jax.errors import UserError, one_of

Tokenize = Callable[[list[str]], Int32[np.ndarray, "batch length"]]


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which pictures are read, and what becomes of each. A wrong value raises UserError naming the field."""

    dataset: str = "captioned_digits"  # a registered TFDS builder: "name", "name/config:1.0.0"
    directory: str = ""  # a prepared ArrayRecord data set's version directory, read in place of `dataset`
    data_dir: str = ""  # where `dataset` lies or is prepared; "": TFDS's default, ~/tensorflow_datasets
    split: str = "train"  # a TFDS split expression: "train", "train[:10%]"
    image_key: str = "image"
    caption_key: str = "caption"  # "captions/text" for nested features; of several captions one is drawn each time
    latents: bool = False  # the data set holds encoded pictures, as `lcm_jax.encode` writes them, in place of pictures
    image_size: int = 32  # pixels: the shorter side is resized to it, then a square is cropped
    resize: str = "lanczos"  # lanczos | bicubic
    crop: str = "center"  # center | random
    flip: bool = False  # mirror half of the pictures (their captions stay)
    shuffle: bool = True  # a new order each epoch; False: as stored
    # width · height; an image of more is a bad record. While it decodes one, each thread holds up to 10 bytes per pixel
    # (0.6 GB at the default), for WebP and JPEG 2000 up to 20
    max_pixels: int = 64_000_000
    threads: int = 4  # batches read and decoded at the same time, ahead of their use; changes no batch

    def __post_init__(self) -> None:
        if not (self.dataset or self.directory):
            raise UserError("dataset and directory are both empty; give a TFDS name or a prepared directory")
        for name in ("split", "image_key", "caption_key"):
            if not getattr(self, name):
                raise UserError(f"{name} is empty; the default is {getattr(DataConfig, name)!r}")
        for name in ("image_size", "max_pixels", "threads"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("image_key", "caption_key", "max_pixels", "resize", "crop", "flip"):
            if self.latents and getattr(self, name) != getattr(DataConfig, name):
                raise UserError(f"{name} has no effect: latents is true, and these pictures are encoded already")
        one_of("resize", self.resize, images.RESAMPLING)
        one_of("crop", self.crop, ("center", "random"))


def prepare_image(
    encoded: bytes, config: DataConfig, place: float = 0.5, mirror: bool = False
) -> UInt8[np.ndarray, "size size 3"]:
    """Decodes one image, resizes its shorter side to config.image_size and crops a square.

    Args: an encoded image (PNG, JPEG, …; orientation tags are obeyed, transparency is laid on white); where along the
    longer side the square lies, 0..1 (0.5 = centre); whether to mirror.
    Returns uint8 RGB. Raises BadImage, by the rules in `lcm_jax.data.images`.
    """
    image = images.decode(encoded, config.image_size, config.max_pixels)
    return images.square(image, config.image_size, config.resize, place, mirror)


@dataclasses.dataclass(frozen=True)
class _LoadBatch(grain.transforms.RandomMap):
    """Turns the record numbers of a global batch into this process's part of the batch."""

    source: Source
    config: DataConfig
    tokenize: Tokenize
    rows: np.ndarray  # of the global batch: those that this process reads

    def random_map(self, element: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
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

    def _token_ids(self, texts: list[str], numbers: list[int]) -> np.ndarray:
        try:
            return np.asarray(self.tokenize(texts), np.int32)
        except UserError:
            for text, number in zip(texts, numbers, strict=True):  # finds which one it was
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
        """Returns a JSON-able dict: the number of the next batch, and what it depends on."""
        return {"step": self._batches.get_state()["next_index"], **self._identity}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to the batch that `state` names. Raises UserError if the state belongs to other batches than these."""
        for key, value in self._identity.items():
            if state[key] != value:
                raise UserError(f"the saved data position has {key} {state[key]!r}, this run {value!r}")
        self._batches.set_state({"next_index": int(state["step"])})

    def close(self) -> None:
        """Stops the reading threads."""
        self._batches.close()


def open_data(config: DataConfig) -> Source:
    """Opens the data set that the config names; raises UserError as `open_source` does."""
    return open_source(
        config.dataset,
        directory=config.directory,
        data_dir=config.data_dir,
        split=config.split,
        image_key=config.image_key,
        caption_key=config.caption_key,
        encoded=config.latents,
    )


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
    """Iterates over one process's part of the batches, without end.

    Args:
      config: what to read, and how.
      tokenize: captions -> token ids (rows, L) int32; called from several threads.
      batch_size: of all processes together.
      rows: which rows of a batch this process reads, in this order; all by default.
      seed: 0 <= seed < 2**32. Batch n depends on (config, seed, batch_size, n) only.
      start_step: number of the first batch.
      vae: {path: array}; that which must have encoded the data set, where it holds encoded pictures.
      vae_config: its config.json.
      source: the data set, where it is open already.

    Returns: iterator of {'image': uint8 (B, S, S, 3), 'input_ids': int32 (B, L)} with get_state, set_state and close;
      B = the number of rows, S = config.image_size. With config.latents there is 'moments', float16 (B, h, w, 2C), in
      place of 'image'.
    Raises: UserError for a data set that cannot be opened (see `open_source`) or was encoded otherwise, and, while
      iterating, for a record that cannot be read or decoded, naming it.
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
