"""Flax NNX ports of the networks of Stable Diffusion. A parameter's path is its name in the peer's files, up to the
last part (kernel for weight, …); everything is NHWC; no network knows of diffusion or of files."""

from lcm_jax.models.clip import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
from lcm_jax.models.functional import Flat, Network
from lcm_jax.models.policy import FP32, Policy
from lcm_jax.models.unet import UNet2DConditionModel
from lcm_jax.models.unet_config import UNetConfig
from lcm_jax.models.vae import AutoencoderKL, VAEConfig

MODEL_CLASSES = {
    "UNet2DConditionModel": (UNetConfig, UNet2DConditionModel),
    "AutoencoderKL": (VAEConfig, AutoencoderKL),
    "CLIPTextModel": (CLIPTextConfig, CLIPTextModel),
    "CLIPTextModelWithProjection": (CLIPTextConfig, CLIPTextModelWithProjection),
}

__all__ = [
    "FP32",
    "MODEL_CLASSES",
    "AutoencoderKL",
    "CLIPTextConfig",
    "CLIPTextModel",
    "CLIPTextModelWithProjection",
    "Flat",
    "Network",
    "Policy",
    "UNet2DConditionModel",
    "UNetConfig",
    "VAEConfig",
]
