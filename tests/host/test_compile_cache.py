"""The second start of a command finds every program in the cache."""

import os
import pathlib
import re
import resource
import subprocess
import sys

import jax
import pytest
from compiling import QUICK_FLAGS
from fixtures_folders import write_little
from jax._src import compilation_cache

from lcm_jax.host import cache_entries, compile_cache

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROGRAM = """
import sys
from importlib import import_module
from lcm_jax import cli
from lcm_jax.host import compile_cache
name = sys.argv[1]
code = cli.run(import_module(f"lcm_jax.{name}").main, sys.argv[2:], name)
print(compile_cache.summary())
sys.exit(code)
"""


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return write_little(tmp_path_factory.mktemp("cache") / "teacher")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


def summary(cache, *arguments):
    """Runs a command in its own process on one device; returns the hits and misses that it prints."""
    environment = {**os.environ, "XLA_FLAGS": QUICK_FLAGS, "JAX_COMPILATION_CACHE_DIR": str(cache)}
    command = [sys.executable, "-c", PROGRAM, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    hits, misses = re.fullmatch(
        rf"compile cache: (\d+) hits, (?:no miss|(\d+) compiled in \d+\.\d s) \({re.escape(str(cache))}\)",
        done.stdout.splitlines()[-1],
    ).groups()
    return int(hits), int(misses or 0)


def test_a_second_start_compiles_nothing(teacher, digits_data_dir, cache, tmp_path):
    def train(number):
        return summary(
            cache,
            "train",
            f"--config={ROOT}/configs/digits_teacher.py:vae",
            f"--config.model.folder={teacher}",
            f"--config.data.data_dir={digits_data_dir}",
            "--config.data.image_size=8",
            "--config.batch_size=8",
            "--config.steps=2",
            "--config.optimizer.decay=constant",
            f"--workdir={tmp_path / str(number)}",
        )

    def export(number):
        return summary(cache, "export", f"--workdir={tmp_path / '0'}", f"--out={tmp_path / f'folder{number}'}")

    def sample(number):
        out = tmp_path / f"{number}.png"
        return summary(cache, "sample", f"--model={teacher}", "--prompt=a red seven", "--steps=2", f"--out={out}")

    for command in (train, export, sample):
        hits, misses = command(0)
        assert misses > 0
        again, none = command(1)
        assert (again, none) == (hits + misses, 0), command.__name__


def test_nothing_is_said_before_the_cache_is_on(monkeypatch):
    monkeypatch.setattr(compile_cache, "_counts", None)
    assert compile_cache.summary() == ""


# ---- entries that are whole or not there


@pytest.fixture
def entries(tmp_path, monkeypatch):
    """Sets up JAX's cache like `enable`, in a folder that does not exist yet; returns the folder."""
    folder, before = tmp_path / "entries", jax.config.jax_compilation_cache_dir
    monkeypatch.setattr(cache_entries, "_warned", False)
    monkeypatch.setattr(compile_cache, "_counts", None)  # another test's run must not find this folder
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(folder))
    compile_cache.enable()
    compilation_cache.reset_cache()
    yield folder
    jax.config.update("jax_compilation_cache_dir", before)
    compilation_cache.reset_cache()


def test_a_library_keeps_the_folder_that_its_user_set(entries, tmp_path):
    assert compile_cache.enable(keep_own=True) == str(entries)
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
    assert compile_cache.enable(keep_own=True) == jax.config.jax_compilation_cache_dir == str(tmp_path / "own")
    assert compile_cache.enable() == jax.config.jax_compilation_cache_dir == str(entries)


def compile_two(number):
    """Compiles two small programs; returns whether both were in the cache."""
    before = compile_cache.from_cache()
    for scale in (number, number + 1):
        jax.jit(lambda x, scale=scale: x * scale + 1).lower(jax.ShapeDtypeStruct((3,), "float32")).compile()
    return compile_cache.from_cache() == before + 2


def cut(file):
    os.truncate(file, file.stat().st_size // 2)


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def plain(file):
    """Returns an entry as JAX itself writes it."""
    file.write_bytes(file.read_bytes()[:-40])


def cut_plain(file):
    plain(file)
    cut(file)


@pytest.mark.parametrize(("harm", "used"), [(cut, False), (flip, False), (cut_plain, False), (plain, True)])
def test_an_entry_that_is_damaged_is_compiled_and_written_again(entries, harm, used):
    compile_two(3)
    assert compile_two(3)
    whole = {file: file.stat().st_size for file in entries.iterdir()}
    assert len(whole) == 2
    assert entries.stat().st_mode & 0o777 == 0o700
    for file in whole:
        harm(file)
    assert compile_two(3) == used  # without a warning, which would be an error
    assert compile_two(3)
    if not used:
        assert {file: file.stat().st_size for file in entries.iterdir()} == pytest.approx(whole, rel=0.2)
    for file in whole:  # as another program reads it
        compilation_cache.decompress_executable(file.read_bytes())


@pytest.mark.parametrize("limit", [-1, 10**6])  # with a limit JAX itself writes
def test_on_a_full_disk_nothing_is_left_but_one_line(entries, limit):
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    jax.config.update("jax_compilation_cache_max_size", limit)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, old[1]))
    try:
        with pytest.warns(
            UserWarning, match=f"{entries}.*File too large; programs that are not cached are compiled again"
        ) as warned:
            compile_two(5)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        jax.config.update("jax_compilation_cache_max_size", -1)
    assert len(warned) == 1
    assert [file for file in entries.iterdir() if file.name != ".lockfile"] == []
    compile_two(5)
    assert compile_two(5)


def test_a_cache_in_a_bad_place_is_one_line(entries):
    entries.write_text("in the way")
    with pytest.warns(
        UserWarning, match=f"{entries} can't be written: it is a file; programs that are not cached"
    ) as warned:
        compile_two(7)
    assert len(warned) == 1
