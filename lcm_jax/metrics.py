"""A run's curves and pictures for TensorBoard, in `<workdir>/tensorboard`.

tensorboardX's SummaryWriter hands events to a thread of its own: when the disk is full that thread dies, and the run
then waits for it without end. Here each event is on disk when a method returns, or the method says why not; only in a
bucket, where a file can't grow, it waits for `flush`, for the next picture or for a minute to pass.
"""

import contextlib
import logging
import socket
import sys
import time
from collections.abc import Iterator, Mapping

import numpy as np
from etils import epath
from jaxtyping import UInt8

from lcm_jax import files


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
            # read in the order of names: nanoseconds, since two runs may start within one second
            name = f"events.out.tfevents.{time.time_ns() / 1e9:.9f}.{socket.gethostname()}"
            self._file = RecordWriter(str(self._folder / name))
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

    def _write(self, *events: Event) -> None:
        with files.one_line(self._folder):
            for event in events:
                event.wall_time = time.time()
                self._file.write(event.SerializeToString())
        if not files.in_bucket(self._folder) or time.monotonic() - self._flushed >= SECONDS:
            self.flush()


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
