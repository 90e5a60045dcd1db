"""A micro state of a run, saved and restored; and damage to its files."""

import contextlib
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import SingleDeviceSharding

from lcm_jax.training.checkpoint import Checkpoints

DATA = {"position": 7, "nested": {"2": [1, 2], "10": "ü"}}


def make_state(seed=0, ema=True, optimizer=True, sharding=None):
    """A micro state of a run: keys that sort unlike numbers, arrays on both sides of what Orbax puts into one file."""
    rng = np.random.default_rng(seed)
    sharding = sharding or SingleDeviceSharding(jax.devices()[0])
    params = {
        "unet": {f"down_blocks.{i}.kernel": rng.standard_normal((4, 8)).astype(np.float32) for i in ("2", "10", "1")},
        "text_encoder": {"embedding": rng.standard_normal((64, 32)).astype(np.float32)},
    }
    params = jax.device_put(params, sharding)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.linear_schedule(0.0, 1e-3, 5)))
    opt_state = jax.tree.map(lambda x: x + seed if x.ndim == 0 else x + rng.standard_normal(x.shape), tx.init(params))
    state = {
        "step": jnp.int32(seed),
        "params": params,
        "ema": jax.tree.map(lambda x: x * 0.5, params) if ema else {},
        "opt_state": opt_state if optimizer else (),
        "skipped": jnp.int32(2),
    }
    return jax.device_put(state, sharding)


def like(state, sharding=None):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding or x.sharding), state)


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True):
        name = jax.tree_util.keystr(path)
        assert x.dtype == y.dtype, name
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), name


def save(workdir, *steps, data=DATA, **options):
    """Saves make_state(step) at each step."""
    with contextlib.closing(Checkpoints(workdir, **options)) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state(step), data)


def restore(workdir, step=0):
    return Checkpoints(workdir).restore_newest(like(make_state(step)))


def flip(path, where=0.5, bit=1):
    content = bytearray(path.read_bytes())
    content[int(len(content) * where)] ^= 1 << bit
    path.write_bytes(content)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def arrays_file(item):
    """The file with an item's array data, relative to the step's folder: the largest there."""

    def find(step_folder):
        files = (step_folder / item).rglob("d/*")
        return max(files, key=lambda path: path.stat().st_size)

    return find


FILES = {
    "params": arrays_file("params"),
    "ema": arrays_file("ema"),
    "opt_state": arrays_file("opt_state"),
    "counters": arrays_file("counters"),
    "manifest": lambda step: step / "params" / "manifest.ocdbt",
    "tree": lambda step: step / "opt_state" / "_METADATA",
    "meta": lambda step: step / "meta" / "metadata",
}
HARMS = {"flipped": flip, "truncated": truncate, "deleted": pathlib.Path.unlink}
