"""Writes a folder atomically: it is complete or absent, even if the process is killed."""

import contextlib
import ctypes
import os
import pathlib
import shutil
import stat
from collections.abc import Iterator

from lcm_jax.errors import UserError
from lcm_jax.host import files, unfinished
from lcm_jax.interop.old_folder import check_replaceable
from lcm_jax.interop.weights import is_weights

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # Linux constants


@contextlib.contextmanager
def replacing(out: str | os.PathLike[str], source: pathlib.Path | None = None) -> Iterator[pathlib.Path]:
    """Yields a new folder next to `out` to write into, and renames it to `out` on success.

    Until then only its owner can read it. It is synced to disk before `out` changes. The change is atomic where the
    operating system can exchange two folders. Elsewhere, a process killed between two renames leaves no `out`; the
    next reader or writer on the same machine restores it. Leftovers of killed processes are removed.

    Raises:
      UserError: `out` is or contains `source`, is a file, holds files that no export writes, or can't be written.
    """
    target = pathlib.Path(os.path.realpath(os.path.expanduser(out)))
    unfinished.restore(target)
    if target.exists():
        if source is not None and target == source.resolve():
            raise UserError(f"{out} is the folder that the model was read from; choose another one")
        if not target.is_dir():
            raise UserError(f"{out} is a file; choose a folder")
        if any(target.iterdir()) and not (target / "model_index.json").is_file():
            raise UserError(f"{out} is neither empty nor a model folder (no model_index.json); choose another one")
        with files.one_line(out):
            check_replaceable(target, source, str(out))
    with files.one_line(out):
        target.parent.mkdir(parents=True, exist_ok=True)
        with unfinished.folder(target) as temporary:
            mode = temporary.stat().st_mode
            _set_mode(temporary, mode & ~0o077)
            yield temporary
            _set_mode(temporary, mode)
            if source is not None:
                keep_private(temporary, source)
            unfinished.sync(temporary)
            _put(temporary, target)
            unfinished.sync_names(target.parent)


def keep_private(folder: pathlib.Path, source: pathlib.Path) -> None:
    """Limits group and other permissions of a folder and its files to those of `source` and its files.

    A weight file that `source` doesn't have is limited by the permissions of all weight files in `source`.
    """
    if not source.is_dir():
        return
    allowed = {path.name: path.stat().st_mode for path in source.iterdir() if path.is_file()}
    of_weights = [mode for name, mode in allowed.items() if is_weights(name)]
    for path in folder.iterdir():
        modes = [allowed[path.name]] if path.name in allowed else of_weights if is_weights(path.name) else []
        for mode in modes if path.is_file() else []:
            _limit(path, mode)
    _limit(folder, source.stat().st_mode)


def _limit(path: pathlib.Path, mode: int) -> None:
    _set_mode(path, path.stat().st_mode & (mode | ~0o077))


def _set_mode(path: pathlib.Path, mode: int) -> None:
    if path.stat().st_mode != mode:
        with contextlib.suppress(PermissionError):  # file systems without permissions, such as FAT
            path.chmod(stat.S_IMODE(mode))


def exchange(first: pathlib.Path, second: pathlib.Path) -> bool:
    """Exchanges two folders atomically; returns False if the operating system or file system can't."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)  # Linux only
    if renameat2 is None:
        return False
    return renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0


def _put(new: pathlib.Path, target: pathlib.Path) -> None:
    """Renames `new` to `target`; the old target ends up at `new` or is removed."""
    if not target.exists():
        new.rename(target)
    elif not exchange(new, target):
        old = new.with_suffix(".old")
        with unfinished.locked(target):
            target.rename(old)
            try:
                new.rename(target)
            except OSError:
                old.rename(target)
                raise
            shutil.rmtree(old, ignore_errors=True)  # the next writer removes the rest
