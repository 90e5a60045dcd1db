"""Untrusted JSON: each error is one line that names the file."""

import json

import pytest

from lcm_jax.errors import UserError
from lcm_jax.host import json_file


def test_an_object_is_returned_as_it_is(tmp_path):
    value = {"text": "ü", "list": [1, 2.5, None, True], "model_max_length": 10**30}
    (tmp_path / "config.json").write_text(json.dumps(value), encoding="utf-8")
    assert json_file.read(tmp_path / "config.json") == value


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"", "can't be read as JSON"),
        (b"{", "can't be read as JSON"),
        (b'{"a": "caf\xe9"}', "can't be read as JSON"),
        (b"[1]", "should hold a JSON object, found list"),
        (b'{"a": %s}' % (b"9" * 5000), "a number of 5000 digits is too large"),
        (b'{"a": %s' % (b"[" * 100_000), "brackets nested deeper than 64"),
        (b'{"a": %s%s}' % (b"[" * 100, b"]" * 100), "brackets nested deeper than 64"),
    ],
)
def test_what_is_refused(tmp_path, text, why):
    path = tmp_path / "config.json"
    path.write_bytes(text)
    with pytest.raises(UserError, match=why) as error:
        json_file.read(path)
    assert str(error.value).startswith(str(path))


def test_a_large_file_is_not_read(tmp_path):
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(json_file.LARGEST + 1)
    with pytest.raises(UserError, match="larger than 32 MiB"):
        json_file.read(path)


def test_a_folder_and_nothing(tmp_path):
    with pytest.raises(UserError, match="can't be read: Is a directory"):
        json_file.read(tmp_path)
    with pytest.raises(UserError, match="config.json is missing"):
        json_file.read(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (json_file.NUMBER, [0, -1.5, 10**100], [True, "1", None, [1], 10**400, float("nan"), float("-inf")]),
        (json_file.POSITIVE, [1, 1e-9], [0, -1, False, "1"]),
        (json_file.INTEGER, [0, -3], [1.0, True, "3", None]),
        (json_file.WHOLE, [1, 2**31 - 1], [0, 2**31, 1.0, True]),
        (json_file.BOOLEAN, [True, False], [0, "false", None]),
        (json_file.TEXT, ["", "a"], [None, 1, ["a"]]),
        (json_file.TEXTS, [{}, {"a": "b"}], [{"a": 1}, ["a"], "a"]),
        (json_file.NUMBERS, [[], [1, 2.5]], [[True], ["1"], 1, {"a": 1}]),
        (json_file.or_none(json_file.TEXT), [None, "a"], [1, False]),
    ],
)
def test_kinds(kind, good, bad):
    for value in good:
        kind.check("key", value)
    for value in bad:
        with pytest.raises(UserError, match=f"key is .*; supported: {kind.name}"):
            kind.check("key", value)


def test_numbers_that_are_not_finite_are_kept_where_nobody_uses_them():
    text = '{"lambda_min_clipped": -Infinity}'  # as diffusers writes DPMSolverMultistepScheduler
    assert json.dumps(json_file.parse(text, "x.json", {"beta_start": json_file.NUMBER})) == text
    with pytest.raises(UserError, match="lambda_min_clipped is -inf; supported: a number"):
        json_file.parse(text, "x.json", {"lambda_min_clipped": json_file.NUMBER})


def test_a_value_of_another_kind_names_file_key_and_value():
    with pytest.raises(UserError) as error:
        json_file.parse('{"beta_start": "0.1"}', "folder/x.json", {"beta_start": json_file.NUMBER})
    assert str(error.value) == "folder/x.json: beta_start is '0.1'; supported: a number"
