"""Checks that the parts of a model folder fit each other."""

import pathlib

from lcm_jax.errors import UserError
from lcm_jax.models import CLIPTextConfig, UNetConfig, VAEConfig

RGB = 3


def check_sd(path: pathlib.Path, unet: UNetConfig, vae: VAEConfig, text_encoder: CLIPTextConfig) -> None:
    """Checks that the sizes of UNet, VAE and text encoder match; `path` is the model folder, for error messages.

    Raises:
      UserError: two sizes differ, the UNet is SDXL's, or the VAE is not for RGB images.
    """
    latents = vae.latent_channels
    kinds = {2 * latents + 1: "an inpainting UNet", 2 * latents: "a UNet that edits images, like InstructPix2Pix's"}
    kind = kinds.get(unet.in_channels, "")
    _same(path, ("unet", "in_channels", unet.in_channels), ("vae", "latent_channels", latents), kind)
    kind = "it predicts the variance too" if unet.out_channels == 2 * latents else ""
    _same(path, ("unet", "out_channels", unet.out_channels), ("vae", "latent_channels", latents), kind)
    width = ("text_encoder", "hidden_size", text_encoder.hidden_size)
    _same(path, ("unet", "cross_attention_dim", unet.cross_attention_dim), width, "")
    if unet.addition_embed_type:
        raise UserError(
            f"{path}/unet/config.json: addition_embed_type is {unet.addition_embed_type!r}; supported: None. It is a "
            "UNet of SDXL, which needs two text encoders"
        )
    for key, channels in (("in_channels", vae.in_channels), ("out_channels", vae.out_channels)):
        if channels != RGB:
            raise UserError(f"{path}/vae/config.json: {key} is {channels}; supported: {RGB}, the channels of an image")


def _same(path: pathlib.Path, a: tuple[str, str, int], b: tuple[str, str, int], kind: str) -> None:
    (part, key, value), (other, other_key, other_value) = a, b
    if value != other_value:
        raise UserError(
            f"{path}: {part} and {other} don't fit each other: {part}/config.json has {key} {value}"
            f"{f' ({kind})' if kind else ''}, {other}/config.json has {other_key} {other_value}; they must be equal"
        )
