"""The train command as a user runs it: what it writes and what it refuses."""

import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from commands import train_on_one
from run_state import assert_same_bits, everything

from lcm_jax import config as config_lib
from lcm_jax.objectives import autoencoder

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def uninterrupted(quick, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted")
    assert train_on_one([*quick, f"--workdir={workdir}", "--config.log.samples_every=3"]) == 0
    return workdir


def start(options, workdir, *more):
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "XLA_FLAGS": ""}  # one device
    command = [sys.executable, "-m", "lcm_jax.train", *options, f"--workdir={workdir}", *more]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_a_run_leaves_what_it_says(uninterrupted):
    assert config_lib.load_resolved(uninterrupted).steps == 6
    assert list((uninterrupted / "tensorboard").iterdir())
    images = sorted(path.name for path in (uninterrupted / "samples").iterdir())
    assert images == ["step_000003.png", "step_000006.png"]
    assert sorted(p.name for p in (uninterrupted / "checkpoints").iterdir() if p.name.isdigit()) == ["4", "6"]


def test_a_run_traces_its_step_once(quick, tmp_path, monkeypatch, capsys):
    traced = []
    loss = autoencoder.autoencoder_loss
    monkeypatch.setattr(autoencoder, "autoencoder_loss", lambda **given: traced.append(1) or loss(**given))
    workdir = tmp_path / "it's a run"
    workdir.mkdir()
    (workdir / "samples").touch()
    assert train_on_one([*quick, f"--workdir={workdir}"]) == 2
    assert f"{workdir}/samples is a file; move it away" in capsys.readouterr().err
    (workdir / "samples").unlink()
    assert train_on_one([*quick, f"--workdir={workdir}"]) == 0
    assert len(traced) == 1
    next_command = shlex.split(capsys.readouterr().out.splitlines()[-1])  # as a shell reads it back
    assert next_command[3:] == [f"--workdir={workdir}", f"--out={workdir}/model"]


def test_a_finished_run_says_so_and_changes_nothing(uninterrupted, quick, capsys):
    before = everything(uninterrupted)[2]
    assert train_on_one([*quick, f"--workdir={uninterrupted}", "--config.log.samples_every=3"]) == 0
    assert everything(uninterrupted)[2] == before
    assert "lcm_jax.export" in capsys.readouterr().out


def test_grids_and_logging_use_no_training_key(uninterrupted, quick, tmp_path):
    more = ["--config.log.every=1000", "--config.checkpoint.every=3"]
    assert train_on_one([*quick, *more, f"--workdir={tmp_path}"]) == 0
    assert_same_bits(tmp_path, uninterrupted)


def test_another_seed_is_another_run(uninterrupted, quick, tmp_path):
    assert train_on_one([*quick, "--config.seed=1", f"--workdir={tmp_path}"]) == 0
    a, b = everything(tmp_path)[0], everything(uninterrupted)[0]
    assert any(a[name].tobytes() != b[name].tobytes() for name in a)


def test_a_flipped_bit_in_the_newest_checkpoint_costs_its_steps_only(quick, uninterrupted, tmp_path, capsys):
    workdir = tmp_path / "run"
    assert train_on_one([*quick, f"--workdir={workdir}"]) == 0
    largest = max((workdir / "checkpoints" / "6").rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    assert train_on_one([*quick, f"--workdir={workdir}"]) == 0
    assert "6" in capsys.readouterr().err
    assert_same_bits(workdir, uninterrupted)


def test_a_loss_that_stays_non_finite_stops_the_run_and_keeps_the_last_good_checkpoint(quick, tmp_path, capsys):
    good = ["--config.steps=2", f"--workdir={tmp_path}"]
    assert train_on_one([*quick, *good, "--config.optimizer.learning_rate=1e30"]) == 0
    more = ["--config.steps=60", f"--workdir={tmp_path}", "--config.optimizer.learning_rate=1e30"]
    assert train_on_one([*quick, *more]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "not finite in 5 steps in a row" in error
    assert "learning_rate" in error
    arrays, _, _ = everything(tmp_path)
    assert all(np.isfinite(a).all() for a in arrays.values() if np.issubdtype(a.dtype, np.floating))


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--config.data.split=train[:0]", "train[:0]"),
        ("--config.model.folder=/nowhere/at/all", "/nowhere/at/all"),
        ("--config.data.image_size=31", "config.data.image_size=31"),
    ],
)
def test_bad_input_is_one_line(option, said, quick, tmp_path, capsys):
    assert train_on_one([*quick, option, f"--workdir={tmp_path / 'run'}"]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert said in error[-1]
    assert not (tmp_path / "run" / "checkpoints").exists() or not any((tmp_path / "run" / "checkpoints").iterdir())


def test_a_cpu_is_split_as_the_config_says(quick, tmp_path, capsys):
    process = start(quick, tmp_path / "run", "--config.mesh.cpu_devices=3")
    assert "config.batch_size=8 is not divisible by the 3 devices" in process.communicate(timeout=240)[0]
    assert process.returncode == 2
    assert train_on_one([*quick, "--config.mesh.cpu_devices=3", f"--workdir={tmp_path / 'run'}"]) == 2
    assert "config.mesh.cpu_devices=3 comes too late" in capsys.readouterr().err


def test_an_unwritable_workdir_is_one_line(quick, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert train_on_one([*quick, f"--workdir={tmp_path / 'file' / 'run'}"]) == 2
    assert "can't be written" in capsys.readouterr().err


def test_a_workdir_of_another_configuration_is_one_line(uninterrupted, quick, capsys):
    assert train_on_one([*quick, "--config.ema.decay=0.5", f"--workdir={uninterrupted}"]) == 2
    assert "holds a run with config.ema.decay=0.99, not 0.5" in capsys.readouterr().err
    assert json.loads((uninterrupted / "config.json").read_text())["ema"]["decay"] == 0.99


def test_some_steps_are_profiled(quick, tmp_path, capsys):
    workdir = tmp_path / "run"
    assert train_on_one([*quick, "--config.profile.steps=(2, 3)", f"--workdir={workdir}"]) == 0, capsys.readouterr()
    (trace,) = (workdir / "profile" / "process_0").rglob("*.xplane.pb")
    planes = jax.profiler.ProfileData.from_file(str(trace)).planes
    events = [event for plane in planes for line in plane.lines for event in line.events if event.name == "train"]
    assert sorted(dict(event.stats)["step_num"] for event in events) == [2, 3]
    shutil.rmtree(workdir / "profile")
    more = ["--config.profile.steps=(2, 3)", "--config.steps=7"]
    assert train_on_one([*quick, *more, f"--workdir={workdir}"]) == 0
    assert "warning: config.profile.steps=(2, 3) has no effect: the run resumes after step 6" in capsys.readouterr().err
    assert not (workdir / "profile").exists()
    assert train_on_one([*quick, "--config.profile.steps=(2, 7)", f"--workdir={tmp_path / 'other'}"]) == 2
    assert "config.profile.steps=(2, 7) goes beyond the last step, 6" in capsys.readouterr().err
    for steps in ("(3, 2)", "(0, 1)", "(1,)"):
        assert train_on_one([*quick, f"--config.profile.steps={steps}", f"--workdir={tmp_path / 'other'}"]) == 2
        assert "give the first and the last step, as in (10, 12), or ()" in capsys.readouterr().err
