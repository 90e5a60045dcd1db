"""The published models that the planner knows without a download, and the configs that start from them."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcm_jax import config_file
from lcm_jax.planning.blueprint import blueprint, published
from lcm_jax.training.networks import trained_shapes


def prompt(padding):
    return [[49406, 49407, *[padding] * 75]]


def test_the_empty_prompt():
    """Start, end, and what fills the 77 tokens: the end's own in SD 1.x, "!" in SD 2.x. Other tokens, another step."""
    for name, padding in {"runwayml/stable-diffusion-v1-5": 49407, "stabilityai/stable-diffusion-2-1": 0}.items():
        assert published()[name][1].tolist() == prompt(padding)
    for name in ("stabilityai/stable-diffusion-xl-base-1.0", "segmind/SSD-1B"):
        found = jax.tree.map(np.ndarray.tolist, published()[name][1])
        assert found == {"tokenizer": prompt(49407), "tokenizer_2": prompt(0)}


@pytest.mark.parametrize(
    ("config", "modules", "parameters"), [("sdxl_lora", 788, 196_751_360), ("ssd1b_lora", 423, 104_902_656)]
)
def test_what_the_loras_configs_train(config, modules, parameters):
    """The counts of the published LCM-LoRAs."""
    parts = blueprint(config_file.load(config))
    assert len(parts.adapted["unet"]) == modules
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(trained_shapes(parts))) == parameters
    assert parts.latent_shape(1024) == (128, 128, 4)
    assert parts.networks["vae"].config.scaling_factor == 0.13025


def test_ssd1bs_unet_is_traced():
    parts = blueprint(config_file.load("ssd1b_lora"))
    unet, float32 = parts.networks["unet"], jnp.float32
    condition = {
        "context": jax.ShapeDtypeStruct((1, 77, 2048), float32),
        "pooled": jax.ShapeDtypeStruct((1, 1280), float32),
        "time_ids": jax.ShapeDtypeStruct((1, 6), float32),
    }

    def output(weights, z, condition):
        return parts.family.call(functools.partial(unet.apply, weights), z, jnp.zeros(1, jnp.int32), condition)

    z = jax.ShapeDtypeStruct((1, 128, 128, 4), float32)
    assert jax.eval_shape(output, unet.shapes, z, condition).shape == z.shape
