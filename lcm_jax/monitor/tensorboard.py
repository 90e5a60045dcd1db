"""Writes a run's scalars and images for TensorBoard to `<workdir>/tensorboard`.

tensorboardX's SummaryWriter writes events in a background thread: when the disk is full, that thread dies and the run
then blocks forever. Here each event is on disk when a method returns, or the method raises. In a bucket, where files
can't grow, events are buffered until `flush`, the next image or the first write after a minute.
"""

import contextlib
import logging
import os
import re
import socket
import sys
import time
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
from etils import epath
from jaxtyping import UInt8

from lcm_jax.errors import UserError
from lcm_jax.host import files


@contextlib.contextmanager
def _as_if_absent(name: str) -> Iterator[None]:
    """Hides a package from imports unless it is already imported."""
    hidden = name not in sys.modules
    if hidden:
        sys.modules[name] = None  # pyright: ignore[reportArgumentType]
    try:
        yield
    finally:
        if hidden:
            del sys.modules[name]


# tensorboardX imports them if it can: that takes seconds, and isn't needed here
with _as_if_absent("torch"), _as_if_absent("google.cloud.storage"):
    from tensorboardX import summary
    from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
    from tensorboardX.record_writer import RecordWriter, register_writer_factory

SECONDS = 60  # between flushes to a bucket
PART = 8 * 2**20  # bytes after which a new object starts in a bucket; bounds what each flush rewrites


class Metrics:
    """Writes scalars and images by step. A resumed run hides the points that earlier runs wrote after its start."""

    def __init__(self, workdir: epath.PathLike, start_step: int = 0) -> None:
        """Opens a new event file in the run's folder; hides the points of earlier runs after `start_step`.

        Raises: UserError, here and in the other methods, if the file can't be written.
        """
        logging.getLogger("tensorboardX.x2num").setLevel(logging.ERROR)  # the run reports NaN itself
        self._folder = epath.Path(workdir) / "tensorboard"
        self._flushed = time.monotonic()
        with files.one_line(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            files.forget_listings(self._folder)
            others = self._folder.iterdir() if self._folder.exists() else ()  # a bucket has no empty folders
            self._path = self._folder / _next_name(path.name for path in others)
            self._file = RecordWriter(str(self._path))
            self._inode = self._on_disk()
        started = SessionLog(status=SessionLog.START)  # TensorBoard drops older points at and after this event's step
        self._write(Event(file_version="brain.Event:2"), Event(step=start_step + 1, session_log=started))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Adds one point to each curve."""
        points = [summary.scalar(name, value) for name, value in values.items()]
        self._write(*(Event(step=step, summary=point) for point in points))

    def images(self, step: int, name: str, images: UInt8[np.ndarray, "n h w 3"]) -> None:
        """Adds images under one name, eight per row."""
        sheet = summary.image(name, images, dataformats="NHWC")
        self._write(Event(step=step, summary=sheet))
        self.flush()

    def flush(self) -> None:
        """Writes buffered events. Call it before a checkpoint: a run resumed from it doesn't repeat these points."""
        with files.one_line(self._folder):
            self._file.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        """Closes the file."""
        with files.one_line(self._folder):
            self._file.close()

    def _on_disk(self) -> int:
        """Returns the event file's inode number; 0 in a bucket, whose objects are written in one piece."""
        return 0 if files.in_bucket(self._path) else os.stat(self._path).st_ino

    def _check_there(self) -> None:
        """Raises UserError if the event file was deleted or replaced: writes to it would succeed but be lost."""
        try:
            there = self._on_disk() == self._inode
        except (FileNotFoundError, NotADirectoryError):
            there = False
        if not there:
            raise UserError(
                f"{self._path} was deleted or moved during the run, with the curves in it; run the same command "
                "again: it resumes from the last checkpoint"
            )

    def _write(self, *events: Event) -> None:
        self._check_there()
        with files.one_line(self._folder):
            for event in events:
                event.wall_time = time.time()
                self._file.write(event.SerializeToString())
        if not files.in_bucket(self._folder) or time.monotonic() - self._flushed >= SECONDS:
            self.flush()


def _next_name(others: Iterable[str]) -> str:
    """Returns an event file name that sorts after all others, since TensorBoard reads files in name order.

    The name starts with the time in nanoseconds, since two runs may start within one second. If another file's time is
    ahead of the clock, its time plus one second is used instead.
    """
    now, prefix = time.time_ns(), "events.out.tfevents."
    for name in others:
        if found := re.match(r"events\.out\.tfevents\.(\d+)", name):
            # ten digits, so that names sort as numbers; a longer number sorts by its first ten digits
            second = int(found[1][:10].ljust(10, "0"))
            if f"{prefix}{now // 10**9:010d}.{now % 10**9:09d}" <= name:
                now = (second + 1) * 10**9
    return f"{prefix}{now // 10**9:010d}.{now % 10**9:09d}.{socket.gethostname()}"


class _Parts:
    """File-like writer for a bucket, where objects can't grow: writes `path.0000`, …, and rewrites only the last one.

    TensorBoard reads the objects one after the other, in name order.
    """

    def __init__(self, path: str) -> None:
        self._path, self._number, self._part = path, 0, bytearray()
        self._stored = True

    def write(self, data: bytes) -> None:
        self._part += data
        self._stored = False

    def flush(self) -> None:
        if self._stored:
            return
        files.write(f"{self._path}.{self._number:04d}", bytes(self._part))
        self._stored = True
        if len(self._part) >= PART:
            self._number, self._part = self._number + 1, bytearray()

    def close(self) -> None:
        self.flush()


class _PartsFactory:
    """Lets tensorboardX's RecordWriter open `gs://…`."""

    def open(self, path: str) -> _Parts:
        return _Parts(path)


register_writer_factory("gs", _PartsFactory())
