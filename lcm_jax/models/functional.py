"""Models as pure functions of flat parameter dicts: 'down_blocks.0.resnets.1.conv1.kernel' -> array."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lcm_jax.errors import UserError
from lcm_jax.models.policy import FP32, Policy

Flat = dict[str, Any]  # parameter path → JAX or numpy array

# used in float32 under every policy, as are vectors (biases, norm scales), which the layers cast themselves
_FULL_PRECISION = re.compile(r"conv_out\.kernel|.*\.cond_proj\.kernel|.*_embedding\.embedding")


def flatten(state: Any) -> dict[str, Any]:
    """Flattens an nnx State or nested dicts to {'a.0.b': leaf}."""
    pure = nnx.to_pure_dict(state) if isinstance(state, nnx.State) else state
    flat = {}
    for path, leaf in jax.tree.leaves_with_path(pure):
        flat[".".join(str(key.key) for key in path)] = leaf
    return flat


def whole(leaf: Any) -> Any:
    """Returns the gathered weight if `leaf` is sharded (has a method `whole`), else `leaf`."""
    return leaf.whole() if hasattr(leaf, "whole") else leaf


def unflatten(flat: dict[str, Any]) -> dict[Any, Any]:
    """Returns the nested dict for `nnx.merge`: digit strings become ints, in numeric order."""
    nested: dict[Any, Any] = {}
    for path in sorted(flat, key=_natural):
        *parents, leaf = _natural(path)
        node = nested
        for key in parents:
            node = node.setdefault(key[1], {})
        node[leaf[1]] = flat[path]
    return nested


def _natural(path: str) -> list[tuple[bool, Any]]:
    return [(part.isdigit(), int(part) if part.isdigit() else part) for part in path.split(".")]


class _OneKey(nnx.Rngs):
    """Rngs that return the same key for every initializer, for abstract models, whose values are never used.

    Tracing the counter of nnx.Rngs costs time quadratic in the number of parameters (a minute for SDXL).
    """

    def params(self) -> jax.Array:
        return jax.random.key(0)


class Network:
    """A model class with its configuration, applied to flat parameters; holds no arrays.

    Attributes:
      model_class, config, policy, options: the constructor's arguments.
      shapes: path -> jax.ShapeDtypeStruct of each parameter.
    """

    def __init__(self, model_class: type[nnx.Module], config: Any, *, policy: Policy = FP32, **options: Any) -> None:
        self.model_class, self.config, self.policy, self.options = model_class, config, policy, options
        self._make = functools.partial(model_class, config, policy=policy, **options)
        abstract = nnx.eval_shape(lambda: self._make(rngs=_OneKey()))
        self._graphdef, state = nnx.split(abstract)
        self.shapes: dict[str, jax.ShapeDtypeStruct] = flatten(state)

    @property
    def used(self) -> dict[str, jax.ShapeDtypeStruct]:
        """`shapes` with the dtype in which the network uses each weight; casting to it first changes no result."""
        return {
            path: jax.ShapeDtypeStruct(leaf.shape, jnp.float32 if self._is_float32(path, leaf) else self.policy.compute)
            for path, leaf in self.shapes.items()
        }

    @staticmethod
    def _is_float32(path: str, leaf: jax.ShapeDtypeStruct) -> bool:
        return len(leaf.shape) < 2 or _FULL_PRECISION.fullmatch(path) is not None

    def init(self, key: jax.Array) -> Flat:
        """Returns random float32 parameters, sampled on the host without compilation.

        Kernels are normal with variance 1 / fan-in (LeCun), embeddings normal with standard deviation 0.02 (as in
        CLIP). Scales are one; biases and the projection of the w-embedding are zero.
        """
        random = np.random.default_rng(np.asarray(jax.random.key_data(key)).tolist())
        params = {}
        for path, leaf in self.shapes.items():
            kind = path.rsplit(".", 1)[-1]
            if kind == "scale":
                params[path] = np.ones(leaf.shape, np.float32)
            elif kind == "bias" or path.endswith("cond_proj.kernel"):
                params[path] = np.zeros(leaf.shape, np.float32)
            else:
                deviation = 0.02 if kind == "embedding" else np.prod(leaf.shape[:-1]) ** -0.5
                params[path] = (random.standard_normal(leaf.shape) * deviation).astype(np.float32)
        return {path: jnp.asarray(array) for path, array in params.items()}

    def check(self, params: dict[str, Any], where: str = "") -> None:
        """Raises UserError that names missing, unexpected and mis-shaped parameters (the first three of each)."""
        misshapen = {
            name: f"{name} is {tuple(params[name].shape)} and should be {leaf.shape}"
            for name, leaf in self.shapes.items()
            if name in params and tuple(params[name].shape) != leaf.shape
        }
        faults = [
            f"{what}: {_some(names)}"
            for what, names in (
                ("missing", {name: name for name in self.shapes.keys() - params.keys()}),
                ("unexpected", {name: name for name in params.keys() - self.shapes.keys()}),
                ("of the wrong shape", misshapen),
            )
            if names
        ]
        if faults:
            raise UserError(f"{where or self.model_class.__name__}: parameters do not fit; {'; '.join(faults)}")

    def apply(self, params: dict[str, Any], *args: Any, method: str = "__call__", **kwargs: Any) -> Any:
        """Calls `method` of the model with these parameters; raises UserError if names or shapes don't fit."""
        return getattr(self.bind(params), method)(*args, **kwargs)

    def in_block(self, path: str) -> bool:
        """Returns whether the model's `run_block` gathers the weight at this path."""
        return path.split(".", 1)[0] in getattr(self.model_class, "BLOCKS", ())

    def bind(self, params: dict[str, Any]) -> Any:
        """Returns a new model that holds these parameters; raises UserError if names or shapes don't fit.

        Instead of an array, a parameter may be an object with its `shape` and a method `whole()` that gathers it. It is
        gathered where it is used: in the model's `run_block`, or here if it is outside of the model's blocks.
        """
        self.check(params)
        params = {path: p if self.in_block(path) else whole(p) for path, p in params.items()}
        return nnx.merge(self._graphdef, unflatten(params))


def _some(said: dict[str, str]) -> str:
    """Returns the values of the first three names, in natural order, and the number of the others."""
    names = sorted(said, key=_natural)
    return ", ".join(said[name] for name in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
