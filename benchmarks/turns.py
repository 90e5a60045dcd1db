"""Benchmark contestants in separate processes that run one at a time; the others wait without using a core."""

import functools
import multiprocessing
import os
import resource
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

RUNS = 3  # per measurement


class Contestant:
    """A process that builds an object and runs it on request."""

    def __init__(
        self,
        name: str,
        build: Callable[..., Any],
        *args: Any,
        env: Mapping[str, str] | None = None,
        wait: bool = True,
    ) -> None:
        """Starts the process and its build.

        Args:
          name: name in the table.
          build: a module-level callable. build(*args) returns an object with `run()`, which blocks until the work is
            done, `facts` (a dict), and optionally `memory()`, the accelerator's peak in bytes (0: use host memory).
          env: additional environment variables of the process.
          wait: whether to wait for the build; `facts` always does.
        """
        self.name = name
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        before = dict(os.environ)
        os.environ.update(env or {})
        try:
            self._process = context.Process(target=_serve, args=(theirs, build, args), daemon=True)
            self._process.start()
        finally:
            os.environ.clear()
            os.environ.update(before)
        theirs.close()
        if wait:
            _ = self.facts

    @functools.cached_property
    def facts(self) -> dict[str, Any]:
        """`facts` of the built object; waits for the build."""
        return self._answer()

    def seconds(self) -> float:
        """Returns the mean time of RUNS runs, in seconds, after one run that is not counted.

        The first run after another contestant's is slower than steps in training: caches are cold, and the operating
        system has reclaimed memory.
        """
        return self._ask("run")

    def memory(self) -> int:
        """Returns the peak memory so far, in bytes."""
        return self._ask("memory")

    def close(self) -> None:
        """Ends the process."""
        self._pipe.close()
        self._process.join(10)

    def _ask(self, what: str) -> Any:
        self._pipe.send(what)
        return self._answer()

    def _answer(self) -> Any:
        try:
            good, value = self._pipe.recv()
        except EOFError:
            raise SystemExit(f"{self.name} has died") from None
        if not good:
            raise SystemExit(f"{self.name}: {value}")
        return value


def take_turns(contestants: Sequence[Contestant], rounds: int, warm_up: int = 2) -> list[dict[str, float]]:
    """Returns name → seconds for each round; the order of contestants is reversed every other round."""
    for contestant in contestants:
        for _ in range(warm_up):
            contestant.seconds()
    found = []
    for number in range(rounds):
        order = list(contestants)[:: 1 if number % 2 else -1]
        found.append({contestant.name: contestant.seconds() for contestant in order})
    return found


def ratio(rounds: Sequence[Mapping[str, float]], of: str, to: str) -> tuple[float, float, float]:
    """Returns median, minimum and maximum over rounds of the time ratio `of` / `to`."""
    each = [one[of] / one[to] for one in rounds]
    return statistics.median(each), min(each), max(each)


def table(contestants: Sequence[Contestant], batch: int, rounds: Sequence[Mapping[str, float]]) -> str:
    """Returns a Markdown table of the results, with times relative to the first contestant.

    Each run must process one batch, and each contestant's `facts` must have `first_seconds`.
    """
    ours, *_ = contestants
    lines = [
        f"| | ms | images/s | time / {ours.name}'s, median (range) | MB | compiled, or first run, s |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for each in contestants:
        seconds = statistics.median(one[each.name] for one in rounds)
        median, low, high = ratio(rounds, each.name, ours.name)
        shown = "" if each is ours else f"{median:.2f} ({low:.2f} to {high:.2f})"
        lines.append(
            f"| {each.name} | {1e3 * seconds:.0f} | {batch / seconds:.1f} | {shown} | {each.memory() / 1e6:.0f} "
            f"| {each.facts['first_seconds']:.0f} |"
        )
    return "\n".join(lines)


def _serve(pipe: Any, build: Callable[..., Any], args: tuple[Any, ...]) -> None:
    try:
        built = build(*args)
        pipe.send((True, built.facts))
        while True:
            try:
                what = pipe.recv()
            except EOFError:
                return
            if what == "run":
                built.run()
                start = time.perf_counter()
                for _ in range(RUNS):
                    built.run()
                pipe.send((True, (time.perf_counter() - start) / RUNS))
            else:
                on_accelerator = built.memory() if hasattr(built, "memory") else 0
                pipe.send((True, on_accelerator or _peak_memory()))
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        pipe.send((False, f"{type(error).__name__}: {error}"))


def _peak_memory() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
