"""Options of the input pipeline."""

import dataclasses

from lcm_jax.data import images
from lcm_jax.errors import UserError, one_of


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Data set and image preprocessing. An invalid value raises UserError naming the field."""

    dataset: str = "captioned_digits"  # a registered TFDS builder: "name", "name/config:1.0.0"
    directory: str = ""  # a data set that is read instead of `dataset`; what it holds says which source reads it
    data_dir: str = ""  # where `dataset` is stored or prepared; "": TFDS's default, ~/tensorflow_datasets
    split: str = "train"  # a TFDS split expression: "train", "train[:10%]"
    image_key: str = "image"  # feature of a record that holds the image
    caption_key: str = "caption"  # "captions/text" for nested features; one of several captions is drawn each time
    latents: bool = False  # the data set holds pre-encoded images, as written by `lcm_jax.encode`
    image_size: int = 32  # pixels: the shorter side is resized to this, then a square is cropped
    resize: str = "lanczos"  # lanczos | bicubic
    crop: str = "center"  # center | random
    flip: bool = False  # mirror each image with probability 0.5; captions are unchanged
    shuffle: bool = True  # a new order each epoch; False: stored order
    # Limit of width · height; larger images raise an error. Each thread uses up to 10 bytes per pixel while decoding
    # (0.6 GB at the default), up to 20 for WebP and JPEG 2000.
    max_pixels: int = 64_000_000
    threads: int = 4  # batches prefetched in parallel; does not change their content

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
                raise UserError(f"{name} has no effect: latents is true, so the images are already encoded")
        one_of("resize", self.resize, images.RESAMPLING)
        one_of("crop", self.crop, ("center", "random"))
