"""Exceptions for user errors, and helpers that format messages as one short, printable line."""

import difflib
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any, TextIO

LONGEST = 500  # characters of a message
_FEW, _LISTED = 3, 12  # names shown of a longer list; maximum number of choices listed in full


def is_out_of_memory(error: Exception) -> bool:
    """Returns whether XLA raised this error because a device has no memory for a program or its arguments."""
    return "RESOURCE_EXHAUSTED" in str(error)


def plain(text: Any, longest: int = LONGEST) -> str:
    """Returns text as one line that is safe to print, of at most `longest` characters.

    Control characters (including ESC, which starts terminal sequences), characters that change the writing direction
    and lone surrogates become escapes (`\\x1b`); runs of whitespace become one space. A long text is shortened to its
    start and end, joined by ` … `.
    """
    line = printable(" ".join(str(text)[: 100 * longest].split()))
    if len(line) <= longest:
        return line
    end = longest // 3
    return f"{line[: longest - end - 3].rstrip()} … {line[-end:].lstrip()}"


def printable(text: str) -> str:
    """Escapes characters that a terminal would interpret, like `plain`, but keeps all spaces."""
    return "".join(c if c.isprintable() or c == " " else _escape(c) for c in text)


def say(line: str, file: TextIO | None = None) -> None:
    """Prints one line that may contain paths and other untrusted text; to stdout by default."""
    print(printable(line), file=file, flush=True)


def _escape(character: str) -> str:
    if unicodedata.category(character) == "Zs":  # no-break and other Unicode spaces
        return " "
    return character.encode("unicode_escape").decode("ascii")


class UserError(Exception):
    """Invalid user input. Commands print it as one line, without traceback, and exit with code 2."""

    def __init__(self, message: str) -> None:
        """Formats `message` with `plain`; it should say what is wrong, where, and how to fix it."""
        super().__init__(plain(message))


class Unavailable(UserError):
    """A resource, such as a host or a port, is temporarily unavailable. Commands exit with code 1: retry later."""


def few(names: Iterable[Any]) -> str:
    """Returns the first three names and the number of the rest: "a, b, c and 12 more"."""
    names = [str(name) for name in names]
    rest = f" and {len(names) - _FEW} more" if len(names) > _FEW else ""
    return ", ".join(plain(name, 100) for name in names[:_FEW]) + rest


def nearest(word: str, choices: Iterable[str]) -> str:
    """Returns "; did you mean 'x'?" for the closest of `choices`, and lists them if they are few or none is close."""
    choices = sorted(choices)
    close = difflib.get_close_matches(word[:100], choices, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    if choices and (not close or len(choices) <= 5):
        hint += f"{' One of' if close else '; choose from'} {_list(choices)}"
    return hint


def _list(choices: Sequence[str]) -> str:
    return ", ".join(choices) if len(choices) <= _LISTED else few(choices)


def one_of(what: str, value: Any, choices: Iterable[str]) -> None:
    """Raises UserError unless `value` is one of `choices`. `what` names the option, or the file and key."""
    choices = list(choices)
    if not isinstance(value, str) or value not in choices:
        raise UserError(f"{what} is {plain(repr(value), 100)}{nearest(str(value)[:100], choices)}")
