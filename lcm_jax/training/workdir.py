"""A run's hold on its workdir: one run at a time, which notices when the folder is no longer its own.

`<workdir>/lock.json` names the process that holds the workdir. It is created only where there is none: with O_EXCL in
a folder, NFS among them; with the precondition that there is no such object in a bucket. The run removes it at its
end; only a killed run leaves it behind. Every BEAT seconds the owner renews it, in a thread of its own. Another run
takes a lock over once its owner is dead:

* The owner was a process of this machine: at once, when no process has its number and its start time.
* It was on another machine, or in another container: when PATIENCE seconds passed without a renewal, by the clock of
  the run that waits. Clocks of different machines are never compared.
* The lock was copied, with all of the folder: at once, though its owner lives. A folder that was moved is no copy.
"""

import contextlib
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
from lcm_jax.host import files, json_file
from lcm_jax.parallel import agreement
from lcm_jax.parallel.processes import is_first

LOCK = "lock.json"
BEAT = 10.0  # seconds between two renewals
PATIENCE = 60.0  # seconds without a renewal after which an owner elsewhere is dead
_LOOK = 0.5  # seconds between two looks at a lock
_KINDS = {
    "host": json_file.TEXT,
    "process": json_file.WHOLE,
    "started": json_file.TEXT,
    "machine": json_file.TEXT,
    "since": json_file.TEXT,
}
_PLACE = {"place": json_file.TEXT, "folder": json_file.TEXT}  # not in a lock of an older version


class Held:
    """A workdir that this run holds; of several processes the first holds it for all."""

    def __init__(self, workdir: epath.Path, lock: "_FileLock | _BucketLock | None", content: bytes) -> None:
        """Args: the run's folder; its lock, None in all processes but the first; what this run wrote into it."""
        self._workdir, self._lock, self._content = workdir, lock, content
        self._seen = time.monotonic()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True) if lock else None
        if self._thread:
            self._thread.start()

    def check(self) -> None:
        """Raises UserError if the workdir was deleted, moved or taken by another run; to be called before each write.

        A bucket is asked at most every BEAT seconds, since an answer takes as long as a step may.
        """
        if not self._lock or (files.in_bucket(self._workdir) and time.monotonic() - self._seen < BEAT):
            return
        found = self._lock.read()
        self._seen = time.monotonic()
        if found and found[0] == self._content:
            return
        what = f"{self._workdir} is no longer this run's folder: "
        if found:
            raise UserError(f"{what}{_owner(found[0])} has taken it; what this run wrote there before stays")
        # whether there is a folder says nothing: a write that was on its way may have made it anew
        raise UserError(
            f"{what}{LOCK} is not there; it was removed, or the folder deleted, moved away or replaced in mid-run. Put "
            "the folder back, or choose another --workdir, and give the same command again: it resumes from the last "
            "checkpoint that is there"
        )

    def release(self) -> None:
        """Ends the hold: removes the lock, if it is still this run's."""
        self._end.set()
        if self._lock and self._thread:
            self._thread.join()
            with contextlib.suppress(UserError):  # then it goes stale, as after a kill
                if (found := self._lock.read()) and found[0] == self._content:
                    self._lock.remove(*found)

    def _renew(self) -> None:
        while not self._end.wait(BEAT):
            with contextlib.suppress(UserError, OSError):  # what is lost is seen, and reported, by `check`
                if self._lock and (found := self._lock.read()) and found[0] == self._content:
                    self._lock.renew(self._content)


@contextlib.contextmanager
def hold(workdir: epath.PathLike) -> Iterator[Held]:
    """Holds a workdir, which is made if it is not there, until the context ends.

    All processes of a run must ask: those that do not write wait until the first one has the lock.

    Raises, in all processes:
      UserError: another process of this machine holds it, or the folder can't be written.
      Unavailable: a process elsewhere holds it, which gives signs of life.
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
    """Returns when the lock is there with this content, which names its place."""
    last, since = None, 0.0  # the lock as it was read before, and since when it has been so
    while not lock.create(content):
        found = lock.read()
        if found is None:
            continue  # released meanwhile
        if found[0] == content:
            return  # a bucket's first answer was lost
        alive = _alive(found[0])
        if alive and not _copied(found[0], place):
            raise UserError(f"{_owner(found[0])} trains there; wait for its end or stop it, or choose another folder")
        if alive is None and (not last or last[0] != found[0]):
            last, since = found, time.monotonic()
            say(f"waiting up to {PATIENCE:g} s for a sign of life of {_owner(found[0])}", sys.stderr)
        elif alive is None and last and last[1] != found[1]:
            raise Unavailable(f"{_owner(found[0])} trains there; wait for its end, or choose another folder")
        elif alive is not None or time.monotonic() - since >= PATIENCE:
            lock.remove(*found)
            continue
        time.sleep(_LOOK)


def _alive(content: bytes) -> bool | None:
    """Whether a lock's owner lives; None if that can't be seen from here."""
    owner, here = _parsed(content), _here()
    if not owner or any(owner.get(name) != here[name] for name in ("host", "machine")):
        return None
    return _started(owner["process"]) == owner["started"]


def _copied(content: bytes, place: Mapping[str, str]) -> bool:
    """Whether a lock of a living process of this machine was made elsewhere and came to this place as a copy.

    Both its path and its folder's number must differ: a moved folder keeps the number, and some network drives give new
    numbers to what stays where it is.
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
    except UserError:  # one that is being written, or cut
        return {}
    return owner if owner.keys() >= _KINDS.keys() else {}


def _here() -> dict[str, Any]:
    """Names this process: no other of this machine, in this container, has its number and start time."""
    machine = ""
    with contextlib.suppress(OSError):  # without /proc the host's name must do
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        machine = f"{boot} {os.readlink('/proc/self/ns/pid')}"
    process = os.getpid()
    return {"host": socket.gethostname(), "machine": machine, "process": process, "started": _started(process)}


def _started(process: int) -> str | None:
    """Returns a process's start time, "" where it can't be known; None if there is no such process."""
    try:
        os.kill(process, 0)
    except PermissionError:
        pass  # another user's
    except (OSError, OverflowError):
        return None
    try:
        state, *fields = pathlib.Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "" if not pathlib.Path("/proc/self/stat").exists() else None
    return None if state in "ZX" else fields[18]  # a zombie is dead; proc(5): starttime, in ticks since the boot


class _FileLock:
    """The lock in a folder; its sign of life is the file's time."""

    def __init__(self, path: epath.Path) -> None:
        self._path = path

    def place(self) -> dict[str, str]:
        """Returns the folder's path and number, which tell a copy of the lock; makes the folder."""
        with files.one_line(self._path.parent):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            return {"place": os.path.realpath(self._path.parent), "folder": str(os.stat(self._path.parent).st_ino)}

    def create(self, content: bytes) -> bool:
        """Writes the lock; returns False if there is one."""
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
                    os.fsync(file.fileno())  # after a power cut an empty lock would be one of an unknown owner
            except OSError:
                self._path.unlink()
                raise
        return True

    def read(self) -> tuple[bytes, Any] | None:
        """Returns the lock's content and what changes with each sign of life; None if there is no lock."""
        with files.one_line(self._path, "read"):
            try:
                with open(self._path, "rb") as file:  # opening asks an NFS server for what is there now
                    return file.read(), os.fstat(file.fileno()).st_mtime_ns
            except (FileNotFoundError, NotADirectoryError):
                return None

    def renew(self, content: bytes) -> None:
        """Gives a sign of life."""
        del content
        os.utime(self._path)

    def remove(self, content: bytes, mark: Any) -> None:
        """Removes the lock that was read; one that another run has put there meanwhile is put back."""
        del mark
        aside = self._path.with_name(f".{LOCK}.{uuid.uuid4().hex}")
        with files.one_line(self._path), contextlib.suppress(FileNotFoundError):  # another run was faster
            self._path.rename(aside)
            if aside.read_bytes() != content and not self._path.exists():
                aside.rename(self._path)
            else:
                aside.unlink()


class _BucketLock:
    """The lock in a bucket; its sign of life is a new generation of the object."""

    def __init__(self, path: epath.Path) -> None:
        import fsspec  # comes with gcsfs, which only buckets need

        self._path = os.fspath(path)
        self._object = self._path.removeprefix("gs://").split("/", 1)
        self._fs: Any = fsspec.filesystem("gs", finalize_on_close=True)  # the one that epath uses

    def place(self) -> dict[str, str]:
        """Returns what tells a copy of the lock."""
        return {"place": self._path, "folder": self._path}

    def create(self, content: bytes) -> bool:
        """As in a folder."""
        with files.one_line(self._path):
            try:
                self._fs.pipe_file(self._path, content, mode="create")
            except FileExistsError:
                return False
        return True

    def read(self) -> tuple[bytes, Any] | None:
        """As in a folder."""
        with files.one_line(self._path, "read"):
            try:
                about = self._fs.call("GET", "b/{}/o/{}", *self._object, json_out=True)
                return self._fs.cat_file(self._path), about["generation"]
            except FileNotFoundError:
                return None

    def renew(self, content: bytes) -> None:
        """As in a folder."""
        with files.one_line(self._path):
            self._fs.pipe_file(self._path, content)

    def remove(self, content: bytes, mark: Any) -> None:
        """Removes this very generation of the lock, and no other."""
        del content
        with files.one_line(self._path), contextlib.suppress(FileNotFoundError, FileExistsError):
            self._fs.call("DELETE", "b/{}/o/{}", *self._object, ifGenerationMatch=mark)
