"""One training step: a pure function from (state, frozen weights, batch) to (state, metrics), jitted as a whole."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from lcm_jax import ema
from lcm_jax.config import Config
from lcm_jax.objectives import autoencoder, denoising, lcd
from lcm_jax.state import Parts, State, make_optimizer

Batch = dict[str, jax.Array]  # 'image' uint8 (B, H, W, 3), 'input_ids' int32 (B, L)
Loss = Callable[..., tuple[jax.Array, dict[str, jax.Array]]]


def make_step(config: Config, parts: Parts) -> Callable[[State, dict, Batch], tuple[State, dict[str, jax.Array]]]:
    """Returns `step(state, frozen, batch) -> (state, metrics)`.

    The step's key is fold_in(key(seed), step), so a run that goes on draws what an uninterrupted one would. If the
    loss or the gradient is not finite, weights, EMA and optimizer stay as they were and `skipped` counts up.
    """
    loss_function = LOSSES[config.objective](config, parts)
    optimizer = make_optimizer(config.optimizer, config.steps)

    def step(state: State, frozen: dict, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.key(config.seed), state["step"])
        params = state["params"]
        grad = jax.value_and_grad(loss_function, has_aux=True)
        (loss, aux), grads = grad(params, state["ema"] or params, frozen, batch, key)
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)

        updates, opt_state = optimizer.update(grads, state["opt_state"], params)
        new_params = optax.apply_updates(params, updates)
        new_ema = state["ema"]
        if new_ema:
            decay = ema.decay_at(state["step"], config.ema.decay, warmup=config.ema.warmup)
            new_ema = ema.update(new_ema, new_params, decay)
        new = {"params": new_params, "ema": new_ema, "opt_state": opt_state}
        kept = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, {name: state[name] for name in new})
        skipped = jnp.where(finite, 0, state["skipped"] + 1)
        metrics = {"loss": loss, "grad_norm": grad_norm, "skipped": skipped, **aux}
        return {"step": state["step"] + 1, **kept, "skipped": skipped}, metrics

    return step


def _pixels(batch: Batch) -> jax.Array:
    """uint8 (B, H, W, 3) to float32 in [-1, 1]."""
    return batch["image"].astype(jnp.float32) / 127.5 - 1.0


def _latents(config: Config, parts: Parts, vae: dict, batch: Batch, key: jax.Array) -> jax.Array:
    """A draw from the VAE's posterior at these images, scaled: z_0."""
    images = _pixels(batch)
    noise = jax.random.normal(key, (len(images), *parts.latent_shape(config.data.image_size)))
    return parts.networks["vae"].apply(vae, images, noise, method="to_latents").astype(jnp.float32)


def _lcd(config: Config, parts: Parts) -> Loss:
    unet, teacher, text = (parts.networks[name] for name in ("unet", "teacher", "text_encoder"))

    def loss(params, target, frozen, batch, key):
        key_vae, key_draws = jax.random.split(key)
        z_0 = _latents(config, parts, frozen["vae"], batch, key_vae)
        context = text.apply(frozen["text_encoder"], batch["input_ids"])
        null_context = text.apply(frozen["text_encoder"], parts.null_ids)
        draws = lcd.draw(key_draws, z_0.shape, config.lcd, parts.schedule.num_train_timesteps)
        return lcd.lcd_loss(
            student=lambda z, t, c, e: unet.apply(params["unet"], z, t, c, e),
            target=lambda z, t, c, e: unet.apply(target["unet"], z, t, c, e),
            teacher=lambda z, t, c: teacher.apply(frozen["teacher"], z, t, c),
            schedule=parts.schedule,
            z_0=z_0,
            context=context,
            null_context=null_context,
            draws=draws,
            config=config.lcd,
        )

    return loss


def _denoising(config: Config, parts: Parts) -> Loss:
    unet, text = parts.networks["unet"], parts.networks["text_encoder"]

    def loss(params, _, frozen, batch, key):
        key_vae, key_draws = jax.random.split(key)
        z_0 = _latents(config, parts, frozen["vae"], batch, key_vae)
        text_params = params["text_encoder"] if "text_encoder" in params else frozen["text_encoder"]
        context = text.apply(text_params, batch["input_ids"])
        null_context = text.apply(text_params, parts.null_ids)
        draws = denoising.draw(key_draws, z_0.shape, config.denoising, parts.schedule.num_train_timesteps)
        return denoising.denoising_loss(
            lambda z, t, c: unet.apply(params["unet"], z, t, c),
            schedule=parts.schedule,
            z_0=z_0,
            context=context,
            null_context=null_context,
            draws=draws,
            config=config.denoising,
        )

    return loss


def _autoencoder(config: Config, parts: Parts) -> Loss:
    vae = parts.networks["vae"]

    def loss(params, _, frozen, batch, key):
        return autoencoder.autoencoder_loss(
            encode=lambda x: vae.apply(params["vae"], x, method="encode"),
            decode=lambda z: vae.apply(params["vae"], z, method="decode"),
            images=_pixels(batch),
            key=key,
            config=config.autoencoder,
        )

    return loss


LOSSES: dict[str, Callable[[Config, Parts], Loss]] = {
    "lcd": _lcd,
    "denoising": _denoising,
    "autoencoder": _autoencoder,
}
