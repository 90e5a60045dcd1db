"""One training step: a pure function from (state, frozen weights, batch) to (state, metrics), jitted as a whole."""

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
from lcm_jax.training.losses import Batch, make_loss
from lcm_jax.training.state import Parts, State, frozen_shapes, make_optimizer, trained_shapes

Step = Callable[[State, dict, Batch], tuple[State, dict[str, jax.Array]]]


def make_step(config: Config, parts: Parts, mesh: Mesh | None = None) -> Step:
    """Returns `step(state, frozen, batch) -> (state, metrics)` over the devices of `mesh`; by default over one.

    The step's key is fold_in(key(seed), step), so a run that goes on draws what an uninterrupted one would; what is
    drawn is drawn for the global batch, so that it does not depend on the mesh. If the loss or the gradient is not
    finite, weights, EMA and optimizer stay as they were and `skipped` counts up.
    """
    mesh = mesh or make_mesh(MeshConfig(), jax.local_devices()[:1])
    draw, loss_function, summary = make_loss(config, parts)
    gradient = make_gradient(
        loss_function,
        trained_shapes(config, parts),
        frozen_shapes(config, parts),
        mesh=mesh,
        config=config.mesh,
        accumulate=config.accumulate,
    )
    optimizer = make_optimizer(config.optimizer, config.steps)
    latent_shape = parts.latent_shape(config.data.image_size)

    def step(state: State, frozen: dict, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.key(config.seed), state["step"])
        params = state["params"]
        draws = draw(key, (len(batch["input_ids"]), *latent_shape))
        (loss, aux), grads = gradient(params, state["ema"] or params, frozen, batch, draws)
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)

        def kept(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

        updates, opt_state = optimizer.update(grads, state["opt_state"], params)
        # the barrier: else both weights and EMA would read the update, which would be written to memory for that
        new_params = jax.lax.optimization_barrier(kept(optax.apply_updates(params, updates), params))
        new_ema = state["ema"]
        if new_ema:
            decay = ema.decay_at(state["step"], config.ema.decay, warmup=config.ema.warmup)
            new_ema = kept(ema.update(new_ema, new_params, decay), new_ema)
        skipped = jnp.where(finite, 0, state["skipped"] + 1)
        metrics = {"loss": loss, "grad_norm": grad_norm, "skipped": skipped, **summary(aux)}
        opt_state = kept(opt_state, state["opt_state"])
        new = {"params": new_params, "ema": new_ema, "opt_state": opt_state}
        return {"step": state["step"] + 1, **new, "skipped": skipped}, metrics

    return step
