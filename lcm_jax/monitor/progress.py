"""Console progress of a run: a bar with loss, images/s and ETA on a terminal, otherwise periodic plain lines."""

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


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
