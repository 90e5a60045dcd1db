"""Writing a folder so that it is complete or not there, however the process ends."""

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

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux


@contextlib.contextmanager
def replacing(out: str | os.PathLike[str], source: pathlib.Path | None = None) -> Iterator[pathlib.Path]:
    """Gives a new folder beside `out` to write into, and renames it to `out` when all went well.

    Only its owner can read the new folder meanwhile. It is on the disk before `out` changes, in one step where the
    operating system can exchange two folders. Otherwise a process that is killed between two renames leaves no `out`,
    which the next reader or writer on this machine puts back. What killed processes left of `out` is removed.

    Raises:
      UserError: `out` is or holds `source`, is a file, or is a folder with something in it that no export writes; no
        place to write.
    """
    target = pathlib.Path(os.path.realpath(os.path.expanduser(out)))
    unfinished.restore(target)
    if target.exists():
        if source is not None and target == source.resolve():
            raise UserError(f"{out} is the folder that the model was read from; choose another one")
        if not target.is_dir():
            raise UserError(f"{out} is a file; choose a folder")
        if any(target.iterdir()) and not (target / "model_index.json").is_file():
            raise UserError(
                f"{out} has something in it and is no model folder (no model_index.json); choose another one"
            )
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
    """Gives group and others no more rights to a folder and its files than they have to those that they came from.

    A file that `source` doesn't have is treated as the most private of its weights, if it holds weights.
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
        with contextlib.suppress(PermissionError):  # a file system without rights, such as that of a memory stick
            path.chmod(stat.S_IMODE(mode))


def exchange(first: pathlib.Path, second: pathlib.Path) -> bool:
    """Exchanges two folders in one step. Returns whether it did: not every system and file system can."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)  # of Linux alone
    if renameat2 is None:
        return False
    return renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0


def _put(new: pathlib.Path, target: pathlib.Path) -> None:
    """Renames `new` to `target`; what was there is then at `new`, or gone."""
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
            shutil.rmtree(old, ignore_errors=True)  # what can't be removed now is removed by the next writer
