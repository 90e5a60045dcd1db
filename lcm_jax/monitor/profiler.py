"""Profiles steps of a run to `<workdir>/profile`, for TensorBoard's profile plugin or xprof."""

import contextlib
import dataclasses
import pathlib
import shutil
import tempfile

import jax
from etils import epath

from lcm_jax.errors import UserError
from lcm_jax.host import files


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
    """Steps to profile, the same on all processes. Does not affect the training result."""

    steps: tuple[int, ...] = ()  # first and last step, as in (10, 12); (): none

    def __post_init__(self) -> None:
        whole = all(type(step) is int for step in self.steps)
        if self.steps and not (whole and len(self.steps) == 2 and 1 <= self.steps[0] <= self.steps[1]):
            raise UserError(f"steps is {self.steps}; give the first and the last step, as in (10, 12), or ()")


class Profiler:
    """Profiles the steps of a ProfileConfig; use as a context manager around the training loop."""

    def __init__(self, config: ProfileConfig, workdir: epath.PathLike) -> None:
        """Creates the folder. Raises UserError, here and when recording stops, if it can't be written."""
        self._first, self._last = config.steps or (0, 0)
        self._folder = epath.Path(workdir) / "profile" / f"process_{jax.process_index()}"
        self._recorded = ""  # local folder of the trace: JAX's profiler can't write to a bucket
        self._running = False
        if config.steps:
            files.make_folder("--workdir", self._folder)

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def step(self, number: int) -> contextlib.AbstractContextManager:
        """Returns a context for dispatching a step, counted from 1; starts recording at the first configured step."""
        if not self._running and self._first <= number <= self._last:
            with files.one_line(tempfile.gettempdir()):
                self._recorded = tempfile.mkdtemp() if files.in_bucket(self._folder) else str(self._folder)
            jax.profiler.start_trace(self._recorded)
            self._running = True
        return jax.profiler.StepTraceAnnotation("train", step_num=number) if self._running else contextlib.nullcontext()

    def is_last(self, number: int) -> bool:
        """Returns whether recording ends with this step, so that the caller must wait for it."""
        return self._running and number >= self._last

    def stop(self) -> None:
        """Stops recording and writes the profile; does nothing if not recording."""
        if self._running:
            self._running = False
            try:
                jax.profiler.stop_trace()
            except (OSError, RuntimeError) as error:
                raise UserError(f"{self._recorded} can't be written: {str(error).splitlines()[0]}") from None
            if files.in_bucket(self._folder):
                try:
                    for path in pathlib.Path(self._recorded).rglob("*"):
                        if path.is_file():
                            files.write(self._folder / path.relative_to(self._recorded), path.read_bytes())
                finally:
                    shutil.rmtree(self._recorded)
