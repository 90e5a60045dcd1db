"""What a person sees of a run: a bar with loss, images/s and ETA on a terminal, else a plain line now and then."""

import collections
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

LINE_EVERY = 10.0  # seconds between plain lines
WINDOW = 50  # steps over which speed is measured


class Progress:
    """Use as a context manager; `update` once a step."""

    def __init__(self, total_steps: int, start_step: int, batch_size: int, console: Console | None = None) -> None:
        """Args: the run's steps, those done before, images a step; the console for tests."""
        self.total, self.batch_size = total_steps, batch_size
        self._console = console or Console()
        self._start, self._line = time.perf_counter(), 0.0
        self._times: collections.deque[tuple[int, float]] = collections.deque(maxlen=WINDOW)
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[says]}"), TimeRemainingColumn())
        self._bar = Bar(*columns, console=self._console, transient=False) if self._console.is_terminal else None
        if self._bar:
            self._task = self._bar.add_task("train", total=total_steps, completed=start_step, says="compiling …")

    def __enter__(self) -> "Progress":
        self.say("Compiling the step …")
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def say(self, line: str) -> None:
        """Prints a line above the bar."""
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def update(self, step: int, loss: float) -> float:
        """Notes that `step` steps are done; returns images/s over the last steps (nan until there are two)."""
        now = time.perf_counter()
        if not self._times:
            self.say(f"First step after {now - self._start:.1f} s")
        self._times.append((step, now))
        (first, then), count = self._times[0], len(self._times)
        rate = (step - first) * self.batch_size / (now - then) if count > 1 else float("nan")
        says = f"loss {loss:.4g}  {rate:.1f} images/s" if count > 1 else f"loss {loss:.4g}"
        if self._bar:
            self._bar.update(self._task, completed=step, says=says)
        elif now - self._line >= LINE_EVERY or step == self.total:
            self._line = now
            left = f"  {_clock((self.total - step) * self.batch_size / rate)} left" if count > 1 else ""
            self.say(f"step {step}/{self.total}  {says}{left}")
        return rate


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
