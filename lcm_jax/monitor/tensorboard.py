"""A run's curves and pictures for TensorBoard, in `<workdir>/tensorboard`.

tensorboardX's SummaryWriter hands events to a thread of its own: when the disk is full that thread dies, and the run
then waits for it without end. Here each event is on disk when a method returns, or the method says why not; only in a
bucket, where a file can't grow, it waits for `flush`, for the next picture or for a minute to pass.
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
    """Lets nothing import this package, unless it has been imported already."""
    hidden = name not in sys.modules
    if hidden:
        sys.modules[name] = None  # pyright: ignore[reportArgumentType]
    try:
        yield
    finally:
        if hidden:
            del sys.modules[name]


with _as_if_absent("torch"):  # tensorboardX imports it where it can: seconds, for nothing that is used here
    from tensorboardX import summary
    from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
    from tensorboardX.record_writer import RecordWriter, register_writer_factory

SECONDS = 60  # between two writings of one part in a bucket
PART = 8 * 2**20  # bytes after which a new part begins there: what is written again and again stays small


class Metrics:
    """Writes scalars and pictures by step. A resumed run hides what an earlier one wrote beyond its start."""

    def __init__(self, workdir: epath.PathLike, start_step: int = 0) -> None:
        """Args: the run's folder; the number of steps done, after which older points are stale.

        Raises: UserError, here and below, if the file can't be written.
        """
        logging.getLogger("tensorboardX.x2num").setLevel(logging.ERROR)  # what a NaN means, the run itself says
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
        """Adds pictures under one name, eight a row."""
        sheet = summary.image(name, images, dataformats="NHWC")
        self._write(Event(step=step, summary=sheet))
        self.flush()

    def flush(self) -> None:
        """Leaves nothing unwritten; to be called before a checkpoint, after which these points do not come again."""
        with files.one_line(self._folder):
            self._file.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        """Closes the file."""
        with files.one_line(self._folder):
            self._file.close()

    def _on_disk(self) -> int:
        """What tells this file from another one of its name; in a bucket, whose objects are written whole, nothing."""
        return 0 if files.in_bucket(self._path) else os.stat(self._path).st_ino

    def _check_there(self) -> None:
        """An open file can be written to after it was deleted, for nobody to read."""
        try:
            there = self._on_disk() == self._inode
        except (FileNotFoundError, NotADirectoryError):
            there = False
        if not there:
            raise UserError(
                f"{self._path} was deleted or moved away in mid-run, with the curves that this run wrote; "
                "give the same command again: it resumes from the last checkpoint"
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
    """Returns the name of an event file that sorts behind all others, since TensorBoard reads them in this order.

    The name begins with the time, to the nanosecond: two runs may start within one second. Where the clock was ahead
    when another file was begun, its time and a second are taken instead.
    """
    now, prefix = time.time_ns(), "events.out.tfevents."
    for name in others:
        if found := re.match(r"events\.out\.tfevents\.(\d+)", name):
            # ten digits, so that the order of names is that of numbers; a name of more would sort by its first ten
            second = int(found[1][:10].ljust(10, "0"))
            if f"{prefix}{now // 10**9:010d}.{now % 10**9:09d}" <= name:
                now = (second + 1) * 10**9
    return f"{prefix}{now // 10**9:010d}.{now % 10**9:09d}.{socket.gethostname()}"


class _Parts:
    """A growing file in a bucket, where none can grow: objects `path.0000`, …, of which the last is written again.

    TensorBoard reads them one after the other, in the order of their names.
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
    """Lets a RecordWriter open `gs://…`."""

    def open(self, path: str) -> _Parts:
        return _Parts(path)


register_writer_factory("gs", _PartsFactory())
