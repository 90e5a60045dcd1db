"""Damaged files of a run: its config, the record of its inputs, checkpoints and its compiled step."""

import contextlib
import os
import pathlib
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "training" / "checkpoints"))
from little_state import DATA, assert_same_bits, like, make_state, save
from mutations import damage_bytes, damage_file, pick

from lcm_jax import config as config_lib
from lcm_jax.training import identity, saved_step
from lcm_jax.training.checkpoint import Checkpoints, restore_params

CONFIG = config_lib.from_dict({"model": {"folder": "teacher"}})
INPUTS = {name: identity.Identity(f"the {name}", {f"{name}/a": "0" * 64, "b": "1"}) for name in ("model", "data")}


def test_config_and_inputs(fuzz, tmp_path):
    (tmp_path / "config.json").write_text(config_lib.resolved(CONFIG))
    identity.record(tmp_path, INPUTS)
    files = sorted(path for path in tmp_path.iterdir() if path.is_file())
    assert len(files) == 2

    def case(rng, place):
        for file in files:
            shutil.copy(file, place)
        yield damage_file(rng, place / pick(rng, files).name)
        config_lib.check_same_run(CONFIG, config_lib.load_resolved(place), place)
        identity.changed(place, INPUTS)

    fuzz(case, share=0.15)


def test_checkpoints(fuzz, tmp_path, capfd):
    save(tmp_path, 1)
    wanted, expected = like(make_state()), make_state(1)
    root = tmp_path / "checkpoints"
    files = sorted(path for path in root.rglob("*") if path.is_file())

    def case(rng, place):
        run = shutil.copytree(root, place / "checkpoints", copy_function=os.link)
        yield damage(rng, run / pick(rng, files).relative_to(root))
        with contextlib.closing(Checkpoints(place)) as checkpoints:
            state, position, step = checkpoints.restore_newest(wanted)
        assert (position, step) == (DATA, 1), "another position"
        assert_same_bits(state, expected)
        assert_same_bits(restore_params(place, "student")[0], expected["params"])

    fuzz(case, share=0.05)


def test_compiled_steps(fuzz, tmp_path):
    mesh = Mesh(jax.devices()[:1], ("data",))
    lowered = jax.jit(lambda x: 2 * x + 1).lower(jnp.zeros(4))
    file = tmp_path / "step"
    saved_step.save(file, mesh, lowered, lowered.compile())

    def case(rng, place):
        shutil.copy(file, place)
        yield damage(rng, place / "step")
        step = saved_step._read(epath.Path(place / "step"), mesh, kept=False).load(mesh.devices.flat)
        assert (place / "step").read_bytes() == file.read_bytes(), "a damaged program is run"
        np.testing.assert_array_equal(step(jnp.arange(4.0)), [1, 3, 5, 7])

    fuzz(case, share=0.1)


def damage(rng, path) -> str:
    data, what = damage_bytes(rng, path.read_bytes())
    path.unlink()
    path.write_bytes(data)
    return f"{path.parent.name}/{path.name}: {what}"
