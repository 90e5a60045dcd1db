"""Runs before any test imports jax: eight virtual CPU devices, quick compilation, and compiled programs kept between
runs."""

import gc
import os
import pathlib

import pytest
from compiling import QUICK_FLAGS

gc.set_threshold(100_000, 50, 100)  # tracing makes many objects, few of them garbage

ROOT = pathlib.Path(__file__).resolve().parent.parent
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 {QUICK_FLAGS}"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

pytest_plugins = ["fixtures_folders"]

# Whole runs in processes of their own, and many compilations: begun first, so that no process is left with them alone.
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
    """A data_dir in which captioned_digits is prepared, once for all tests and workers, as training does it."""
    from lcm_jax.data.sources import open_source

    root = tmp_path_factory.getbasetemp()  # of this worker; above it is what they share, and the preparation locks
    root = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "digits"
    open_source("captioned_digits", data_dir=str(root))
    return str(root)


@pytest.fixture(scope="session")
def quick(digits_data_dir, tmp_path_factory):
    """The options of a run of seconds, on real data, around the smallest step there is."""
    from fixtures_folders import write_little

    teacher = write_little(tmp_path_factory.mktemp("little") / "teacher", vae_channels=[8, 8])
    return [
        f"--config={ROOT}/configs/digits_teacher.py:vae",
        f"--config.model.folder={teacher}",
        f"--config.data.data_dir={digits_data_dir}",
        "--config.mesh.cpu_devices=0",
        "--config.data.image_size=16",  # a tenth of the attention
        "--config.batch_size=8",
        "--config.steps=6",
        "--config.optimizer.decay=constant",
        "--config.checkpoint.every=2",
        "--config.log.samples_every=0",
    ]


@pytest.fixture(scope="module")
def one_device():
    """Runs of the train command take one device: eight copies of each array make Orbax slow and nothing clearer."""
    import jax

    from lcm_jax import train
    from lcm_jax.parallel.mesh import make_mesh

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))
        yield
