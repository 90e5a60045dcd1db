"""Temporary folders of dead processes are removed, all others are kept."""

import os
import pathlib
import socket
import subprocess
import sys

import pytest

from lcm_jax.host import unfinished


def names(folder: pathlib.Path) -> list[str]:
    return sorted(os.listdir(folder))


@pytest.fixture(scope="module")
def dead_pid() -> int:
    """The id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-S", "-c", ""])
    process.wait()
    return process.pid


def left(target: pathlib.Path, pid: int, kind: str = "tmp", host: str | None = None) -> pathlib.Path:
    """Creates the leftovers of a process that was killed while it wrote `target`."""
    host = host or "".join(c if c.isalnum() else "_" for c in socket.gethostname())
    folder = target.with_name(f".{target.name}.{host}-{pid}.0123abcd.{kind}")
    (folder / "unet").mkdir(parents=True)
    (folder / "unet/file").write_text(kind)
    return folder


def test_dead_leftovers_are_removed_and_only_they(tmp_path, dead_pid):
    target = tmp_path / "x"
    target.mkdir()
    left(target, dead_pid)
    left(target, dead_pid, "old")
    others = [
        left(target, dead_pid, host="elsewhere"),
        left(tmp_path / "x.y", dead_pid),
        left(tmp_path / "y", dead_pid),
        target,
    ]
    with unfinished.folder(target) as at_work, unfinished.folder(target) as as_well:
        assert names(tmp_path) == sorted(path.name for path in [*others, at_work, as_well])
    assert names(tmp_path) == sorted(path.name for path in others)


def test_links_are_not_followed(tmp_path, dead_pid):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("")
    leftover = left(tmp_path / "x", dead_pid)
    (leftover / "link").symlink_to(tmp_path / "mine")
    leftover.with_name(leftover.name.replace("0123abcd", "01234567")).symlink_to(tmp_path / "mine")
    unfinished.clean(tmp_path / "x")
    assert not leftover.exists()
    assert names(tmp_path / "mine") == ["thesis.txt"]


@pytest.mark.parametrize("use", [unfinished.clean, unfinished.restore])
def test_old_target_is_put_back_where_there_is_none(tmp_path, dead_pid, use):
    target = tmp_path / "x"
    left(target, dead_pid, "old")
    use(target)
    assert (target / "unet/file").read_text() == "old"
    left(target, dead_pid, "old")
    (target / "unet/file").write_text("new")
    use(target)
    assert (target / "unet/file").read_text() == "new"


def test_where_there_are_no_locks_the_process_decides(tmp_path, dead_pid, monkeypatch):
    def no_locks(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", no_locks)
    dead, alive = left(tmp_path / "x", dead_pid), left(tmp_path / "x", os.getppid())
    with unfinished.folder(tmp_path / "x") as first, unfinished.folder(tmp_path / "x"):
        assert first.exists()
    assert alive.exists()
    assert not dead.exists()


def test_long_names(tmp_path):
    target = tmp_path / ("é" * 127)
    with unfinished.folder(target) as folder:
        (folder / "new").write_text("")
        (folder / "new").replace(target)
    assert names(tmp_path) == [target.name]
