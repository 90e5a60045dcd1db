"""The train command in several real processes: losses as with one; stopped, killed, and resumed by others."""

import pathlib
import re
import shutil
import signal
import socket
import time

import numpy as np
import pytest
from compiling import QUICK_FLAGS
from event_files import visible
from forks import Fork, command
from little import assert_weights_equal

from lcm_jax.training.checkpoint import finalized_steps, restore_params

ROOT = pathlib.Path(__file__).resolve().parents[2]
DEVICES, STEPS = 4, 24


@pytest.fixture(scope="module")
def options(little, digits_data_dir):
    return [
        f"--config={ROOT}/configs/digits_teacher.py:vae",
        f"--config.model.folder={little.path}",
        f"--config.data.data_dir={digits_data_dir}",
        "--config.mesh.cpu_devices=0",
        "--config.mesh.fsdp=2",
        "--config.data.image_size=16",  # a tenth of the attention
        "--config.batch_size=8",
        f"--config.steps={STEPS}",
        "--config.optimizer.decay=constant",
        "--config.optimizer.eps=1e-3",
        "--config.optimizer.learning_rate=2e-4",  # or rounding grows beyond the tolerance
        "--config.checkpoint.every=6",
        "--config.log.every=1",
        f"--config.log.samples_every={STEPS}",
    ]


class Group:
    """The processes of one run, four devices in all."""

    def __init__(self, options, workdir, count, wait=60, only=None):
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        flags = f"--xla_force_host_platform_device_count={DEVICES // count} {QUICK_FLAGS}"
        place = [f"--coordinator=127.0.0.1:{port}", f"--num-processes={count}", f"--wait={wait}"] if count > 1 else []
        argv = [*options, f"--workdir={workdir}", *place]
        self.workdir = workdir
        self.processes = [
            Fork(command, "train", [*argv, *([f"--process-id={i}"] if place else [])], flags=flags)
            for i in (range(count) if only is None else only)
        ]

    def wait_for_another_checkpoint(self):
        folder = self.workdir / "checkpoints"
        before, deadline = finalized_steps(folder)[:1], time.monotonic() + 240
        while finalized_steps(folder)[:1] == before:
            assert all(process.poll() is None for process in self.processes), self.end()
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def end(self):
        """The exit codes and what was printed."""
        outputs = [process.communicate() for process in self.processes]
        return [process.returncode for process in self.processes], outputs


def run(options, workdir, count):
    codes, outputs = Group(options, workdir, count).end()
    assert codes == [0] * count, outputs
    assert f"Done: {STEPS} steps" in outputs[0]
    assert not any("step" in output for output in outputs[1:]), outputs[1:]  # one of them speaks
    return workdir


def weights(workdir):
    params, step = restore_params(workdir, "ema")
    assert step == STEPS
    return params["vae"]


def assert_same_bits(a, b):
    for path, array in weights(a).items():
        assert array.tobytes() == weights(b)[path].tobytes(), path


def assert_equal(a, b):
    assert_weights_equal(weights(a), weights(b))


def losses(workdir):
    """{step: loss}, as TensorBoard shows them."""
    return dict(visible(workdir)["loss"])


@pytest.fixture(scope="module")
def by_two(options, tmp_path_factory):
    return run(options, tmp_path_factory.mktemp("two") / "run", 2)


def test_two_processes_train_as_one_does(options, by_two, tmp_path):
    workdir = run(options, tmp_path / "run", 1)
    expected, found = losses(by_two), losses(workdir)
    assert len(expected) == STEPS
    assert found.keys() == expected.keys()
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-5)
    assert_equal(workdir, by_two)
    assert [path.name for path in (workdir / "samples").iterdir()] == [f"step_{STEPS:06d}.png"]


def test_killed_and_stopped_it_goes_on_with_any_number_of_processes(options, by_two, tmp_path):
    workdir = tmp_path / "run"
    group = Group(options, workdir, 2)
    group.wait_for_another_checkpoint()
    group.processes[1].kill()
    codes, outputs = group.end()
    assert codes == [1, -signal.SIGKILL], outputs
    assert re.search(
        r"lcm-jax: error: process 1 on \S+ was lost without an error message \(killed\?\); all processes", outputs[0]
    )

    group = Group(options, workdir, 2)
    group.wait_for_another_checkpoint()
    group.processes[1].send_signal(signal.SIGTERM)
    codes, outputs = group.end()
    assert codes == [128 + signal.SIGTERM] * 2, outputs
    stopped = int(re.search(rf"Stopped and saved at step (\d+) of {STEPS}", outputs[0])[1])
    assert finalized_steps(workdir / "checkpoints")[0] == stopped < STEPS

    by_one = run(options, shutil.copytree(workdir, tmp_path / "by_one"), 1)
    assert_equal(by_one, by_two)
    assert losses(by_one) == pytest.approx(losses(by_two), rel=1e-5)
    assert_same_bits(run(options, workdir, 2), by_two)


def test_the_first_process_killed_is_noticed_too(options, tmp_path):
    group = Group(options, tmp_path / "run", 2)
    group.wait_for_another_checkpoint()
    group.processes[0].kill()
    codes, outputs = group.end()
    assert codes == [-signal.SIGKILL, 1], outputs
    assert "error: process 0 was lost without an error message (killed?)" in outputs[1]


def test_why_one_ended_is_told_by_the_others(options, tmp_path):
    (tmp_path / "run" / "config.json").mkdir(parents=True)  # which only the first process writes
    codes, outputs = Group(options, tmp_path / "run", 2).end()
    assert codes == [2, 1], outputs
    assert "can't be written" in outputs[0]
    assert re.search(r"process 0 on \S+ has ended: --workdir=.* can't be written", outputs[1])


def test_others_that_do_not_come_are_one_line(options, tmp_path):
    for only, said in (
        ((0,), "timed out waiting for 1 of 2 processes: 1 (connected: 0 on"),
        ((1,), "does not answer ("),
    ):
        codes, outputs = Group(options, tmp_path / "run", 2, wait=1, only=only).end()
        assert codes == [1], outputs  # worth another try
        assert said in outputs[0].splitlines()[-1]
        assert not (tmp_path / "run").exists()
