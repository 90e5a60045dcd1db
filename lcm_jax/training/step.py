"""One training step: a pure function from (state, frozen weights, batch) to (state, metrics), jitted as a whole."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from lcm_jax.config import Config
from lcm_jax.parallel.gradient import make_gradient
from lcm_jax.parallel.mesh import MeshConfig, make_mesh
from lcm_jax.training import ema
from lcm_jax.training.losses import Batch, Loss, make_losses
from lcm_jax.training.metrics import prefix
from lcm_jax.training.networks import Parts, frozen_shapes, trained_shapes
from lcm_jax.training.optimizer import make_optimizer
from lcm_jax.training.state import State, divided, joined, part

Metrics = dict[str, jax.Array]
Step = Callable[[State, dict, Batch], tuple[State, Metrics]]


def make_step(config: Config, parts: Parts, mesh: Mesh | None = None) -> Step:
    """Returns `step(state, frozen, batch) -> (state, metrics)` over the devices of `mesh`; by default over one.

    The key of a step is fold_in(key(seed), step), so a resumed run draws what an uninterrupted one would; draws are
    made for the global batch, so they do not depend on the mesh. If a loss or its gradient is not finite, the weights
    that it trains, their EMA and their optimizer stay as they were, and its `skipped` counts up.

    The objective's updates are done in their order, each with the weights that the ones before it left. With several,
    an update's metrics start with its name ("critic/loss"), and are NaN in steps without it. The metric `skipped` is
    the largest of all updates.
    """
    mesh = mesh or make_mesh(MeshConfig(), jax.local_devices()[:1])
    losses = make_losses(parts)
    updates = {
        name: _make_update(config, parts, mesh, loss, number) for number, (name, loss) in enumerate(losses.items())
    }

    def step(state: State, frozen: dict, batch: Batch) -> tuple[State, Metrics]:
        params, average, metrics = state["params"], state["ema"], {}
        states, skipped = (dict(divided(state[name], losses)) for name in ("opt_state", "skipped"))
        for name, update in updates.items():
            carry, found = _due(
                losses[name].every,
                state["step"],
                lambda carry, update=update: update(state["step"], *carry, frozen, batch),
                (params, average, states[name], skipped[name]),
            )
            params, average, states[name], skipped[name] = carry
            metrics |= {f"{prefix(name, updates)}{key}": value for key, value in found.items()}
        new = {"params": params, "ema": average, "opt_state": joined(states), "skipped": joined(skipped)}
        most = functools.reduce(jnp.maximum, skipped.values())
        return {"step": state["step"] + 1, **new}, {**metrics, "skipped": most}

    return step


Carry = tuple[dict, dict, Any, jax.Array]  # weights, their EMA, the optimizer's state, updates skipped in a row
Outcome = tuple[Carry, Metrics]


def _due(every: int, step: jax.Array, update: Callable[[Carry], Outcome], carry: Carry) -> Outcome:
    """Does the update in each `every`-th step only; otherwise its metrics are NaN, and nothing of it is computed."""
    if every == 1:
        return update(carry)
    shapes = jax.eval_shape(update, carry)

    def skip(carry: Carry) -> Outcome:
        return carry, jax.tree.map(lambda leaf: jnp.full(leaf.shape, jnp.nan, leaf.dtype), shapes[1])

    return jax.lax.cond(step % every == 0, update, skip, carry)


def _make_update(config: Config, parts: Parts, mesh: Mesh, loss: Loss, number: int) -> Callable[..., Outcome]:
    """Returns one update: (step, *Carry, frozen weights, batch) → what is new."""
    gradient = make_gradient(
        loss.loss,
        trained_shapes(parts),
        frozen_shapes(config, parts),
        trains=loss.trains,
        mesh=mesh,
        config=config.mesh,
        accumulate=config.accumulate,
    )
    optimizer = make_optimizer(config.optimizer, config.steps, loss.learning_rate, loss.every)
    latent_shape = parts.latent_shape(config.data.image_size)

    def update(
        step: jax.Array,
        params: dict,
        average: dict,
        opt_state: Any,
        skipped: jax.Array,
        frozen: dict,
        batch: Batch,
    ) -> Outcome:
        key = jax.random.fold_in(jax.random.key(config.seed), step)
        key = jax.random.fold_in(key, number) if number else key
        draws = loss.draw(key, (len(jax.tree.leaves(batch)[0]), *latent_shape))
        (value, aux), grads = gradient(params, average or params, frozen, batch, draws)
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(value) & jnp.isfinite(grad_norm)

        def kept(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

        old = part(params, loss)
        changes, new_state = optimizer.update(grads, opt_state, old, key=key)
        # the barrier: else both weights and EMA would read the update, which would be written to memory for that
        new = jax.lax.optimization_barrier(kept(optax.apply_updates(old, changes), old))
        if average:
            decay = ema.decay_at(step, config.ema.decay, warmup=config.ema.warmup)
            before = {key: average[key] for key in loss.averages}
            after = ema.update(before, {key: new[key] for key in before}, decay)
            average = {**average, **kept(after, before)}
        metrics = {"loss": value, "grad_norm": grad_norm, **loss.summary(aux)}
        skipped = jnp.where(finite, 0, skipped + 1)
        return ({**params, **new}, average, kept(new_state, opt_state), skipped), metrics

    return update
