"""Lists every option of a run: its name, type, default and comment.

python -m lcm_jax.train --options             prints them
python -m lcm_jax.config_options              prints them as Markdown, the content of docs/options.md
"""

import dataclasses
import inspect
import io
import sys
import textwrap
import tokenize
from collections.abc import Iterator
from typing import Any, NamedTuple

from lcm_jax.config import Config

_WIDTH = 100  # characters of a line in a terminal


class Option(NamedTuple):
    """One option: "config.SECTION.NAME", or "config.NAME"."""

    name: str
    type: str
    default: str
    comment: str


def sections() -> Iterator[tuple[str, str, list[Option]]]:
    """Yields (section, first line of its docstring, its options): those of the run first, then section by section."""
    nested = [field for field in dataclasses.fields(Config) if dataclasses.is_dataclass(field.type)]
    yield "config", "", [o for o in _options(Config, "config") if o.name.split(".")[1] not in {f.name for f in nested}]
    for field in nested:
        about = inspect.cleandoc(field.type.__doc__ or "").split("\n\n")[0].replace("\n", " ")
        yield f"config.{field.name}", about, list(_options(field.type, f"config.{field.name}"))


def text() -> str:
    """Returns all options for a terminal."""
    lines = []
    for section, about, options in sections():
        lines += ["", f"{section}: {about}" if about else section]
        for option in options:
            lines.append(f"  --{option.name}={option.default}  ({option.type})")
            lines += textwrap.wrap(option.comment, _WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines[1:]) + "\n"


def markdown() -> str:
    """Returns the content of docs/options.md."""
    lines = [
        "# Options",
        "",
        "All options of `lcm-jax train` and their defaults in the code; a config file changes some of them. Change one",
        "on the command line as in `--config.optimizer.learning_rate=1e-5`. `python -m lcm_jax.config_options` writes",
        "this page from the dataclasses; `python -m lcm_jax.train --options` prints the same.",
    ]
    for section, about, options in sections():
        lines += [
            "",
            f"## {section}",
            "",
            *([about, ""] if about else []),
            "| option | type | default | |",
            "|---|---|---|---|",
        ]
        for name, kind, default, comment in options:
            cells = [f"`{name}`", kind, f"`{default}`" if default else "", comment]
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _options(section: Any, prefix: str) -> Iterator[Option]:
    comments = _comments(section)
    for field in dataclasses.fields(section):
        kind = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", str(field.type))
        if kind == "tuple":
            kind = str(field.type)
        default = "" if field.default is dataclasses.MISSING else str(field.default)
        yield Option(f"{prefix}.{field.name}", kind, default, comments.get(field.name, ""))


def _comments(section: Any) -> dict[str, str]:
    """Returns field → the comment in the lines of its definition, or else directly above it."""
    found, above, field, depth = {}, [], "", 0
    for token in tokenize.generate_tokens(io.StringIO(inspect.getsource(section)).readline):
        if token.type == tokenize.COMMENT:
            comment = token.string.removeprefix("#").strip()
            (found.setdefault(field, []) if field else above).append(comment)
        elif token.type == tokenize.NEWLINE:
            field = ""
        elif token.type == tokenize.OP and token.string in "([{":
            depth += 1
        elif token.type == tokenize.OP and token.string in ")]}":
            depth -= 1
        elif token.type == tokenize.NAME and not field and token.start[1] == 4 and not depth:
            field = token.string
            if above:
                found[field], above = above, []
    return {name: " ".join(lines) for name, lines in found.items()}


if __name__ == "__main__":
    sys.stdout.write(markdown())
