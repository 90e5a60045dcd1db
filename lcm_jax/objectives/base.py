"""The record of an objective: which networks it has, which of them it trains by which losses, and what is exported."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from lcm_jax.errors import one_of

Aux = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Roles:
    """The networks of an objective by role, each with the component of the teacher's folder that it starts from.

    Attributes:
      trained: role → component.
      frozen: role → component, of those that are only called.
      exported: trained role → component as which it is written. In a run's state its weights have that name; those
        of other roles have the role's.
      averaged: trained roles that are not exported, but of which a loss reads the average.

    Raises:
      UserError: an exported or averaged role that is not trained.
    """

    trained: Mapping[str, str]
    frozen: Mapping[str, str] = dataclasses.field(default_factory=dict)
    exported: Mapping[str, str] = dataclasses.field(default_factory=dict)
    averaged: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for role in self.with_average:
            one_of("an exported or averaged role", role, self.trained)

    @property
    def with_average(self) -> tuple[str, ...]:
        """The roles of whose weights a run keeps the average."""
        return (*self.exported, *self.averaged)

    def key(self, role: str) -> str:
        """Returns the name of this role's weights in a run's state."""
        return self.exported.get(role, role)


class Networks(NamedTuple):
    """The networks of a loss, bound to their weights.

    Attributes:
      by_role: trained and frozen ones. A denoiser is called as (z, t, condition, w embedding or None) → raw output;
        another network as its class is, with `method=` for one of its methods.
      average: those of `Roles.with_average` with the exponential moving average of their weights, or with the weights
        themselves where the run keeps none.
    """

    by_role: Mapping[str, Callable[..., Any]]
    average: Mapping[str, Callable[..., Any]]


class Inputs(NamedTuple):
    """What a loss gets of its samples; None for what the objective does not need.

    Attributes:
      images: float32 (B, H, W, 3) in [-1, 1].
      z_0: float32 (B, h, w, C), scaled latents.
      condition: of the captions; a tree of arrays (B, …).
      null_condition: of the empty prompt; the same tree of arrays (1, …).
    """

    images: Any
    z_0: Any
    condition: Any
    null_condition: Any


@dataclasses.dataclass(frozen=True)
class Update:
    """One loss, and the networks that its gradient changes.

    Attributes:
      draw: (key, shape (B, h, w, C) of the latents) → all that is random, each array with B as its first axis.
      loss: (networks, inputs, draws) → (loss, aux), means over the samples.
      summary: aux averaged over the global batch → what is logged.
      trains: roles; all trained ones by default.
      every: steps between two updates; the first one is at step 0.
      learning_rate: instead of the run's. Warm-up and decay are the run's, over its steps.
    """

    draw: Callable[[jax.Array, tuple[int, ...]], Any]
    loss: Callable[[Networks, Inputs, Any], tuple[jax.Array, Aux]]
    summary: Callable[[Aux], Aux] = dict
    trains: tuple[str, ...] = ()
    every: int = 1
    learning_rate: float | None = None


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a trained denoiser is sampled.

    Attributes:
      kind: "lcm" or "ddim".
      grid_steps: N, the steps of the trained grid; "lcm" only.
      timestep_scaling: of the boundary condition; "lcm" only.
    """

    kind: str
    grid_steps: int = 0
    timestep_scaling: float = 10.0


def _unchanged(role: str, options: Any, config: Any, family: Any) -> Any:
    return config


def _nothing_to_check(options: Any, adapters: bool) -> None:
    pass


def _no_sampling(options: Any, process: Any) -> None:
    return None


@dataclasses.dataclass(frozen=True)
class Objective:
    """One way to train.

    `options` below is an instance of the class `options`, `family` a `families.Family`, `process` the noise process.

    Attributes:
      name: in config.objective, and of its section of options.
      options: the dataclass of its options.
      needs: which of "images", "latents" and "condition" its losses read.
      result: what it trains: the usual name of an exported folder.
      roles: (options, family) → Roles.
      updates: (options, process) → {name: Update}, in the order in which a step does them.
      check: (options, whether adapters are trained); raises UserError for what does not go together.
      network_config: (role, options, config of the component, family) → config of that role's network.
      new_weight: (options, key, shape) → a weight that `network_config` added.
      sampling: (options, process) → how previews are sampled; None where they show reconstructions.
      recipe: (options, process) → what lcm_jax.json, the model card and a LoRA's header say of a few-step model that an
        LCMScheduler samples: the fields of `interop.recipe.Recipe` that the run doesn't know; None for other models.
      latent_std: options → the standard deviation of the exported VAE's latents; None where the VAE is not trained.
    """

    name: str
    options: type
    needs: frozenset[str]
    result: str
    roles: Callable[[Any, Any], Roles]
    updates: Callable[[Any, Any], Mapping[str, Update]]
    check: Callable[[Any, bool], None] = _nothing_to_check
    network_config: Callable[[str, Any, Any, Any], Any] = _unchanged
    new_weight: Callable[[Any, jax.Array, tuple[int, ...]], Any] | None = None
    sampling: Callable[[Any, Any], Sampling | None] = _no_sampling
    recipe: Callable[[Any, Any], dict[str, Any]] | None = None
    latent_std: Callable[[Any], float] | None = None
