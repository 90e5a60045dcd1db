"""Damaged checkpoints are reported and set aside, and the previous one is used."""

import asyncio
import gc
import re
import shutil

import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from little_state import (
    DATA,
    FILES,
    HARMS,
    assert_same_bits,
    contents,
    flip,
    like,
    make_state,
    restore,
)

from lcm_jax.errors import UserError
from lcm_jax.training.checkpoint import Checkpoints, finalized_steps, restore_params


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
    assert err.endswith(f"); resuming from step 2; the damaged one is kept as {folder}/3.damaged\n")
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
    """Damage to files that Orbax doesn't need leaves the state complete."""
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
    refused = f"{target.parent}: all checkpoints are damaged"
    assert set(outcomes) == {"whole", refused}
    assert outcomes.count(refused) > 20
    gc.collect()
    assert [record.getMessage() for record in caplog.records] == []  # nor do asyncio and Orbax complain
    assert len(files) > 30


def test_reads_that_orbax_gives_up_are_not_heard_of(workdir, monkeypatch, caplog):
    """Orbax sometimes drops a second failed read; here it always does."""

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
    assert finalized_steps(workdir / "checkpoints") == [4, 3, 2]
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
        (
            _drop,
            r"\['unet'\]\['down_blocks.10.kernel'\] is float32 \(4, 8\) in the checkpoint, absent in this run",
        ),
        (
            _add,
            r"\['unet'\]\['down_blocks.11.kernel'\] is absent in the checkpoint, float32 \(4, 8\) in this run",
        ),
        (_reshape, r"\['down_blocks.10.kernel'\] is float32 \(4, 8\) in the checkpoint, float32 \(8, 4\) in this run"),
        (_cast, r"\['down_blocks.10.kernel'\] is float32 \(4, 8\) in the checkpoint, bfloat16 \(4, 8\) in this run"),
        (
            _no_ema,
            r"\['ema'\]\['text_encoder'\]\['embedding'\] is float32 \(64, 32\) in the checkpoint, absent in this run",
        ),
        (_other_optimizer, r"\['opt_state'\].* is absent in the checkpoint"),
    ],
)
def test_another_model_is_named_by_the_first_key_that_differs(workdir, change, expected):
    state = make_state()
    change(state)
    with pytest.raises(UserError, match=expected) as caught:
        Checkpoints(workdir).restore_newest(like(state))
    assert "another model" in str(caught.value)
    assert "damaged" not in str(caught.value)
    assert finalized_steps(workdir / "checkpoints") == [3, 2, 1]
