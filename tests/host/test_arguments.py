"""Arguments from users: clear values are accepted, others raise one line that names the argument."""

import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

import lcm_jax
from lcm_jax.errors import UserError
from lcm_jax.host import arguments

NOT_WHOLE = "; supported: a whole number"
NOT_A_NUMBER = "; supported: a finite number"
NOT_UTF8 = ", which is not UTF-8; give it in UTF-8"


@pytest.mark.parametrize("value", [4, 4.0, "4", np.int16(4), np.uint64(4), np.float32(4), np.array(4), jnp.int32(4)])
def test_whole_numbers(value):
    found = arguments.whole("steps", value)
    assert type(found) is int
    assert found == 4


@pytest.mark.parametrize(
    "value",
    [
        4.5,
        float("nan"),
        float("inf"),
        "4.5",
        "four",
        "",
        True,
        np.True_,
        [4],
        np.array([4]),
        b"4",
        4j,
        {},
        object,
        pytest.param(10**5000, id="long"),
    ],
)
def test_what_is_no_whole_number(value):
    with pytest.raises(UserError) as error:
        arguments.whole("steps", value)
    assert str(error.value).startswith("steps is ")
    assert str(error.value).endswith(NOT_WHOLE)


@pytest.mark.parametrize("value", [7.5, "7.5", np.float16(7.5), np.array(7.5), jnp.float32(7.5)])
def test_numbers(value):
    found = arguments.number("guidance_scale", value)
    assert type(found) is float
    assert found == 7.5


@pytest.mark.parametrize(
    "value",
    [
        *map(float, ("nan", "inf", "-inf")),
        "nan",
        "7,5",
        "",
        True,
        np.False_,
        10**400,
        1e39,
        np.array([7.0]),
        [7.0],
        b"7",
        7j,
    ],
)
def test_what_is_no_finite_number(value):
    with pytest.raises(UserError) as error:
        arguments.number("guidance_scale", value)
    assert str(error.value).startswith("guidance_scale is ")
    assert str(error.value).endswith(NOT_A_NUMBER)


@pytest.mark.parametrize("value", [[999, 499], (999.0, "499"), np.array([999, 499]), iter([999, 499])])
def test_lists_of_whole_numbers(value):
    assert arguments.wholes("timesteps", value) == [999, 499]
    assert arguments.wholes("timesteps", np.int64(999)) == arguments.wholes("timesteps", "999") == [999]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("999,499", "timesteps is '999,499'" + NOT_WHOLE),
        ([999, 4.5], "timesteps[1] is 4.5" + NOT_WHOLE),
        ([[999]], "timesteps[0] is [999]" + NOT_WHOLE),
        ({999: 1}, "timesteps is {999: 1}" + NOT_WHOLE),
    ],
)
def test_what_is_no_list_of_whole_numbers(value, message):
    with pytest.raises(UserError) as error:
        arguments.wholes("timesteps", value)
    assert str(error.value) == message


def test_seeds():
    assert [arguments.seed(s) for s in (0, "7", np.uint64(2**64 - 1))] == [0, 7, 2**64 - 1]
    for value in (-1, 2**64):
        with pytest.raises(UserError, match=r"seed is .*; it must be in 0 … 18446744073709551615"):
            arguments.seed(value)


@pytest.mark.parametrize(
    "value",
    [["café", "b"], ("café", "b"), (text for text in ("café", "b")), np.array(["café", "b"]), ["café".encode(), "b"]],
    ids=["list", "tuple", "generator", "array", "bytes"],
)
def test_texts(value):
    found = arguments.texts("prompts", value)
    assert found == ["café", "b"]
    assert {type(text) for text in found} == {str}


@pytest.mark.parametrize("value", ["café", np.str_("café"), np.array("café"), "café".encode()])
def test_a_single_text(value):
    assert arguments.texts("prompts", value) == ["café"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "prompts is None; supported: a text, or a list of texts"),
        (7, "prompts is 7; supported: a text, or a list of texts"),
        ({"a"}, "prompts is {'a'}; supported: a text, or a list of texts"),
        ({"a": 1}, "prompts is {'a': 1}; supported: a text, or a list of texts"),
        (["a", None], "prompts[1] is None; supported: a text"),
        ([["a"]], "prompts[0] is ['a']; supported: a text"),
        ("caf\udce9", r"prompts is 'caf\udce9'" + NOT_UTF8),
        (["a", "\ud800"], r"prompts[1] is '\ud800'" + NOT_UTF8),
        (b"caf\xe9", r"prompts is b'caf\xe9'" + NOT_UTF8),
    ],
)
def test_what_is_no_text(value, message):
    with pytest.raises(UserError) as error:
        arguments.texts("prompts", value)
    assert str(error.value) == message


@pytest.mark.parametrize(
    "value", ["abc", ["a", "b"], None, [[1], [1, 2]], np.ones(2, bool), np.ones(2, complex), np.array("a"), {}]
)
def test_what_is_no_array(value):
    with pytest.raises(UserError, match="latents is .*; supported: an array of real numbers"):
        arguments.array("latents", value, (2,))


def test_paths():
    assert arguments.path("folder", pathlib.Path("a/b")) == arguments.path("folder", "a/b") == "a/b"
    for value in (None, 7, b"a/b", ["a"], "", "a\0b"):
        with pytest.raises(UserError, match=r"path_or_hub_id is .*; supported: a path"):
            lcm_jax.load_pipeline(value)
