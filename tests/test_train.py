"""The train command as a user runs it: stopped, killed, started again; what it writes and what it refuses."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from lcm_jax import checkpoint, cli, train
from lcm_jax import config as config_lib
from lcm_jax.blank import write_blank
from lcm_jax.errors import UserError

ALL_DEVICES = train.data_mesh
ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """Most runs here take one device: eight copies of each array make Orbax slow and nothing clearer."""
    patch = pytest.MonkeyPatch()
    with patch.context() as context:
        one = np.array(jax.devices()[:1])
        context.setattr(train, "data_mesh", lambda batch_size: jax.sharding.Mesh(one, ("data",)))
        yield


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return write_blank("micro", tmp_path_factory.mktemp("micro") / "teacher")


@pytest.fixture(scope="module")
def options(teacher, digits_data_dir):
    """A run of seconds, on real data, that every test here shares its compiled step with."""
    return [
        f"--config={ROOT}/configs/digits.py:smoke",
        f"--config.model.folder={teacher}",
        f"--config.data.data_dir={digits_data_dir}",
        "--config.steps=6",
        "--config.checkpoint.every=2",
        "--config.log.samples_every=0",
    ]


@pytest.fixture(scope="module")
def uninterrupted(options, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted")
    assert cli.run(train.main, [*options, f"--workdir={workdir}", "--config.log.samples_every=3"]) == 0
    return workdir


def everything(workdir):
    """Parameters, EMA, optimizer, counters and data position of the newest checkpoint, as comparable values."""
    folder = workdir / "checkpoints"
    step = checkpoint.good_steps(folder)[0]
    names = ("params", "ema", "opt_state", "counters")
    with ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(read_only=True)) as manager:
        items = {name: ocp.args.StandardRestore() for name in names if (folder / str(step) / name).exists()}
        meta = ocp.args.JsonRestore()
        arrays = dict(manager.restore(step, args=ocp.args.Composite(**items, meta=meta)).items())
    data = arrays.pop("meta")["content"]["data"]
    leaves = jax.tree.leaves_with_path(arrays)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}, data, step


def assert_same_bits(a, b):
    (arrays_a, data_a, step_a), (arrays_b, data_b, step_b) = everything(a), everything(b)
    assert step_a == step_b
    assert data_a == data_b
    assert arrays_a.keys() == arrays_b.keys()
    for name, array in arrays_a.items():
        assert array.tobytes() == arrays_b[name].tobytes(), name


def start(options, workdir, *more):
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "XLA_FLAGS": ""}  # one device
    command = [sys.executable, "-m", "lcm_jax.train", *options, f"--workdir={workdir}", *more]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for(workdir, step, process):
    deadline = time.monotonic() + 240
    while not (workdir / "checkpoints" / str(step)).is_dir():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_run_leaves_what_it_says(uninterrupted):
    assert config_lib.load_resolved(uninterrupted).steps == 6
    assert list((uninterrupted / "tensorboard").iterdir())
    pictures = sorted(path.name for path in (uninterrupted / "samples").iterdir())
    assert pictures == ["step_000003.png", "step_000006.png"]
    assert sorted(p.name for p in (uninterrupted / "checkpoints").iterdir() if p.name.isdigit()) == ["4", "6"]


def test_a_finished_run_says_so_and_changes_nothing(uninterrupted, options, capsys):
    before = everything(uninterrupted)[2]
    assert cli.run(train.main, [*options, f"--workdir={uninterrupted}", "--config.log.samples_every=3"]) == 0
    assert everything(uninterrupted)[2] == before
    assert "lcm_jax.export" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_saves_and_ends_bit_identical(number, uninterrupted, options, tmp_path):
    process = start([*options, "--config.steps=400"], tmp_path)
    wait_for(tmp_path, 2, process)
    process.send_signal(number)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 128 + number, output
    stopped = int(re.search(r"Stopped at step (\d+) of 400, saved", output)[1])
    assert everything(tmp_path)[2] == stopped
    # the comparison runs as far as the stopped one came
    longer = tmp_path / "longer"
    steps = f"--config.steps={stopped + 2}"
    assert cli.run(train.main, [*options, steps, f"--workdir={tmp_path}"]) == 0
    assert cli.run(train.main, [*options, steps, f"--workdir={longer}", "--config.checkpoint.every=1000"]) == 0
    assert_same_bits(tmp_path, longer)


def test_a_killed_run_ends_bit_identical(uninterrupted, options, tmp_path):
    process = start([*options, "--config.steps=400"], tmp_path)
    wait_for(tmp_path, 4, process)
    process.kill()
    process.communicate()
    steps = everything(tmp_path)[2] + 3
    assert cli.run(train.main, [*options, f"--config.steps={steps}", f"--workdir={tmp_path}"]) == 0
    longer = tmp_path / "longer"
    assert cli.run(train.main, [*options, f"--config.steps={steps}", f"--workdir={longer}"]) == 0
    assert_same_bits(tmp_path, longer)


def test_grids_and_logging_use_no_training_key(uninterrupted, options, tmp_path):
    more = ["--config.log.every=1000", "--config.checkpoint.every=3"]
    assert cli.run(train.main, [*options, *more, f"--workdir={tmp_path}"]) == 0
    assert_same_bits(tmp_path, uninterrupted)


def test_another_seed_is_another_run(uninterrupted, options, tmp_path):
    assert cli.run(train.main, [*options, "--config.seed=1", f"--workdir={tmp_path}"]) == 0
    a, b = everything(tmp_path)[0], everything(uninterrupted)[0]
    assert any(a[name].tobytes() != b[name].tobytes() for name in a)


def test_a_flipped_bit_in_the_newest_checkpoint_costs_its_steps_only(options, uninterrupted, tmp_path, capsys):
    workdir = tmp_path / "run"
    assert cli.run(train.main, [*options, f"--workdir={workdir}"]) == 0
    largest = max((workdir / "checkpoints" / "6").rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    assert cli.run(train.main, [*options, f"--workdir={workdir}"]) == 0
    assert "6" in capsys.readouterr().err
    assert_same_bits(workdir, uninterrupted)


def test_a_loss_that_stays_non_finite_stops_the_run_and_keeps_the_last_good_checkpoint(options, tmp_path, capsys):
    good = ["--config.steps=2", f"--workdir={tmp_path}"]
    assert cli.run(train.main, [*options, *good, "--config.optimizer.learning_rate=1e30"]) in (0, 2)
    more = ["--config.steps=60", f"--workdir={tmp_path}", "--config.optimizer.learning_rate=1e30"]
    assert cli.run(train.main, [*options, *more]) == 2
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
        ("--config.data.image_size=30", "config.data.image_size=30"),
    ],
)
def test_bad_input_is_one_line(option, said, options, tmp_path, capsys):
    assert cli.run(train.main, [*options, option, f"--workdir={tmp_path / 'run'}"]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert said in error[-1]
    assert not (tmp_path / "run" / "checkpoints").exists() or not any((tmp_path / "run" / "checkpoints").iterdir())


def test_a_batch_is_divided_by_all_devices():
    mesh = ALL_DEVICES(16)
    assert mesh.shape == {"data": 8}
    with pytest.raises(UserError, match=r"config.batch_size=7 does not divide by the 8 devices"):
        ALL_DEVICES(7)


def test_an_unwritable_workdir_is_one_line(options, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert cli.run(train.main, [*options, f"--workdir={tmp_path / 'file' / 'run'}"]) == 2
    assert "can't be written" in capsys.readouterr().err


def test_a_workdir_of_another_configuration_is_one_line(uninterrupted, options, capsys):
    assert cli.run(train.main, [*options, "--config.lcd.skip=10", f"--workdir={uninterrupted}"]) == 2
    assert "holds a run with config.lcd.skip=20, not 10" in capsys.readouterr().err
    assert json.loads((uninterrupted / "config.json").read_text())["lcd"]["skip"] == 20
