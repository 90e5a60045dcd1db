"""The compiled step in a file: what a second start reads ahead, and what plan keeps for train."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcm_jax import cli, compile_cache, plan, train
from lcm_jax.checkpoint import restore_params
from lcm_jax.compiled_step import Ahead
from lcm_jax.config import Config, ModelConfig
from lcm_jax.parallel.mesh import MeshConfig, make_mesh


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A compile cache of one test's own, and nothing in JAX's; its folder."""
    folder = tmp_path / "cache"
    folder.mkdir()
    monkeypatch.setattr(compile_cache, "folder", lambda: str(folder))
    with compile_cache.off():
        yield folder


@pytest.fixture
def compiled(monkeypatch):
    """The names of the functions that were lowered and compiled ahead of their call, in order."""
    names = []
    compile_lowered = jax.stages.Lowered.compile

    def note(self, *args, **kwargs):
        names.append(self.as_text().split("@jit_", 1)[1].split(" ", 1)[0])
        return compile_lowered(self, *args, **kwargs)

    monkeypatch.setattr(jax.stages.Lowered, "compile", note)
    return names


def run(quick, workdir, *more):
    return cli.run(train.main, [*quick, "--config.steps=2", f"--workdir={workdir}", *more])


def weights(workdir):
    return jax.tree.leaves(restore_params(workdir, "student")[0])


@pytest.mark.usefixtures("one_device")
def test_a_second_start_reads_the_step(quick, cache, compiled, tmp_path):
    for folder in ("first", "second"):
        assert run(quick, tmp_path / folder) == 0
        assert compiled == ["step_or_stop"]
        assert len(list(cache.glob("step-*"))) == 1
    for one, other in zip(weights(tmp_path / "first"), weights(tmp_path / "second"), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.usefixtures("one_device")
def test_train_takes_the_step_that_plan_saved(quick, cache, compiled, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(plan, "make_mesh", lambda config, devices: make_mesh(config, devices[:1]))
    saved = tmp_path / "saved"
    options = [*quick, "--config.steps=2"]
    assert cli.run(plan.main, [*options, "--topology=local", f"--save={saved}"], "plan") == 0
    assert f"train takes it with --compiled={saved}" in capsys.readouterr().out
    assert run(quick, tmp_path / "run", f"--compiled={saved}") == 0
    assert compiled == ["step_or_stop"]
    assert "not used" not in capsys.readouterr().err
    assert not list(cache.iterdir())  # the user takes care of the file

    assert run(quick, tmp_path / "typo", f"--compiled={saved}x") == 2
    assert f"--compiled={saved}x: there is no such file" in capsys.readouterr().err
    assert not (tmp_path / "typo").exists()


def lowered():
    """The smallest step there is."""

    def step_or_stop(x):
        return 2 * x

    return jax.jit(step_or_stop).lower(jax.ShapeDtypeStruct((2,), jnp.float32))


def another_program(line, content):
    return {**line, "program": "0" * 64}, content


def another_machine(line, content):
    return {**line, "cpu": "another"}, content


def other_flags(line, content):
    return {**line, "XLA_FLAGS": "--xla_of_that_time"}, content


def cut_short(line, content):
    return line, content[:-50]


def empty_line(line, content):
    return {}, content


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (another_program, "it is another step: the options, the folder's configurations or the code differ"),
        (another_machine, "it was compiled elsewhere: cpu 'another', here"),
        (other_flags, "it was compiled elsewhere: XLA_FLAGS '--xla_of_that_time', here"),
        (cut_short, "it is damaged, or this runtime can't load it: "),
        (empty_line, "it is damaged, or this runtime can't load it: "),
    ],
)
def test_no_other_step_is_taken(damage, said, cache, compiled, capsys):
    config, mesh = Config(ModelConfig("teacher")), make_mesh(MeshConfig(), jax.devices()[:1])

    def step(**given):
        result = Ahead(config, mesh, **given).step(lowered())
        np.testing.assert_array_equal(result(jnp.ones(2)), 2 * np.ones(2))
        return len(compiled)

    assert (step(), step()) == (1, 1)
    (kept,) = cache.glob("step-*")
    line, _, content = kept.read_bytes().partition(b"\n")
    made_for, content = damage(json.loads(line), content)
    kept.write_bytes(json.dumps(made_for).encode() + b"\n" + content)
    assert step(given=str(kept)) == 2
    error = capsys.readouterr().err
    assert f"--compiled={kept} is not used: {said}" in error
    assert error.count("\n") == 1
    assert (step(), step()) == (3, 3)  # compiled once more, and kept again
    assert kept.read_bytes().partition(b"\n")[0] == line
    assert capsys.readouterr().err == ""


def test_a_step_that_another_cache_had_is_not_kept(cache, compiled, monkeypatch):
    """Read from a cache, an executable of a CPU can't be written: functions would be missing from it."""
    hits = iter((0, 1))
    monkeypatch.setattr(compile_cache, "from_cache", lambda: next(hits))
    Ahead(Config(ModelConfig("teacher")), make_mesh(MeshConfig(), jax.devices()[:1])).step(lowered())
    assert len(compiled) == 1
    assert not list(cache.iterdir())
