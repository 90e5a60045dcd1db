"""Names of a step's metrics, and which of them a step has.

The metrics of an objective's only update have their own names ("loss"). With several updates, each one's metrics start
with its name ("critic/loss"), so no plain "loss" hides one of them.
"""

from collections.abc import Collection, Mapping

from lcm_jax.training.losses import Loss


def prefix(update: str, updates: Collection[str]) -> str:
    """Returns the start of the names of this update's metrics."""
    return f"{update}/" if len(updates) > 1 else ""


def computed(values: Mapping[str, float], losses: Mapping[str, Loss], step: int) -> dict[str, float]:
    """Returns the metrics of a step, counted from 0, without those of updates that it did not do."""
    absent = tuple(prefix(name, losses) for name, loss in losses.items() if step % loss.every)
    return {name: value for name, value in values.items() if not name.startswith(absent)}


def losses_in(values: Mapping[str, float], losses: Mapping[str, Loss]) -> dict[str, float]:
    """Returns the losses among these metrics."""
    names = [f"{prefix(name, losses)}loss" for name in losses]
    return {name: values[name] for name in names if name in values}
