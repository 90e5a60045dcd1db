"""A run's curves and pictures for TensorBoard, in `<workdir>/tensorboard`."""

import pathlib
from collections.abc import Mapping

import numpy as np
from jaxtyping import UInt8
from tensorboardX import SummaryWriter


class Metrics:
    """Writes scalars and pictures by step. A resumed run hides what an earlier one wrote beyond its start."""

    def __init__(self, workdir: pathlib.Path, start_step: int = 0) -> None:
        """Args: the run's folder; the number of steps done, after which older points are stale."""
        self._writer = SummaryWriter(str(workdir / "tensorboard"), purge_step=start_step + 1)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Adds one point to each curve."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def images(self, step: int, name: str, images: UInt8[np.ndarray, "n h w 3"]) -> None:
        """Adds pictures under one name."""
        self._writer.add_images(name, images, step, dataformats="NHWC")
        self._writer.flush()

    def close(self) -> None:
        """Writes out what is still in memory."""
        self._writer.close()
