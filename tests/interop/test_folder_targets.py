"""Where a model folder is written to: permissions, folders that are there, a failure, links of a hub cache."""

import os
import shutil

import pytest
from folder_files import assert_same_folder, files

from lcm_jax.errors import UserError
from lcm_jax.interop import weights
from lcm_jax.interop.folder import read_folder
from lcm_jax.interop.folder_writing import write_folder


def test_written_with_parents_and_usual_permissions(copy, tmp_path):
    out = write_folder(read_folder(copy), tmp_path / "a/b/c")
    assert out.stat().st_mode & 0o777 == 0o777 & ~_umask()
    assert [p.name for p in out.parent.iterdir()] == ["c"]


def test_model_folder_is_replaced_as_a_whole(copy, tmp_path):
    out = tmp_path / "out"
    write_folder(read_folder(copy), out)
    (out / "unet/old.txt").write_text("from before")
    write_folder(read_folder(copy), out)
    assert_same_folder(out, copy)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out"]


def test_empty_folder_is_used(copy, tmp_path):
    (tmp_path / "out").mkdir()
    write_folder(read_folder(copy), tmp_path / "out")
    assert_same_folder(tmp_path / "out", copy)


def test_other_folder_is_not_overwritten(copy, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="nor a model folder"):
        write_folder(read_folder(copy), tmp_path / "out")
    assert (tmp_path / "out/thesis.txt").read_text() == "mine"


def test_own_source_is_not_overwritten(copy):
    with pytest.raises(UserError, match="the model was read from"):
        write_folder(read_folder(copy), copy / "../model")


def test_file_is_not_overwritten(copy, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(UserError, match="is a file"):
        write_folder(read_folder(copy), tmp_path / "out")
    with pytest.raises(UserError, match="can't be written"):
        write_folder(read_folder(copy), tmp_path / "out/inside")


def test_nothing_is_left_behind_when_writing_fails(copy, tmp_path, monkeypatch):
    out = tmp_path / "out"
    write_folder(read_folder(copy), out)
    before = {name: path.read_bytes() for name, path in files(out).items()}
    folder = read_folder(copy)

    def no_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights, "write_weights", no_space)
    with pytest.raises(UserError, match="out can't be written: No space left on device"):
        write_folder(folder, out)
    assert {name: path.read_bytes() for name, path in files(out).items()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out"]


def test_hidden_folders_are_left_behind(copy, tmp_path):
    (copy / ".cache/huggingface").mkdir(parents=True)
    (copy / ".cache/huggingface/x.lock").write_text("")
    write_folder(read_folder(copy), tmp_path / "out")
    assert not (tmp_path / "out/.cache").exists()


@pytest.mark.parametrize("moved", ["", "blobs", "."])
def test_links_of_a_hub_cache_are_followed(copy, tmp_path, moved):
    """Also if the cache, or only its blobs, was moved to another disk."""
    cache = tmp_path / "hub/models--someone--model"
    (cache / "blobs").mkdir(parents=True)
    (cache / "snapshots").mkdir()
    snapshot = cache / "snapshots/0123"
    shutil.copytree(copy, snapshot)
    for i, path in enumerate(files(snapshot).values()):
        blob = cache / "blobs" / f"{i:040x}"
        path.rename(blob)
        path.symlink_to(os.path.relpath(blob, path.parent))
    if moved:
        (cache / moved).rename(tmp_path / "other_disk")
        (cache / moved).symlink_to(tmp_path / "other_disk")
    write_folder(read_folder(snapshot), tmp_path / "out")
    assert not any(path.is_symlink() for path in files(tmp_path / "out").values())
    assert_same_folder(tmp_path / "out", copy)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
