"""The second start of a command finds every program in the cache."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

from lcm_jax import compile_cache
from lcm_jax.blank import write_blank

ROOT = pathlib.Path(__file__).resolve().parent.parent
PROGRAM = """
import sys
from importlib import import_module
from lcm_jax import cli, compile_cache
name = sys.argv[1]
code = cli.run(import_module(f"lcm_jax.{name}").main, sys.argv[2:], name)
print(compile_cache.summary())
sys.exit(code)
"""


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return write_blank("micro", tmp_path_factory.mktemp("cache_micro") / "teacher")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


def summary(cache, *arguments):
    """Runs a command in its own process on one device; returns the hits and the misses that it prints at its end."""
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_COMPILATION_CACHE_DIR": str(cache)}
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
