"""Checkpoints: the full state or only the weights are restored bit for bit; retention."""

import contextlib
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from little_state import DATA, FILES, HARMS, assert_same_bits, like, make_state, restore, save

from lcm_jax.errors import UserError
from lcm_jax.training import checkpoint
from lcm_jax.training.checkpoint import Checkpoints, checksums, finalized_steps, restore_params

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


# ---- which are kept


def test_keep_last_and_keep_every(tmp_path):
    save(tmp_path, *range(1, 10), keep_last=2, keep_every=4)
    assert finalized_steps(tmp_path / "checkpoints") == [9, 8, 4]
    save(tmp_path, 10, 11, keep_last=2, keep_every=4)
    assert finalized_steps(tmp_path / "checkpoints") == [11, 10, 8, 4]


def test_a_step_that_is_there_is_not_written_again(workdir):
    with contextlib.closing(Checkpoints(workdir)) as checkpoints:
        assert checkpoints.newest_step() == 3
        checkpoints.save(3, make_state(77), DATA)
    restored = restore(workdir)
    assert restored
    assert_same_bits(restored[0], make_state(3))


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
    assert finalized_steps(workdir / "checkpoints") == [3, 2, 1]  # an export renames nothing


def test_meta_says_what_is_there(three):
    content = json.loads((three / "checkpoints" / "3" / "meta" / "metadata").read_text())["content"]
    assert content["leaves"]["['params']['unet']['down_blocks.10.kernel']"][:2] == [[4, 8], "float32"]
    assert checkpoint.COUNTERS == ("step", "skipped")
