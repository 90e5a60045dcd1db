"""Folders for what is being written, and what killed processes left of them.

`.NAME.HOST-PID.XXXXXXXX.tmp`, beside NAME, holds what becomes NAME when it is complete. `….old` is the NAME that is
being replaced, where the operating system can't exchange two folders in one step. The process that writes holds a lock
on the folder; the system releases it however the process ends. So the next process that writes to NAME knows which
leftovers belong to nobody: it puts an `.old` back where NAME is missing, and removes all others.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import pathlib
import re
import secrets
import shutil
import socket
from collections.abc import Iterator

_LONGEST = 100  # bytes of a target's name that are repeated in the temporary one; file systems allow 255 in all
_OWNER = re.compile(r"(?P<host>\w+)-(?P<pid>\d+)\.[0-9a-f]{8}\.(?:tmp|old)$")


@contextlib.contextmanager
def folder(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """Gives an empty folder beside `target`, and removes it at the end with what is still in it.

    What killed processes of this machine left of `target` is removed first. Raises OSError where nothing can be made.
    """
    clean(target)
    path, lock = _make(target)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)  # what can't be removed now is removed by the next call
        os.close(lock)


@contextlib.contextmanager
def locked(path: pathlib.Path) -> Iterator[bool]:
    """Holds the lock of a folder; gives False if another process or thread has it, or the folder is gone.

    Where the file system has no locks, the process that the folder's name tells decides.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:  # gone meanwhile, or another user's
        yield False
        return
    try:
        lock = _lock(descriptor)
        yield not _runs(path) if lock is None else lock
    finally:
        os.close(descriptor)


def clean(target: pathlib.Path) -> None:
    """Removes what killed processes of this machine left of `target`, or puts it back if it is the old `target`."""
    for path in _leftovers(target):
        with locked(path) as free:
            if free and path.suffix == ".old" and not os.path.lexists(target):
                path.rename(target)
            elif free:
                shutil.rmtree(path, ignore_errors=True)


def restore(target: pathlib.Path) -> None:
    """Puts the old `target` back if a process was killed after it had moved it away; otherwise changes nothing."""
    for path in _leftovers(target):
        with locked(path) as free:
            if free and path.suffix == ".old" and not os.path.lexists(target):
                with contextlib.suppress(OSError):  # a reader may lack the rights: then the target is missing to it
                    path.rename(target)


def sync(folder: pathlib.Path) -> None:
    """Waits until all of a folder is on the disk: a rename that follows can't expose empty files after a loss of power.

    Raises OSError: some file systems report only here that they are full.
    """
    for root, _, names in os.walk(folder):
        for name in names:
            sync_file(pathlib.Path(root, name))
        sync_names(pathlib.Path(root))


def sync_file(path: pathlib.Path) -> None:
    """Waits until a file's content is on the disk, as `sync` does."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_names(folder: pathlib.Path) -> None:
    """Waits until the names in a folder are on the disk, where the file system can."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def _make(target: pathlib.Path) -> tuple[pathlib.Path, int]:
    """Returns a new folder and the open file descriptor that holds its lock."""
    while True:
        name = f"{_prefix(target)}{_host()}-{os.getpid()}.{secrets.token_hex(4)}.tmp"
        path = target.with_name(name)
        path.mkdir()
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        # another process may have taken it for a leftover in the moment before it was locked
        if _lock(descriptor) is not False and path.exists():
            return path, descriptor
        os.close(descriptor)


def _lock(descriptor: int) -> bool | None:
    """Locks an open folder, until it is closed; returns None where the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _runs(path: pathlib.Path) -> bool:
    """Whether the process runs that the name of a temporary folder tells."""
    found = _OWNER.search(path.name)
    if not found:
        return False
    try:
        os.kill(int(found["pid"]), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # it runs, as another user
        pass
    return True


def _leftovers(target: pathlib.Path) -> list[pathlib.Path]:
    """Returns the temporary folders that processes of this machine have made for `target`, old targets first."""
    prefix = _prefix(target)
    try:
        names = os.listdir(target.parent)
    except OSError:  # no such folder, or one that can't be listed
        return []
    rests = {name: _OWNER.fullmatch(name[len(prefix) :]) for name in names if name.startswith(prefix)}
    ours = [target.with_name(name) for name, rest in rests.items() if rest and rest["host"] == _host()]
    return sorted(ours, key=lambda path: path.suffix != ".old")


def _host() -> str:
    return re.sub(r"\W", "_", socket.gethostname())[:60] or "_"


def _prefix(target: pathlib.Path) -> str:
    name = os.fsencode(target.name)
    return f".{target.name if len(name) <= _LONGEST else hashlib.sha256(name).hexdigest()}."
