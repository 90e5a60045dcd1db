"""Messages: one line, safe to print, short."""

import pytest

from lcm_jax.errors import LONGEST, UserError, few, nearest, one_of, plain


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a key\x1b[31m in red", r"a key\x1b[31m in red"),
        ("\x9b31m and \x07", r"\x9b31m and \x07"),
        ("written\u202ebackwards", r"written\u202ebackwards"),
        ("a lone \udce9", r"a lone \udce9"),
        ("two\nlines\t and\u2028more ", "two lines and more"),
        ("fünf Bilder 日本 '…' \\", "fünf Bilder 日本 '…' \\"),
    ],
)
def test_a_message_is_one_line_that_can_be_printed(text, line):
    assert plain(text) == line
    assert str(UserError(text)) == line
    line.encode()


def test_a_long_message_keeps_its_start_and_its_end():
    message = str(UserError("start " + "x" * 20_000 + " end"))
    assert len(message) == LONGEST
    assert message.startswith("start xxx")
    assert message.endswith("xxx end")


def test_a_message_around_another_stays_short():
    inner = UserError("x" * 1000)
    assert len(str(UserError(f"folder/file: {inner}"))) == LONGEST


def test_few_names_three_and_counts_the_rest():
    assert few(["a", "b", "c"]) == "a, b, c"
    assert few(f"module {i}" for i in range(20)) == "module 0, module 1, module 2 and 17 more"


def test_choices_are_listed_where_they_are_few():
    assert nearest("zzz", [f"choice{i:02}" for i in range(278)]) == (
        "; choose from choice00, choice01, choice02 and 275 more"
    )
    assert nearest("zzz", "ab") == "; choose from a, b"


@pytest.mark.parametrize("value", [["LCMScheduler"], None, 3, "x" * 10**6])
def test_one_of_takes_any_value(value):
    with pytest.raises(UserError, match="scheduler is ") as error:
        one_of("scheduler", value, ["LCMScheduler", "DDIMScheduler"])
    assert len(str(error.value)) < 200
