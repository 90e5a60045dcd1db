"""Odd options of the commands and arguments of the pipeline: taken, or refused in one line with exit code 2."""

import pathlib

import numpy as np
import pytest
from mutations import TEXTS, VALUES, pick

from lcm_jax import cli, export, sample, train
from lcm_jax import config as config_lib
from lcm_jax.pipeline import load_pipeline

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent

WORDS = [
    "",
    "0",
    "-1",
    "1",
    "4",
    "1.5",
    "1e400",
    "nan",
    "inf",
    "9" * 40,
    "true",
    "None",
    "()",
    "(1,)",
    "[1, 2]",
    "{}",
    "[" * 500,
    "'",
    "lambda: 0",
    "999,499",
    ",",
    "x=3/0.5",
    ":",
    "a:b:c",
    "-",
    "--",
    "\x1b[31m",
    "\udcff",
    "../x",
    "/",
    "gs://",
    "http://x/y",
    ".",
]


@pytest.fixture(scope="module")
def pipe(micro):
    """A pipeline that samples zeros: what it is given is checked, nothing is compiled."""
    pipe = load_pipeline(micro)
    pipe._program = lambda kind, guided, decode: (
        lambda params, ids, negative, w, grid, z_T, between: np.zeros((len(ids), 32, 32, 3) if decode else z_T.shape)
    )
    return pipe


@pytest.fixture
def nothing_runs(monkeypatch, pipe):
    """The commands read their options, and then do no work."""
    monkeypatch.setattr(train, "train", lambda config, *_: train.Result(config.steps, 0))
    monkeypatch.setattr(sample, "load_pipeline", lambda *_, **__: pipe)
    monkeypatch.setattr(sample, "write_png", lambda *_: None)
    monkeypatch.setattr(cli, "make_folder", lambda *_: None)


def options(parser):
    return


def test_config_overrides(fuzz):
    keys = list(config_lib._option_keys(config_lib.default_config()))
    file = str(ROOT / "configs/digits.py")

    def case(rng, place):
        overrides = [
            f"--config.{pick(rng, keys)}={pick(rng, [*WORDS, *TEXTS])}" for _ in range(int(rng.integers(1, 3)))
        ]
        yield repr(overrides)[:300]
        config = config_lib.load(file + pick(rng, ["", "", ":smoke", ":x", ":"]), overrides)
        assert config_lib.from_dict(__import__("json").loads(config_lib.resolved(config))) == config

    fuzz(case, share=0.1)


COMMANDS = {
    train: [
        "--config",
        "--workdir",
        "--compiled",
        "--num_processes",
        "--process_id",
        "--coordinator",
        "--wait",
        "--config.steps",
    ],
    sample: [
        "--model",
        "--prompt",
        "--lora",
        "--steps",
        "--guidance_scale",
        "--seed",
        "--out",
        "--scale",
        "--label",
        "--negative_prompt",
        "--height",
        "--width",
        "--timesteps",
        "--sampler",
        "--dtype",
    ],
    export: [
        "--workdir",
        "--model",
        "--out",
        "--which",
        "--step",
        "--dtype",
        "--dialect",
        "--lora",
        "--sampler",
        "--verify",
    ],
}
GOOD = {
    train: [f"--config={ROOT}/configs/digits.py", "--workdir=run"],
    sample: ["--model=m", "--prompt=a red seven"],
    export: ["--model=nowhere", "--lora=x.safetensors", "--out=new"],
}


def test_commands(fuzz, nothing_runs, monkeypatch, capsys):
    def case(rng, place):
        monkeypatch.chdir(place)
        command = pick(rng, COMMANDS)
        argv = list(GOOD[command])
        for _ in range(int(rng.integers(1, 3))):
            option = pick(rng, COMMANDS[command])
            argv += pick(rng, [[f"{option}={pick(rng, WORDS)}"], [option, pick(rng, WORDS)], [option], [option[:-1]]])
        yield f"{command.__name__} {argv!r}"[:300]
        code = cli.run(command.main, argv)
        out, err = capsys.readouterr()
        assert code in (0, 1, 2), f"exit code {code}"
        if code:
            assert err.count("\n") == 1, f"printed {err!r}"
        assert "Traceback" not in err

    fuzz(case, share=0.2)


def test_pipeline_arguments(fuzz, pipe):
    given = {
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
    odd = [
        *VALUES,
        object(),
        b"x",
        np.float32(4),
        np.int64(4),
        np.zeros(3),
        np.array("x"),
        [4, 2],
        ["a", "b"],
        (1,),
        {1},
        1j,
        range(3),
    ]

    def case(rng, place):
        names = [name for name in given if rng.random() < 0.2]
        call = {"prompts": "a", **{name: pick(rng, odd) if rng.random() < 0.7 else given[name] for name in names}}
        yield repr(call)[:300]
        result = pipe(**call)
        assert isinstance(result, np.ndarray)

    fuzz(case, share=0.2)
