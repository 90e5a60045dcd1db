"""A run's options: files, overrides, and error messages."""

import dataclasses
import json
import pathlib

import pytest

from lcm_jax import config as config_lib
from lcm_jax import config_file
from lcm_jax.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parent.parent
FILES = (
    "digits.py",
    "digits.py:full",
    "digits.py:smoke",
    "digits_teacher.py",
    "digits_teacher.py:vae",
    "sd15.py",
    "sd21.py",
    "sdxl.py",
    "sdxl_lora.py",
    "ssd1b_lora.py",
)


def load(name, *overrides):
    return config_file.load(str(ROOT / "configs" / name), overrides)


@pytest.mark.parametrize("name", FILES)
def test_each_config_file_loads(name):
    assert load(name).steps > 0


def test_sd15_is_the_papers_recipe():
    config = load("sd15.py")
    assert (config.optimizer.learning_rate, config.batch_size, config.ema.decay) == (8e-6, 72, 0.999943)
    assert (config.lcd.guidance_min, config.lcd.guidance_max, config.lcd.skip) == (3.0, 15.0, 20)  # w + 1, w in [2, 14]


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("--config.optimizer.learning_rate=1e-3", ("optimizer", "learning_rate"), 1e-3),
        ("--config.steps=7", ("steps",), 7),
        ("--config.lcd.solver=dpmpp", ("lcd", "solver"), "dpmpp"),
        ("--config.ema.warmup=True", ("ema", "warmup"), True),
        ("--config.log.prompts=('one', 'two')", ("log", "prompts"), ("one", "two")),
        ("--config.lcd.guidance_max=9", ("lcd", "guidance_max"), 9.0),
    ],
)
def test_the_command_line_overrides(override, path, value):
    config = load("digits.py", override)
    for name in path:
        config = getattr(config, name)
    assert config == value
    assert type(config) is type(value)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("--config.lcd.sovler=dpmpp", "lcd.solver"),
        ("--config.learning_rate=1e-4", "optimizer.learning_rate"),
        ("--config.optimizer.lr=1", "did you mean 'config.optimizer.learning_rate'?"),
        ("--config.image_size=8", "did you mean 'config.data.image_size'?"),
        ("--config.ema_decay=1", "did you mean 'config.ema.decay'?"),
        ("--config.lcd.solver=dpm++", "One of ddim, dpm, dpmpp"),
        ("--config.steps=many", "--config.steps is 'many'; it must be a whole number, as in 32"),
        ("--config.optimizer.b1=x", "--config.optimizer.b1 is 'x'; it must be a number, as in 1e-5"),
        ("--config.data.latents=maybe", "--config.data.latents is 'maybe'; it must be true or false"),
        ("--config.steps=-1", "config.steps is -1; it must be positive"),
        ("--config.steps", "a value is missing"),
        ("--confg.steps=1", "not an option of this command"),
        ("--config.seed=-1", "config.seed is -1; it must be in 0 … 4294967295"),
        ("--config.seed=4294967296", "config.seed is 4294967296; it must be in 0 … 4294967295"),
        ("--config.optimizer.learning_rate=nan", "config.optimizer.learning_rate is nan; it must be positive"),
        ("--config.optimizer.clip_norm=inf", "config.optimizer.clip_norm is inf"),
        ("--config.log.guidance_scale=nan", "config.log.guidance_scale is nan; it must be a finite number"),
        ("--config.ema.decay=1.5", "config.ema.decay is 1.5"),
        ("--config.optimizer.name=adam", "config.optimizer.name is 'adam'; did you mean 'adamw'? One of "),
        ("--config.optimizer.moments_dtype=float16", "moments_dtype is 'float16'; did you mean 'bfloat16'? One of "),
        ("--config.objective=lcm", "did you mean 'lcd'"),
        ("--config.denoising.min_snr_gamma=5", "denoising.min_snr_gamma has no effect: objective is 'lcd'"),
    ],
)
def test_a_slip_ends_in_one_line_that_helps(override, said):
    with pytest.raises(UserError) as error:
        load("digits.py", override)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("option", ["moments_dtype=bfloat16", "b1=0.8", "b2=0.99", "eps=1e-6"])
def test_adamws_options_have_no_effect_on_adafactor(option):
    with pytest.raises(UserError, match=rf"optimizer\.{option.split('=')[0]} has no effect: name is 'adafactor'"):
        load("digits.py", "--config.optimizer.name=adafactor", f"--config.optimizer.{option}")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nowhere.py", "there is no file"),
        ("x" * 300, "there is no file"),
        ("digits.py:smok", "digits.py has :full and :smoke"),
        ("digitz", "there is no file .*digitz; did you mean 'digits'?"),
        ("x/sd15.py:a", "there is no file .*sd15.py; lcm_jax's own config of that name is --config=sd15:a"),
    ],
)
def test_a_wrong_file_or_variant_is_named(name, said):
    with pytest.raises(UserError, match=said):
        load(name)


def test_a_config_of_lcm_jax_is_found_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert set(config_file.own_configs()) == {path.stem for path in (ROOT / "configs").glob("*.py")}
    assert config_file.load("digits:smoke") == load("digits.py:smoke")
    (tmp_path / "digits").write_text("def get_config():\n  return None\n")  # a file of this name comes first
    with pytest.raises(UserError, match="returns NoneType"):
        config_file.load("digits")


def test_a_config_file_that_fails_is_one_line(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from lcm_jax.config import default_config\n"
        "def get_config():\n  config = default_config()\n  config.stesp = 3\n  return config\n"
    )
    with pytest.raises(UserError, match="stesp") as error:
        config_file.load(str(file))
    assert "\n" not in str(error.value)
    file.write_text("def get_config():\n  pass\n")
    with pytest.raises(UserError, match="returns NoneType; return the ConfigDict"):
        config_file.load(str(file))


@pytest.mark.parametrize("name", FILES)
def test_the_stored_config_reads_back_equal(name, tmp_path):
    config = load(name)
    (tmp_path / "config.json").write_text(config_lib.resolved(config))
    assert config_lib.load_resolved(tmp_path) == config


def test_a_run_of_another_checkout_finds_its_teacher_here(tmp_path):
    config = load("digits.py")
    moved = config_lib.resolved(config).replace(str(ROOT), "/moved/away")
    assert moved != config_lib.resolved(config)
    (tmp_path / "config.json").write_text(moved)
    assert config_lib.load_resolved(tmp_path) == config
    found = config_lib.load_resolved(tmp_path, {"model.folder": "/new", "data.directory": "/data"})
    assert (found.model.folder, found.data.directory) == ("/new", "/data")


def test_a_workdir_of_another_run_is_refused():
    config = load("digits.py")
    other = dataclasses.replace(config, batch_size=7)
    with pytest.raises(UserError, match=r"runs/x holds a run with config.batch_size=7, not 32"):
        config_lib.check_same_run(config, other, "runs/x")
    other = dataclasses.replace(config, lcd=dataclasses.replace(config.lcd, skip=10))
    with pytest.raises(UserError, match=r"config.lcd.skip=10, not 20"):
        config_lib.check_same_run(config, other, "runs/x")


def test_what_does_not_change_the_steps_may_differ():
    config = load("digits.py", "--config.optimizer.decay=constant")
    data = dataclasses.replace(config.data, max_pixels=10**9, threads=1)
    other = dataclasses.replace(config, steps=5, log=config_lib.LogConfig(every=3), data=data)
    config_lib.check_same_run(config, other, "runs/x")


def test_more_steps_under_a_cosine_decay_is_another_run():
    config = load("digits_teacher.py")
    with pytest.raises(UserError, match=r"config.steps="):
        config_lib.check_same_run(config, dataclasses.replace(config, steps=5), "runs/x")


@pytest.mark.parametrize("text", ["{", json.dumps({"model": {"folder": "x"}, "stpes": 1}), None])
def test_a_folder_that_is_no_run_is_named(text, tmp_path):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=str(tmp_path)):
        config_lib.load_resolved(tmp_path)
