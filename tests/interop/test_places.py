"""Names and links of a model folder: those that lead out of it are rejected by name."""

import json
import os

import pytest

from lcm_jax.errors import UserError
from lcm_jax.interop import places


@pytest.fixture
def model(tmp_path):
    """A folder with one part of one file."""
    (tmp_path / "model/unet").mkdir(parents=True)
    (tmp_path / "model/unet/config.json").write_text('{"_class_name": "X"}')
    return tmp_path / "model"


def checked(model, name="unet"):
    return [places.part_file(model, name, file).name for file in places.file_names(model, name)]


@pytest.mark.parametrize("name", ["unet", "text_encoder_2", "model-00001-of-00002.safetensors", "日本", "a b"])
def test_plain_names(name):
    assert places.plain_name(name, "x names") == name


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../evil", "/etc", "a/b", "a\\b", "C:x", ".git", "a\x00b", "a\x1b[2Jb", "a\nb", " a", "é" * 128]
    + [None, 3, ["a"], "a\ud800"],
    ids=repr,
)
def test_other_names_are_refused(name):
    with pytest.raises(UserError, match=r"^index\.json names .*not a plain name"):
        places.plain_name(name, "index.json names")


def test_files_of_a_part(model):
    (model / "unet/sub/deep").mkdir(parents=True)
    (model / "unet/sub/deep/a.txt").write_text("")
    (model / "unet/.DS_Store").write_text("")
    (model / "unet/.git").mkdir()
    (model / "unet/.git/x").write_text("")
    (model / "unet/again.json").symlink_to("config.json")
    (model / "unet/gone.bin").symlink_to("gone")
    (model / "unet/checkpoints").symlink_to("/etc")
    assert places.file_names(model, "unet") == ["again.json", "config.json", "gone.bin"]
    assert places.part_file(model, "unet", "again.json") == model / "unet/again.json"
    assert places.file_names(model, "vae") == []


@pytest.mark.parametrize("relative", [True, False])
def test_link_to_a_file_elsewhere(model, tmp_path, relative):
    (tmp_path / "secret").write_text("")
    target = tmp_path / "secret"
    (model / "unet/notes.txt").symlink_to(os.path.relpath(target, model / "unet") if relative else target)
    with pytest.raises(UserError, match=r"unet/notes\.txt is a link to .*/secret, outside of .*model: "):
        checked(model)


def test_link_to_another_part(model):
    """Links must stay in the model folder or, for a part that is a link to another folder, in that folder."""
    (model / "vae").mkdir()
    (model / "vae/config.json").symlink_to("../unet/config.json")
    assert checked(model, "vae") == ["config.json"]
    other = model.parent / "other"
    other.mkdir()
    (other / "vae").symlink_to(model / "vae")
    with pytest.raises(UserError, match=r"vae/config\.json is a link to .*unet/config\.json, outside of .*other/vae"):
        checked(other, "vae")


def test_links_of_a_hub_cache(model, tmp_path):
    snapshot = tmp_path / "models--me--tiny/snapshots/0123"
    blobs = tmp_path / "models--me--tiny/blobs"
    blobs.mkdir(parents=True)
    snapshot.parent.mkdir()
    model.rename(snapshot)
    (snapshot / "unet/config.json").rename(blobs / "abc")
    (snapshot / "unet/config.json").symlink_to("../../../blobs/abc")
    assert checked(snapshot) == ["config.json"]
    # a part of another model that is a link to the snapshot's
    (tmp_path / "other").mkdir()
    (tmp_path / "other/unet").symlink_to(snapshot / "unet")
    assert checked(tmp_path / "other") == ["config.json"]
    (blobs / "abc").unlink()
    with pytest.raises(UserError, match=r"unet/config\.json is a broken link: .*blobs/abc is missing"):
        checked(snapshot)


def test_a_moved_hub_cache_opens_no_other_folder(model, tmp_path):
    """`blobs` of an untrusted model may link to anything; files that are not named like blobs are rejected."""
    snapshot = tmp_path / "models--me--tiny/snapshots/0123"
    snapshot.parent.mkdir(parents=True)
    model.rename(snapshot)
    (tmp_path / ".ssh").mkdir()
    (tmp_path / "models--me--tiny/blobs").symlink_to(tmp_path / ".ssh")
    for name, accepted in (("id_rsa", False), ("a" * 40, True), ("b" * 64, True)):
        (tmp_path / ".ssh" / name).write_text("")
        (snapshot / "unet" / name).symlink_to(f"../../../blobs/{name}")
        if accepted:
            places.part_file(snapshot, "unet", name)
        else:
            with pytest.raises(UserError, match="id_rsa is a link to"):
                places.part_file(snapshot, "unet", name)


def test_part_that_is_a_link_to_a_part(model, tmp_path):
    (model / "unet").rename(tmp_path / "shared")
    (model / "unet").symlink_to(tmp_path / "shared")
    assert checked(model) == ["config.json"]
    (tmp_path / "secret").write_text("")
    (tmp_path / "shared/x.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match=r"unet/x\.txt is a link"):
        checked(model)


@pytest.mark.parametrize("content", [{}, {"config.json": {"auths": {}}}, {"id_rsa": {}}], ids=str)
def test_part_that_is_a_link_to_something_else(model, tmp_path, content):
    (tmp_path / ".ssh").mkdir()
    for name, value in content.items():
        (tmp_path / ".ssh" / name).write_text(json.dumps(value))
    (model / "extra").symlink_to(tmp_path / ".ssh")
    with pytest.raises(UserError, match=r"extra is a link to .*ssh, which is not a part of a model"):
        places.file_names(model, "extra")


def test_broken_part(model, tmp_path):
    (model / "extra").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="extra is a broken link: .*nowhere is missing"):
        places.file_names(model, "extra")
    (model / "file").write_text("")
    with pytest.raises(UserError, match="file is not a folder"):
        places.file_names(model, "file")


def test_named_pipe(model):
    os.mkfifo(model / "unet/pipe.json")
    with pytest.raises(UserError, match=r"pipe\.json is not a regular file"):
        checked(model)
