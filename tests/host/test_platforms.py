"""Off a TPU JAX does not start libtpu, which would print errors; a user's own settings are kept."""

import os

import jax
import pytest

from lcm_jax.host import platforms


@pytest.fixture
def machine(monkeypatch):
    """A machine with libtpu and no accelerator, where nothing is set; its platforms are restored."""
    before = jax.config.jax_platforms
    for name in [name for name in os.environ if name.startswith(platforms.SETTINGS)]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(platforms, "DEVICES", ())
    monkeypatch.setattr(platforms.hardware_utils, "num_available_tpu_chips_and_device_id", lambda: (0, None))
    monkeypatch.setattr(platforms.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(platforms.importlib.metadata, "entry_points", lambda group: ())
    jax.config.update("jax_platforms", None)
    yield monkeypatch
    jax.config.update("jax_platforms", before)


def test_without_a_tpu(machine):
    platforms.skip_absent_tpu()
    assert jax.config.jax_platforms == "cpu"


@pytest.mark.parametrize(
    "there_is",
    [
        lambda patch: jax.config.update("jax_platforms", "tpu,cpu"),
        lambda patch: patch.setattr(
            platforms.hardware_utils, "num_available_tpu_chips_and_device_id", lambda: (4, None)
        ),
        lambda patch: patch.setattr(platforms, "DEVICES", ("/dev/nul?",)),
        lambda patch: patch.setattr(platforms.importlib.util, "find_spec", lambda name: None),
        lambda patch: patch.setattr(platforms.importlib.metadata, "entry_points", lambda group: ["cuda"]),
        lambda patch: patch.setenv("TPU_WORKER_HOSTNAMES", "a,b"),
    ],
    ids=["setting", "chips", "device", "no libtpu", "plugin", "variable"],
)
def test_nothing_is_changed_where_there_is_a(machine, there_is):
    there_is(machine)
    before = jax.config.jax_platforms
    platforms.skip_absent_tpu()
    assert jax.config.jax_platforms == before
