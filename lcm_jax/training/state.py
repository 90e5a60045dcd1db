"""The state that a step changes.

    state = {'step': int32, 'params': {key: Flat}, 'ema': {key: Flat} or {}, 'opt_state': optax, 'skipped': int32}

Keys are those of `networks.py`. Master weights and EMA are float32. `skipped` counts updates in a row that were not
finite. With several updates, `opt_state` and `skipped` are dicts with one entry for each of them.
"""

from typing import Any

import jax
import jax.numpy as jnp

from lcm_jax.config import Config
from lcm_jax.models import Flat
from lcm_jax.training.losses import Loss
from lcm_jax.training.optimizer import make_optimizer

State = dict[str, Any]


def initial_state(config: Config, losses: dict[str, Loss], params: dict[str, Flat]) -> State:
    """Returns the state before the first step. The EMA starts as a copy of the weights, of those that it averages."""
    states = {
        name: make_optimizer(config.optimizer, config.steps, loss.learning_rate, loss.every).init(part(params, loss))
        for name, loss in losses.items()
    }
    averages = {key: params[key] for loss in losses.values() for key in loss.averages}
    return {
        "step": jnp.int32(0),
        "params": params,
        "ema": jax.tree.map(jnp.copy, averages) if config.ema.decay else {},
        "opt_state": joined(states),
        "skipped": joined({name: jnp.int32(0) for name in losses}),
    }


def part(params: dict[str, Flat], loss: Loss) -> dict[str, Flat]:
    """Returns the weights that this loss trains."""
    return {key: params[key] for key in loss.trains}


def joined(states: dict[str, Any]) -> Any:
    """Returns what each update has of its own, by its name, as it stands in a run's state."""
    return states if len(states) > 1 else next(iter(states.values()))


def divided(states: Any, losses: dict[str, Loss]) -> dict[str, Any]:
    """Returns name of the update → what it has of its own: the inverse of `joined`."""
    return states if len(losses) > 1 else dict.fromkeys(losses, states)
