"""Flax NNX ports of Stable Diffusion's networks, in NHWC.

A parameter's path is its name in diffusers and transformers files, except for the last part (kernel for weight, …). The
networks contain no diffusion math and no file access.
"""

from lcm_jax.models.clip import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
from lcm_jax.models.functional import Flat, Network
from lcm_jax.models.policy import FP32, Policy
from lcm_jax.models.unet import UNet2DConditionModel
from lcm_jax.models.unet_config import UNetConfig
from lcm_jax.models.vae import AutoencoderKL, VAEConfig

__all__ = [
    "FP32",
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
