"""The jitted train step with the shapes and shardings of its arguments, for training and planning."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lcm_jax.config import Config
from lcm_jax.parallel import partition
from lcm_jax.parallel.mesh import BATCH, check_batch
from lcm_jax.training.losses import Batch, make_losses
from lcm_jax.training.networks import Parts, frozen_shapes, trained_shapes
from lcm_jax.training.state import State, initial_state
from lcm_jax.training.step import make_step


@dataclasses.dataclass(frozen=True)
class Program:
    """A train step over a mesh.

    Attributes:
      mesh: the devices.
      state, frozen, batch: arguments of the step as jax.ShapeDtypeStruct, with shardings.
      stop: the fourth argument of the step likewise, int32 with one number per device.
      step: the jitted `step(state, frozen, batch, stop) -> (state, metrics)`. The state is donated. The metrics are
        replicated; their `stop` is the maximum over devices, so that a signal to one process reaches all.
      start: the jitted `initial_state(params)`.
    """

    mesh: Mesh
    state: dict[str, Any]
    frozen: dict[str, Any]
    batch: dict[str, Any]
    stop: jax.ShapeDtypeStruct
    step: jax.stages.Wrapped
    start: jax.stages.Wrapped

    def trace(self) -> jax.stages.Traced:
        """Traces the step from the shapes of its arguments."""
        return self.step.trace(self.state, self.frozen, self.batch, self.stop)

    def lower(self) -> jax.stages.Lowered:
        """Lowers the step. On a mesh of described devices, `.compile()` needs no attached ones."""
        return self.trace().lower()

    @property
    def rows(self) -> np.ndarray:
        """The indices of the global batch's rows on this process's devices, ascending."""
        first = jax.tree.leaves(self.batch)[0]
        count = first.shape[0]
        parts = first.sharding.addressable_devices_indices_map((count,)).values()
        return np.unique(np.concatenate([np.arange(count)[part] for part in parts]))

    def put(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Returns the global batch as sharded arrays, from this process's rows of it."""
        rows = self.rows

        def place(local: np.ndarray, like: jax.ShapeDtypeStruct) -> jax.Array:
            def of_device(index: Any) -> np.ndarray:
                wanted = np.arange(like.shape[0])[index[0]]
                return local[np.searchsorted(rows, wanted)]

            return jax.make_array_from_callback(like.shape, like.sharding, of_device)

        return {name: jax.tree.map(place, batch[name], like) for name, like in self.batch.items()}

    def put_stop(self, number: int) -> jax.Array:
        """Returns the `stop` argument of the step, with `number` for each device of this process."""
        numbers = np.full(self.stop.shape, number, np.int32)
        return jax.make_array_from_callback(numbers.shape, self.stop.sharding, lambda index: numbers[index])

    def whole(self, tree: Any) -> Any:
        """Returns the arrays replicated on all devices."""
        return jax.jit(lambda x: x, out_shardings=NamedSharding(self.mesh, P()))(tree)


def make_program(config: Config, parts: Parts, mesh: Mesh) -> Program:
    """Returns the program of a run; nothing is compiled yet.

    Raises:
      UserError: a batch size that devices and micro-batches do not divide, or an image size that does not fit.
    """
    check_batch(config.batch_size, config.accumulate, mesh)
    losses = make_losses(parts)
    whole = NamedSharding(mesh, P())
    state = _sharded(jax.eval_shape(lambda: initial_state(config, losses, _masters(trained_shapes(parts)))), mesh)
    frozen = frozen_shapes(config, parts)
    if config.mesh.frozen == "sharded":
        frozen = _sharded(frozen, mesh)
    else:
        frozen = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole), frozen)
    over_batch = NamedSharding(mesh, BATCH)
    batch = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((config.batch_size, *leaf.shape), leaf.dtype, sharding=over_batch),
        parts.sample_shapes(config.data),
    )
    stop = jax.ShapeDtypeStruct((mesh.size,), jnp.int32, sharding=over_batch)
    places = [jax.tree.map(lambda leaf: leaf.sharding, tree) for tree in (state, frozen, batch, stop)]
    step = make_step(config, parts, mesh)

    def step_or_stop(state: State, frozen: dict, batch: Batch, stop: jax.Array) -> tuple[State, dict[str, jax.Array]]:
        state, metrics = step(state, frozen, batch)
        return state, {**metrics, "stop": jnp.max(stop)}

    jitted = jax.jit(
        step_or_stop,
        donate_argnums=0,
        in_shardings=tuple(places),
        out_shardings=(places[0], whole),
        compiler_options=_cpu_options() if mesh.devices.flat[0].platform == "cpu" else None,
    )
    start = jax.jit(functools.partial(initial_state, config, losses), out_shardings=places[0])
    return Program(mesh, state, frozen, batch, stop, jitted, start)


@functools.cache
def _cpu_options() -> dict[str, bool] | None:
    """Returns an XLA option without which a CPU copies much of the state in each step; None if it is unknown."""
    options = {"xla_cpu_copy_insertion_use_region_analysis": True}
    try:
        jax.jit(lambda: 0, compiler_options=options).lower().compile()
    except jax.errors.JaxRuntimeError:  # this jaxlib lacks the option; it is only slower
        return None
    return options


def _masters(shapes: dict[str, dict[str, jax.ShapeDtypeStruct]]) -> dict[str, dict[str, jax.Array]]:
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), shapes)


def _sharded(tree: Any, mesh: Mesh) -> Any:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        partition.shardings(tree, mesh),
    )
