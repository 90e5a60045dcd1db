"""The networks of a run by role, and the weights that they start from.

Weights are {key: Flat}. `Flat` is a dict from a parameter's path ('down_blocks.0.resnets.1.conv1.kernel') to its array;
keys are the components' names in the folder ('unet', 'text_encoder', 'vae') for exported networks and for those read
from there, and the role's own for other networks ('teacher').

With `config.lora.rank` the `Flat` of a trained network holds adapters (`lcm_jax.adapters.lora`) instead of the
network's own weights. Those are among the frozen ones, once, for all roles that start from them.
"""

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lcm_jax.adapters import lora
from lcm_jax.config import Config
from lcm_jax.data.config import DataConfig
from lcm_jax.diffusion.process import Process
from lcm_jax.errors import UserError, one_of
from lcm_jax.families import Family, family_of
from lcm_jax.families.base import Tokens
from lcm_jax.interop.folder import Folder, make_network, read_folder
from lcm_jax.models import Flat, Network, Policy
from lcm_jax.objectives import OBJECTIVES, Objective
from lcm_jax.objectives.base import Roles


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a step needs besides arrays.

    Attributes:
      family, objective, options: what is trained, and how; `options` are the objective's.
      roles: the objective's networks.
      networks: by key, and by component of the folder where no role has that key.
      process: the noise process of the folder.
      null_ids: the tokens of the empty prompt, a batch of one.
      adapted: key → module → shape of its adapter; {} where the networks' own weights are trained.
    """

    family: Family
    objective: Objective
    options: Any
    roles: Roles
    networks: dict[str, Network]
    process: Process
    null_ids: Tokens
    adapted: dict[str, dict[str, lora.Target]]

    def latent_shape(self, image_size: int) -> tuple[int, int, int]:
        """Returns (h, w, C), the latents of a square image of `image_size` pixels; raises UserError if none fits."""
        return self.networks["vae"].config.latent_shape(image_size)

    def sample_shapes(self, config: DataConfig) -> dict[str, Any]:
        """Returns the shape and dtype of each part of one sample of a batch."""
        tokens = jax.tree.map(lambda ids: jax.ShapeDtypeStruct(ids.shape[1:], jnp.int32), self.null_ids)
        shapes: dict[str, Any] = {"input_ids": tokens}
        if config.latents:
            *size, channels = self.latent_shape(config.image_size)
            shapes["moments"] = jax.ShapeDtypeStruct((*size, 2 * channels), jnp.float16)
        else:
            shapes["image"] = jax.ShapeDtypeStruct((config.image_size, config.image_size, 3), jnp.uint8)
        if self.family.uses_sizes:
            shapes["sizes"] = jax.ShapeDtypeStruct((6,), jnp.int32)
        return shapes

    @property
    def trained(self) -> dict[str, str]:
        """Key → component of the networks that are trained."""
        return _trained(self.roles)

    @property
    def frozen(self) -> dict[str, str]:
        """Key → component of the weights that the step or a preview reads, but which are not trained."""
        components = {"vae"} if "latents" in self.objective.needs else set()
        if "condition" in self.objective.needs:
            components |= {*self.family.text_encoders}
        if self.objective.sampling(self.options, self.process):
            components |= {*components_of(self.family)}  # for previews
        return _frozen(components, self.roles, adapters=bool(self.adapted))


def components_of(family: Family) -> tuple[str, ...]:
    """Returns the components of a folder that sample images together."""
    return (family.denoiser, "vae", *family.text_encoders)


def _trained(roles: Roles) -> dict[str, str]:
    return {roles.key(role): component for role, component in roles.trained.items()}


def _frozen(components: set[str], roles: Roles, *, adapters: bool) -> dict[str, str]:
    trained = _trained(roles)
    if adapters:
        bases = set(trained.values())
        others = {role: component for role, component in roles.frozen.items() if component not in bases}
        return {component: component for component in components | bases} | others
    return {component: component for component in components - trained.keys()} | dict(roles.frozen)


def chosen(config: Config) -> tuple[Objective, Any]:
    """Returns the objective of a run, and its options."""
    return OBJECTIVES[config.objective], getattr(config, config.objective)


def trained_components(config: Config, family: Family) -> dict[str, str]:
    """Returns key → component of the networks that this run trains."""
    objective, options = chosen(config)
    return _trained(objective.roles(options, family))


def read_model(config: Config) -> Folder:
    """Reads the folder that a run starts from. Raises UserError that names the option if there is none."""
    try:
        return read_folder(config.model.folder)
    except UserError as error:
        if os.path.exists(config.model.folder):
            raise
        raise type(error)(f"config.model.folder: {error}; give --config.model.folder=DIR, where it lies now") from None


def make_parts(
    config: Config,
    folder: Folder,
    tokenizer: Callable[[Sequence[str]], Tokens],
    objective: tuple[Objective, Any] | None = None,
) -> Parts:
    """Builds the networks of a run from the folder's own configurations, for the devices that JAX finds here.

    Args:
      config, folder, tokenizer: of the run.
      objective: the record and its options; those of the config by default.

    Raises:
      UserError: roles that don't fit the folder, adapters or an image size that don't fit the networks.
    """
    record, options = objective or chosen(config)
    family = family_of(folder.model_index)
    roles = record.roles(options, family)
    policy = Policy.named(config.model.dtype)
    of_denoiser = {"remat": config.model.remat, "attention": config.model.attention_on(jax.devices()[0])}
    components = {}
    for name in components_of(family):
        component, where = folder.components[name], str(folder.path / name)
        extra = of_denoiser if name == family.denoiser else {}
        components[name] = make_network(component.library_class, component.config, where=where, policy=policy, **extra)
    networks = dict(components)
    for role, component in {**roles.trained, **roles.frozen}.items():
        one_of(f"the component of the role {role!r} of the objective {record.name!r}", component, components)
        base = components[component]
        try:
            wanted = record.network_config(role, options, base.config, family)
        except UserError as error:
            raise UserError(f"{folder.path}: {error}") from None
        same = wanted == base.config
        networks[roles.key(role)] = base if same else Network(base.model_class, wanted, policy=policy, **base.options)
    found = adapted(config, _trained(roles), networks)
    parts = Parts(family, record, options, roles, networks, folder.schedule, tokenizer([""]), found)
    parts.latent_shape(config.data.image_size)  # an error now, not in the middle of the first step
    return parts


def adapted(config: Config, trained: dict[str, str], networks: dict[str, Network]) -> dict[str, dict[str, lora.Target]]:
    """Returns key → module → shape of its adapter.

    The modules of all networks are chosen at once, so that a pattern may begin with a network's key.

    Raises:
      UserError: a pattern that matches nothing, a rank or an alpha that can't be.
    """
    if not config.lora.rank:
        return {}
    shapes = {f"{name}.{path}": leaf for name in trained for path, leaf in networks[name].shapes.items()}
    found: dict[str, dict[str, lora.Target]] = {name: {} for name in trained}
    try:
        for module, target in lora.choose(shapes, config.lora.targets()).items():
            name, _, path = module.partition(".")
            found[name][path] = target
    except UserError as error:
        raise UserError(f"config.lora: {error}") from None
    return {name: targets for name, targets in found.items() if targets}


def initial_params(config: Config, parts: Parts, folder: Folder) -> dict[str, Flat]:
    """Returns the weights that training starts from: the folder's own, new ones as the objective makes them.

    Adapters start with a second half of zero, so the adapted network equals its base. The arrays are on the host, the
    folder's in the file's dtype: `partition.place` casts them to float32 on their way to the devices.
    """
    if parts.adapted:
        return {
            name: lora.init(
                jax.random.fold_in(jax.random.key(config.seed), LORA_KEY - number),
                parts.networks[name].shapes,
                targets,
                config.lora.init,
            ).params
            for number, (name, targets) in enumerate(parts.adapted.items())
        }
    params = {}
    for key, component in parts.trained.items():
        network = parts.networks[key]
        flat: dict[str, Any] = dict(folder.components[component].params)
        for path in network.shapes.keys() - flat.keys():
            if parts.objective.new_weight:
                random = jax.random.fold_in(jax.random.key(config.seed), NEW_WEIGHT_KEY)
                flat[path] = parts.objective.new_weight(parts.options, random, network.shapes[path].shape)
        network.check(flat, where=f"{folder.path}/{component}")
        params[key] = flat
    return params


NEW_WEIGHT_KEY = 2**31 - 1  # no step has this number, so the key is used nowhere else
LORA_KEY = 2**31 - 2  # and the number below


def frozen_params(parts: Parts, folder: Folder) -> dict[str, dict[str, np.ndarray]]:
    """Returns the weights that the step reads but does not train, in the file's dtype.

    `partition.place` casts them to the compute dtype, as in `frozen_shapes`, on their way to the devices.
    """
    return {key: dict(folder.components[component].params) for key, component in parts.frozen.items()}


def trained_shapes(parts: Parts) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
    """Returns the shapes of the weights that are trained, in the dtype in which the networks use them."""
    if not parts.adapted:
        return {name: parts.networks[name].used for name in parts.trained}
    found: dict[str, dict[str, jax.ShapeDtypeStruct]] = {}
    for name, targets in parts.adapted.items():
        used = parts.networks[name].used
        found[name] = {
            path: jax.ShapeDtypeStruct(shape, used[f"{lora.module_of(path)}.kernel"].dtype)
            for path, shape in lora.shapes(used, targets).items()
        }
    return found


def frozen_shapes(config: Config, parts: Parts) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
    """Returns the shapes of `frozen_params`, and the compute dtype."""
    dtype = Policy.named(config.model.dtype).compute
    return {
        name: {path: jax.ShapeDtypeStruct(leaf.shape, dtype) for path, leaf in parts.networks[name].shapes.items()}
        for name in parts.frozen
    }
