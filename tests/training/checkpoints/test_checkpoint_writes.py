"""Checkpoint writing: during the next step, on a full disk, in a process that dies."""

import contextlib
import logging
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import threading
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from little_state import DATA, assert_same_bits, like, make_state, restore, save
from orbax.checkpoint._src.serialization import serialization

from lcm_jax.errors import UserError
from lcm_jax.training import orbax_noise
from lcm_jax.training.checkpoint import Checkpoints, finalized_steps

# ---- while the next step runs


@pytest.fixture
def gate(monkeypatch):
    """Blocks the writing of arrays until it is opened."""
    gate, write = threading.Event(), serialization.async_serialize_from_host

    async def held(*args, **kwargs):
        assert gate.wait(60)
        return await write(*args, **kwargs)

    monkeypatch.setattr(serialization, "async_serialize_from_host", held)
    yield gate
    gate.set()


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("size", [64, 2**18])
def test_the_state_may_be_donated_right_after_save(tmp_path, gate, devices, size):
    mesh = jax.make_mesh((devices,), ("data",), devices=jax.devices()[:devices])
    replicated = NamedSharding(mesh, P())
    state = make_state(optimizer=False, sharding=replicated)
    state["params"]["unet"]["big"] = jax.device_put(np.arange(size, dtype=np.float32), replicated)
    expected = jax.tree.map(lambda x: np.array(x, copy=True), state)
    step = jax.jit(lambda state: jax.tree.map(lambda x: x * -2 - 1, state), donate_argnums=0)
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        checkpoints.save(1, state, {})
        for _ in range(3):
            state = jax.block_until_ready(step(state))
        assert not finalized_steps(tmp_path / "checkpoints")  # nothing is on disk yet
        gate.set()
    restored = Checkpoints(tmp_path).restore_newest(like(expected | state))
    assert restored
    assert_same_bits(restored[0], expected)


# ---- failing writes


def test_a_write_error_is_one_line_and_the_one_before_stays_good(workdir, monkeypatch, capfd):
    async def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    checkpoints = Checkpoints(workdir)
    with monkeypatch.context() as patch:
        patch.setattr(serialization, "async_serialize_from_host", fail)
        checkpoints.save(4, make_state(4), DATA)
        with pytest.raises(
            UserError, match=r"could not be written .*No space left.*the newest complete one is of step 3"
        ) as caught:
            checkpoints.wait()
    assert "\n" not in str(caught.value)
    assert finalized_steps(workdir / "checkpoints") == [3, 2, 1]
    assert capfd.readouterr() == ("", "")
    checkpoints.save(5, make_state(5), DATA)  # with space again
    checkpoints.close()
    restored = restore(workdir)
    assert restored
    assert_same_bits(restored[0], make_state(5))


def test_the_next_save_tells_of_the_failure_before_it(workdir, monkeypatch):
    async def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    checkpoints = Checkpoints(workdir)
    monkeypatch.setattr(serialization, "async_serialize_from_host", fail)
    checkpoints.save(4, make_state(4), DATA)
    with pytest.raises(UserError, match=r"No space left.*the newest complete one is of step 3"):
        checkpoints.save(5, make_state(5), DATA)


def test_a_full_disk(workdir):
    """The kernel refuses to let a file grow, as on a full disk."""
    state = make_state(4)
    rng = np.random.default_rng(0)
    state["params"]["unet"]["big"] = jnp.asarray(rng.standard_normal(2**20, np.float32))
    checkpoints = Checkpoints(workdir)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, old[1]))
    try:
        checkpoints.save(4, state, DATA)
        with pytest.raises(
            UserError, match=r"could not be written to .*File too large.*; the newest complete one is of step 3"
        ):
            checkpoints.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    restored = restore(workdir)
    assert restored
    assert restored[2] == 3
    save(workdir, 4)
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["2", "3", "4"]


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"file/checkpoints can't be written: Not a directory$"):
        Checkpoints(tmp_path / "file").save(1, make_state(), {})
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(UserError, match=f"could not be written to {tmp_path}/checkpoints: .*Not a directory"):
        Checkpoints(tmp_path).save(1, make_state(), {})


def test_a_checkpoint_that_was_deleted_is_noticed(workdir):
    checkpoints = Checkpoints(workdir)
    checkpoints.restore_newest(like(make_state()))
    shutil.rmtree(workdir / "checkpoints" / "2")  # an older one is not needed
    checkpoints.save(4, make_state(4), DATA)
    checkpoints.wait()
    shutil.rmtree(workdir / "checkpoints" / "4")
    said = f"the checkpoint of step 4 was deleted from {workdir}/checkpoints during the run; put it back"
    with pytest.raises(UserError, match=said):
        checkpoints.save(5, make_state(5), DATA)
    checkpoints.close()
    with pytest.raises(UserError, match=said):
        checkpoints.check_there(4)
    checkpoints.check_there(3)


# ---- in a process of its own


QUIET = """
import gc, sys, pathlib, little_state as t
from orbax.checkpoint._src.serialization import serialization
from lcm_jax.errors import UserError
workdir = pathlib.Path(sys.argv[1])
t.save(workdir, 3, 4, 5, keep_last=3)
t.flip(t.FILES["params"](workdir / "checkpoints" / "4"))
t.FILES["manifest"](workdir / "checkpoints" / "5").unlink()  # Orbax fails in several reads at once
assert t.restore(workdir)[2] == 3
gc.collect()
async def fail(*args, **kwargs):
    raise OSError(28, "No space left on device")
serialization.async_serialize_from_host = fail
try:
    t.save(workdir, 6)
except UserError as error:
    print(f"error: {error}", file=sys.stderr)
else:
    raise AssertionError
"""

KILLED = """
import os, signal, sys, threading, little_state as t
from orbax.checkpoint._src.serialization import serialization
async def hold(*args, **kwargs):
    threading.Event().wait()
t.save(sys.argv[1], 1)
serialization.async_serialize_from_host = hold
t.Checkpoints(sys.argv[1]).save(2, t.make_state(2), {})
os.kill(os.getpid(), signal.SIGKILL)
"""


def run_script(script, workdir):
    environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parent)}
    command = [sys.executable, "-c", script, str(workdir)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def test_nothing_but_our_own_lines_on_the_terminal(tmp_path):
    done = run_script(QUIET, tmp_path)
    assert done.stdout == ""
    assert [line.split(":")[0] for line in done.stderr.splitlines()] == ["warning", "warning", "error"], done.stderr
    assert done.returncode == 0


def test_only_dropped_work_is_not_heard(caplog):
    """A read or write may end after the error was reported; errors of other code must still be shown."""
    orbax_noise.silence()
    for lost in ("ValueError('… tensorstore_spec=…')", "ValueError('… in OCDBT database …')", "ValueError('mine')"):
        logging.getLogger("asyncio").error(f"Future exception was never retrieved\nfuture: <Future exception={lost}>")
    assert [record.getMessage().partition("=")[2] for record in caplog.records] == ["ValueError('mine')>"]


def test_killed_in_mid_save(tmp_path, capfd):
    done = run_script(KILLED, tmp_path)
    assert done.returncode == -signal.SIGKILL, done.stderr
    folder = tmp_path / "checkpoints"
    assert len(list(folder.iterdir())) == 2  # something half-written is there
    assert finalized_steps(folder) == [1]
    checkpoints = Checkpoints(tmp_path)
    restored = checkpoints.restore_newest(like(make_state()))
    assert restored
    assert restored[2] == 1
    checkpoints.save(2, make_state(2), DATA)
    checkpoints.close()
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2"]
    assert capfd.readouterr() == ("", "")


def test_a_callback_that_comes_too_late_is_not_heard(monkeypatch):
    """TensorStore prints, by way of sys.excepthook, that asyncio's loop is closed, for each array of a full disk."""
    heard = []
    monkeypatch.setattr(sys, "excepthook", lambda kind, error, trace: heard.append(str(error)))
    monkeypatch.setattr(sys, "unraisablehook", lambda seen: heard.append(str(seen.exc_value)))
    orbax_noise.silence.__wrapped__()
    for error in (RuntimeError("Event loop is closed"), RuntimeError("mine")):
        sys.excepthook(type(error), error, None)
        sys.unraisablehook(types.SimpleNamespace(object=None, exc_value=error))
    assert heard == ["mine", "mine"]
