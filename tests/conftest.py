"""Configures JAX before any test imports it: eight CPU devices, quick compilation, a persistent cache."""

import gc
import os
import pathlib

import pytest
from compiling import QUICK_FLAGS

gc.set_threshold(100_000, 50, 100)  # fewer collections: tracing creates many objects, little of it garbage

ROOT = pathlib.Path(__file__).resolve().parent.parent
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 {QUICK_FLAGS}"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

pytest_plugins = ["fixtures_folders"]

# Slow files (subprocesses, many compilations) run first, so that no worker is left alone with one at the end.
LONGEST = (
    "test_processes.py",
    "test_train.py",
    "test_plan.py",
    "test_golden_step.py",
    "test_killed.py",
    "test_program.py",
    "test_buckets.py",
    "test_other_mesh.py",
    "test_lora_training.py",
    "test_compile_cache.py",
    "test_options.py",
)


def pytest_addoption(parser):
    parser.addoption("--fuzz-cases", type=int, default=400, help="damaged inputs of tests/fuzz, all targets together")
    parser.addoption("--fuzz-seed", type=int, default=0, help="of the damage")
    parser.addoption("--fuzz-only", type=int, help="run the case of this number alone")


def pytest_collection_modifyitems(items):
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(LONGEST)))


@pytest.fixture(scope="session")
def digits_data_dir(tmp_path_factory):
    """A data_dir with captioned_digits, prepared once for all tests and workers, as in training."""
    from lcm_jax.data.config import DataConfig
    from lcm_jax.data.sources import open_data

    root = tmp_path_factory.getbasetemp()  # per worker; its parent is shared, and the preparation takes a lock
    root = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "digits"
    open_data(DataConfig(data_dir=str(root)))
    return str(root)


@pytest.fixture(scope="session")
def quick(digits_data_dir, tmp_path_factory):
    """Options of a training run that takes seconds: real data and the smallest model."""
    from fixtures_folders import write_little

    teacher = write_little(tmp_path_factory.mktemp("little") / "teacher", vae_channels=[8, 8])
    return [
        f"--config={ROOT}/configs/digits_teacher.py:vae",
        f"--config.model.folder={teacher}",
        f"--config.data.data_dir={digits_data_dir}",
        "--config.mesh.cpu_devices=0",
        "--config.data.image_size=16",  # a tenth of the cost of attention
        "--config.batch_size=8",
        "--config.steps=6",
        "--config.optimizer.decay=constant",
        "--config.checkpoint.every=2",
        "--config.log.samples_every=0",
    ]
