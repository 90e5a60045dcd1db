"""Pre-encoded images: a TFDS data set in ArrayRecord files with the moments of q(z|x) and the captions.

A run that reads it neither decodes images nor runs the VAE encoder in each step. metadata.json records the VAE and the
image size, which `check` verifies, and how the images were resized, cropped and mirrored, for information.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Float16, Int32

from lcm_jax.errors import UserError

MOMENTS = "moments"  # (h, w, 2C) float16: mean and log-variance, not scaled
CAPTIONS = "captions"
SIZES = "sizes"  # (6,) int32, as in `batches.Prepared`


class Latent(NamedTuple):
    """A pre-encoded image: float16 (h, w, 2C), and its sizes, or None where the data set was written without them."""

    moments: Float16[np.ndarray, "h w c"]
    sizes: Int32[np.ndarray, " 6"] | None


def fingerprint(vae: Mapping[str, Any]) -> str:
    """Returns a hash of the encoder's weights in {path: array}, the same for a VAE stored in float32 and in float16."""
    digest = hashlib.sha256()
    for path in sorted(vae):
        if path.startswith(("encoder.", "quant_conv.")):
            digest.update(path.encode() + np.asarray(vae[path], np.float16).tobytes())
    return digest.hexdigest()[:16]


def config_fingerprint(config: Mapping[str, Any]) -> str:
    """Returns a hash of the VAE's config.json, without the keys that do not affect the moments."""
    beside = ("scaling_factor", "shift_factor", "latents_mean", "latents_std", "sample_size", "force_upcast")
    meant = {key: value for key, value in config.items() if not key.startswith("_") and key not in beside}
    return hashlib.sha256(json.dumps(meant, sort_keys=True).encode()).hexdigest()[:16]


def check(
    metadata: Mapping[str, Any] | None,
    vae: Mapping[str, Any],
    image_size: int,
    where: str,
    config: Mapping[str, Any] | None = None,
) -> None:
    """Raises UserError unless the data set was encoded by this VAE (and config, if both known) at this image size."""
    made = dict(metadata or {})
    if not {"image_size", "vae"} <= made.keys():
        raise UserError(f"{where} does not record what encoded it (metadata.json); run lcm_jax.encode again")
    if made.get("image_size") != image_size:
        raise UserError(f"{where} was encoded at {made.get('image_size')} px, config.data.image_size is {image_size}")
    if made.get("vae") != fingerprint(vae):
        raise UserError(f"{where} was encoded by another VAE than this folder's; run lcm_jax.encode with this one")
    if config is not None and made.get("vae_config", config_fingerprint(config)) != config_fingerprint(config):
        raise UserError(
            f"{where} was encoded by a VAE with another vae/config.json than this folder's; run lcm_jax.encode with "
            "this one"
        )


class Encoded(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """TFDS builder that writes the data set to `data_dir`/encoded/1.0.0, with the single split "train"."""

    name = "encoded"
    VERSION = tfds.core.Version("1.0.0")
    url_infos = {}  # noqa: RUF012 (nothing is downloaded)

    def __init__(
        self, examples: Iterable[tuple[Latent, list[str]]], *, shape: tuple[int, ...], made: dict, data_dir: str
    ) -> None:
        """Takes (latent, captions) per image, the shape (h, w, 2C) of the moments, and the metadata for `check`."""
        self._examples, self._shape, self._made = examples, shape, made
        self.written = False  # stays False if another process wrote the data set
        super().__init__(data_dir=data_dir)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Moments of the latents of images, as lcm_jax.encode writes them, with the captions.",
            features=tfds.features.FeaturesDict(
                {
                    MOMENTS: tfds.features.Tensor(shape=self._shape, dtype=np.float16),
                    SIZES: tfds.features.Tensor(shape=(6,), dtype=np.int32),
                    CAPTIONS: tfds.features.Sequence(tfds.features.Text()),
                }
            ),
            metadata=tfds.core.MetadataDict(self._made),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        del dl_manager
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict]]:
        for number, (latent, captions) in enumerate(self._examples):
            yield number, {MOMENTS: latent.moments, SIZES: latent.sizes, CAPTIONS: captions}
        self.written = True
