"""Each objective over the networks of a run: what it draws for the global batch, and its loss on a part of it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lcm_jax.adapters import lora, side_branch
from lcm_jax.config import Config
from lcm_jax.host.images import to_signed
from lcm_jax.models import Network
from lcm_jax.models.vae import scaled_draw
from lcm_jax.objectives import autoencoder, denoising, lcd
from lcm_jax.training.state import Parts

# 'input_ids' int32 (B, L), and 'image' uint8 (B, H, W, 3) or 'moments' (B, h, w, 2C): mean and log-variance of q(z|x)
Batch = dict[str, jax.Array]
Aux = dict[str, jax.Array]


class Loss(NamedTuple):
    """One objective.

    Attributes:
      draw: (key, shape (B, h, w, C) of the latents) -> all that is random, each array with B as its first axis.
      loss: (params, target, frozen, batch, draws) -> (loss, aux), all of them means over the samples that it is given.
      summary: aux averaged over the global batch -> what is logged.
    """

    draw: Callable[[jax.Array, tuple[int, ...]], Any]
    loss: Callable[..., tuple[jax.Array, Aux]]
    summary: Callable[[Aux], Aux]


def make_loss(config: Config, parts: Parts) -> Loss:
    """Returns the loss of `config.objective`."""
    return _LOSSES[config.objective](config, parts)


def _bound(name: str, network: Network, params: Any, **options: Any) -> Callable[..., Any]:
    """The network with these weights, as a function; profiles show what it does under `name`."""

    def function(*args: Any) -> Any:
        with jax.named_scope(name):
            return network.apply(params, *args, **options)

    return function


def _trained(name: str, component: str, parts: Parts, weights: dict, frozen: dict) -> Callable[..., Any]:
    """The network `component` with `weights`: its own, or adapters beside the frozen ones; `name` as in `_bound`."""
    network = parts.networks[component]
    if component not in parts.adapted:
        return _bound(name, network, (weights if component in weights else frozen)[component])
    alphas = lora.alphas(parts.adapted[component])

    def function(*args: Any) -> Any:
        with jax.named_scope(name):
            return side_branch.apply(network, frozen[component], weights[component], alphas, *args)

    return function


def _latents(parts: Parts, vae: dict, batch: Batch, noise: jax.Array) -> jax.Array:
    """A draw from the VAE's posterior at these images, scaled: z_0."""
    network = parts.networks["vae"]
    if "moments" in batch:
        mean, logvar = jnp.split(batch["moments"].astype(jnp.float32), 2, axis=-1)
    else:
        mean, logvar = _bound("vae", network, vae, method="encode")(to_signed(batch["image"]))
    return scaled_draw(network.config, mean, logvar, noise)


def _contexts(parts: Parts, weights: dict, frozen: dict, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """The features of these captions, and of the empty prompt."""
    encode = _trained("text_encoder", "text_encoder", parts, weights, frozen)
    return encode(batch["input_ids"]), encode(parts.null_ids)


def _lcd(config: Config, parts: Parts) -> Loss:
    def draw(key, shape):
        key_vae, key_draws = jax.random.split(key)
        draws = lcd.draw(key_draws, shape, config.lcd, parts.schedule.num_train_timesteps)
        return jax.random.normal(key_vae, shape), draws

    def loss(params, target, frozen, batch, draws):
        noise, draws = draws
        z_0 = _latents(parts, frozen["vae"], batch, noise)
        context, null_context = _contexts(parts, params, frozen, batch)
        teacher = frozen["unet" if parts.adapted else "teacher"]
        return lcd.lcd_loss(
            student=_trained("student", "unet", parts, params, frozen),
            target=_trained("target", "unet", parts, target, frozen),
            teacher=_bound("teacher", parts.networks["teacher"], teacher),
            schedule=parts.schedule,
            z_0=z_0,
            context=context,
            null_context=null_context,
            draws=draws,
            config=config.lcd,
        )

    return Loss(draw, loss, lcd.summary)


def _denoising(config: Config, parts: Parts) -> Loss:
    def draw(key, shape):
        key_vae, key_draws = jax.random.split(key)
        draws = denoising.draw(key_draws, shape, config.denoising, parts.schedule.num_train_timesteps)
        return jax.random.normal(key_vae, shape), draws

    def loss(params, _, frozen, batch, draws):
        noise, draws = draws
        z_0 = _latents(parts, frozen["vae"], batch, noise)
        context, null_context = _contexts(parts, params, frozen, batch)
        return denoising.denoising_loss(
            _trained("unet", "unet", parts, params, frozen),
            schedule=parts.schedule,
            z_0=z_0,
            context=context,
            null_context=null_context,
            draws=draws,
            config=config.denoising,
        )

    return Loss(draw, loss, dict)


def _autoencoder(config: Config, parts: Parts) -> Loss:
    vae = parts.networks["vae"]

    def loss(params, _, frozen, batch, noise):
        return autoencoder.autoencoder_loss(
            encode=_bound("encoder", vae, params["vae"], method="encode"),
            decode=_bound("decoder", vae, params["vae"], method="decode"),
            images=to_signed(batch["image"]),
            noise=noise,
            config=config.autoencoder,
        )

    return Loss(jax.random.normal, loss, autoencoder.summary)


_LOSSES: dict[str, Callable[[Config, Parts], Loss]] = {
    "lcd": _lcd,
    "denoising": _denoising,
    "autoencoder": _autoencoder,
}
