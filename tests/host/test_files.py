"""Files are written completely or not at all."""

import json
import os

import pytest

from lcm_jax.errors import UserError
from lcm_jax.host.files import write, write_json


def test_files_are_whole_or_not_there(tmp_path, monkeypatch):
    path = tmp_path / "new" / "x.json"
    write_json(path, {"a": [1, "é"]})
    assert json.loads(path.read_text()) == {"a": [1, "é"]}
    monkeypatch.setattr(type(path), "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match=f"^{path} can't be written: No space left on device$"):
        write(path, "something else")
    assert json.loads(path.read_text()) == {"a": [1, "é"]}
    assert os.listdir(path.parent) == ["x.json"]


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for name, message in (
        ("file/x", f"{tmp_path}/file is a file"),
        ("folder", "Is a directory"),
        ("file/a/x", "Not a directory"),
    ):
        with pytest.raises(UserError, match=f"^{tmp_path}/{name} can't be written: {message}$"):
            write(tmp_path / name, "")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]
