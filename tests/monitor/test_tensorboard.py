"""Event files as TensorBoard reads them: the record format, the purge of stale steps, images."""

import contextlib
import io
import math
import os
import pathlib
import resource
import shutil
import time

import numpy as np
import pytest
from event_files import events, visible
from PIL import Image

from lcm_jax.errors import UserError
from lcm_jax.monitor.tensorboard import Metrics


@pytest.fixture
def metrics(tmp_path):
    with contextlib.closing(Metrics(tmp_path)) as metrics:
        yield metrics


def test_points_by_step(metrics, tmp_path):
    metrics.scalars(1, {"loss": 0.5, "gradient_norm": 2.0})
    metrics.scalars(2, {"loss": np.float32(0.25), "gradient_norm": 1})
    assert visible(tmp_path) == {"loss": [(1, 0.5), (2, 0.25)], "gradient_norm": [(1, 2.0), (2, 1.0)]}  # before close
    metrics.close()
    first = events(tmp_path)[0]
    assert first.file_version == "brain.Event:2"
    assert all(event.wall_time > 1e9 for event in events(tmp_path))


def test_a_resumed_run_hides_what_came_after_its_start(metrics, tmp_path):
    for step in range(1, 8):
        metrics.scalars(step, {"loss": float(step)})
    metrics.close()
    resumed = Metrics(tmp_path, start_step=4)
    assert visible(tmp_path)["loss"] == [(step, float(step)) for step in (1, 2, 3, 4)]
    resumed.scalars(5, {"loss": 50.0})
    resumed.close()
    assert visible(tmp_path)["loss"] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 50.0)]
    assert len(os.listdir(tmp_path / "tensorboard")) == 2  # though both began within one second


def test_a_run_from_the_start_hides_all(metrics, tmp_path):
    metrics.scalars(1, {"loss": 1.0})
    Metrics(tmp_path).close()
    assert visible(tmp_path) == {}


def test_values_that_are_not_finite(metrics, tmp_path):
    metrics.scalars(3, {"nan": math.nan, "inf": math.inf})
    curves = visible(tmp_path)
    assert math.isnan(curves["nan"][0][1])
    assert curves["inf"] == [(3, math.inf)]


def test_images(metrics, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (10, 4, 6, 3), dtype=np.uint8)
    metrics.images(5, "samples", images)
    (event,) = [event for event in events(tmp_path) if event.HasField("summary")]
    (value,) = event.summary.value
    assert (event.step, value.tag) == (5, "samples")
    sheet = np.asarray(Image.open(io.BytesIO(value.image.encoded_image_string)))
    np.testing.assert_array_equal(sheet[:4, :48], np.concatenate(images[:8], axis=1))
    np.testing.assert_array_equal(sheet[4:, :12], np.concatenate(images[8:], axis=1))


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "tensorboard").write_text("in the way")
    with pytest.raises(UserError, match="tensorboard can't be written: it is a file"):
        Metrics(tmp_path)


def test_a_full_disk_is_an_error_and_no_endless_wait(tmp_path):
    """The kernel refuses to let the file grow, as on a full disk."""
    metrics = Metrics(tmp_path)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, old[1]))
    try:
        with pytest.raises(UserError, match=r"tensorboard can't be written: \w+"):
            metrics.scalars(1, dict.fromkeys(map(str, range(1000)), 0.0))
        with pytest.raises(UserError, match="tensorboard can't be written"):
            metrics.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


# ---- names and places


@pytest.mark.parametrize("jumps", [(0, -0.5, -1), (0, -3600, -7200), (0, -(10**8), -(2 * 10**8)), (1970, 0, 1)])
def test_a_clock_that_jumped_hides_nothing(tmp_path, monkeypatch, jumps):
    begun = time.time_ns()
    for number, jump in enumerate(jumps):
        clock = 45 * 10**9 if jump == 1970 else begun + int(jump * 1e9)  # 45 s after the epoch, as without a clock
        monkeypatch.setattr(time, "time_ns", lambda clock=clock: clock)
        resumed = Metrics(tmp_path, start_step=2 * number)
        for step in (2 * number + 1, 2 * number + 2):
            resumed.scalars(step, {"loss": float(step)})
        resumed.close()
    assert visible(tmp_path)["loss"] == [(step, float(step)) for step in range(1, 7)]


@pytest.mark.parametrize("harm", [pathlib.Path.unlink, lambda path: shutil.rmtree(path.parent)])
def test_an_event_file_that_was_deleted_is_noticed(tmp_path, metrics, harm):
    metrics.scalars(1, {"loss": 1.0})
    (path,) = (tmp_path / "tensorboard").iterdir()
    harm(path)
    with pytest.raises(UserError, match=f"^{path} was deleted or moved during the run"):
        metrics.scalars(2, {"loss": 1.0})
