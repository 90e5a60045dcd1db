"""Ctrl-C and SIGTERM: a command ends within seconds, also while its main thread is in XLA's compiler.

Python runs a signal handler in the main thread between two of its instructions, so never before a call into C++ has
returned: for a large step that takes minutes. Here a second thread learns of the signal at once. It lets the main
thread end by itself, and ends the process where that does not happen.
"""

import contextlib
import dataclasses
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
GRACE = 0.5  # seconds that the main thread has to end by itself
TIDYING = 0.5  # seconds for the last acts of a process that has to be ended

Act = Callable[[KeyboardInterrupt], None]
_last_acts: list[Act] = []


class Terminated(KeyboardInterrupt):
    """SIGTERM, raised where Ctrl-C would raise KeyboardInterrupt."""


EXIT_CODES = {"interrupted": 128 + signal.SIGINT, "terminated": 128 + signal.SIGTERM}


def word(error: KeyboardInterrupt) -> str:
    """Returns what happened to the command, a key of EXIT_CODES: 130 for Ctrl-C, 143 for SIGTERM."""
    return "terminated" if isinstance(error, Terminated) else "interrupted"


@contextlib.contextmanager
def ends_soon(say: Act) -> Iterator[None]:
    """Ends the process within GRACE + TIDYING seconds of SIGINT or SIGTERM, after `say`.

    The main thread gets KeyboardInterrupt or Terminated. When that has left the context, or after GRACE seconds, the
    process ends, without Python's own end: that waits for threads and takes seconds with JAX. A signal that is ignored
    stays so. Does nothing in another thread than the main one, which could not set handlers, nor while other handlers
    are set (`as_flag`).
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    raised, left = threading.Event(), threading.Event()
    reading, writing = os.pipe()
    os.set_blocking(writing, False)

    def handler(number: int, _: Any) -> None:
        if not raised.is_set():
            raised.set()
            raise _error(number)

    def watch() -> None:
        while received := os.read(reading, 1):
            if signal.getsignal(received[0]) is handler and not left.wait(GRACE):
                _end(_error(received[0]), say)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    before = {number: signal.getsignal(number) for number in SIGNALS}
    wakeup = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    for number in SIGNALS:
        if before[number] != signal.SIG_IGN:
            signal.signal(number, handler)
    try:
        yield
    except KeyboardInterrupt as error:
        left.set()
        if raised.is_set():
            _end(error, say)
        raise
    finally:
        left.set()
        for number, old in before.items():
            signal.signal(number, old)
        signal.set_wakeup_fd(wakeup)
        os.close(writing)
        thread.join()
        os.close(reading)


@contextlib.contextmanager
def last_act(act: Act) -> Iterator[None]:
    """While the context lasts, `act` is called before `ends_soon` ends the process: to give back a lock, say.

    It runs in another thread than the main one, which may be anywhere, and has TIDYING seconds, with all others.
    """
    _last_acts.append(act)
    try:
        yield
    finally:
        _last_acts.remove(act)


@dataclasses.dataclass
class Flag:
    """The first signal that was received while `as_flag` lasted; 0: none."""

    signal: int = 0


@contextlib.contextmanager
def as_flag() -> Iterator[Flag]:
    """Turns the first SIGINT or SIGTERM into a flag that the caller reads; a second Ctrl-C interrupts at once."""
    flag = Flag()

    def handler(number: int, _: Any) -> None:
        if flag.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        flag.signal = number

    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield flag
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _error(number: int) -> KeyboardInterrupt:
    return Terminated() if number == signal.SIGTERM else KeyboardInterrupt()


def _end(error: KeyboardInterrupt, say: Act) -> None:
    def tidy() -> None:
        for act in reversed(_last_acts):
            with contextlib.suppress(Exception):  # the process ends: there is nobody to report it to
                act(error)
        say(error)
        if sys.__stdout__:  # sys.stdout may be redirected at this moment
            sys.__stdout__.flush()

    tidying = threading.Thread(target=tidy, daemon=True)  # which may wait for a network
    tidying.start()
    tidying.join(TIDYING)
    os._exit(EXIT_CODES[word(error)])
