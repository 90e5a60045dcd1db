"""Checks that the parts of a model folder fit each other."""

import pathlib

from lcm_jax.errors import UserError
from lcm_jax.models import CLIPTextConfig, UNetConfig, VAEConfig

RGB = 3
SIZES = 6  # time ids of SDXL: original height and width, top and left of the crop, height and width


def check_sd(path: pathlib.Path, unet: UNetConfig, vae: VAEConfig, text_encoder: CLIPTextConfig) -> None:
    """Checks that the sizes of UNet, VAE and text encoder match; `path` is the model folder, for error messages.

    Raises:
      UserError: two sizes differ, the UNet is SDXL's, the VAE is not for RGB images, or diffusers' pipelines would
        ignore its `latents_mean`.
    """
    _check_images(path, unet, vae)
    width = ("text_encoder", "hidden_size", text_encoder.hidden_size)
    _same(path, ("unet", "cross_attention_dim", unet.cross_attention_dim), width, "")
    if unet.addition_embed_type:
        raise UserError(
            f"{path}/unet/config.json: addition_embed_type is {unet.addition_embed_type!r}; supported: None. It is a "
            "UNet of SDXL, which needs two text encoders and the pipeline class StableDiffusionXLPipeline"
        )
    if vae.latents_mean:
        raise UserError(f"{path}/vae/config.json: latents_mean is given; supported: null, but for Stable Diffusion XL")


def check_sdxl(
    path: pathlib.Path,
    unet: UNetConfig,
    vae: VAEConfig,
    text_encoder: CLIPTextConfig,
    text_encoder_2: CLIPTextConfig,
) -> None:
    """Checks that the sizes of UNet, VAE and both text encoders match; `path` as in `check_sd`.

    Raises:
      UserError: two sizes differ, the UNet is not SDXL's, or the VAE is not for RGB images.
    """
    _check_images(path, unet, vae)
    if unet.addition_embed_type != "text_time":
        raise UserError(
            f"{path}/unet/config.json: addition_embed_type is {unet.addition_embed_type!r}; supported: 'text_time', "
            "as in UNets of SDXL"
        )
    widths = text_encoder.hidden_size + text_encoder_2.hidden_size
    both = ("text_encoder and text_encoder_2", "hidden_size, summed,", widths)
    _same(path, ("unet", "cross_attention_dim", unet.cross_attention_dim), both, "")
    width = (text_encoder_2.projection_dim or 0) + SIZES * (unet.addition_time_embed_dim or 0)
    added = ("text_encoder_2 and unet", f"projection_dim + {SIZES} · addition_time_embed_dim", width)
    name = "projection_class_embeddings_input_dim"
    _same(path, ("unet", name, unet.projection_class_embeddings_input_dim or 0), added, "")


def _check_images(path: pathlib.Path, unet: UNetConfig, vae: VAEConfig) -> None:
    latents = vae.latent_channels
    kinds = {2 * latents + 1: "an inpainting UNet", 2 * latents: "a UNet that edits images, like InstructPix2Pix's"}
    kind = kinds.get(unet.in_channels, "")
    _same(path, ("unet", "in_channels", unet.in_channels), ("vae", "latent_channels", latents), kind)
    kind = "it predicts the variance too" if unet.out_channels == 2 * latents else ""
    _same(path, ("unet", "out_channels", unet.out_channels), ("vae", "latent_channels", latents), kind)
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
