"""Data sources: one kind per file, and the table that finds the source of a directory."""

import dataclasses
from collections.abc import Callable

from etils import epath

from lcm_jax.data.config import DataConfig
from lcm_jax.data.sources import tfds
from lcm_jax.data.sources.base import Source
from lcm_jax.errors import UserError, few
from lcm_jax.host import files


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of source.

    Attributes:
      recognises: whether a directory (`config.data.directory`, `~` expanded) holds such data. It looks at names only,
        and is called before any check: the path may be a file, a pattern or missing.
      mismatch: for the error about a directory that no source recognises, a clause that says why this one doesn't, and
        what would be right: "it is not …: it has no …; did you mean …?".
      open: opens the directory of the config. Raises UserError for data that cannot be read, and for options that have
        no effect on it.
    """

    recognises: Callable[[epath.Path], bool]
    mismatch: Callable[[epath.Path], str]
    open: Callable[[DataConfig], Source]


KINDS = (Kind(tfds.recognises, tfds.mismatch, tfds.open_tfds),)  # the first that recognises a directory opens it


def open_data(config: DataConfig) -> Source:
    """Opens the data set of the config: `directory`, with the first of KINDS that recognises it, or else `dataset`.

    Raises: UserError for a directory that is missing or that no source recognises, and for data that its source cannot
      open.
    """
    if not config.directory:
        return tfds.open_tfds(config)
    path = epath.Path(config.directory).expanduser()
    with files.one_line(path, "read"):
        kind = next((kind for kind in KINDS if kind.recognises(path)), None)
        if kind is None:
            if not path.exists():
                raise UserError(
                    f"data directory {config.directory} does not exist; give your own with --config.data.directory="
                    f"DIR ({tfds.GUIDE} says how to prepare it)"
                )
            reasons = "; ".join(kind.mismatch(path) for kind in KINDS)
            raise UserError(f"{config.directory} {_content(path)}; {reasons}")
    return kind.open(config)


def _content(path: epath.Path) -> str:
    if not path.is_dir():
        return "is a file"
    names = sorted(entry.name for entry in path.iterdir())
    return f"holds {few(names)}" if names else "is empty"


__all__ = ["KINDS", "Kind", "Source", "open_data"]
