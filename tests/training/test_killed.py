"""Distillations that are killed and stopped end with the bits of those that were not interrupted.

The signals are real ones, each at an exact moment, and so is the death of the process.
"""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys

import pytest
from compiling import QUICK_FLAGS
from fixtures_folders import write_little
from run_state import ITEMS, assert_same_bits, everything

from lcm_jax.training.checkpoint import finalized_steps

ROOT = pathlib.Path(__file__).resolve().parents[2]
STEPS, EVERY = 12, 3
KINDS = {
    "all weights": ["--config.lcd.w_embedding_dim=8"],
    "LoRA": ["--config.lora.rank=2", "--config.lcd.w_embedding_dim=0"],
}
SAVING, BETWEEN = ("saving", 2 * EVERY), ("training", EVERY + 1)  # moments

# Runs the command once for each (workdir, moment, signal) and prints the exit codes. One process for several runs: most
# of a process' time goes into its start.
PROGRAM = """
import json, os, sys, time
from lcm_jax.training import checkpoint
from lcm_jax import cli, train
from lcm_jax.monitor import progress
save, update = checkpoint.Checkpoints.save, progress.Progress.update
def strike(*now):
    if now == tuple(moment):
        while not checkpoint.finalized_steps(f"{workdir}/checkpoints"):
            time.sleep(0.01)
        os.kill(os.getpid(), number)
def saved(self, done, *rest):
    save(self, done, *rest)  # returns while it is being written
    strike("saving", done)
def updated(self, done, loss):
    strike("training", done)
    return update(self, done, loss)
checkpoint.Checkpoints.save, progress.Progress.update = saved, updated
for workdir, moment, number in json.loads(sys.argv[1]):
    print("exit code", cli.run(train.main, [*sys.argv[2:], f"--workdir={workdir}"]), flush=True)
"""


@pytest.fixture(scope="module")
def options(digits_data_dir, tmp_path_factory):
    """A short training with the smallest networks."""
    return [
        f"--config.model.folder={write_little(tmp_path_factory.mktemp('killed') / 'teacher')}",
        f"--config.data.data_dir={digits_data_dir}",
        "--config.data.image_size=8",
        "--config.batch_size=2",
        f"--config.steps={STEPS}",
        f"--config.checkpoint.every={EVERY}",
        "--config.log.samples_every=0",
        "--config.mesh.cpu_devices=0",
    ]


def trained(options, *runs):
    """Returns the exit code of the process, and what it printed."""
    command = [sys.executable, "-c", PROGRAM, json.dumps([(str(workdir), *rest) for workdir, *rest in runs]), *options]
    environment = {**os.environ, "XLA_FLAGS": QUICK_FLAGS}  # one device
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_is_killed_and_stopped_ends_bit_identical(kind, options, tmp_path):
    workdir, reference = tmp_path / "struck", tmp_path / "reference"
    command = [f"--config={ROOT}/configs/digits.py", *KINDS[kind], *options]
    stops = [(*BETWEEN, signal.SIGINT), ("saving", 3 * EVERY, signal.SIGTERM)]
    nothing = ((), 0)
    code, output = trained(command, (reference, *nothing), (workdir, SAVING, signal.SIGKILL))
    assert code == -signal.SIGKILL, output
    assert f"Done: {STEPS} steps" in output
    assert finalized_steps(workdir / "checkpoints") == [EVERY]

    runs = [(workdir, (moment, step), number) for moment, step, number in stops]
    code, output = trained(command, *runs, (workdir, *nothing))
    codes = [int(line) for line in re.findall(r"exit code (\d+)", output)]
    assert codes == [*(128 + number for *_, number in stops), 0], output
    steps = [int(step) for step in re.findall(rf"Stopped and saved at step (\d+) of {STEPS}", output)]
    assert all(wanted <= step < STEPS for step, (_, wanted, _) in zip(steps, stops, strict=True)), output
    arrays, _, step = everything(reference)
    assert step == STEPS
    assert {re.match(r"\['(\w+)'\]", name)[1] for name in arrays} == set(ITEMS)
    assert_same_bits(workdir, reference)
