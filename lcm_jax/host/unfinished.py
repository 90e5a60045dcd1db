"""Temporary folders for atomic writes, and recovery from killed processes.

`.NAME.HOST-PID.XXXXXXXX.tmp`, next to NAME, holds what becomes NAME when it is complete. `….old` is the NAME being
replaced, where the operating system can't exchange two folders atomically. The writing process holds a lock on the
folder, which the system releases however the process ends. So the next process that writes to NAME can tell which
folders were abandoned: it restores an `.old` if NAME is missing and removes all others.
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

_LONGEST = 100  # bytes; longer target names are hashed, since file systems allow 255 for the temporary name
_OWNER = re.compile(r"(?P<host>\w+)-(?P<pid>\d+)\.[0-9a-f]{8}\.(?:tmp|old)$")


@contextlib.contextmanager
def folder(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields an empty folder next to `target`, and removes it at exit with its contents.

    Cleans up after killed processes first, see `clean`. Raises OSError if the folder can't be created.
    """
    clean(target)
    path, lock = _make(target)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)  # the next call removes what can't be removed now
        os.close(lock)


@contextlib.contextmanager
def locked(path: pathlib.Path) -> Iterator[bool]:
    """Locks a folder; yields False if another process or thread holds the lock, or the folder can't be opened.

    On a file system without locks, yields whether the process named in the folder's name has ended.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:  # removed meanwhile, or another user's
        yield False
        return
    try:
        lock = _lock(descriptor)
        yield not _runs(path) if lock is None else lock
    finally:
        os.close(descriptor)


def clean(target: pathlib.Path) -> None:
    """Removes what killed processes of this machine left of `target`; restores the old `target` if it is missing."""
    for path in _leftovers(target):
        with locked(path) as free:
            if free and path.suffix == ".old" and not os.path.lexists(target):
                path.rename(target)
            elif free:
                shutil.rmtree(path, ignore_errors=True)


def restore(target: pathlib.Path) -> None:
    """Restores the old `target` if a process was killed after moving it away; otherwise changes nothing."""
    for path in _leftovers(target):
        with locked(path) as free:
            if free and path.suffix == ".old" and not os.path.lexists(target):
                with contextlib.suppress(OSError):  # a reader may lack permission: then the target stays missing
                    path.rename(target)


def sync(folder: pathlib.Path) -> None:
    """Flushes a folder and its files to disk, so that a later rename can't expose empty files after a power loss.

    Raises OSError: some file systems report only here that they are full.
    """
    for root, _, names in os.walk(folder):
        for name in names:
            sync_file(pathlib.Path(root, name))
        sync_names(pathlib.Path(root))


def sync_file(path: pathlib.Path) -> None:
    """Flushes a file's content to disk, like `sync`."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_names(folder: pathlib.Path) -> None:
    """Flushes a folder's directory entries to disk, if the file system supports it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def _make(target: pathlib.Path) -> tuple[pathlib.Path, int]:
    """Creates a folder and returns its path and the open file descriptor that holds its lock."""
    while True:
        name = f"{_prefix(target)}{_host()}-{os.getpid()}.{secrets.token_hex(4)}.tmp"
        path = target.with_name(name)
        path.mkdir()
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        # another process may have removed it as abandoned before it was locked
        if _lock(descriptor) is not False and path.exists():
            return path, descriptor
        os.close(descriptor)


def _lock(descriptor: int) -> bool | None:
    """Locks an open folder until it is closed. Returns False if it is locked, None without support for locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _runs(path: pathlib.Path) -> bool:
    """Returns whether the process named in a temporary folder's name is running."""
    found = _OWNER.search(path.name)
    if not found:
        return False
    try:
        os.kill(int(found["pid"]), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # it runs as another user
        pass
    return True


def _leftovers(target: pathlib.Path) -> list[pathlib.Path]:
    """Returns the temporary folders that processes of this machine created for `target`, old targets first."""
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
