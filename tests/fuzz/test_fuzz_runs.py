"""A run's own files, damaged: its config.json and its checkpoints."""

import contextlib
import os
import pathlib
import shutil
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "checkpoints"))
from little_state import DATA, assert_same_bits, like, make_state, save
from mutations import damage_bytes, damage_file, pick

from lcm_jax import config as config_lib
from lcm_jax.checkpoint import Checkpoints, restore_params

CONFIG = config_lib.from_dict({"model": {"folder": "teacher"}})


def test_config(fuzz, tmp_path):
    (tmp_path / "config.json").write_text(config_lib.resolved(CONFIG))

    def case(rng, place):
        shutil.copy(tmp_path / "config.json", place)
        yield damage_file(rng, place / "config.json")
        config_lib.check_same_run(CONFIG, config_lib.load_resolved(place), place)

    fuzz(case, share=0.15)


def test_checkpoints(fuzz, tmp_path, capfd):
    save(tmp_path, 1)
    wanted, expected = like(make_state()), make_state(1)
    files = sorted(path for path in tmp_path.rglob("*") if path.is_file())

    def case(rng, place):
        run = shutil.copytree(tmp_path / "checkpoints", place / "checkpoints", copy_function=os.link)
        path = run / pick(rng, files).relative_to(tmp_path / "checkpoints")
        data, what = damage_bytes(rng, path.read_bytes())
        path.unlink()
        path.write_bytes(data)
        yield f"{path.relative_to(run)}: {what}"
        with contextlib.closing(Checkpoints(place)) as checkpoints:
            state, position, step = checkpoints.restore_newest(wanted)
        assert (position, step) == (DATA, 1), "another position"
        assert_same_bits(state, expected)
        params, _ = restore_params(place, "student")
        assert_same_bits(params, expected["params"])

    fuzz(case, share=0.1)
