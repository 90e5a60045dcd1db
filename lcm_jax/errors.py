"""The one exception for a user's mistake: a single line that says what is wrong, where, and what would be right."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in what the user gave. Every command prints it as one line, without traceback, and exits with 2."""


class Unavailable(UserError):
    """What a command needs is not there now, and may be later: a host, a port. It exits with 1: worth another try."""


def nearest(word: str, choices: Iterable[str]) -> str:
    """Returns "; did you mean 'x'?" for the closest of `choices`; lists them where they are few, or none is close."""
    choices = sorted(choices)
    close = difflib.get_close_matches(word, choices, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    if choices and (not close or len(choices) <= 5):
        hint += f"{' One of' if close else '; choose from'} {', '.join(choices)}"
    return hint


def one_of(what: str, value: str, choices: Iterable[str]) -> None:
    """Raises UserError unless `value` is one of `choices`; `what` names the option or the file and key."""
    choices = list(choices)
    if value not in choices:
        raise UserError(f"{what} is {value!r}{nearest(str(value), choices)}")
