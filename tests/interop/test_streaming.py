"""Weights are read, placed on devices and written one tensor at a time: a large model is held once."""

import contextlib
import tracemalloc

import jax
import numpy as np
from fixtures_folders import latents
from safetensors.numpy import load_file, save_file

from lcm_jax.interop import names, weights
from lcm_jax.parallel import partition
from lcm_jax.parallel.mesh import MeshConfig, make_mesh

COUNT, SHAPE = 24, (512, 512)
KEYS = [f"layers.{i}.weight" for i in range(COUNT)]
TENSORS = {key: latents(i, *SHAPE).astype(np.float16) for i, key in enumerate(KEYS)}
SIZE = sum(tensor.nbytes for tensor in TENSORS.values())  # 12 MiB


@contextlib.contextmanager
def traced():
    """Yields a function that returns the peak of the memory that numpy allocated so far, and what of it is left."""
    tracemalloc.start()
    try:
        yield lambda: tuple(reversed(tracemalloc.get_traced_memory()))
    finally:
        tracemalloc.stop()


def test_from_the_file_to_a_sharded_mesh(tmp_path):
    """On a CPU numpy's memory is the host's, and the devices' is not traced."""
    save_file(TENSORS, tmp_path / "model.safetensors", {"format": "pt"})
    mesh = make_mesh(MeshConfig(data=1, fsdp=8), jax.devices()[:8])
    shapes = {path: jax.ShapeDtypeStruct(SHAPE, np.float32) for path in (f"layers.{i}.kernel" for i in range(COUNT))}
    like = {"unet": {path: jax.ShapeDtypeStruct(SHAPE, np.float32, sharding=sharding)
                     for path, sharding in partition.shardings(shapes, mesh).items()}}  # fmt: skip
    with traced() as memory:
        tensors, _ = weights.read_weights(tmp_path)
        assert memory()[0] < 1.1 * SIZE
        params = {names.file_key(path): path for path in shapes}
        tree = {"unet": {params[key]: names.from_file(params[key], tensors.pop(key)) for key in KEYS}}
        placed = partition.place(tree, like)["unet"]
        peak, left = memory()
        assert peak < 1.3 * SIZE  # a float32 copy of it would be 3
        assert left < 0.1 * SIZE
    assert tree == {"unet": {}}
    held = np.zeros(8)
    for path, array in placed.items():
        np.testing.assert_array_equal(array, TENSORS[names.file_key(path)].astype(np.float32).T)
        for shard in array.addressable_shards:
            held[shard.device.id] += shard.data.nbytes
    assert (held == 2 * SIZE / 8).all()  # float32


def test_to_the_file(tmp_path):
    """Cast and transposed; the file is byte for byte that of safetensors."""
    views = {key: np.ascontiguousarray(tensor.astype(np.float32).T).T for key, tensor in TENSORS.items()}
    arrangement = weights.one_file("model.safetensors", KEYS)
    with traced() as memory:
        weights.write_weights(tmp_path, views, arrangement, dict.fromkeys(KEYS, np.dtype(np.float16)))
        assert memory()[0] < 0.3 * SIZE
    save_file(TENSORS, tmp_path / "peer.safetensors", {"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "peer.safetensors").read_bytes()
    assert load_file(tmp_path / "model.safetensors").keys() == TENSORS.keys()
