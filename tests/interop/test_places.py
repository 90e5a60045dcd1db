"""Names and links of a model folder: what leaves the folder is refused by name."""

import json
import os
import pathlib

import pytest

from lcm_jax.errors import UserError
from lcm_jax.interop import places


@pytest.fixture
def model(tmp_path):
    """A folder with one part of one file."""
    (tmp_path / "model/unet").mkdir(parents=True)
    (tmp_path / "model/unet/config.json").write_text('{"_class_name": "X"}')
    return tmp_path / "model"


def listed(model, **options):
    return [str(path) for path in places.part_files(model, "unet", **options)]


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
    with pytest.raises(UserError, match=r"^index\.json names .*no plain name"):
        places.plain_name(name, "index.json names")


def test_files_of_a_part(model):
    (model / "unet/sub/deep").mkdir(parents=True)
    (model / "unet/sub/deep/a.txt").write_text("")
    (model / "unet/.DS_Store").write_text("")
    (model / "unet/.git").mkdir()
    (model / "unet/.git/x").write_text("")
    (model / "unet/again.json").symlink_to("config.json")
    assert listed(model) == ["unet/again.json", "unet/config.json", "unet/sub/deep/a.txt"]
    assert places.part_files(model, "vae") == []


@pytest.mark.parametrize("relative", [True, False])
def test_link_to_a_file_elsewhere(model, tmp_path, relative):
    (tmp_path / "secret").write_text("")
    target = tmp_path / "secret"
    (model / "unet/notes.txt").symlink_to(os.path.relpath(target, model / "unet") if relative else target)
    with pytest.raises(UserError, match=r"unet/notes\.txt is a link to .*/secret, outside of .*unet"):
        listed(model)


def test_link_to_another_part(model):
    """It could be that of a part that is not copied."""
    (model / "vae").mkdir()
    (model / "vae/config.json").symlink_to("../unet/config.json")
    with pytest.raises(UserError, match=r"vae/config\.json is a link"):
        places.part_files(model, "vae")


def test_links_of_a_hub_cache(model, tmp_path):
    snapshot = tmp_path / "models--me--tiny/snapshots/0123"
    blobs = tmp_path / "models--me--tiny/blobs"
    blobs.mkdir(parents=True)
    snapshot.parent.mkdir()
    model.rename(snapshot)
    (snapshot / "unet/config.json").rename(blobs / "abc")
    (snapshot / "unet/config.json").symlink_to("../../../blobs/abc")
    assert listed(snapshot) == ["unet/config.json"]
    # a part of another model that is a link to the snapshot's
    (tmp_path / "other").mkdir()
    (tmp_path / "other/unet").symlink_to(snapshot / "unet")
    assert listed(tmp_path / "other") == ["unet/config.json"]
    (blobs / "abc").unlink()
    assert listed(snapshot, broken=True) == ["unet/config.json"]
    with pytest.raises(UserError, match=r"unet/config\.json is a broken link: .*blobs/abc is missing"):
        listed(snapshot)


def test_part_that_is_a_link_to_a_part(model, tmp_path):
    (model / "unet").rename(tmp_path / "shared")
    (model / "unet").symlink_to(tmp_path / "shared")
    assert listed(model) == ["unet/config.json"]
    (tmp_path / "shared/x.txt").symlink_to(tmp_path / "model")
    with pytest.raises(UserError, match=r"unet/x\.txt is a link|unet/x\.txt is no regular"):
        listed(model)


@pytest.mark.parametrize("content", [{}, {"config.json": {"auths": {}}}, {"id_rsa": {}}], ids=str)
def test_part_that_is_a_link_to_something_else(model, tmp_path, content):
    (tmp_path / ".ssh").mkdir()
    for name, value in content.items():
        (tmp_path / ".ssh" / name).write_text(json.dumps(value))
    (model / "extra").symlink_to(tmp_path / ".ssh")
    with pytest.raises(UserError, match=r"extra is a link to .*ssh, which is no part of a model"):
        places.part_files(model, "extra")


def test_broken_part(model, tmp_path):
    (model / "extra").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="extra is a broken link: .*nowhere is missing"):
        places.part_files(model, "extra")
    (model / "file").write_text("")
    with pytest.raises(UserError, match="file is no folder"):
        places.part_files(model, "file")


def test_folder_link_inside_a_part(model):
    (model / "unet/loop").symlink_to(pathlib.Path(".."))
    with pytest.raises(UserError, match="unet/loop is a link to a folder"):
        listed(model)


def test_named_pipe(model):
    os.mkfifo(model / "unet/pipe.json")
    with pytest.raises(UserError, match=r"pipe\.json is no regular file"):
        listed(model)
