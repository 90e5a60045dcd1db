"""The losses of an objective as functions of weights: networks are bound, and the inputs of a loss are made."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lcm_jax.adapters import lora, side_branch
from lcm_jax.errors import UserError, one_of
from lcm_jax.host.images import to_signed
from lcm_jax.models.vae import scaled_draw
from lcm_jax.objectives.base import Aux, Inputs, Networks, Update
from lcm_jax.training.networks import Parts

# 'input_ids' tokens (`families.base`), and 'image' uint8 (B, H, W, 3) or 'moments' (B, h, w, 2C): mean and
# log-variance of q(z|x); 'sizes' int32 (B, 6) for a family that uses them (`families.base.default_sizes`)
Batch = dict[str, Any]


class Loss(NamedTuple):
    """One update of an objective.

    Attributes:
      trains: keys of the weights that it changes.
      averages: those of them whose average is kept.
      draw: (key, shape (B, h, w, C) of the latents) → all that is random, each array with B as its first axis.
      loss: (params, target, frozen, batch, draws) → (loss, aux), all of them means over the samples that it is given.
      summary: aux averaged over the global batch → what is logged.
      every, learning_rate: as in `Update`.
    """

    trains: tuple[str, ...]
    averages: tuple[str, ...]
    draw: Callable[[jax.Array, tuple[int, ...]], Any]
    loss: Callable[..., tuple[jax.Array, Aux]]
    summary: Callable[[Aux], Aux]
    every: int
    learning_rate: float | None


def make_losses(parts: Parts) -> dict[str, Loss]:
    """Returns name → loss of the run's objective, in the order of its updates.

    Raises:
      UserError: an update of a role that is not trained, a trained role without an update.
    """
    updates = parts.objective.updates(parts.options, parts.process)
    _check(updates, parts)
    return {name: _loss(update, parts) for name, update in updates.items()}


def _check(updates: Mapping[str, Update], parts: Parts) -> None:
    trained, where = parts.roles.trained, f"of the objective {parts.objective.name!r}"
    for name, update in updates.items():
        for role in update.trains:
            one_of(f"a role that the update {name!r} {where} trains", role, trained)
    for role in trained:
        if not any(role in (update.trains or trained) for update in updates.values()):
            raise UserError(f"no update {where} trains the role {role!r}; make it a frozen one")


def _loss(update: Update, parts: Parts) -> Loss:
    latents = "latents" in parts.objective.needs

    def draw(key: jax.Array, shape: tuple[int, ...]) -> Any:
        if not latents:
            return None, update.draw(key, shape)
        key_vae, key_draws = jax.random.split(key)
        return jax.random.normal(key_vae, shape), update.draw(key_draws, shape)

    def loss(params: dict, target: dict, frozen: dict, batch: Batch, draws: Any) -> tuple[jax.Array, Aux]:
        noise, draws = draws
        roles = parts.roles
        networks = Networks(
            by_role={role: _of_role(parts, role, role, params, frozen) for role in (*roles.trained, *roles.frozen)},
            average={role: _of_role(parts, "target", role, target, frozen) for role in roles.with_average},
        )
        return update.loss(networks, _inputs(parts, params, frozen, batch, noise), draws)

    roles = update.trains or tuple(parts.roles.trained)
    trains = tuple(key for key in map(parts.roles.key, roles) if not parts.adapted or key in parts.adapted)
    averages = tuple(key for key in map(parts.roles.key, parts.roles.with_average) if key in trains)
    return Loss(trains, averages, draw, loss, update.summary, update.every, update.learning_rate)


def _bound(parts: Parts, scope: str, key: str, component: str, weights: dict, frozen: dict) -> Callable[..., Any]:
    """The network `key` with its weights: trained, frozen, or adapters beside the frozen weights of its component.

    Profiles show what it does under `scope`.
    """
    network = parts.networks[key]
    alphas = lora.alphas(parts.adapted[key]) if key in parts.adapted else None

    def function(*args: Any, **options: Any) -> Any:
        with jax.named_scope(scope):
            if alphas is not None:
                return side_branch.apply(network, frozen[component], weights[key], alphas, *args, **options)
            flat = weights[key] if key in weights else frozen[key if key in frozen else component]
            return network.apply(flat, *args, **options)

    return function


def _of_role(parts: Parts, scope: str, role: str, weights: dict, frozen: dict) -> Callable[..., Any]:
    component = {**parts.roles.trained, **parts.roles.frozen}[role]
    bound = _bound(parts, scope, parts.roles.key(role), component, weights, frozen)
    if component != parts.family.denoiser:
        return bound

    def denoiser(z: jax.Array, t: jax.Array, condition: Any, w_embedding: jax.Array | None = None) -> jax.Array:
        return parts.family.call(bound, z, t, condition, w_embedding)

    return denoiser


def _inputs(parts: Parts, params: dict, frozen: dict, batch: Batch, noise: Any) -> Inputs:
    needs, family = parts.objective.needs, parts.family
    images = to_signed(batch["image"]) if "images" in needs else None
    z_0 = _latents(parts, frozen["vae"], batch, noise) if "latents" in needs else None
    condition = null_condition = None
    if "condition" in needs:
        encoders = {name: _bound(parts, name, name, name, params, frozen) for name in family.text_encoders}
        text, sizes = family.encode(encoders, batch["input_ids"]), batch.get("sizes")
        null = family.null(text) if family.null else family.encode(encoders, parts.null_ids)
        condition, null_condition = family.condition(text, sizes), family.condition(null, sizes)
    return Inputs(images, z_0, condition, null_condition)


def _latents(parts: Parts, vae: dict, batch: Batch, noise: jax.Array) -> jax.Array:
    """A draw from the VAE's posterior at these images, scaled: z_0."""
    network = parts.networks["vae"]
    if "moments" in batch:
        mean, logvar = jnp.split(batch["moments"].astype(jnp.float32), 2, axis=-1)
    else:
        with jax.named_scope("vae"):
            mean, logvar = network.apply(vae, to_signed(batch["image"]), method="encode")
    return scaled_draw(network.config, mean, logvar, noise)
