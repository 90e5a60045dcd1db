"""The compiled step in a file: what a second start reads ahead, and what plan keeps for train."""

import hashlib
import itertools
import json
import os
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import train_on_one

from lcm_jax import cli, plan
from lcm_jax.config import Config, ModelConfig
from lcm_jax.host import cache_entries, compile_cache
from lcm_jax.parallel.mesh import MeshConfig, make_mesh
from lcm_jax.training import program, saved_step
from lcm_jax.training.checkpoint import restore_params
from lcm_jax.training.saved_step import Ahead


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
    program._cpu_options()  # compiles once per process
    names = []
    compile_lowered = jax.stages.Lowered.compile

    def note(self, *args, **kwargs):
        names.append(self.as_text().split("@jit_", 1)[1].split(" ", 1)[0])
        return compile_lowered(self, *args, **kwargs)

    monkeypatch.setattr(jax.stages.Lowered, "compile", note)
    return names


def run(quick, workdir, *more):
    return train_on_one([*quick, "--config.steps=2", f"--workdir={workdir}", *more])


def weights(workdir):
    return jax.tree.leaves(restore_params(workdir, "student")[0])


def test_a_second_start_reads_the_step(quick, cache, compiled, tmp_path):
    for folder in ("first", "second"):
        assert run(quick, tmp_path / folder) == 0
        assert compiled == ["step_or_stop"]
        assert len(list(cache.glob("step-*"))) == 1
    for one, other in zip(weights(tmp_path / "first"), weights(tmp_path / "second"), strict=True):
        np.testing.assert_array_equal(one, other)


def test_train_takes_the_step_that_plan_saved(quick, cache, compiled, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(plan, "make_mesh", lambda config, devices: make_mesh(config, devices[:1]))
    saved = tmp_path / "saved"
    options = [*quick, "--config.steps=2"]
    assert cli.run(plan.main, [*options, "--topology=local", f"--save={saved}"], "plan") == 0
    assert f"to use it, pass --compiled={saved} to train" in capsys.readouterr().out
    assert run(quick, tmp_path / "run", f"--compiled={saved}") == 0
    assert compiled == ["step_or_stop"]
    assert "not used" not in capsys.readouterr().err
    assert not list(cache.iterdir())  # the user takes care of the file

    assert run(quick, tmp_path / "typo", f"--compiled={saved}x") == 2
    assert f"--compiled={saved}x: the file does not exist" in capsys.readouterr().err
    assert run(quick, tmp_path / "typo", "--compiled=http://x/y") == 2
    assert "--compiled=http://x/y: the file does not exist" in capsys.readouterr().err
    assert run(quick, tmp_path / "typo", "--compiled=gs://") == 2
    assert "--compiled=gs:// must name a bucket and a path in it" in capsys.readouterr().err
    assert not (tmp_path / "typo").exists()


def lowered():
    """The smallest step there is."""

    def step_or_stop(x):
        return 2 * x

    return jax.jit(step_or_stop).lower(jax.ShapeDtypeStruct((2,), jnp.float32))


def sealed(rest):
    return saved_step._BEGIN + hashlib.sha256(rest).hexdigest().encode() + b"\n" + rest


def with_header(change):
    """The file with another header, and the right checksum: as a user could write it."""

    def write(data):
        line, _, content = data.split(b"\n", 1)[1].partition(b"\n")
        header = json.loads(line)
        change(header)
        return sealed(json.dumps(header).encode() + b"\n" + content)

    return write


def flipped(where):
    def write(data):
        place = int(where * len(data))
        return data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :]

    return write


class Evil:
    def __reduce__(self):
        return pytest.fail, ("unpickled",)


def evil(data):
    """A pickle that runs what it likes, where a step of another program should be."""
    line, _, content = (
        with_header(lambda header: header.update(program="0" * 64))(data).split(b"\n", 1)[1].partition(b"\n")
    )
    step = json.loads(line)["step"]
    return sealed(line + b"\n" + content[:step] + pickle.dumps(Evil()))


@pytest.mark.parametrize(
    ("harm", "said", "heard"),
    [
        (
            with_header(lambda header: header.update(program="0" * 64)),
            "it is a different step: the options, the fold",
            False,
        ),
        (evil, "it is a different step: the options, the folder's configuration or the code changed", False),
        (
            with_header(lambda header: header["made_for"].update(cpu="another")),
            "it was compiled for another environment: cpu 'an",
            False,
        ),
        (
            with_header(lambda header: header["made_for"].update(XLA_FLAGS="--x")),
            "for another environment: XLA_FLAGS '--x', here",
            False,
        ),
        (with_header(dict.clear), "its header has no 'executable'", True),
        (lambda data: data[:-50], "it is damaged: its content does not match its checksum", True),
        (lambda data: b"", "it holds no step, or was written by another version of lcm_jax", True),
        (lambda data: data.split(b"\n", 1)[1], "it holds no step, or was written by another version of lcm_jax", True),
        *((flipped(where), "", True) for where in (0, 0.01, 0.6)),
    ],
)
def test_no_other_step_is_taken(harm, said, heard, cache, compiled, capsys, monkeypatch):
    config, mesh = Config(ModelConfig("teacher")), make_mesh(MeshConfig(), jax.devices()[:1])

    def step(**given):
        result = Ahead(config, mesh, **given).step(lowered())
        np.testing.assert_array_equal(result(jnp.ones(2)), 2 * np.ones(2))
        return len(compiled)

    assert (step(), step()) == (1, 1)
    (kept,) = cache.glob("step-*")
    assert kept.stat().st_mode & 0o777 == 0o600
    kept.write_bytes(harm(kept.read_bytes()))
    with monkeypatch.context() as patch:  # nothing of it is loaded
        patch.setattr(saved_step._Saved, "load", lambda *_: pytest.fail("loaded"))
        assert step(given=str(kept)) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"--compiled={kept} is not used: ")
    assert said in error
    assert error.count("\n") == 1
    assert (step(), step()) == (3, 3)  # compiled once more, and kept again
    error = capsys.readouterr().err
    assert error.startswith(f"the cached step {kept} is not used: ") if heard else error == ""
    assert error.count("\n") == int(heard)


def loose_file(kept):
    kept.chmod(0o620)


def loose_folder(kept):
    kept.parent.chmod(0o777)


def link(kept):
    kept.rename(kept.with_name("elsewhere")).chmod(0o600)
    kept.symlink_to("elsewhere")


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (loose_file, "others may write to {kept}; chmod go-w {kept}"),
        (loose_folder, "others may write to {kept.parent}; chmod go-w {kept.parent}"),
        (link, "{kept} can't be read: Too many levels of symbolic links"),
        (None, "{kept.parent} belongs to another user"),
    ],
)
def test_a_kept_step_is_this_users_own(harm, said, cache, compiled, capsys, monkeypatch):
    config, mesh = Config(ModelConfig("teacher")), make_mesh(MeshConfig(), jax.devices()[:1])
    Ahead(config, mesh).step(lowered())
    (kept,) = cache.glob("step-*")
    if harm:
        harm(kept)
    else:
        monkeypatch.setattr(os, "geteuid", lambda user=os.geteuid(): user + 1)
    monkeypatch.setattr(saved_step._Saved, "load_executable", lambda *_: pytest.fail("loaded"))
    monkeypatch.setattr(cache_entries, "_warned", True)  # that it is not kept again
    Ahead(config, mesh).step(lowered())
    assert len(compiled) == 2
    assert capsys.readouterr().err == f"the cached step {kept} is not used: {said.format(kept=kept)}\n"


def test_no_step_is_kept_where_others_may_write(cache, compiled):
    cache.chmod(0o775)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_entries, "_warned", False)
        with pytest.warns(
            UserWarning, match=f"others may write to {cache}; chmod go-w {cache}; programs that are not cached are"
        ):
            Ahead(Config(ModelConfig("teacher")), make_mesh(MeshConfig(), jax.devices()[:1])).step(lowered())
    assert not list(cache.iterdir())


def test_a_step_that_another_cache_had_is_not_kept(cache, compiled, monkeypatch):
    """Read from a cache, an executable of a CPU can't be written: functions would be missing from it."""
    hits = iter((0, 1))
    monkeypatch.setattr(compile_cache, "from_cache", lambda: next(hits))
    Ahead(Config(ModelConfig("teacher")), make_mesh(MeshConfig(), jax.devices()[:1])).step(lowered())
    assert len(compiled) == 1
    assert not list(cache.iterdir())


def test_a_damaged_step_is_reported_once(cache, compiled, capsys, monkeypatch):
    config, mesh = Config(ModelConfig("teacher")), make_mesh(MeshConfig(), jax.devices()[:1])
    Ahead(config, mesh).step(lowered())
    (kept,) = cache.glob("step-*")
    kept.write_bytes(kept.read_bytes()[:-50])
    hits = itertools.count()
    monkeypatch.setattr(compile_cache, "from_cache", lambda: next(hits))  # the program itself is in JAX's cache
    Ahead(config, mesh).step(lowered())
    assert "is not used: it is damaged" in capsys.readouterr().err
    Ahead(config, mesh).step(lowered())
    assert capsys.readouterr().err == ""
