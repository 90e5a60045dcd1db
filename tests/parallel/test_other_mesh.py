"""A run of the train command that resumes on a different mesh."""

import pathlib

from little import assert_weights_equal

from lcm_jax import cli, train
from lcm_jax.training.checkpoint import restore_params

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_a_run_goes_on_over_another_mesh(little, digits_data_dir, tmp_path):
    options = [
        f"--config={ROOT}/configs/digits_teacher.py:vae",
        f"--config.model.folder={little.path}",
        f"--config.data.data_dir={digits_data_dir}",
        "--config.mesh.cpu_devices=0",
        "--config.data.image_size=16",
        "--config.batch_size=16",
        "--config.optimizer.decay=constant",
        "--config.optimizer.warmup_steps=0",
        "--config.optimizer.eps=1e-3",
        "--config.log.samples_every=4",
    ]

    def run(name, *more):
        assert cli.run(train.main, [*options, f"--workdir={tmp_path / name}", *more]) == 0
        return restore_params(tmp_path / name, "ema")[0]["vae"]

    expected = run("one", "--config.mesh.data=8", "--config.steps=4")
    run("two", "--config.mesh.fsdp=2", "--config.steps=2")
    found = run("two", "--config.mesh.data=1", "--config.mesh.fsdp=-1", "--config.accumulate=2", "--config.steps=4")
    assert_weights_equal(found, expected)
    images = (tmp_path / "two" / "samples").iterdir()
    assert sorted(path.name for path in images) == ["step_000002.png", "step_000004.png"]
