"""Suppresses what Orbax and TensorStore print in addition to raising, so that an error is one line.

After its first error Orbax neither awaits its other reads and writes nor retrieves their exceptions. These are printed
later, when a TensorStore thread calls back into a closed event loop, or when Python collects the task.
"""

import contextlib
import functools
import logging
import pathlib
import sys
import warnings
from collections.abc import Iterator
from types import TracebackType
from typing import Any


@functools.cache
def silence() -> None:
    """Installs the filters permanently, since abandoned tasks can end at any time. Other libraries' messages pass."""
    logging.getLogger("absl").addFilter(_is_not_orbaxs_log)
    logging.getLogger("asyncio").addFilter(_is_not_dropped)
    unraisable, unhandled = sys.unraisablehook, sys.excepthook

    def unraisable_hook(seen: Any) -> None:
        code = getattr(seen.object, "cr_code", None)
        if not (code is not None and _of_orbax(code.co_filename)) and not _too_late(seen.exc_value):
            unraisable(seen)

    def unhandled_hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not _too_late(error):
            unhandled(kind, error, trace)

    sys.unraisablehook, sys.excepthook = unraisable_hook, unhandled_hook


@contextlib.contextmanager
def while_reading() -> Iterator[None]:
    """Suppresses asyncio's messages in the context: a damaged checkpoint causes a warning per array."""
    silence()
    logger = logging.getLogger("asyncio")
    logger.disabled, before = True, logger.disabled
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "coroutine .* was never awaited")
            yield
    finally:
        logger.disabled = before


def _of_orbax(file: str) -> bool:
    return "orbax" in pathlib.PurePath(file).parts


def _is_not_orbaxs_log(record: logging.LogRecord) -> bool:
    return not _of_orbax(record.pathname)


def _too_late(error: BaseException | None) -> bool:
    return isinstance(error, RuntimeError) and str(error) == "Event loop is closed"


def _is_not_dropped(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    if "exception was never retrieved" not in message:
        return True
    trace = record.exc_info[2] if record.exc_info else None
    while trace:
        if _of_orbax(trace.tb_frame.f_code.co_filename):
            return False
        trace = trace.tb_next
    return "tensorstore" not in message and "OCDBT database" not in message  # OCDBT: TensorStore's file format
