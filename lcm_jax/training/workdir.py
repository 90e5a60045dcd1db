"""Locks a workdir for one run at a time, and detects when the run loses it.

`<workdir>/lock.json` names the process that holds the workdir. It is created exclusively: with O_EXCL on a file system
(including NFS), with a does-not-exist precondition in a bucket. The run removes it when it ends; only a killed run
leaves it behind. A thread renews it every BEAT seconds. Another run takes the lock over once its owner is dead:

* Owner on this machine: at once, if no process has its pid and start time.
* Owner on another machine or in another container: after PATIENCE seconds without a renewal, by the clock of the
  waiting run. Clocks of different machines are never compared.
* Owner alive on this machine, but the lock was copied with its folder: at once. A moved folder is not a copy.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from lcm_jax.errors import Unavailable, UserError, plain, say
from lcm_jax.host import files, interrupts, json_file
from lcm_jax.parallel import agreement
from lcm_jax.parallel.processes import is_first

LOCK = "lock.json"
BEAT = 10.0  # seconds between renewals
PATIENCE = 60.0  # seconds without a renewal after which a remote owner is considered dead
_LOOK = 0.5  # seconds between reads of a lock while waiting
_KINDS = {
    "host": json_file.TEXT,
    "process": json_file.WHOLE,
    "started": json_file.TEXT,
    "machine": json_file.TEXT,
    "since": json_file.TEXT,
}
_PLACE = {"place": json_file.TEXT, "folder": json_file.TEXT}  # absent from locks of older versions


class Held:
    """A workdir locked by this run; the first process holds the lock for all processes."""

    def __init__(self, workdir: epath.Path, lock: "_FileLock | _BucketLock | None", content: bytes) -> None:
        """Args: the run's folder; its lock, None except in the first process; the content that this run wrote to it."""
        self._workdir, self._lock, self._content = workdir, lock, content
        self._seen = time.monotonic()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True) if lock else None
        if self._thread:
            self._thread.start()

    def check(self) -> None:
        """Raises UserError if the workdir was deleted, moved or taken by another run. Call it before each write.

        A bucket is read at most every BEAT seconds, since a request can take as long as a train step.
        """
        if not self._lock or (files.in_bucket(self._workdir) and time.monotonic() - self._seen < BEAT):
            return
        found = self._lock.read()
        self._seen = time.monotonic()
        if found and found[0] == self._content:
            return
        what = f"{self._workdir} is no longer this run's folder: "
        if found:
            raise UserError(f"{what}{_owner(found[0])} has taken it over; files that this run wrote remain")
        # the folder may exist even so: a pending write may have recreated it
        raise UserError(
            f"{what}{LOCK} is missing; it was removed, or the folder was deleted, moved or replaced during the run. "
            "Put the folder back, or choose another --workdir, and run the same command again: it resumes from the "
            "last remaining checkpoint"
        )

    def release(self) -> None:
        """Removes the lock if this run still owns it."""
        self._end.set()
        if self._lock and self._thread:
            self._thread.join()
            with contextlib.suppress(UserError):  # the lock then goes stale, as after a kill
                if (found := self._lock.read()) and found[0] == self._content:
                    self._lock.remove(*found)

    def _renew(self) -> None:
        while not self._end.wait(BEAT):
            with contextlib.suppress(UserError, OSError):  # `check` reports a lost lock
                if self._lock and (found := self._lock.read()) and found[0] == self._content:
                    self._lock.renew(*found)


@contextlib.contextmanager
def hold(workdir: epath.PathLike) -> Iterator[Held]:
    """Locks a workdir until the context ends; creates it if it does not exist.

    All processes of a run must call it; the others wait until the first one has the lock.

    Raises, in all processes:
      UserError: another process on this machine holds it, or the folder cannot be written.
      Unavailable: a process on another machine holds it and renews the lock.
    """
    workdir = epath.Path(workdir)
    held, problem = Held(workdir, None, b""), ""
    if is_first():
        try:
            held = _held(workdir)
        except UserError as error:
            problem = type(error)(f"--workdir={workdir}: {error}")
    try:
        agreement.agree({}, problem)
        with interrupts.last_act(lambda _: held.release()):
            yield held
    finally:
        held.release()


def _held(workdir: epath.Path) -> Held:
    lock = _BucketLock(workdir / LOCK) if files.in_bucket(workdir) else _FileLock(workdir / LOCK)
    since = {"since": time.strftime("%Y-%m-%d %H:%M:%S"), "run": uuid.uuid4().hex}
    place = lock.place()
    content = json.dumps({**_here(), **since, **place}).encode()
    _take(lock, content, place)
    return Held(workdir, lock, content)


def _take(lock: "_FileLock | _BucketLock", content: bytes, place: Mapping[str, str]) -> None:
    """Creates the lock once no other owner is alive; raises UserError or Unavailable if one is."""
    last, since = None, 0.0  # the lock when its content was first seen, and when that was
    while not lock.create(content):
        found = lock.read()
        if found is None:
            continue  # just released
        if found[0] == content:
            return  # created by an earlier request whose response was lost
        alive = _alive(found[0])
        if alive and not _copied(found[0], place):
            raise UserError(
                f"{_owner(found[0])} is training in it; wait until it ends, stop it, or choose another folder"
            )
        if alive is None and (not last or last[0] != found[0]):
            last, since = found, time.monotonic()
            say(f"waiting up to {PATIENCE:g} s for a heartbeat of {_owner(found[0])}", sys.stderr)
        elif alive is None and last and last[1] != found[1]:
            raise Unavailable(f"{_owner(found[0])} is training in it; wait until it ends, or choose another folder")
        elif alive is not None or time.monotonic() - since >= PATIENCE:
            lock.remove(*found)
            continue
        time.sleep(_LOOK)


def _alive(content: bytes) -> bool | None:
    """Returns whether a lock's owner is alive; None if it is on another machine or unknown."""
    owner, here = _parsed(content), _here()
    if not owner or any(owner.get(name) != here[name] for name in ("host", "machine")):
        return None
    return _started(owner["process"]) == owner["started"]


def _copied(content: bytes, place: Mapping[str, str]) -> bool:
    """Returns whether a lock of a live process on this machine was copied here with its folder.

    Both the path and the folder's inode must differ: a moved folder keeps its inode, and some network file systems
    assign new inodes to unmoved files.
    """
    owner = _parsed(content)
    return all(owner.get(name, place[name]) != place[name] for name in _PLACE)


def _owner(content: bytes) -> str:
    owner = _parsed(content)
    if not owner:
        return f"an unknown run (its {LOCK} is damaged)"
    return plain(f"process {owner['process']} on {owner['host']} (since {owner['since']})", 200)


def _parsed(content: bytes) -> Mapping[str, Any]:
    try:
        owner = json_file.parse(content, LOCK, {**_KINDS, **_PLACE})
    except UserError:  # partly written or truncated
        return {}
    return owner if owner.keys() >= _KINDS.keys() else {}


def _here() -> dict[str, Any]:
    """Identifies this process by host, boot and PID namespace, pid and start time."""
    machine = ""
    with contextlib.suppress(OSError):  # without /proc only the host name identifies the machine
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        machine = f"{boot} {os.readlink('/proc/self/ns/pid')}"
    process = os.getpid()
    return {"host": socket.gethostname(), "machine": machine, "process": process, "started": _started(process)}


def _started(process: int) -> str | None:
    """Returns a process's start time, "" if it is unknown, or None if there is no such process."""
    try:
        os.kill(process, 0)
    except PermissionError:
        pass  # a process of another user
    except (OSError, OverflowError):
        return None
    try:
        state, *fields = pathlib.Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "" if not pathlib.Path("/proc/self/stat").exists() else None
    return None if state in "ZX" else fields[18]  # zombies are dead; proc(5): starttime, in ticks since boot


class _FileLock:
    """A lock on a file system; its heartbeat is the file's modification time."""

    def __init__(self, path: epath.Path) -> None:
        self._path = path

    def place(self) -> dict[str, str]:
        """Returns the folder's path and inode, which reveal a copied lock; creates the folder."""
        with files.one_line(self._path.parent):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            return {"place": os.path.realpath(self._path.parent), "folder": str(os.stat(self._path.parent).st_ino)}

    def create(self, content: bytes) -> bool:
        """Creates the lock; returns False if it exists."""
        with files.one_line(self._path.parent):
            self._path.parent.mkdir(parents=True, exist_ok=True)
        with files.one_line(self._path):
            try:
                number = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
            except FileExistsError:
                return False
            try:
                with os.fdopen(number, "wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())  # an empty lock, left by a power failure, would have no known owner
            except OSError:
                self._path.unlink()
                raise
        return True

    def read(self) -> tuple[bytes, Any] | None:
        """Returns the lock's content and a mark that changes with each heartbeat; None if there is no lock."""
        with files.one_line(self._path, "read"):
            try:
                with open(self._path, "rb") as file:  # opening makes an NFS client revalidate its cache
                    return file.read(), os.fstat(file.fileno()).st_mtime_ns
            except (FileNotFoundError, NotADirectoryError):
                return None

    def renew(self, content: bytes, mark: Any) -> None:
        """Updates the heartbeat."""
        del content, mark
        os.utime(self._path)

    def remove(self, content: bytes, mark: Any) -> None:
        """Removes the lock that was read, unless another run has replaced it since.

        Only while its flock is held: of many runs that read a stale lock, a late one must not remove the lock that an
        early one has created meanwhile.
        """
        del mark
        with (
            files.one_line(self._path),
            contextlib.suppress(FileNotFoundError),  # another run removed it first
            open(self._path, "r+b") as file,  # writable, or NFS refuses the flock
        ):
            fcntl.flock(file, fcntl.LOCK_EX)
            if file.read() == content and os.path.samestat(os.fstat(file.fileno()), os.stat(self._path)):
                self._path.unlink()


class _BucketLock:
    """A lock in a bucket; its heartbeat is the object's generation."""

    def __init__(self, path: epath.Path) -> None:
        import fsspec  # installed with gcsfs, which only buckets need

        self._path = os.fspath(path)
        self._object = self._path.removeprefix("gs://").split("/", 1)
        self._fs: Any = fsspec.filesystem("gs", finalize_on_close=True)  # the instance that epath uses

    def place(self) -> dict[str, str]:
        """Returns the path, which reveals a copied lock."""
        return {"place": self._path, "folder": self._path}

    def create(self, content: bytes) -> bool:
        """See `_FileLock.create`."""
        with files.one_line(self._path):
            try:
                self._fs.pipe_file(self._path, content, mode="create")
            except FileExistsError:
                return False
        return True

    def read(self) -> tuple[bytes, Any] | None:
        """See `_FileLock.read`."""
        with files.one_line(self._path, "read"):
            try:
                about = self._fs.call("GET", "b/{}/o/{}", *self._object, json_out=True)
                return self._fs.cat_file(self._path), about["generation"]
            except FileNotFoundError:
                return None

    def renew(self, content: bytes, mark: Any) -> None:
        """Writes the lock again, which gives it a new generation, if its generation is still `mark`.

        Without that condition it could bring back a lock that was removed since it was read.
        """
        bucket, name = self._object
        upload = f"{self._fs._location}/upload/storage/v1/b/{bucket}/o"  # gcsfs uploads with no condition but "absent"
        with files.one_line(self._path):
            self._fs.call("POST", upload, uploadType="media", name=name, ifGenerationMatch=mark, data=content)

    def remove(self, content: bytes, mark: Any) -> None:
        """Removes the lock if its generation is still `mark`."""
        del content
        with files.one_line(self._path), contextlib.suppress(FileNotFoundError, FileExistsError):
            self._fs.call("DELETE", "b/{}/o/{}", *self._object, ifGenerationMatch=mark)
