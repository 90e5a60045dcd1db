"""Damages an input, reads it, and collects the cases that do not end as promised:

a UserError, or a right result, within ten seconds and one GB of memory.

python -m pytest tests/fuzz --fuzz-cases=10000 --fuzz-seed=1
python -m pytest tests/fuzz/test_fuzz_loras.py --fuzz-only=57      only this case, as named in a failure
"""

import collections
import contextlib
import faulthandler
import pathlib
import resource
import shutil
import signal
import sys
import traceback
import warnings
import zlib
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from lcm_jax.digits.presets import write_blank
from lcm_jax.errors import LONGEST, UserError
from lcm_jax.inference.pipeline import load_pipeline

SECONDS, MEMORY = 10, 2**30
Case = Callable[[np.random.Generator, pathlib.Path], Iterator[str]]


@pytest.fixture
def fuzz(request, tmp_path):
    """Returns a function that runs a share of the cases.

    A case is a generator function of (rng, empty folder): it yields a description of the damage, then reads the input.
    It raises AssertionError if an invalid input was accepted.
    """

    def run(case: Case, share: float) -> None:
        option = request.config.getoption
        seed, only, target = option("--fuzz-seed"), option("--fuzz-only"), request.node.name
        numbers = range(max(1, round(share * option("--fuzz-cases")))) if only is None else [only]
        failures = collections.defaultdict(list)
        for number in numbers:
            place = tmp_path / str(number)
            place.mkdir()
            steps = case(np.random.default_rng([seed, number, zlib.crc32(target.encode())]), place)
            what = next(steps)
            if kind := _failure(steps):
                failures[kind[0]].append(f"--fuzz-seed={seed} --fuzz-only={number}  {what:.150}: {kind[1]:.150}")
            shutil.rmtree(place)
        if failures:
            file = request.node.path.relative_to(request.config.rootpath)
            report = [f"{len(cases)} x {kind}\n    " + "\n    ".join(cases[:5]) for kind, cases in failures.items()]
            pytest.fail(f"{file}::{target}, of {len(numbers)} cases:\n" + "\n".join(report), pytrace=False)

    return run


def _failure(steps: Iterator[str]) -> tuple[str, str] | None:
    """Runs the rest of a case. Returns how it broke the promise, as a kind and the words, or None."""
    try:
        with _watched(), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # which a command prints as one line
            next(steps, None)
    except UserError as error:
        text = str(error)
        if not text.isprintable() or len(text) > LONGEST:
            return "UserError that is not a plain line", repr(text)
    except (Exception, SystemExit) as error:  # whatever there is: that is what is looked for
        own = [frame for frame in traceback.extract_tb(error.__traceback__) if "/lcm_jax/" in frame.filename]
        where = f" in {pathlib.Path(own[-1].filename).name}:{own[-1].name}" if own else ""
        return f"{type(error).__name__}{where}", " ".join(str(error).partition("\nassert")[0].split())
    return None


@contextlib.contextmanager
def _watched() -> Iterator[None]:
    """Raises TimeoutError and MemoryError beyond the limits; a call into C that never returns ends the process."""

    def late(*_) -> None:
        raise TimeoutError(f"no end in {SECONDS} s")

    before = _memory()
    # not SIGPROF: where a profile was recorded before, libtpu sends it by itself, for as long as the process lives
    timers = {signal.ITIMER_VIRTUAL: (signal.SIGVTALRM, SECONDS), signal.ITIMER_REAL: (signal.SIGALRM, 6 * SECONDS)}
    usual = {number: signal.signal(number, late) for number, _ in timers.values()}
    for timer, (_, seconds) in timers.items():  # computing, or asleep: other processes may keep the cores
        signal.setitimer(timer, seconds)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    faulthandler.dump_traceback_later(20 * SECONDS, exit=True, file=sys.__stderr__)
    resource.setrlimit(resource.RLIMIT_AS, (before["VmSize"] + 4 * MEMORY, hard))  # so that the machine lives on
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        faulthandler.cancel_dump_traceback_later()
        for timer, (number, _) in timers.items():
            signal.setitimer(timer, 0)
            signal.signal(number, usual[number])
    if (rise := _memory()["VmHWM"] - before["VmRSS"]) > MEMORY:
        raise MemoryError(f"{rise >> 20} MiB were needed")


def _memory() -> dict[str, int]:
    """Linux's VmSize, VmRSS and VmHWM in bytes; the last one, the highest of VmRSS, starts anew."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    return {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines if line.startswith("Vm")}


@pytest.fixture(scope="session")
def micro(tmp_path_factory) -> pathlib.Path:
    """A micro model folder."""
    return pathlib.Path(write_blank("micro", tmp_path_factory.mktemp("fuzz") / "micro"))


@pytest.fixture(scope="session")
def pipe(micro):
    """A pipeline that samples zeros: what it is given is checked and converted, nothing is compiled."""
    pipe = load_pipeline(micro)

    def program(kind, guided, decode, negative, in_strips):
        return lambda params, ids, negative, sizes, null_sizes, w, grid, z_T, between: np.zeros(
            (len(z_T), 32, 32, 3) if decode else z_T.shape
        )

    pipe._program = program
    pipe("a")  # what it calls of JAX is compiled before anything is measured
    return pipe
