"""peft's patterns for modules: the same matches as peft, in bounded time."""

import random
import re

import pytest
from peft.utils.other import get_pattern_key

from lcm_jax.errors import UserError
from lcm_jax.interop.lora.patterns import LONGEST, Patterns

MODULES = [
    "down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q",
    "mid_block.resnets.0.conv1",
    "up_blocks.1.attentions.0.proj_in",
    "text_model.encoder.layers.11.mlp.fc1",
    "conv_in",
    "aa.bab",
    "ab",
]


@pytest.mark.parametrize(
    "patterns",
    [
        ["to_q", "conv1", "mlp.fc1"],
        ["^mid_block.resnets.0.conv1", "^resnets.0.conv1"],
        ["encoder\\.layers\\.11\\.mlp\\.fc1$", "fc1"],
        [r"layers\.\d+\.mlp.*", r"attn\d.to_(q|k)", "proj_(?:in|out)"],
        ["^model.layers.[1-5].", "^down_blocks.*", "^up_blocks.[0-9]+.attentions.*"],
        [".*", "conv_in"],
        ["conv_in", ".*"],
        [r"a+\.[^a]\w?b", "(a|b)?b"],
        [],
    ],
)
def test_the_first_that_peft_matches(patterns):
    found = Patterns(patterns, "alpha_pattern")
    for module in MODULES:
        theirs = get_pattern_key(patterns, module)
        assert found.first(module) == (theirs if theirs in patterns else None)


def test_random_patterns_as_python_matches_them():
    """Supported patterns match like Python's matcher, which backtracks; these are short enough for it."""
    draw = random.Random(0)
    pieces = [*"ab_^$|()*+?", r"\.", r"\d", r"\w", "[ab]", "[^a.]", "[0-9]", "(.)", ".*", ".*?"]
    pieces += ["(a|b)", "(a|(b|ab))?", "to_q"]
    read = matches = 0
    for _ in range(1500):
        pattern = "".join(draw.choices(pieces, k=draw.randint(1, 6)))
        try:
            found = Patterns([pattern], "alpha_pattern")
        except UserError:
            continue
        read += 1
        spelled = re.compile(rf"(.*\.)?({pattern})$")
        for module in MODULES:
            assert (found.first(module) is not None) == (spelled.match(module) is not None), (pattern, module)
            matches += found.first(module) is not None
    assert read > 300
    assert matches > 300


def test_spellings_of_a_module():
    """The first pattern that matches counts."""
    patterns = Patterns(["^text_model.fc1", "fc1", "^fc2", "text_model.*fc."], "alpha_pattern")
    assert patterns.first("fc1", "text_model.fc1") == "^text_model.fc1"
    assert patterns.first("fc2", "text_model.fc2") == "^fc2"
    assert patterns.first("fc3", "text_model.fc3") == "text_model.*fc."


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        ("(a+)+$", "a group that repeats"),
        ("(a|aa)*b", "a group that repeats"),
        ("(.*a){20}", "a group that repeats"),
        ("a{2,}", "an unsupported repetition"),
        ("a*+b", "an unsupported repetition"),
        (r"(a)\1", "an unsupported escape sequence"),
        ("a(?=b)", r"a misplaced \?"),
        ("[", "an unsupported character set"),
        ("(a", "an unclosed bracket"),
        ("a)", "an unmatched closing bracket"),
        ("^a|b", r"a \^ that applies to one alternative only"),
        ("(" * 11 + "a" + ")" * 11, "groups nested deeper than 10"),
        ("*", r"a misplaced \*"),
        ("a\x1b*\\", "an unsupported escape sequence"),
    ],
)
def test_refused(pattern, why):
    with pytest.raises(UserError, match=rf"^its alpha_pattern has '.*', {why}; supported: names and ") as error:
        Patterns([pattern], "alpha_pattern")
    assert str(error.value).isprintable()


def test_matching_is_linear():
    """A backtracking matcher takes some 10^50 steps for this."""
    pattern = "a*" * 400 + "b"
    assert Patterns([pattern], "alpha_pattern").first("x." + "a" * 200) is None
    assert Patterns([pattern], "alpha_pattern").first("x." + "a" * 200 + "b") == pattern
    with pytest.raises(
        UserError, match=f"regular expressions of {2 * LONGEST} characters; at most {LONGEST} are supported"
    ):
        Patterns(["a*" * (LONGEST // 2), "b*" * (LONGEST // 2)], "alpha_pattern")
