"""The exception for a user's mistake, and the words that every message is made of: one line, plain and short."""

import difflib
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any, TextIO

LONGEST = 500  # characters of a message
_FEW, _LISTED = 3, 12  # names in a list that is cut; choices that are listed in full


def plain(text: Any, longest: int = LONGEST) -> str:
    """Returns text as one line that is safe to print, of at most `longest` characters.

    Control characters (ESC, which starts a terminal's commands, among them), characters that change the direction of
    writing and lone surrogates become escapes (`\\x1b`), any white space a blank. Of a long text the start and the end
    are kept, with ` … ` between them.
    """
    line = printable(" ".join(str(text)[: 100 * longest].split()))
    if len(line) <= longest:
        return line
    end = longest // 3
    return f"{line[: longest - end - 3].rstrip()} … {line[-end:].lstrip()}"


def printable(text: str) -> str:
    """Returns text without characters that a terminal would obey, as `plain` does, but with all its blanks."""
    return "".join(c if c.isprintable() or c == " " else _escape(c) for c in text)


def say(line: str, file: TextIO | None = None) -> None:
    """Prints one line that may hold paths and other words from outside; on stdout by default."""
    print(printable(line), file=file, flush=True)


def _escape(character: str) -> str:
    if unicodedata.category(character) == "Zs":  # a no-break space and its kin
        return " "
    return character.encode("unicode_escape").decode("ascii")


class UserError(Exception):
    """A mistake in what the user gave. Every command prints it as one line, without traceback, and exits with 2."""

    def __init__(self, message: str) -> None:
        """Args: what is wrong, where, and what would be right; `plain` makes it one line."""
        super().__init__(plain(message))


class Unavailable(UserError):
    """What a command needs is not there now, and may be later: a host, a port. It exits with 1: worth another try."""


def few(names: Iterable[Any]) -> str:
    """Returns the first three names and the number of the others: "a, b, c and 12 more"."""
    names = [str(name) for name in names]
    rest = f" and {len(names) - _FEW} more" if len(names) > _FEW else ""
    return ", ".join(plain(name, 100) for name in names[:_FEW]) + rest


def nearest(word: str, choices: Iterable[str]) -> str:
    """Returns "; did you mean 'x'?" for the closest of `choices`; lists them where they are few, or none is close."""
    choices = sorted(choices)
    close = difflib.get_close_matches(word[:100], choices, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    if choices and (not close or len(choices) <= 5):
        hint += f"{' One of' if close else '; choose from'} {_list(choices)}"
    return hint


def _list(choices: Sequence[str]) -> str:
    return ", ".join(choices) if len(choices) <= _LISTED else few(choices)


def one_of(what: str, value: Any, choices: Iterable[str]) -> None:
    """Raises UserError unless `value` is one of `choices`; `what` names the option or the file and key."""
    choices = list(choices)
    if not isinstance(value, str) or value not in choices:
        raise UserError(f"{what} is {plain(repr(value), 100)}{nearest(str(value)[:100], choices)}")
