"""The networks of an objective by role: which averages a run keeps, and roles that can't be."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures_folders import write_little

from lcm_jax.config import Config, EMAConfig, ModelConfig
from lcm_jax.data.batches import DataConfig
from lcm_jax.errors import UserError
from lcm_jax.interop.folder import read_folder
from lcm_jax.interop.tokenizer import load_tokenizer
from lcm_jax.objectives import OBJECTIVES
from lcm_jax.objectives.autoencoder import AutoencoderConfig
from lcm_jax.objectives.base import Roles, Update
from lcm_jax.training.losses import make_losses
from lcm_jax.training.networks import frozen_params, initial_params, make_parts
from lcm_jax.training.state import initial_state
from lcm_jax.training.step import make_step

SIZE = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return read_folder(write_little(tmp_path_factory.mktemp("little") / "teacher"))


def make(folder, decay=0.9, trains=(), reads="generator", **roles):
    """(config, parts) of a generator and a critic, whose loss reads the average of `reads`."""
    roles = {"trained": {"generator": "vae", "critic": "vae"}, "exported": {"generator": "vae"}, **roles}

    def loss(networks, inputs, draws):
        critic, average = networks.by_role["critic"], networks.average[reads]
        a, b = (network(inputs.images, method="encode")[0] for network in (critic, average))
        return jnp.mean((a - b) ** 2), {}

    def updates(options, process):
        return {"critic": Update(lambda key, shape: jnp.zeros(shape[:1]), loss, trains=trains)}

    objective = OBJECTIVES["autoencoder"]
    record = dataclasses.replace(objective, name="toy", roles=lambda options, family: Roles(**roles), updates=updates)
    config = Config(model=ModelConfig(folder=str(folder.path)), data=DataConfig(image_size=SIZE), ema=EMAConfig(decay))
    return config, make_parts(config, folder, load_tokenizer(folder), (record, AutoencoderConfig()))


def states(folder, **options):
    """The shapes of the state at the start and after a step."""
    config, parts = make(folder, **options)
    params = initial_params(config, parts, folder)
    state = jax.eval_shape(lambda: initial_state(config, make_losses(parts), params))
    batch = {
        "image": jax.ShapeDtypeStruct((2, SIZE, SIZE, 3), jnp.uint8),
        "input_ids": jax.ShapeDtypeStruct((2, *parts.null_ids.shape[1:]), np.int32),
    }
    return state, jax.eval_shape(make_step(config, parts), state, frozen_params(parts, folder), batch)[0]


@pytest.mark.parametrize(
    ("options", "averaged"),
    [
        ({}, {"vae"}),
        ({"averaged": ("critic",), "reads": "critic"}, {"vae", "critic"}),
        ({"decay": 0.0}, set()),
        ({"decay": 0.0, "averaged": ("critic",), "reads": "critic"}, set()),
    ],
)
def test_averages_are_kept_of_exported_roles_and_of_those_that_are_read(folder, options, averaged):
    start, after = states(folder, **options)
    assert start["params"].keys() == {"vae", "critic"}
    assert start["ema"].keys() == averaged
    assert jax.tree.map(lambda leaf: leaf.shape, after) == jax.tree.map(lambda leaf: leaf.shape, start)


def test_an_average_that_is_not_kept_can_not_be_read(folder):
    for decay in (0.9, 0.0):
        with pytest.raises(KeyError, match="critic"):
            states(folder, decay=decay, reads="critic")


@pytest.mark.parametrize(
    ("roles", "said"),
    [
        (
            {"trained": {"generator": "vae", "critic": "vea"}},
            "component of the role 'critic' of the objective 'toy' is 'vea'; did you mean 'vae'",
        ),
        ({"frozen": {"teacher": "unit"}}, "component of the role 'teacher' .* is 'unit'; did you mean 'unet'"),
        ({"exported": {"generate": "vae"}}, "exported or averaged role is 'generate'; did you mean 'generator'"),
        ({"averaged": ("teacher",)}, "exported or averaged role is 'teacher'"),
        ({"trains": ("critics",)}, "role that the update 'critic' .* trains is 'critics'; did you mean 'critic'"),
        ({"trains": ("critic",)}, "no update of the objective 'toy' trains the role 'generator'"),
    ],
)
def test_roles_that_can_not_be_are_one_line(folder, roles, said):
    with pytest.raises(UserError, match=said):
        make_losses(make(folder, **roles)[1])
