"""Console progress of training and of sampling: a bar with images/s and ETA on a terminal, else plain lines."""

import collections
import contextlib
import math
import time
from collections.abc import Callable, Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

from lcm_jax.host import interrupts

LINE_EVERY = 10.0  # seconds between plain lines
WINDOW = 50  # steps over which throughput is measured


class Progress:
    """Shows progress; use as a context manager and call `update` once per step."""

    def __init__(
        self,
        total_steps: int,
        start_step: int,
        batch_size: int,
        console: Console | None = None,
        compiled: Callable[[], str] = str,
    ) -> None:
        """Starts at `start_step` of `total_steps`; prints the summary that `compiled` returns after the first step."""
        self.total, self.batch_size, self._compiled = total_steps, batch_size, compiled
        self._console = console or Console()
        self._start, self._line = time.perf_counter(), -math.inf
        self._losses: dict[str, float] = {}
        self._times: collections.deque[tuple[int, float]] = collections.deque(maxlen=WINDOW + 1)
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[says]}", markup=False))
        self._bar = Bar(*columns, console=self._console, transient=False) if self._console.is_terminal else None
        self._acts = contextlib.ExitStack()
        if self._bar:
            self._task = self._bar.add_task("train", total=total_steps, completed=start_step, says="compiling")

    def __enter__(self) -> "Progress":
        self.say("Compiling the step ...")
        if bar := self._bar:
            bar.start()
            self._acts.enter_context(interrupts.last_act(lambda _: bar.stop()))  # which shows the cursor again
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._acts.close()
        if self._bar:
            self._bar.stop()

    def say(self, line: str) -> None:
        """Prints a line without markup, above the bar if there is one."""
        self._console.print(line, highlight=False, markup=False, emoji=False, soft_wrap=True)

    def update(self, step: int, losses: Mapping[str, float]) -> float:
        """Shows that `step` steps are done; returns images/s over the last WINDOW steps (NaN at the first call).

        Shows the last value of each of `losses`, also if a later step lacks it.
        Time is measured from the end of the first step, since that step includes compilation.
        """
        now = time.perf_counter()
        if not self._times:
            self.say("; ".join(filter(None, [f"First step after {now - self._start:.1f} s", self._compiled()])))
        self._times.append((step, now))
        first, then = self._times[0]
        seconds = now - then
        rate = (step - first) * self.batch_size / seconds if seconds > 0 else math.nan
        self._losses.update(losses)
        says = "  ".join(f"{name} {loss:.4g}" for name, loss in self._losses.items())
        if rate > 0:
            says += f"  {rate:.1f} images/s  {_clock((self.total - step) * self.batch_size / rate)} left"
        if self._bar:
            self._bar.update(self._task, completed=step, says=says)
        elif now - self._line >= LINE_EVERY or step == self.total:
            self._line = now
            self.say(f"step {step}/{self.total}  {says}")
        return rate


class Sampling:
    """Shows how many images are sampled, in one or several series; use as a context manager."""

    def __init__(self, work: int, console: Console | None = None) -> None:
        """Takes the total work, in images times their calls of the network, which the time left is estimated from."""
        self._work, self._finished = work, 0
        self._console = console or Console()
        self._line, self._first = time.perf_counter(), (0, math.nan)
        columns = (BarColumn(), TextColumn("{task.fields[says]}", markup=False))
        self._bar = Bar(*columns, console=self._console, transient=True) if self._console.is_terminal else None
        if self._bar:
            self._task = self._bar.add_task("sample", total=work, says="compiling")

    def __enter__(self) -> "Sampling":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def series(self, name: str, images: int, calls: int = 1) -> Callable[[int], None]:
        """Starts a series of images; returns a function to call with the number of its images that are done.

        Time is measured from the end of a series' first batch, since that may include compilation.

        Args:
          name: shown before the numbers, or "".
          images: in this series.
          calls: of the network per image.
        """
        before, start = self._finished, [math.nan, 0.0]  # time and images at the end of the first batch
        self._finished += images * calls

        def done(count: int) -> None:
            now, work = time.perf_counter(), before + count * calls
            if math.isnan(start[0]):
                start[:] = now, count
            if math.isnan(self._first[1]):
                self._first = work, now
            says = f"{name}  {count}/{images} images".strip()
            if now > start[0]:
                says += f"  {(count - start[1]) / (now - start[0]):.1f} images/s"
            if now > self._first[1] and work > self._first[0]:
                seconds = (now - self._first[1]) / (work - self._first[0])  # per image and call
                says += f"  {_clock((self._work - work) * seconds)} left"
            if self._bar:
                self._bar.update(self._task, completed=work, says=says)
            elif now - self._line >= LINE_EVERY:
                self._line = now
                self._console.print(says, highlight=False, markup=False, emoji=False, soft_wrap=True)

        return done


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
