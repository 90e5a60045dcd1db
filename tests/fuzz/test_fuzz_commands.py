"""Odd options of the commands: accepted, or one error line with exit code 2 (or 1: a retry may succeed)."""

import contextlib
import inspect
import json
import pathlib
import re

import numpy as np
import pytest
from mutations import TEXTS, VALUES, pick

from lcm_jax import cli, config_file, encode, evaluate, export, plan, sample, train
from lcm_jax import config as config_lib
from lcm_jax.training import loop

ROOT = pathlib.Path(__file__).resolve().parents[2]
FILE = f"{ROOT}/configs/digits.py"
WORDS = (
    "0 -1 1 4 1.5 1e400 nan inf true None (1,) {} ' lambda:0 999,499 , x=3/0.5 : a:b:c - -- / ../x . gs:// ~nobody/x"
)
WORDS = [*WORDS.split(), *TEXTS, "9" * 40, "[" * 500, "\udcff", "http://x/y"]
GOOD = {  # a command and what it needs at least
    train: [f"--config={FILE}", "--workdir=run"],
    sample: ["--model=m", "--prompt=a red seven"],
    export: ["--model=nowhere", "--lora=x.safetensors", "--out=new"],
    encode: ["--model=nowhere", "--out=new"],
    evaluate: ["--model=nowhere"],
    plan: [f"--config={FILE}", "--topology=nowhere"],
}


def options(command) -> list[str]:
    """The names in its source, of options that it shares with others too."""
    names = re.findall(r'"(--[a-z][\w-]*)', inspect.getsource(command))
    return [*dict.fromkeys([*names, "--lora", "--coordinator", "--num-processes", "--process-id", "--config.steps"])]


@pytest.fixture
def nothing_runs(monkeypatch, pipe):
    """The commands read their options; valid ones then have nothing to do."""
    monkeypatch.setattr(train, "train", lambda config, *_: loop.Result(config.steps, 0))
    monkeypatch.setattr(train.processes, "Processes", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(sample, "load_pipeline", lambda *_, **__: pipe)
    monkeypatch.setattr(sample, "write_png", lambda *_: None)


def test_commands(fuzz, nothing_runs, monkeypatch, capsys):
    def case(rng, place):
        monkeypatch.chdir(place)
        command = pick(rng, GOOD)
        argv = list(GOOD[command])
        for _ in range(int(rng.integers(1, 3))):
            option, word = pick(rng, options(command)), pick(rng, WORDS)
            argv += pick(rng, [[f"{option}={word}"], [option, word], [option], [option[:-1]]])
        yield f"{command.__name__} {argv!r}"
        try:
            code = cli.run(command.main, argv)
        except SystemExit as end:  # as argparse ends an option that only prints, like --options
            code = end.code
        err = capsys.readouterr().err
        assert code in (0, 1, 2), f"exit code {code}"
        assert code == 0 or err.splitlines()[-1].count("error: ") == 1, f"printed {err!r}"
        assert all(line.startswith("lcm-jax ") for line in err.splitlines()), f"printed {err!r}"

    fuzz(case, share=0.15)


def test_options_of_a_run(fuzz):
    keys = list(config_file.option_keys(config_lib.default_config()))

    def case(rng, place):
        overrides = [f"--config.{pick(rng, keys)}={pick(rng, WORDS)}" for _ in range(int(rng.integers(1, 3)))]
        yield repr(overrides)
        config = config_file.load(FILE + pick(rng, ["", ":smoke", ":x", ":"]), overrides)
        assert config_lib.from_dict(json.loads(config_lib.resolved(config))) == config

    fuzz(case, share=0.1)


GIVEN = {
    "prompts": "a",
    "steps": 2,
    "guidance_scale": 3.0,
    "seed": 1,
    "negative_prompt": "b",
    "height": 32,
    "width": 32,
    "timesteps": [999, 499],
    "latents": np.zeros((1, 8, 8, 4)),
    "noise": np.zeros((1, 1, 8, 8, 4)),
    "output": "float",
    "sampler": "lcm",
}


def test_arguments_of_a_pipeline(fuzz, pipe):
    arrays = [np.float32(4), np.int64(4), np.zeros(3), np.array("x"), np.full((1, 8, 8, 4), np.nan)]
    odd = [*VALUES, *arrays, object(), b"x", [4, 2], ["a", "b"], (1,), {1}, 1j, range(3)]

    def case(rng, place):
        names = [name for name in GIVEN if rng.random() < 0.2]
        call = {"prompts": "a", **{name: pick(rng, odd) if rng.random() < 0.7 else GIVEN[name] for name in names}}
        yield repr(call).replace("\n", "")
        assert isinstance(pipe(**call), np.ndarray)

    fuzz(case, share=0.1)
