"""The list of options is that of the dataclasses, and docs/options.md is up to date."""

import pathlib

import pytest

from lcm_jax import config_file, config_options, train
from lcm_jax.config import default_config

ROOT = pathlib.Path(__file__).resolve().parents[1]


def listed():
    return [option for _, _, options in config_options.sections() for option in options]


def test_every_option_is_listed_with_its_default():
    tree = default_config()
    assert {option.name for option in listed()} == {f"config.{key}" for key in config_file.option_keys(tree)}
    by_name = {option.name: option for option in listed()}
    assert by_name["config.optimizer.learning_rate"].default == "1e-05"
    assert by_name["config.data.latents"].type == "bool"
    assert by_name["config.log.prompts"].type == "tuple[str, ...]"


def test_comments_are_those_of_the_field():
    by_name = {option.name: option.comment for option in listed()}
    assert by_name["config.data.resize"] == "lanczos | bicubic"
    assert by_name["config.data.max_pixels"].startswith("Limit of width")  # above the field, in two lines
    assert by_name["config.data.max_pixels"].endswith("JPEG 2000.")


def test_the_page_is_up_to_date():
    page = (ROOT / "docs" / "options.md").read_text()
    assert page == config_options.markdown(), "python -m lcm_jax.config_options > docs/options.md"


def test_train_prints_them(capsys):
    with pytest.raises(SystemExit) as end:
        train.main(["--options"])
    assert end.value.code == 0
    assert capsys.readouterr().out == config_options.text()
