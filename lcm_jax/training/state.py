"""What a run starts from: the networks, the frozen weights, and the state that the step changes.

    state = {'step': int32, 'params': {component: Flat}, 'ema': {component: Flat} or {},
             'opt_state': optax, 'skipped': int32}

`Flat` is a dict from a parameter's path ('down_blocks.0.resnets.1.conv1.kernel') to its array; components have the
names that they have in a diffusers folder: 'unet', 'text_encoder', 'vae'. Master weights and EMA are float32.

With `config.lora.rank` the `Flat` of a component holds adapters (`lcm_jax.adapters.lora`) instead of the network's own
weights; those are among the frozen ones, once, for the teacher and the student.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lcm_jax.adapters import lora
from lcm_jax.config import Config, OptimizerConfig
from lcm_jax.data.pipeline import DataConfig
from lcm_jax.diffusion.schedule import Schedule
from lcm_jax.errors import UserError
from lcm_jax.interop.folder import Folder, make_network
from lcm_jax.models import Flat, Network, Policy

State = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a step needs besides arrays.

    Attributes:
      networks: by component; in "lcd" `unet` is the student and `teacher` the teacher.
      schedule: the noise schedule of the folder.
      null_ids: (1, L) int32, the tokens of the empty prompt.
      adapted: component -> module -> what its adapter is like; {} where the networks' own weights are trained.
    """

    networks: dict[str, Network]
    schedule: Schedule
    null_ids: np.ndarray
    adapted: dict[str, dict[str, lora.Target]]

    def latent_shape(self, image_size: int) -> tuple[int, int, int]:
        """Returns (h, w, C), the latents of a square picture of `image_size` pixels; raises UserError if none fits."""
        return self.networks["vae"].config.latent_shape(image_size)

    def sample_shapes(self, config: DataConfig) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the shape and dtype of each part of one sample of a batch."""
        shapes = {"input_ids": jax.ShapeDtypeStruct(self.null_ids.shape[1:], jnp.int32)}
        if config.latents:
            *size, channels = self.latent_shape(config.image_size)
            shapes["moments"] = jax.ShapeDtypeStruct((*size, 2 * channels), jnp.float16)
        else:
            shapes["image"] = jax.ShapeDtypeStruct((config.image_size, config.image_size, 3), jnp.uint8)
        return shapes


def trained_components(config: Config) -> tuple[str, ...]:
    """Returns the names of the components that this objective trains."""
    if config.objective == "autoencoder":
        return ("vae",)
    if config.objective == "denoising" and config.denoising.train_text_encoder:
        return ("unet", "text_encoder")
    return ("unet",)


def frozen_components(config: Config) -> dict[str, str]:
    """Returns {component: its name in the folder} of those that the step reads but does not train."""
    if config.objective == "autoencoder":
        return {}
    names = {"vae": "vae", "text_encoder": "text_encoder"}
    if config.lora.rank:
        return {**names, "unet": "unet"}  # the teacher too
    if config.objective == "lcd":
        names["teacher"] = "unet"
    return {name: source for name, source in names.items() if name not in trained_components(config)}


def make_parts(config: Config, folder: Folder, tokenizer: Callable[[Sequence[str]], np.ndarray]) -> Parts:
    """Builds the networks of a run from the folder's own configurations, for the devices that JAX finds here."""
    policy = Policy.named(config.model.dtype)
    of_unet = {"remat": config.model.remat, "attention": config.model.attention_on(jax.devices()[0])}
    networks = {}
    for name in ("unet", "vae", "text_encoder"):
        component, where = folder.components[name], str(folder.path / name)
        options = of_unet if name == "unet" else {}
        networks[name] = make_network(component.library_class, component.config, where=where, policy=policy, **options)
    if config.objective == "lcd":
        teacher = networks["unet"]
        if teacher.config.time_cond_proj_dim:
            raise UserError(
                f"{folder.path}: its UNet has time_cond_proj_dim, so it is a consistency model already; "
                "give the folder of the diffusion model as config.model.folder"
            )
        dim = config.lcd.w_embedding_dim or None
        student = dataclasses.replace(teacher.config, time_cond_proj_dim=dim)
        networks["teacher"] = teacher
        networks["unet"] = Network(teacher.model_class, student, policy=policy, **of_unet)
    parts = Parts(networks, folder.schedule, tokenizer([""]), adapted(config, networks))
    parts.latent_shape(config.data.image_size)  # an error now, not in the middle of the first step
    return parts


def adapted(config: Config, networks: dict[str, Network]) -> dict[str, dict[str, lora.Target]]:
    """Returns component -> module -> what its adapter is like.

    The modules of all components are chosen at once, so that a pattern may begin with a component's name.

    Raises:
      UserError: a pattern that matches nothing, a rank or an alpha that can't be.
    """
    if not config.lora.rank:
        return {}
    names = trained_components(config)
    shapes = {f"{name}.{path}": leaf for name in names for path, leaf in networks[name].shapes.items()}
    chosen: dict[str, dict[str, lora.Target]] = {name: {} for name in names}
    try:
        for module, target in lora.choose(shapes, config.lora.targets()).items():
            name, _, path = module.partition(".")
            chosen[name][path] = target
    except UserError as error:
        raise UserError(f"config.lora: {error}") from None
    return {name: of for name, of in chosen.items() if of}


def initial_params(config: Config, parts: Parts, folder: Folder) -> dict[str, Flat]:
    """Returns the float32 weights that training starts from.

    They are the folder's own, the w-embedding's projection zero: the student then equals the teacher for every guidance
    at step 0; as it does with adapters, whose second half is zero. The arrays are on the host: they go to the devices
    at once, not by one small program for each shape.
    """
    if parts.adapted:
        return {
            name: lora.init(
                jax.random.fold_in(jax.random.key(config.seed), LORA_KEY - number),
                parts.networks[name].shapes,
                chosen,
                config.lora.init,
            ).params
            for number, (name, chosen) in enumerate(parts.adapted.items())
        }
    params = {}
    for name in trained_components(config):
        flat: dict[str, Any] = {
            path: np.asarray(array, np.float32) for path, array in folder.components[name].params.items()
        }
        if name == "unet" and config.objective == "lcd" and config.lcd.w_embedding_dim:
            shape = parts.networks["unet"].shapes[W_PROJECTION].shape
            if config.lcd.w_embedding_init == "zeros":
                flat[W_PROJECTION] = np.zeros(shape, np.float32)
            else:
                key = jax.random.fold_in(jax.random.key(config.seed), W_PROJECTION_KEY)
                flat[W_PROJECTION] = jax.nn.initializers.lecun_normal()(key, shape, jnp.float32)
        parts.networks[name].check(flat, where=f"{folder.path}/{name}")
        params[name] = flat
    return params


W_PROJECTION = "time_embedding.cond_proj.kernel"
W_PROJECTION_KEY = 2**31 - 1  # no step has this number, so the key is used nowhere else
LORA_KEY = 2**31 - 2  # and the number below


def frozen_params(config: Config, folder: Folder) -> dict[str, dict[str, np.ndarray]]:
    """Returns the weights that the step reads but does not train, in the compute dtype."""
    dtype = Policy.named(config.model.dtype).compute
    return {
        name: {path: np.asarray(array, dtype) for path, array in folder.components[source].params.items()}
        for name, source in frozen_components(config).items()
    }


def trained_shapes(config: Config, parts: Parts) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
    """Returns the shapes of the weights that are trained, in the dtype in which the networks use them."""
    if not parts.adapted:
        return {name: parts.networks[name].used for name in trained_components(config)}
    found: dict[str, dict[str, jax.ShapeDtypeStruct]] = {}
    for name, chosen in parts.adapted.items():
        used = parts.networks[name].used
        found[name] = {
            path: jax.ShapeDtypeStruct(shape, used[f"{lora.module_of(path)}.kernel"].dtype)
            for path, shape in lora.shapes(used, chosen).items()
        }
    return found


def frozen_shapes(config: Config, parts: Parts) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
    """Returns the shapes and dtypes of `frozen_params`."""
    dtype = Policy.named(config.model.dtype).compute
    return {
        name: {path: jax.ShapeDtypeStruct(leaf.shape, dtype) for path, leaf in parts.networks[name].shapes.items()}
        for name in frozen_components(config)
    }


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Returns the learning rate as a function of the step: linear warm-up, then constant or cosine to zero."""
    if config.decay == "cosine":
        after = optax.cosine_decay_schedule(config.learning_rate, max(steps - config.warmup_steps, 1))
    else:
        after = optax.constant_schedule(config.learning_rate)
    if config.warmup_steps == 0:
        return after
    # the first step already moves: the ramp goes from 1/warmup to 1
    warmup = optax.linear_schedule(
        config.learning_rate / config.warmup_steps, config.learning_rate, config.warmup_steps - 1
    )
    return optax.join_schedules([warmup, after], [config.warmup_steps])


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Returns AdamW behind clipping by the global norm."""
    adamw = optax.adamw(
        learning_rate(config, steps), config.b1, config.b2, config.eps, weight_decay=config.weight_decay
    )
    return optax.chain(_clip(config.clip_norm), adamw) if config.clip_norm else adamw


def _clip(most: float) -> optax.GradientTransformation:
    """Clipping by the global norm, as one factor for all gradients.

    That costs no pass over them, as optax's division does: whatever reads a gradient multiplies while it reads.
    """

    def clip(grads: Any, _: Any) -> Any:
        factor = jnp.minimum(1.0, most / optax.tree.norm(grads))
        return jax.tree.map(lambda g: g * factor, grads)

    return optax.stateless(clip)


def initial_state(config: Config, params: dict[str, Flat]) -> State:
    """Returns the state before the first step. The EMA starts as a copy of the weights."""
    return {
        "step": jnp.int32(0),
        "params": params,
        "ema": jax.tree.map(jnp.copy, params) if config.ema.decay else {},
        "opt_state": make_optimizer(config.optimizer, config.steps).init(params),
        "skipped": jnp.int32(0),
    }
