"""A run with two updates, of which every second step does only the first."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from event_files import visible
from fixtures_folders import write_little

from lcm_jax.config import default_config, from_dict
from lcm_jax.errors import UserError
from lcm_jax.objectives import OBJECTIVES
from lcm_jax.objectives.base import Roles, Update
from lcm_jax.training.loop import train
from lcm_jax.training.losses import Loss
from lcm_jax.training.metrics import computed, losses_in

ONE = Loss(("unet",), ("unet",), None, None, dict, 1, None)  # pyright: ignore[reportArgumentType]
TWO = {"critic": ONE, "generator": ONE._replace(every=2)}
VALUES = {"critic/loss": 1.0, "generator/loss": 2.0, "generator/grad_norm": 3.0}


def test_metrics_of_updates_that_a_step_did_not_do_are_left_out():
    assert computed(VALUES, TWO, 2) == VALUES
    assert computed(VALUES, TWO, 3) == {"critic/loss": 1.0}
    assert computed({"loss": math.inf}, {"critic": ONE}, 3) == {"loss": math.inf}
    assert losses_in(VALUES, TWO) == {"critic/loss": 1.0, "generator/loss": 2.0}
    assert losses_in({"loss": 1.0, "mse": 2.0}, {"critic": ONE}) == {"loss": 1.0}


def updates(options, process):
    def of(role, factor):
        def loss(networks, inputs, draws):
            mean, _ = networks.by_role[role](inputs.images, method="encode")
            return factor * jnp.mean(mean**2), {}

        return loss

    def nothing(key, shape):
        return jnp.zeros(shape[:1])

    return {
        "critic": Update(nothing, of("critic", 1.0), trains=("critic",)),
        "generator": Update(nothing, of("generator", jnp.nan), trains=("generator",), every=2),
    }


@pytest.fixture
def configure(tmp_path, digits_data_dir, monkeypatch):
    roles = Roles({"generator": "vae", "critic": "vae"}, exported={"generator": "vae"})
    record = dataclasses.replace(OBJECTIVES["autoencoder"], roles=lambda options, family: roles, updates=updates)
    monkeypatch.setitem(OBJECTIVES, "autoencoder", record)
    tree = default_config().to_dict() | {"objective": "autoencoder", "batch_size": 4, "steps": 4}
    tree["model"]["folder"] = str(write_little(tmp_path / "teacher"))
    tree["data"] |= {"data_dir": digits_data_dir, "image_size": 8}
    tree["log"] |= {"every": 2, "samples_every": 0}
    tree["checkpoint"]["every"] = 2
    return lambda most: from_dict(tree | {"max_skipped": most})


def test_a_rare_update_has_curves_and_stops_a_run_that_diverges(configure, tmp_path):
    """The generator's loss is NaN in the steps 1 and 3, while the critic's is finite in each."""
    with pytest.raises(UserError, match="not finite in 2 steps in a row, up to step 3"):
        train(configure(2), tmp_path / "run", devices=jax.devices()[:1])
    curves = visible(tmp_path / "run")
    names = {f"{update}/{value}" for update in TWO for value in ("loss", "grad_norm")}
    assert curves.keys() == names | {"skipped", "images_per_second", "data_wait_seconds"}
    assert curves["skipped"] == [(2, 1.0)]
    ((step, loss),) = curves["generator/loss"]
    assert step == 2
    assert math.isnan(loss)
    assert math.isfinite(curves["critic/loss"][0][1])
    # the checkpoint of step 2 has a count for each update
    assert train(configure(5), tmp_path / "run", devices=jax.devices()[:1]).step == 4
    assert visible(tmp_path / "run")["skipped"] == [(2, 1.0), (4, 2.0)]
