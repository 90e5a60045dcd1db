"""Written folders: content, permissions, and that a folder that can't be written or loaded leaves nothing behind."""

import dataclasses
import json
import os
import pathlib
import resource
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lcm_jax.errors import UserError
from lcm_jax.interop import contents, weights
from lcm_jax.interop.folder import read_folder
from lcm_jax.interop.folder_writing import write_folder
from lcm_jax.interop.trained_folder import write_trained_folder

UNET_FILE = "unet/diffusion_pytorch_model.safetensors"


def files(folder: pathlib.Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}


def add(folder: pathlib.Path, **parts: str) -> None:
    """Adds parts of these classes to model_index.json, each with a configuration."""
    path = folder / "model_index.json"
    named = {name: ["transformers", part_class] for name, part_class in parts.items()}
    path.write_text(json.dumps({**json.loads(path.read_text()), **named}))
    for name in parts:
        (folder / name).mkdir()
        (folder / name / "config.json").write_text('{"model_type": "clip"}')


# ---- names and links


@pytest.mark.parametrize("name", ["../evil", "/{}/evil", "a/b", ".."])
def test_parts_are_not_written_elsewhere(copy, tmp_path, name):
    name = name.format(tmp_path)
    folder = read_folder(copy)
    evil = dataclasses.replace(folder.components["vae"], name=name)
    folder.model_index[name] = ["diffusers", "AutoencoderKL"]
    folder.components[name] = evil
    with pytest.raises(UserError, match=r"model_index\.json names .* not a plain name"):
        write_folder(folder, tmp_path / "new/out")
    assert sorted(os.listdir(tmp_path)) == ["model", "new"]
    assert not os.listdir(tmp_path / "new")


def test_weights_are_not_written_elsewhere(copy, tmp_path):
    folder = read_folder(copy)
    unet = folder.components["unet"]
    assert unet.source is not None
    arrangement = weights.one_file("../evil.safetensors", list(unet.source.keys.values()))
    folder.components["unet"] = dataclasses.replace(
        unet, source=dataclasses.replace(unet.source, arrangement=arrangement)
    )
    fails(folder, tmp_path, r"the weights for unet name '\.\./evil\.safetensors', which is not a plain name")


def test_parts_may_be_links_to_folders(copy, tmp_path):
    expected = files(copy)
    for name in ("tokenizer", "unet", "scheduler"):
        (copy / name).rename(tmp_path / name)
        (copy / name).symlink_to(tmp_path / name)
    write_folder(read_folder(copy), tmp_path / "out")
    assert files(tmp_path / "out") == expected
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))


@pytest.mark.parametrize("name", ["README.md", "tokenizer/tokenizer.json"])
def test_links_that_leave_the_folder_are_not_copied(copy, tmp_path, name):
    folder = read_folder(copy)
    (copy / name).unlink()
    (tmp_path / "secret").write_text("")
    (copy / name).symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match=f"{name} is a link to .*secret, outside of"):
        write_folder(folder, tmp_path / "out")


def test_links_to_nothing(copy, tmp_path):
    """A setting is needed; a document is not."""
    folder = read_folder(copy)
    (copy / "README.md").unlink(missing_ok=True)
    (copy / "README.md").symlink_to("gone")
    with pytest.warns(UserWarning, match=r"links to missing files, which are not copied: README\.md$") as seen:
        out = write_folder(folder, tmp_path / "out")
    assert len(seen) == 1
    assert not (out / "README.md").exists()
    (copy / "tokenizer/LICENSE.txt").symlink_to("gone")
    with pytest.warns(UserWarning, match=r"not copied: README\.md, tokenizer/LICENSE\.txt$"):
        write_folder(read_folder(copy), tmp_path / "out")
    (copy / "tokenizer/merges.txt").symlink_to("gone")
    with pytest.raises(UserError, match=r"model/tokenizer/merges\.txt is a broken link"):
        write_folder(folder, tmp_path / "out")
    (copy / "tokenizer/merges.txt").unlink()
    (copy / "tokenizer/tokenizer.json").unlink()
    (copy / "tokenizer/tokenizer.json").symlink_to("gone")
    with pytest.raises(UserError, match=r"model/tokenizer/tokenizer\.json is a broken link"):
        write_folder(folder, tmp_path / "out")


# ---- what belongs to a folder


def test_only_what_the_index_names_and_documents(copy, tmp_path):
    add(copy, safety_checker="StableDiffusionSafetyChecker", image_encoder="CLIPVisionModelWithProjection")
    save_file({"x": np.zeros(3, np.float32)}, copy / "safety_checker/model.safetensors")
    for name in ("NOTICE", "LICENSE.md", "license", "docs.md", "use.txt", "unet/LICENSE", "vae/notes.txt"):
        (copy / name).write_text("text")
    for name in ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"):  # there is no safetensors
        (copy / "image_encoder" / name).write_text("x")
    (copy / "image_encoder/pytorch_model.bin.index.json").write_text('{"weight_map": {}}')
    expected = files(copy)
    for name in (
        "v1-5.safetensors", "v1-5.ckpt", "v1-inference.yaml", ".gitattributes", ".git/config", "logs/x.md",
        "checkpoint-500/unet/config.json", "sample.png", "train.py", "vae_old/config.json", "__pycache__/x.pyc",
        "unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.bin", "unet/model.onnx",
        "unet/diffusion_flax_model.msgpack", "unet/optimizer.pt", "unet/trainer_state.json", "unet/cache/notes.txt",
        "unet/diffusion_pytorch_model.safetensors.index.fp16.json", "tokenizer/tokenizer.h5", "tokenizer/.x/a.json",
        "safety_checker/pytorch_model.bin", "safety_checker/model.fp16.safetensors", "safety_checker/tf_model.h5",
        "safety_checker/pytorch_model.bin.index.json", "image_encoder/pytorch_model.fp16.bin",
    ):  # fmt: skip
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_text("stray")
    write_folder(read_folder(copy), tmp_path / "out")
    assert files(tmp_path / "out") == expected


def test_of_several_variants_the_one_of_full_precision_is_copied():
    names = [f"model.{variant}.safetensors" for variant in ("bf16", "fp16", "fp32", "ema")]
    assert contents.of_copied_part(names) == ["model.fp32.safetensors"]
    assert contents.of_copied_part(names[:2]) == ["model.fp16.safetensors"]


def test_a_tokenizer_that_does_not_load_is_not_exported(copy, tmp_path):
    folder = read_folder(copy)
    (copy / "tokenizer/tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"model/tokenizer can't be read as a CLIP tokenizer"):
        write_folder(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_recipe_is_kept_while_the_unet_is(copy, tmp_path):
    (copy / "lcm_jax.json").write_text("{}")
    folder = read_folder(copy)
    for trained, kept in (("vae", True), ("unet", False)):
        out = write_trained_folder(folder, {trained: folder.components[trained].params}, tmp_path / trained)
        assert (out / "lcm_jax.json").exists() == kept
    assert (write_folder(folder, tmp_path / "same") / "lcm_jax.json").exists()


# ---- what is replaced


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("mine.txt", "mine.txt"),
        ("lora.safetensors", "lora.safetensors"),
        ("run/checkpoints/1/state", "run"),
        (".git/config", ".git"),
        ("unet/mine.png", "unet/mine.png"),
        ("unet/old/config.json", "unet/old"),
        ("vae/pytorch_lora_weights.safetensors", "vae/pytorch_lora_weights.safetensors"),
    ],
)
def test_what_no_export_writes_is_not_lost(copy, tmp_path, name, named):
    out = write_folder(read_folder(copy), tmp_path / "out")
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    (out / name).write_text("mine")
    before = files(out)
    with pytest.raises(UserError, match=f"^{out} holds {named}, which is not from an export and .* another --out$"):
        write_folder(read_folder(copy), out)
    assert files(out) == before


def test_models_are_replaced_with_all_that_came_from_the_source(copy, tmp_path):
    add(copy, safety_checker="StableDiffusionSafetyChecker")
    save_file({"x": np.zeros(3, np.float32)}, copy / "safety_checker/model.safetensors")
    for name in ("use.txt", "LICENSE.md", "lcm_jax.json", "unet/notes.md"):
        (copy / name).write_text("{}")
    folder = read_folder(copy)
    out = write_folder(folder, tmp_path / "out")
    (out / ".gitattributes").write_text("")
    (out / "README.md").write_text("")
    (out / "unet/diffusion_pytorch_model.fp16.safetensors").write_text("")
    assert files(write_folder(folder, out)) == files(copy)


def test_the_source_is_not_in_what_is_replaced(copy, tmp_path):
    out = write_folder(read_folder(copy), tmp_path / "out")
    inner = write_folder(read_folder(copy), out / "merged")
    with pytest.raises(UserError, match=f"^the model is read from {inner}, inside {out}, which would be replaced"):
        write_folder(read_folder(inner), out)
    shutil.rmtree(inner)
    shutil.rmtree(copy / "vae")
    (copy / "vae").symlink_to(out / "vae")  # the copy would lose its VAE
    with pytest.raises(UserError, match=f"^the model is read from {copy}/vae, inside {out}, which"):
        write_folder(read_folder(copy), out)


# ---- who may read it


def test_what_is_private_stays_private(copy, tmp_path):
    for path in copy.rglob("*.safetensors"):  # diffusers and transformers make them private
        path.chmod(0o644)
    (copy / "vae/diffusion_pytorch_model.safetensors").chmod(0o640)
    (copy / UNET_FILE).rename(copy / UNET_FILE.replace(".safetensors", ".fp16.safetensors"))
    for name in ("README.md", "tokenizer/tokenizer.json", UNET_FILE.replace(".safetensors", ".fp16.safetensors")):
        (copy / name).chmod(0o600)
    (copy / "text_encoder").chmod(0o750)
    folder = read_folder(copy)
    before = os.umask(0o022)
    try:
        out = write_trained_folder(folder, {"unet": folder.components["unet"].params}, tmp_path / "out")
    finally:
        os.umask(before)
    modes = {path.relative_to(out).as_posix(): path.stat().st_mode & 0o777 for path in out.rglob("*")}
    assert {name: mode for name, mode in modes.items() if mode not in (0o644, 0o755)} == {
        "vae/diffusion_pytorch_model.safetensors": 0o640,
        "README.md": 0o600,
        "tokenizer/tokenizer.json": 0o600,
        UNET_FILE: 0o600,
        "text_encoder": 0o750,
    }
    copy.chmod(0o700)
    assert write_folder(folder, tmp_path / "out").stat().st_mode & 0o777 == 0o700


# ---- what can't be written or loaded


@pytest.mark.parametrize("size", [0, 20_000], ids=["first file", "weights"])
def test_disk_that_takes_no_more(copy, tmp_path, size):
    """The system itself refuses to write: no file may be larger than `size`."""
    out = write_folder(read_folder(copy), tmp_path / "out")
    folder, before = read_folder(copy), {name: (out / name).read_bytes() for name in files(out)}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        with pytest.raises(UserError, match=f"^{out} can't be written: File too large$"):
            write_folder(folder, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {name: (out / name).read_bytes() for name in files(out)} == before
    assert sorted(os.listdir(tmp_path)) == ["model", "out"]


def fails(folder, tmp_path, message: str) -> None:
    with pytest.raises(UserError, match=message):
        write_folder(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_parts_that_are_not_there(copy, tmp_path):
    add(copy, safety_checker="StableDiffusionSafetyChecker", feature_extractor="CLIPImageProcessor")
    with pytest.warns(UserWarning, match="can be loaded but not exported: .*model/safety_checker holds no weights"):
        folder = read_folder(copy)
    fails(folder, tmp_path, "model/safety_checker holds no weights, but model_index.json names safety_checker")
    (copy / "safety_checker/model.safetensors").write_bytes(b"cut")
    fails(folder, tmp_path, "model/safety_checker/model.safetensors can't be read")
    (copy / "safety_checker/model.safetensors").unlink()
    (copy / "safety_checker/model.safetensors.index.json").write_text('{"weight_map": {"x": "a.safetensors"}}')
    fails(folder, tmp_path, "model/safety_checker/model.safetensors.index.json names missing files: a.safetensors")
    shutil.rmtree(copy / "safety_checker")
    fails(folder, tmp_path, "model/safety_checker holds no config.json")
    folder.model_index["safety_checker"] = [None, None]
    (copy / "feature_extractor/config.json").write_text("{")
    fails(folder, tmp_path, "model/feature_extractor/config.json can't be read as JSON")
    folder.model_index["feature_extractor"] = [None, None]
    shutil.rmtree(copy / "tokenizer")
    fails(folder, tmp_path, r"model/tokenizer holds no tokenizer.json, nor vocab.json and merges.txt, but")
    shutil.rmtree(copy)
    fails(folder, tmp_path, r"model is missing")


def test_networks_that_would_not_load(copy, tmp_path, monkeypatch):
    folder = read_folder(copy)
    write = weights.write_weights

    def lossy(directory, tensors, arrangement, *others):
        write(directory, tensors, arrangement)
        if directory.name == "unet":
            path = next(directory.glob("*.safetensors"))
            save_file({key: array for key, array in load_file(path).items() if key != "conv_in.bias"}, path)

    monkeypatch.setattr(weights, "write_weights", lossy)
    fails(folder, tmp_path, r"^the written folder can't be loaded: unet: .* 1 missing \(conv_in.bias\)$")
    monkeypatch.undo()
    folder.components["vae"].config["latent_channels"] = 5
    fails(folder, tmp_path, r"^the written folder can't be loaded: vae: .* of the wrong shape")


# ---- power and processes that end


def test_all_is_on_the_disk_before_it_gets_its_name(copy, tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    rename, synced_before = pathlib.Path.rename, []
    monkeypatch.setattr(pathlib.Path, "rename", lambda *paths: synced_before.extend(synced) or rename(*paths))
    out = write_folder(read_folder(copy), tmp_path / "out")
    inodes = {path: path.stat().st_ino for path in [out, *out.rglob("*")]}
    assert not [path for path, inode in inodes.items() if inode not in synced_before]
    assert tmp_path.stat().st_ino in synced
