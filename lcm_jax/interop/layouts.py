"""What a folder of each supported diffusers pipeline class holds."""

import dataclasses
from collections.abc import Callable, Mapping

from lcm_jax.host import json_file
from lcm_jax.host.json_file import Kind
from lcm_jax.interop import fit

# Only copied, so any class is accepted: the feature extractor's class name differs between transformers versions.
OPTIONAL = ("safety_checker", "feature_extractor", "image_encoder")


@dataclasses.dataclass(frozen=True)
class Layout:
    """The parts of a folder, besides the scheduler.

    Attributes:
      networks: part → class.
      denoiser: the network that predicts the noise.
      w_embedding_key: the key of the denoiser's config.json with the dimension of its w-embedding, null for none.
      tokenizers: part → the text encoder that takes its ids.
      copied: optional parts, which are only copied.
      flagged: those of them that model_index.json has a `requires_PART` for.
      students: the pipeline classes of a distilled model without and with a w-embedding.
      check_fit: (folder, network → its configuration) raises UserError if the networks don't fit each other.
      settings: setting of the pipeline in model_index.json → kind of its value.
    """

    networks: Mapping[str, str]
    denoiser: str
    w_embedding_key: str
    tokenizers: Mapping[str, str]
    copied: tuple[str, ...]
    students: tuple[str, str]
    check_fit: Callable[..., None]
    flagged: tuple[str, ...] = ()
    settings: Mapping[str, Kind] = dataclasses.field(default_factory=dict)

    @property
    def required(self) -> tuple[str, ...]:
        """The parts without which a folder is not read."""
        return (*self.networks, *self.tokenizers, "scheduler")


SD = Layout(
    networks={"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"},
    denoiser="unet",
    w_embedding_key="time_cond_proj_dim",
    tokenizers={"tokenizer": "text_encoder"},
    copied=OPTIONAL,
    students=("StableDiffusionPipeline", "LatentConsistencyModelPipeline"),
    check_fit=fit.check_sd,
    flagged=("safety_checker",),
)
SDXL = Layout(
    networks={**SD.networks, "text_encoder_2": "CLIPTextModelWithProjection"},
    denoiser=SD.denoiser,
    w_embedding_key=SD.w_embedding_key,
    tokenizers={"tokenizer": "text_encoder", "tokenizer_2": "text_encoder_2"},
    copied=("feature_extractor", "image_encoder"),
    students=("StableDiffusionXLPipeline", "StableDiffusionXLPipeline"),
    check_fit=fit.check_sdxl,
    settings={"force_zeros_for_empty_prompt": json_file.or_none(json_file.BOOLEAN)},
)
LAYOUTS = {"StableDiffusionPipeline": SD, "LatentConsistencyModelPipeline": SD, "StableDiffusionXLPipeline": SDXL}
