"""Low-rank adapters (LoRA, arXiv 2106.09685) as a flat tree, separate from the base parameters.

'down_blocks.0.resnets.0.conv1.lora_A.kernel' -> (k, k, in, rank)    '….lora_B.kernel' -> (1, 1, rank, out)
'mid_block.….attn1.to_q.lora_A.kernel' -> (in, rank)                 '….lora_B.kernel' -> (rank, out)

A module's weight difference is dW = alpha / rank · B A. For a convolution, A has the module's kernel size, stride and
padding, and B is 1 × 1. B starts at zero, so the adapted network starts equal to the base. Names and initial values
follow peft: a path is the key in a peft file, except for the last part.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lcm_jax.errors import UserError, nearest, one_of
from lcm_jax.models import Flat

A, B = ".lora_A.kernel", ".lora_B.kernel"
INITS = ("kaiming", "gaussian")

# The modules that published LCM-LoRAs adapt (278 in SD 1.5's UNet, 788 in SDXL's), and a CLIP text encoder's layers.
MODULES = (
    r"to_q|to_k|to_v|to_out\.0|proj_in|proj_out|ff\.net\.0\.proj|ff\.net\.2|conv1|conv2|conv_shortcut|"
    r"downsamplers\.0\.conv|upsamplers\.0\.conv|time_emb_proj|"
    r"q_proj|k_proj|v_proj|out_proj|fc1|fc2"
)


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Whether to train adapters instead of all weights, and for which modules."""

    rank: int = 0  # rank of each adapter, 64 in published LCM-LoRAs; 0: no LoRA, all weights are trained
    alpha: float = 0.0  # dW = alpha / rank · B A; 0: alpha = rank
    modules: str = MODULES  # linear layers and convolutions to adapt: a regular expression for the end of their paths
    # more modules, or another rank/alpha: 'mid_block\..*=128', 'attn2\.to_q=16/8'; the first match wins, then `modules`
    patterns: tuple[str, ...] = ()
    init: str = "kaiming"  # initializer of A: kaiming | gaussian; B starts at zero

    def __post_init__(self) -> None:
        one_of("init", self.init, INITS)
        if not self.rank >= 0:
            raise UserError(f"rank is {self.rank}; it can't be negative")
        if not 0 <= self.alpha < float("inf"):
            raise UserError(f"alpha is {self.alpha}; it must be positive, or 0 for the rank")
        for field in dataclasses.fields(self):
            if self.rank == 0 and getattr(self, field.name) != field.default:
                raise UserError(f"{field.name} has no effect: rank is 0")
        self.targets()

    def targets(self) -> list["Target"]:
        """Returns the targets in order of precedence: patterns, then modules. Raises UserError for a wrong pattern."""
        return [*map(_target, self.patterns), Target(self.modules, self.rank, self.alpha or None)]


@dataclasses.dataclass(frozen=True)
class Target:
    """A set of modules to adapt, with rank and alpha.

    Attributes:
      modules: a regular expression for a module's path, or for its end after a dot: `to_q`, `attn2\\.to_(k|v)`,
        `mid_block\\..*`. Only linear layers and convolutions can match.
      rank: at least 1.
      alpha: dW is scaled by alpha / rank; None means alpha = rank.
    """

    modules: str = MODULES
    rank: int = 64
    alpha: float | None = None


def _target(pattern: str) -> Target:
    if not isinstance(pattern, str):
        raise UserError(f"patterns has {pattern!r}; it should be text, as in ('attn2\\.to_q=16/8',)")
    modules, _, numbers = pattern.rpartition("=")
    rank, slash, alpha = numbers.partition("/")
    try:
        return Target(modules, int(rank), float(alpha) if slash else None)
    except ValueError:
        pass
    raise UserError(f"patterns has {pattern!r}; it should be MODULES=RANK or MODULES=RANK/ALPHA: 'attn2\\.to_q=16/8'")


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A network's adapter.

    Attributes:
      params: path → array, two per adapted module.
      alphas: module → alpha; not trained.
    """

    params: Flat
    alphas: dict[str, float]

    @property
    def ranks(self) -> dict[str, int]:
        """Maps module → rank."""
        return {module: int(self.params[module + B].shape[-2]) for module in self.alphas}


def module_of(path: str) -> str:
    """Returns the module of an adapter parameter's path."""
    return path.removesuffix(A).removesuffix(B)


def kernels(shapes: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Returns module → kernel shape for the linear layers and convolutions in `shapes`."""
    suffix = ".kernel"
    return {path.removesuffix(suffix): tuple(leaf.shape) for path, leaf in shapes.items() if path.endswith(suffix)}


def choose(shapes: Mapping[str, Any], targets: Sequence[Target]) -> dict[str, Target]:
    """Returns module → the first target that matches it; modules without a match are left out.

    Args:
      shapes: path → array or ShapeDtypeStruct of the base parameters.
      targets: in order of precedence.

    Raises:
      UserError: a pattern isn't a regular expression or matches no module; rank < 1; alpha isn't positive and finite.
    """
    modules, chosen = kernels(shapes), {}
    for target in targets:
        if target.rank < 1:
            raise UserError(f"the LoRA rank of {target.modules!r} is {target.rank}; it must be at least 1")
        if target.alpha is not None and not 0 < target.alpha < float("inf"):
            raise UserError(f"the LoRA alpha of {target.modules!r} is {target.alpha}; it must be above 0, and finite")
        try:
            pattern = re.compile(rf"(.*\.)?({target.modules})")
        except re.error as error:
            raise UserError(f"the LoRA target {target.modules!r} is not a regular expression: {error}") from None
        matched = [module for module in modules if pattern.fullmatch(module)]
        if not matched:
            ends = {module.rpartition(".")[2] for module in modules}
            raise UserError(
                f"the LoRA target {target.modules!r} matches no linear layer or convolution"
                f"{nearest(target.modules, {end for end in ends if not end.isdigit()})}"
            )
        for module in matched:
            chosen.setdefault(module, target)
    return {module: chosen[module] for module in modules if module in chosen}


def shapes(base: Mapping[str, Any], chosen: Mapping[str, Target]) -> dict[str, tuple[int, ...]]:
    """Returns path → shape of the adapter parameters."""
    found, of_base = {}, kernels(base)
    for module, target in chosen.items():
        *size, c_in, c_out = of_base[module]
        found[module + A] = (*size, c_in, target.rank)
        found[module + B] = (*[1] * len(size), target.rank, c_out)
    return found


def init(key: jax.Array, base: Mapping[str, Any], chosen: Mapping[str, Target], how: str = "kaiming") -> Adapter:
    """Initializes an adapter with float32 numpy arrays: B zero, A random with peft's distributions.

    Args:
      key: typed key.
      base: path → array or ShapeDtypeStruct of the base parameters.
      chosen: the result of `choose`.
      how: "kaiming", uniform in ±1/sqrt(fan-in) (peft's default), or "gaussian", with standard deviation 1/rank.

    Raises:
      UserError: `how` is unknown.
    """
    one_of("LoRA init", how, INITS)
    random = np.random.default_rng(np.asarray(jax.random.key_data(key)).tolist())
    params: Flat = {}
    for path, shape in shapes(base, chosen).items():
        if path.endswith(B):
            params[path] = np.zeros(shape, np.float32)
        elif how == "gaussian":
            params[path] = (random.standard_normal(shape) / shape[-1]).astype(np.float32)
        else:
            bound = np.prod(shape[:-1]) ** -0.5
            params[path] = random.uniform(-bound, bound, shape).astype(np.float32)
    return Adapter(params, alphas(chosen))


def alphas(chosen: Mapping[str, Target]) -> dict[str, float]:
    """Returns module → alpha."""
    return {module: float(t.rank if t.alpha is None else t.alpha) for module, t in chosen.items()}


def differences(params: Mapping[str, Any], alphas: Mapping[str, float]) -> Flat:
    """Returns kernel path → dW, float32, in the base's layout. For numpy inputs it is numpy: nothing is compiled."""
    found = {}
    for module, alpha in alphas.items():
        a, b = params[module + A], params[module + B]
        rank = b.shape[-2]
        a, b = a.astype(np.float32), b.reshape(b.shape[-2:]).astype(np.float32)
        # one product for linear layers and convolutions: a convolution's B is 1 × 1
        product = a @ b if isinstance(a, np.ndarray) else jnp.matmul(a, b, precision="highest")
        found[f"{module}.kernel"] = product * np.float32(alpha / rank)
    return found


def merge(base: Mapping[str, Any], params: Mapping[str, Any], alphas: Mapping[str, float], weight: float = 1.0) -> Flat:
    """Returns the base parameters with each adapted kernel replaced by W + weight · dW in float32.

    The other parameters are the base's arrays, not copies; with weight 0, all are.
    """
    merged = dict(base)
    if weight == 0:
        return merged
    for path, difference in differences(params, alphas).items():
        merged[path] = base[path].astype(np.float32) + np.float32(weight) * difference
    return merged
