"""Checkpoints: the same bits back, and what happens when a file, a disk or a process fails."""

import asyncio
import contextlib
import gc
import json
import logging
import os
import pathlib
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint._src.serialization import serialization

from lcm_jax import checkpoint
from lcm_jax.checkpoint import Checkpoints, checksums, good_steps, restore_params
from lcm_jax.errors import UserError

DATA = {"position": 7, "nested": {"2": [1, 2], "10": "ü"}}


def make_state(seed=0, ema=True, optimizer=True, sharding=None):
    """A micro state of a run: keys that sort unlike numbers, arrays on both sides of what Orbax puts into one file."""
    rng = np.random.default_rng(seed)
    sharding = sharding or SingleDeviceSharding(jax.devices()[0])
    params = {
        "unet": {f"down_blocks.{i}.kernel": rng.standard_normal((4, 8)).astype(np.float32) for i in ("2", "10", "1")},
        "text_encoder": {"embedding": rng.standard_normal((64, 32)).astype(np.float32)},
    }
    params = jax.device_put(params, sharding)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.linear_schedule(0.0, 1e-3, 5)))
    opt_state = jax.tree.map(lambda x: x + seed if x.ndim == 0 else x + rng.standard_normal(x.shape), tx.init(params))
    state = {
        "step": jnp.int32(seed),
        "params": params,
        "ema": jax.tree.map(lambda x: x * 0.5, params) if ema else {},
        "opt_state": opt_state if optimizer else (),
        "skipped": jnp.int32(2),
    }
    return jax.device_put(state, sharding)


def like(state, sharding=None):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding or x.sharding), state)


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True):
        name = jax.tree_util.keystr(path)
        assert x.dtype == y.dtype, name
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), name


def save(workdir, *steps, data=DATA, **options):
    """Saves make_state(step) at each step."""
    with contextlib.closing(Checkpoints(workdir, **options)) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state(step), data)


def restore(workdir, step=0):
    return Checkpoints(workdir).restore_newest(like(make_state(step)))


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A workdir with the checkpoints of steps 1, 2, 3."""
    workdir = tmp_path_factory.mktemp("three")
    save(workdir, 1, 2, 3)
    return workdir


@pytest.fixture
def workdir(three, tmp_path):
    """A copy of it to do harm to."""
    return shutil.copytree(three, tmp_path / "run")


def flip(path, where=0.5, bit=1):
    content = bytearray(path.read_bytes())
    content[int(len(content) * where)] ^= 1 << bit
    path.write_bytes(content)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def arrays_file(item):
    """The file with an item's array data, relative to the step's folder: the largest there."""

    def find(step_folder):
        files = (step_folder / item).rglob("d/*")
        return max(files, key=lambda path: path.stat().st_size)

    return find


FILES = {
    "params": arrays_file("params"),
    "ema": arrays_file("ema"),
    "opt_state": arrays_file("opt_state"),
    "counters": arrays_file("counters"),
    "manifest": lambda step: step / "params" / "manifest.ocdbt",
    "tree": lambda step: step / "opt_state" / "_METADATA",
    "meta": lambda step: step / "meta" / "metadata",
}
HARMS = {"flipped": flip, "truncated": truncate, "deleted": pathlib.Path.unlink}


# ---- the same bits


def test_restore_gives_the_same_bits(three):
    state, data, step = restore(three)
    assert step == 3
    assert data == DATA
    assert_same_bits(state, make_state(3))
    assert list(state["params"]["unet"]) == list(make_state(3)["params"]["unet"])


def test_every_dtype_and_unusual_bits(tmp_path):
    words = np.array([0x7FC00001, 0xFFC12345, 0x7F800001, 0x80000000, 0x7F800000, 0x00000001], np.uint32)
    state = make_state(optimizer=False)
    state["params"]["odd"] = {
        "float32": jnp.asarray(words.view(np.float32)),
        "bfloat16": jnp.asarray(np.arange(2**16, dtype=np.uint16).view(jnp.bfloat16)),
        "float16": jnp.asarray(np.arange(2**16, dtype=np.uint16).view(np.float16)),
        "int8": jnp.arange(-128, 128, dtype=jnp.int8),
        "uint32": jnp.asarray(words),
        "bool": jnp.asarray([True, False, True]),
        "scalar": jnp.float32(-0.0),
    }
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        checkpoints.save(1, state, {})
    restored = Checkpoints(tmp_path).restore_newest(like(state))
    assert restored
    assert_same_bits(restored[0], state)


@pytest.mark.parametrize(("ema", "optimizer"), [(False, True), (True, False), (False, False)])
def test_parts_without_leaves_come_back_as_they_were(tmp_path, ema, optimizer):
    state = make_state(ema=ema, optimizer=optimizer)
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        checkpoints.save(1, state, {})
    restored = Checkpoints(tmp_path).restore_newest(like(state))
    assert restored
    assert_same_bits(restored[0], state)


def test_data_state_comes_back_as_json(tmp_path):
    save(tmp_path, 1, data={2: "int keys sort unlike their strings", 10: (1, 2), "x": None})
    restored = restore(tmp_path)
    assert restored
    assert restored[1] == {"2": "int keys sort unlike their strings", "10": [1, 2], "x": None}


def test_restore_onto_other_shardings(three):
    mesh = jax.make_mesh((8,), ("data",))
    state = make_state(3)
    for target in (NamedSharding(mesh, P()), NamedSharding(mesh, P(None, "data"))):
        shardings = jax.tree.map(lambda x, s=target: s if x.ndim == 2 else NamedSharding(mesh, P()), state)
        wanted = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)
        restored = Checkpoints(three).restore_newest(wanted)
        assert restored
        assert_same_bits(restored[0], state)
        assert jax.tree.map(lambda x: x.sharding, restored[0]) == shardings


def test_save_sharded_restore_on_one_device(tmp_path):
    mesh = jax.make_mesh((8,), ("data",))
    state = make_state(optimizer=False)
    sharded = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, P(None, "data"))) if x.ndim else x, state)
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        checkpoints.save(1, sharded, {})
    restored = Checkpoints(tmp_path).restore_newest(like(state))
    assert restored
    assert_same_bits(restored[0], state)


# ---- checksums


def test_checksums_do_not_depend_on_sharding():
    mesh = jax.make_mesh((4, 2), ("a", "b"))
    x = np.random.default_rng(0).standard_normal((16, 8, 4)).astype(np.float32)
    specs = (P(), P("a"), P("b", "a"), P(None, ("a", "b")), P("a", None, "b"))
    sums = {checksums([jax.device_put(x, NamedSharding(mesh, spec))])[0] for spec in specs}
    assert sums == set(checksums([jnp.asarray(x)]))


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.int8, np.float64])
def test_checksums_see_every_bit(dtype):
    with jax.enable_x64(True):
        x = np.random.default_rng(0).standard_normal((3, 4)).astype(dtype)
        seen = set(checksums([x]))
        bits = x.nbytes * 8
        for bit in range(bits):
            flipped = np.frombuffer(x.tobytes(), np.uint8).copy()
            flipped[bit // 8] ^= 1 << bit % 8
            seen.update(checksums([flipped.view(dtype).reshape(x.shape)]))
    assert len(seen) == bits + 1  # and all of them differ among themselves


def test_checksums_see_order():
    rng = np.random.default_rng(0)
    x = 2.0 ** rng.integers(-3, 4, (32, 32)).astype(np.float32)  # words with 23 equal bits at the end
    reference = checksums([x])
    assert checksums([x.T.copy()]) != reference
    assert checksums([x.reshape(64, 16)]) == reference  # the same words in the same order
    swaps = [(i, j) for i, j in rng.integers(0, 1024, (1500, 2)) if x.flat[i] != x.flat[j]]
    for i, j in swaps:
        y = x.copy()
        y.flat[[i, j]] = y.flat[[j, i]]
        assert checksums([y]) != reference
    assert len(swaps) > 1000


# ---- damage


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("file", FILES)
def test_damaged_newest_is_named_and_the_one_before_is_used(workdir, file, harm, capfd):
    folder = workdir / "checkpoints"
    HARMS[harm](FILES[file](folder / "3"))
    content = contents(folder / "3")
    checkpoints = Checkpoints(workdir)
    restored = checkpoints.restore_newest(like(make_state()))
    assert restored
    state, data, step = restored
    assert (step, data) == (2, DATA)
    assert_same_bits(state, make_state(2))

    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("warning: the checkpoint of step 3 is damaged (")
    assert re.search(r"damaged \(.{15,}\); ", err)
    assert "tensorstore_spec" not in err
    assert err.endswith(f"); going on from step 2; it is kept as {folder}/3.damaged\n")
    assert len(err) < 500
    assert not (folder / "3").exists()
    assert contents(folder / "3.damaged") == content

    checkpoints.save(3, make_state(33), DATA)  # training gets there again
    checkpoints.close()
    again = restore(workdir)
    assert again
    assert again[2] == 3
    assert_same_bits(again[0], make_state(33))
    assert contents(folder / "3.damaged") == content


def test_no_bit_of_any_file_changes_the_state_unseen(three, tmp_path, caplog):
    """Files that Orbax doesn't need may be harmed; then the state is whole."""
    step_folder = three / "checkpoints" / "3"
    files = [path.relative_to(step_folder) for path in sorted(step_folder.rglob("*")) if path.is_file()]
    places = [(path, where) for path in files for where in (0.4,)]
    for name in ("params", "meta"):
        path = FILES[name](step_folder).relative_to(step_folder)
        places += [(path, where) for where in np.random.default_rng(0).random(10)]
    outcomes = []
    target = tmp_path / "checkpoints" / "3"
    shutil.copytree(step_folder, target)
    checkpoints, wanted, expected = Checkpoints(tmp_path), like(make_state()), make_state(3)
    for path, where in places:
        flip(target / path, where)
        try:
            restored = checkpoints.restore_newest(wanted)
            assert restored
            assert_same_bits(restored[0], expected)
            assert restored[1] == DATA
            outcomes.append("whole")
        except UserError as error:
            outcomes.append(str(error).partition(" (")[0])
        flip(target / path, where)
    refused = f"{target.parent}: no checkpoint is whole"
    assert set(outcomes) == {"whole", refused}
    assert outcomes.count(refused) > 20
    gc.collect()
    assert [record.getMessage() for record in caplog.records] == []  # nor do asyncio and Orbax complain
    assert len(files) > 30


def test_reads_that_orbax_gives_up_are_not_heard_of(workdir, monkeypatch, caplog):
    """Now and then it drops a read that has failed as well; here it always does."""

    async def fail():
        raise ValueError("a second error")

    def restore(self, *args, **kwargs):
        loop = asyncio.new_event_loop()
        cycle = [loop.create_task(fail())]
        cycle.append(cycle)
        loop.run_until_complete(asyncio.sleep(0.01))
        loop.close()
        raise ValueError("the first error")

    monkeypatch.setattr(ocp.Checkpointer, "restore", restore)
    with pytest.raises(UserError, match="the first error"):
        restore_params(workdir, "ema")
    gc.collect()
    assert caplog.records == []


def test_several_damaged_and_an_older_one_set_aside_before(workdir, capfd):
    folder = workdir / "checkpoints"
    shutil.copytree(folder / "1", folder / "3.damaged")
    flip(FILES["ema"](folder / "3"))
    (folder / "2" / "meta" / "metadata").write_text("")
    restored = restore(workdir)
    assert restored
    assert restored[2] == 1
    lines = capfd.readouterr().err.splitlines()
    assert [line.split(" is ")[0] for line in lines] == [f"warning: the checkpoint of step {n}" for n in (3, 2)]
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2.damaged", "3.damaged"]


def test_all_damaged_is_an_error_and_nothing_is_renamed(workdir):
    folder = workdir / "checkpoints"
    for step in (1, 2, 3):
        flip(FILES["params"](folder / str(step)))
    with pytest.raises(UserError) as caught:
        restore(workdir)
    message = str(caught.value)
    assert "\n" not in message
    assert all(f"step {step}: " in message for step in (1, 2, 3))
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2", "3"]


def test_a_bare_step_folder_is_damage(workdir, capfd):
    (workdir / "checkpoints" / "9").mkdir()
    restored = restore(workdir)
    assert restored
    assert restored[2] == 3
    assert "step 9 is damaged (" in capfd.readouterr().err
    assert (workdir / "checkpoints" / "9.damaged").is_dir()


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("file", ["_CHECKPOINT_METADATA", "params/_METADATA", "meta/metadata"])
def test_damage_to_an_older_one_does_not_matter(workdir, file, harm, capfd):
    HARMS[harm](workdir / "checkpoints" / "2" / file)
    checkpoints = Checkpoints(workdir)
    restored = checkpoints.restore_newest(like(make_state()))
    assert restored
    assert restored[2] == 3
    checkpoints.save(4, make_state(4), DATA)
    checkpoints.close()
    assert good_steps(workdir / "checkpoints") == [4, 3, 2]
    assert capfd.readouterr() == ("", "")


def test_no_checkpoint_is_none(tmp_path):
    assert restore(tmp_path) is None
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "5").write_text("a file is no checkpoint")
    assert restore(tmp_path) is None


def _drop(state):
    del state["params"]["unet"]["down_blocks.10.kernel"]


def _add(state):
    state["params"]["unet"]["down_blocks.11.kernel"] = jnp.zeros((4, 8))


def _reshape(state):
    state["params"]["unet"]["down_blocks.10.kernel"] = jnp.zeros((8, 4))


def _cast(state):
    state["params"]["unet"]["down_blocks.10.kernel"] = jnp.zeros((4, 8), jnp.bfloat16)


def _no_ema(state):
    state["ema"] = {}


def _other_optimizer(state):
    state["opt_state"] = optax.sgd(0.1, momentum=0.9).init(state["params"])


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (_drop, r"\['params'\]\['unet'\]\['down_blocks.10.kernel'\] is float32 \(4, 8\) there, absent in this run"),
        (_add, r"\['params'\]\['unet'\]\['down_blocks.11.kernel'\] is absent there, float32 \(4, 8\) in this run"),
        (_reshape, r"\['down_blocks.10.kernel'\] is float32 \(4, 8\) there, float32 \(8, 4\) in this run"),
        (_cast, r"\['down_blocks.10.kernel'\] is float32 \(4, 8\) there, bfloat16 \(4, 8\) in this run"),
        (_no_ema, r"\['ema'\]\['text_encoder'\]\['embedding'\] is float32 \(64, 32\) there, absent in this run"),
        (_other_optimizer, r"\['opt_state'\].* is absent there"),
    ],
)
def test_another_model_is_named_by_the_first_key_that_differs(workdir, change, expected):
    state = make_state()
    change(state)
    with pytest.raises(UserError, match=expected) as caught:
        Checkpoints(workdir).restore_newest(like(state))
    assert "another model" in str(caught.value)
    assert "damaged" not in str(caught.value)
    assert good_steps(workdir / "checkpoints") == [3, 2, 1]


# ---- which are kept


def test_keep_last_and_keep_every(tmp_path):
    save(tmp_path, *range(1, 10), keep_last=2, keep_every=4)
    assert good_steps(tmp_path / "checkpoints") == [9, 8, 4]
    save(tmp_path, 10, 11, keep_last=2, keep_every=4)
    assert good_steps(tmp_path / "checkpoints") == [11, 10, 8, 4]


def test_a_step_that_is_there_is_not_written_again(workdir):
    with contextlib.closing(Checkpoints(workdir)) as checkpoints:
        assert checkpoints.newest_step() == 3
        checkpoints.save(3, make_state(77), DATA)
    restored = restore(workdir)
    assert restored
    assert_same_bits(restored[0], make_state(3))


# ---- while the next step runs


@pytest.fixture
def gate(monkeypatch):
    """Holds every array back from the disk until it is opened."""
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
        assert not good_steps(tmp_path / "checkpoints")  # nothing is on disk yet
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
        with pytest.raises(UserError, match=r"could not be written .*No space left.*step 3 is good") as caught:
            checkpoints.wait()
    assert "\n" not in str(caught.value)
    assert good_steps(workdir / "checkpoints") == [3, 2, 1]
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
    with pytest.raises(UserError, match=r"No space left.*step 3 is good"):
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
        with pytest.raises(UserError, match=r"could not be written to .*File too large.*; the checkpoint of step 3 is"):
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


# ---- in a process of its own

QUIET = """
import gc, sys, pathlib, test_checkpoint as t
workdir = pathlib.Path(sys.argv[1])
t.save(workdir, 3, 4, 5, keep_last=3)
t.flip(t.FILES["params"](workdir / "checkpoints" / "4"))
t.FILES["manifest"](workdir / "checkpoints" / "5").unlink()  # Orbax fails in several reads at once
assert t.restore(workdir)[2] == 3
gc.collect()
async def fail(*args, **kwargs):
    raise OSError(28, "No space left on device")
t.serialization.async_serialize_from_host = fail
try:
    t.save(workdir, 6)
except t.UserError as error:
    print(f"error: {error}", file=sys.stderr)
else:
    raise AssertionError
"""

KILLED = """
import os, signal, sys, threading, test_checkpoint as t
async def hold(*args, **kwargs):
    threading.Event().wait()
t.save(sys.argv[1], 1)
t.serialization.async_serialize_from_host = hold
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


def test_only_dropped_reads_are_not_heard(caplog):
    """A read may end after the damage was told; what others lose is theirs to hear."""
    checkpoint._ignore_dropped_reads()
    for lost in ("ValueError('… tensorstore_spec=…')", "ValueError('mine')"):
        logging.getLogger("asyncio").error(f"Future exception was never retrieved\nfuture: <Future exception={lost}>")
    assert [record.getMessage().partition("=")[2] for record in caplog.records] == ["ValueError('mine')>"]


def test_killed_in_mid_save(tmp_path, capfd):
    done = run_script(KILLED, tmp_path)
    assert done.returncode == -signal.SIGKILL, done.stderr
    folder = tmp_path / "checkpoints"
    assert len(list(folder.iterdir())) == 2  # something half-written is there
    assert good_steps(folder) == [1]
    checkpoints = Checkpoints(tmp_path)
    restored = checkpoints.restore_newest(like(make_state()))
    assert restored
    assert restored[2] == 1
    checkpoints.save(2, make_state(2), DATA)
    checkpoints.close()
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2"]
    assert capfd.readouterr() == ("", "")


# ---- the weights alone


@pytest.mark.parametrize(("which", "item"), [("student", "params"), ("ema", "ema")])
@pytest.mark.parametrize("step", [None, 2])
def test_restore_params(three, which, item, step):
    params, found = restore_params(three, which, step)
    assert found == (step or 3)
    assert_same_bits(params, jax.device_get(make_state(found)[item]))
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(params))


def test_restore_params_reads_nothing_else(workdir):
    for item in ("opt_state", "params", "counters"):
        shutil.rmtree(workdir / "checkpoints" / "3" / item)
    params, step = restore_params(workdir, "ema")
    assert step == 3
    assert_same_bits(params, jax.device_get(make_state(3)["ema"]))


def test_restore_params_errors(workdir, tmp_path):
    with pytest.raises(UserError, match="holds no checkpoint yet"):
        restore_params(tmp_path / "nowhere", "ema")
    with pytest.raises(UserError, match=r"no checkpoint of step 8; it has 1, 2, 3$"):
        restore_params(workdir, "ema", 8)
    with contextlib.closing(Checkpoints(tmp_path / "plain")) as checkpoints:
        checkpoints.save(1, make_state(ema=False), {})
    with pytest.raises(UserError, match=r"no EMA .*--which=student"):
        restore_params(tmp_path / "plain", "ema")


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("file", ["ema", "meta"])
def test_restore_params_damaged(workdir, file, harm):
    HARMS[harm](FILES[file](workdir / "checkpoints" / "3"))
    with pytest.raises(UserError, match=r"step 3 in .* is damaged \(.+\); --step=2 is an older one") as caught:
        restore_params(workdir, "ema")
    assert "\n" not in str(caught.value)
    assert restore_params(workdir, "ema", 2)[1] == 2
    assert good_steps(workdir / "checkpoints") == [3, 2, 1]  # an export renames nothing


def test_meta_says_what_is_there(three):
    content = json.loads((three / "checkpoints" / "3" / "meta" / "metadata").read_text())["content"]
    assert content["leaves"]["['params']['unet']['down_blocks.10.kernel']"][:2] == [[4, 8], "float32"]
    assert checkpoint.COUNTERS == ("step", "skipped")
