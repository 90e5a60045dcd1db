"""Matches peft's patterns for module names (`alpha_pattern`) in linear time.

peft matches each key as a regular expression with the end of a module's path: `to_q`, `attn2.to_k`,
`^mid_block.proj_in`, `layers.\\d+.fc1`. Files are untrusted, and a backtracking matcher may never finish on `(a+)+$`.
Plain names, the usual case, are looked up literally, so a dot matches only a dot. Regular expressions may use literals,
`.`, `\\d`, `\\w`, `[a-z]`, `*`, `+`, `?`, `(a|b)`, and `^` and `$` at the ends; only single characters may repeat. All
positions that a pattern can reach in a text are tracked at once, as the bits of an integer.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable
from typing import Any

from lcm_jax.errors import UserError, plain

LONGEST = 1000  # characters, total over all regular expressions of a configuration
DEEPEST = 10  # nested groups
_NAME = re.compile(r"(\^?)([\w-]+(?:\\?\.[\w-]+)*)\$?")
_CLASSES: dict[str, Callable[[str], bool]] = {
    ".": lambda c: True,
    "d": str.isdecimal,
    "w": lambda c: c.isalnum() or c == "_",
}


@dataclasses.dataclass(frozen=True)
class _One:
    """One character of the set `accepted` (a key of the masks), which may be optional or repeated."""

    accepted: str
    optional: bool
    repeats: bool


@dataclasses.dataclass(frozen=True)
class _Choice:
    options: list[list[Any]]


class Patterns:
    """The patterns of a configuration, in order; the first that matches a module applies."""

    def __init__(self, patterns: Iterable[str], what: str) -> None:
        """Parses patterns; `what` names the option in errors. Raises UserError for an unsupported pattern."""
        self._names: dict[tuple[bool, str], tuple[int, str]] = {}  # (from the start, name) -> position, pattern
        self._regular: list[tuple[int, str, _Regular]] = []
        for position, pattern in enumerate(patterns):
            if name := _NAME.fullmatch(pattern):
                key = bool(name[1]), name[2].replace("\\.", ".")
                self._names.setdefault(key, (position, pattern))
            else:
                self._regular.append((position, pattern, _Regular(pattern, what)))
        if (length := sum(len(pattern) for _, pattern, _ in self._regular)) > LONGEST:
            raise UserError(
                f"its {what} has regular expressions of {length} characters; at most {LONGEST} are supported"
            )

    def first(self, *spellings: str) -> str | None:
        """Returns the first pattern that matches any of a module's spellings, or None."""
        found = []
        for spelled in spellings:
            keys = [(True, spelled), *((False, spelled[start:]) for start in _starts(spelled))]
            found += [self._names[key] for key in keys if key in self._names]
            found += [(at, pattern) for at, pattern, regular in self._regular if regular.matches(spelled)][:1]
        return min(found)[1] if found else None


def _starts(text: str) -> list[int]:
    """Returns the positions where a pattern may start: 0 and after each dot."""
    return [0, *(i + 1 for i, c in enumerate(text) if c == ".")]


class _Regular:
    """A regular expression in which only single characters may repeat."""

    def __init__(self, pattern: str, what: str) -> None:
        self._pattern, self._what = pattern, what
        self._anchored = pattern.startswith("^")
        self._text = pattern.removeprefix("^")
        if self._text.endswith("$") and not self._text.endswith("\\$"):
            self._text = self._text[:-1]
        self._at = 0
        self._tests: dict[str, Callable[[str], bool]] = {}
        self._options = self._read_options(0)
        if self._at < len(self._text):
            raise self._unread("an unmatched closing bracket")
        if self._anchored and len(self._options) > 1:
            raise self._unread("a ^ that applies to one alternative only")

    def matches(self, text: str) -> bool:
        masks = {key: sum(1 << i for i, c in enumerate(text) if test(c)) for key, test in self._tests.items()}
        reached = 1 if self._anchored else sum(1 << start for start in _starts(text))
        return bool(_advance(_Choice(self._options), reached, masks, len(text)) >> len(text) & 1)

    def _unread(self, why: str) -> UserError:
        return UserError(
            f"its {self._what} has {plain(self._pattern, 100)!r}, {why}; supported: names and regular expressions of "
            r"literals, ., \d, \w, [a-z], *, +, ? and (a|b), in which only single characters repeat"
        )

    def _read_options(self, depth: int) -> list[list[Any]]:
        """Reads alternatives up to the closing parenthesis or the end."""
        if depth > DEEPEST:
            raise self._unread(f"groups nested deeper than {DEEPEST}")
        options: list[list[Any]] = [[]]
        while self._at < len(self._text) and self._text[self._at] != ")":
            if self._text[self._at] == "|":
                self._at += 1
                options.append([])
            elif self._text[self._at] == "(":
                options[-1].append(self._read_group(depth))
            else:
                options[-1].append(self._read_one())
        return options

    def _read_group(self, depth: int) -> _Choice:
        self._at += 3 if self._text.startswith("(?:", self._at) else 1
        options = self._read_options(depth + 1)
        if not self._take(")"):
            raise self._unread("an unclosed bracket")
        if self._take("?"):
            options.append([])
        if self._text[self._at : self._at + 1] in tuple("*+?{"):
            raise self._unread("a group that repeats")
        return _Choice(options)

    def _read_one(self) -> _One:
        accepted = self._read_character()
        sign = next((sign for sign in "*+?" if self._take(sign)), "")
        if sign:
            self._take("?")  # greedy or lazy doesn't change what matches
        if self._text[self._at : self._at + 1] in tuple("*+?{"):
            raise self._unread("an unsupported repetition")
        return _One(accepted, optional=sign in tuple("*?"), repeats=sign in tuple("*+"))

    def _take(self, sign: str) -> bool:
        if taken := self._text.startswith(sign, self._at):
            self._at += len(sign)
        return taken

    def _read_character(self) -> str:
        """Reads a one-character item, stores its test, and returns its text, the key of the test."""
        start, sign = self._at, self._text[self._at]
        if sign == "[":
            found = re.compile(r"\[(\^?)((?:[\w.]-[\w.]|\\[dw.-]|[\w.-])+)\]").match(self._text, self._at)
            if found is None:
                raise self._unread("an unsupported character set")
            self._at = found.end()
            members = re.findall(r"([\w.])-([\w.])|\\(.)|(.)", found[2])
            self._tests[found[0]] = lambda c: any(_in(c, member) for member in members) != bool(found[1])
            return found[0]
        if sign == "\\":
            name = self._text[self._at + 1 : self._at + 2]
            if name not in ("d", "w") and (not name or name.isalnum()):
                raise self._unread("an unsupported escape sequence")
            self._at += 2
            self._tests[self._text[start : self._at]] = _CLASSES[name] if name in ("d", "w") else name.__eq__
        elif sign in "*+?{}^$]":
            raise self._unread(f"a misplaced {sign}")
        else:
            self._at += 1
            self._tests[sign] = _CLASSES["."] if sign == "." else sign.__eq__
        return self._text[start : self._at]


def _in(character: str, member: tuple[str, str, str, str]) -> bool:
    low, high, escaped, single = member
    if low:
        return low <= character <= high
    if escaped:
        return _CLASSES[escaped](character) if escaped in "dw" else character == escaped
    return character == single


def _advance(item: _One | _Choice, reached: int, masks: dict[str, int], length: int) -> int:
    """Returns the positions after an item, given those before it; bit i is the position before character i."""
    if isinstance(item, _Choice):
        behind = 0
        for option in item.options:
            at = reached
            for inner in option:
                at = _advance(inner, at, masks, length)
            behind |= at
        return behind
    mask = masks[item.accepted]
    behind = (reached & mask) << 1
    step = 1
    while item.repeats and step <= length:  # over 1, 2, 4, 8 … accepted characters
        behind |= (behind & mask) << step
        mask &= mask >> step
        step *= 2
    return behind | reached if item.optional else behind
