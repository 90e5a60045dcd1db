"""Models as pure functions of flat dicts: 'down_blocks.0.resnets.1.conv1.kernel' -> array."""

import functools
from typing import Any

import jax
from flax import nnx

from lcm_jax.errors import UserError
from lcm_jax.models.policy import FP32, Policy

Flat = dict[str, jax.Array]


def flatten(state: Any) -> dict[str, Any]:
    """Returns {'a.0.b': leaf} of an nnx State, or of nested dicts."""
    pure = nnx.to_pure_dict(state) if isinstance(state, nnx.State) else state
    flat = {}
    for path, leaf in jax.tree.leaves_with_path(pure):
        flat[".".join(str(key.key) for key in path)] = leaf
    return flat


def unflatten(flat: dict[str, Any]) -> dict[Any, Any]:
    """Returns the nested dict that nnx.merge takes: digit strings become ints, in numeric order."""
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


class Network:
    """A model class with its configuration, applied to flat parameters; cheap, and free of arrays.

    Attributes:
      model_class, config, policy, options: what it is made of.
      shapes: path -> jax.ShapeDtypeStruct of each parameter.
    """

    def __init__(self, model_class: type[nnx.Module], config: Any, *, policy: Policy = FP32, **options: Any) -> None:
        self.model_class, self.config, self.policy, self.options = model_class, config, policy, options
        self._make = functools.partial(model_class, config, policy=policy, **options)
        abstract = nnx.eval_shape(lambda: self._make(rngs=nnx.Rngs(0)))
        self._graphdef, state = nnx.split(abstract)
        self.shapes: dict[str, jax.ShapeDtypeStruct] = flatten(state)

    def init(self, key: jax.Array) -> Flat:
        """Returns random float32 parameters."""
        return jax.jit(lambda k: flatten(nnx.state(self._make(rngs=nnx.Rngs(k)))))(key)

    def check(self, params: dict[str, Any], where: str = "") -> None:
        """Raises UserError that names each missing, unexpected or mis-shaped parameter (the first three of each)."""
        faults = []
        for what, names in (
            ("missing", self.shapes.keys() - params.keys()),
            ("unexpected", params.keys() - self.shapes.keys()),
        ):
            if names:
                faults.append(f"{what}: {_some(names)}")
        for name in self.shapes.keys() & params.keys():
            found, wanted = tuple(params[name].shape), self.shapes[name].shape
            if found != wanted:
                faults.append(f"{name} has the shape {found}, not {wanted}")
        if faults:
            raise UserError(f"{where or self.model_class.__name__}: parameters do not fit; {'; '.join(faults[:4])}")

    def apply(self, params: dict[str, Any], *args: Any, method: str = "__call__", **kwargs: Any) -> Any:
        """Calls the model with these parameters; names and shapes are checked while tracing."""
        self.check(params)
        model = nnx.merge(self._graphdef, unflatten(params))
        return getattr(model, method)(*args, **kwargs)
