"""safetensors files: single, sharded, in half precision; errors."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from lcm_jax.errors import UserError
from lcm_jax.interop import weights

TENSORS = {
    "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b.weight": np.arange(4, dtype=np.float16),
    "c.bias": np.arange(3, dtype=np.float32).astype(ml_dtypes.bfloat16),
    "ids": np.arange(5, dtype=np.int64)[None],
}
INDEX = "diffusion_pytorch_model.safetensors.index.json"
SHARDS = ["diffusion_pytorch_model-00001-of-00002.safetensors", "diffusion_pytorch_model-00002-of-00002.safetensors"]


def write_shards(folder, index=INDEX, shards=SHARDS):
    weight_map = {key: shards[i % 2] for i, key in enumerate(TENSORS)}
    for shard in shards:
        held = {key: TENSORS[key] for key, name in weight_map.items() if name == shard}
        save_file(held, folder / shard, {"format": "pt"})
    (folder / index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype
        assert a[key].shape == b[key].shape
        assert a[key].tobytes() == b[key].tobytes()


@pytest.mark.parametrize(
    "name",
    [
        "diffusion_pytorch_model.safetensors",
        "model.safetensors",
        "diffusion_pytorch_model.fp16.safetensors",
        "model.fp16.safetensors",
    ],
)
def test_whole_file_there_and_back(tmp_path, name):
    save_file(TENSORS, tmp_path / name, {"format": "pt"})
    tensors, arrangement = weights.read_weights(tmp_path)
    assert_same(tensors, TENSORS)
    (tmp_path / "out").mkdir()
    weights.write_weights(tmp_path / "out", tensors, arrangement)
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / name).read_bytes()


@pytest.mark.parametrize(
    ("index", "shards"),
    [
        (INDEX, SHARDS),
        (
            "diffusion_pytorch_model.safetensors.index.fp16.json",
            [name.replace("model-", "model.fp16-") for name in SHARDS],
        ),
        (
            "model.fp16.safetensors.index.json",
            ["model.fp16-00001-of-00002.safetensors", "model.fp16-00002-of-00002.safetensors"],
        ),
    ],
)
def test_shards_there_and_back(tmp_path, index, shards):
    write_shards(tmp_path, index, shards)
    tensors, arrangement = weights.read_weights(tmp_path)
    assert_same(tensors, TENSORS)
    (tmp_path / "out").mkdir()
    weights.write_weights(tmp_path / "out", tensors, arrangement)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted([index, *shards])
    assert json.loads((tmp_path / "out" / index).read_text()) == json.loads((tmp_path / index).read_text())
    for shard in shards:
        assert (tmp_path / "out" / shard).read_bytes() == (tmp_path / shard).read_bytes()


def test_transposed_views_are_written_as_they_read(tmp_path):
    view = np.arange(6, dtype=np.float32).reshape(2, 3).T
    weights.write_weights(tmp_path, {"x": view}, weights.one_file("model.safetensors", ["x"]))
    np.testing.assert_array_equal(weights.read_weights(tmp_path)[0]["x"], view)


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"])
def test_float8_there_and_back(tmp_path, name):
    """safetensors' reader for numpy has no float8; the other tensors of the file stand before and behind it."""
    values = np.array([[0.5, -3.0, 0.0], [16.0, np.nan, 0.25]]).astype(name)
    tensors = {**TENSORS, "b": values, "d": values[:, :1].copy(), "none": values[:0], "scalar": values[0, 0][...]}
    weights.save(tmp_path / "model.safetensors", tensors, None)
    found, _ = weights.read_weights(tmp_path)
    assert_same(found, tensors)
    assert weights.read_shapes(tmp_path / "model.safetensors") == {key: a.shape for key, a in tensors.items()}


def test_full_precision_goes_before_half(tmp_path):
    save_file({"x": np.zeros(1, np.float16)}, tmp_path / "model.fp16.safetensors")
    save_file({"x": np.zeros(1, np.float32)}, tmp_path / "model.safetensors")
    assert weights.read_weights(tmp_path)[0]["x"].dtype == np.float32


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (("model.bf16.safetensors",), "model.bf16.safetensors"),
        (("model.fp32.safetensors", "model.fp16.safetensors", "model.bf16.safetensors"), "model.fp32.safetensors"),
        (("model.bf16.safetensors", "model.fp16.safetensors", "model.ema.safetensors"), "model.fp16.safetensors"),
        (("model.non_ema.safetensors",), "model.non_ema.safetensors"),
        (("model.non_ema.safetensors", "model.ema.safetensors", "model.safetensors"), "model.safetensors"),
        (("model.x-00001-of-00002.safetensors", "model.y.safetensors"), "model.y.safetensors"),
        (("model.safetensors", "diffusion_pytorch_model.safetensors"), "diffusion_pytorch_model.safetensors"),
    ],
)
def test_one_variant_is_chosen(tmp_path, names, chosen):
    for name in names:
        save_file({"x": np.zeros(1, np.float32)}, tmp_path / name)
    assert list(weights.read_weights(tmp_path)[1].metadata) == [chosen]


def test_no_choice_among_unusual_variants(tmp_path):
    for name in ("model.ema.safetensors", "model.non_ema.safetensors"):
        save_file({"x": np.zeros(1, np.float32)}, tmp_path / name)
    with pytest.raises(UserError, match="several variants, ema, non_ema; keep one"):
        weights.read_weights(tmp_path)


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "model.ckpt"])
def test_pickles_are_refused_unread(tmp_path, name):
    (tmp_path / name).write_bytes(b"never opened")
    with pytest.raises(UserError, match=f"only as {name}, a pickle, .* run any code .*safe_serialization"):
        weights.read_weights(tmp_path)


def test_no_weights(tmp_path):
    with pytest.raises(UserError, match="holds no weights: expected diffusion_pytorch_model"):
        weights.read_weights(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_file(tmp_path, keep):
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(
        UserError, match=r"model.safetensors (is empty|can't be read as safetensors.* truncated)"
    ) as error:
        weights.read_weights(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n", "is a pointer of git-lfs"),
        (b"\n<!DOCTYPE html>\n<html><head><title>Sign in</title>" + b" " * 300, "is a web page"),
        (b'{"error": "not found"}', "is JSON, not safetensors"),
        (b"PK\x03\x04" + b"\0" * 60, "is a pickle or another zip file"),
        (b"\x80\x02}q\x00." * 9, "is a pickle"),
        (b"GGUF\x03\0\0\0" * 9, "is a GGUF file"),
        (b"Access denied " * 9, "can't be read as safetensors: it has no safetensors header"),
    ],
)
def test_files_that_are_no_weights_are_called_what_they_are(tmp_path, content, message):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=rf"model\.safetensors {message}"):
        weights.read_weights(tmp_path)


def test_missing_shard(tmp_path):
    write_shards(tmp_path)
    (tmp_path / SHARDS[1]).unlink()
    with pytest.raises(UserError, match=f"{SHARDS[1]} is missing"):
        weights.read_weights(tmp_path)


def test_key_missing_from_its_shard(tmp_path):
    write_shards(tmp_path)
    save_file({"a.weight": TENSORS["a.weight"]}, tmp_path / SHARDS[0])
    with pytest.raises(UserError, match=rf"{SHARDS[0]} lacks c.bias"):
        weights.read_weights(tmp_path)


def test_key_that_the_index_does_not_list(tmp_path):
    write_shards(tmp_path)
    save_file({**TENSORS, "d": TENSORS["ids"]}, tmp_path / SHARDS[0])
    with pytest.raises(UserError, match="which the index doesn't list"):
        weights.read_weights(tmp_path)


def test_index_that_points_elsewhere(tmp_path):
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"x": "../x.safetensors"}}))
    with pytest.raises(UserError, match=r"weight_map names '\.\./x\.safetensors', which is not a plain name"):
        weights.read_weights(tmp_path)
