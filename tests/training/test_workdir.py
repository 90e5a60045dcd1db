"""One run per workdir: lock owners, stale locks, and runs whose folder was deleted."""

import concurrent.futures
import contextlib
import json
import os
import re
import shutil
import subprocess
import threading
import time

import pytest
from commands import train_on_one

from lcm_jax.errors import Unavailable, UserError
from lcm_jax.monitor.progress import Progress
from lcm_jax.training import workdir
from lcm_jax.training.checkpoint import finalized_steps
from lcm_jax.training.workdir import LOCK, hold


@pytest.fixture
def hasty(monkeypatch):
    monkeypatch.setattr(workdir, "BEAT", 0.05)
    monkeypatch.setattr(workdir, "PATIENCE", 0.6)
    monkeypatch.setattr(workdir, "_LOOK", 0.05)


def leave_lock(folder, **changes):
    """The lock of a killed run."""
    content = json.dumps({**workdir._here(), "since": "then", "run": "0", **changes})
    (folder / LOCK).write_text(content)
    return content


# ---- the lock


def test_a_second_run_is_refused_by_name_and_the_first_leaves_nothing(tmp_path):
    folder = tmp_path / "run"
    with hold(folder) as held:
        with pytest.raises(UserError) as caught, hold(folder):
            pass
        held.check()
    words = f"--workdir={folder}: process {os.getpid()} on {os.uname().nodename} (since "
    assert str(caught.value).startswith(words)
    assert type(caught.value) is UserError
    assert list(folder.iterdir()) == []


def test_a_lock_is_stale_when_its_process_is_dead(tmp_path):
    with subprocess.Popen(["sleep", "60"]) as process:
        started = workdir._started(process.pid)
        leave_lock(tmp_path, process=process.pid, started=started)
        with pytest.raises(UserError, match=f"process {process.pid} on .* is training in it"), hold(tmp_path):
            pass
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, but its parent has not asked yet
        with hold(tmp_path) as held:
            held.check()
    leave_lock(tmp_path, started="1")  # its number belongs to another process now
    with hold(tmp_path) as held:
        held.check()


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize(
    ("lock", "owner"),
    [
        ({"host": "elsewhere"}, "process {pid} on elsewhere (since then)"),
        ({"machine": "after a new start"}, "process {pid} on {host} (since then)"),
        ('{"host": "cut sh', "an unknown run (its lock.json is damaged)"),
    ],
)
def test_an_owner_elsewhere_is_dead_without_a_sign_of_life(lock, owner, tmp_path, capsys):
    if isinstance(lock, str):
        (tmp_path / LOCK).write_text(lock)
    else:
        leave_lock(tmp_path, **lock)
    before = time.monotonic()
    with hold(tmp_path) as held:
        held.check()
    assert time.monotonic() - before > 0.5
    owner = owner.format(pid=os.getpid(), host=os.uname().nodename)
    assert capsys.readouterr().err == f"waiting up to 0.6 s for a heartbeat of {owner}\n"


@pytest.mark.usefixtures("hasty")
def test_an_owner_elsewhere_that_gives_signs_of_life_keeps_its_workdir(tmp_path, monkeypatch):
    with hold(tmp_path) as held:
        here = workdir._here()
        monkeypatch.setattr(workdir, "_here", lambda: {**here, "host": "another"})
        with pytest.raises(Unavailable, match=f"process {os.getpid()} on .* is training in it"), hold(tmp_path):
            pass
        held.check()


def test_of_many_runs_one_takes_a_stale_lock(tmp_path):
    leave_lock(tmp_path, started="1")
    begin, end = threading.Barrier(8), threading.Barrier(8)

    def run(_):
        begin.wait()
        with contextlib.ExitStack() as stack:
            try:
                held = stack.enter_context(hold(tmp_path))
            except UserError:
                held = None
            end.wait()
            if held:
                held.check()
            return held is not None

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(run, range(8))) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_replaced_a_stale_one_is_not_touched(tmp_path):
    stale = leave_lock(tmp_path, started="1").encode()
    with hold(tmp_path):
        before = os.stat(tmp_path / LOCK)
        workdir._FileLock(tmp_path / LOCK).remove(stale, None)  # by a run that read it before it was replaced
        assert os.stat(tmp_path / LOCK).st_ctime_ns == before.st_ctime_ns  # moved away and back, it would have another


def test_a_lock_on_a_full_disk_is_not_left_empty(tmp_path, monkeypatch):
    def full(number, mode):
        os.close(number)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fdopen", full)
    message = f"--workdir={tmp_path}: {tmp_path}/{LOCK} can't be written: No space left"
    with pytest.raises(UserError, match=re.escape(message)), hold(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_lock_is_on_the_disk_before_anything_else(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(os.fstat(number).st_size))
    with hold(tmp_path):
        assert synced == [(tmp_path / LOCK).stat().st_size] != [0]


def test_a_copy_of_a_held_workdir_is_free_and_a_moved_one_is_not(tmp_path):
    first, copy, moved_away = tmp_path / "run", tmp_path / "copy", tmp_path / "moved"
    with hold(first) as held:
        shutil.copytree(first, copy)
        with hold(copy) as another:
            another.check()
            with pytest.raises(UserError, match="is training in it"), hold(copy):
                pass
        held.check()
        (tmp_path / "link").symlink_to(first)
        first.rename(moved_away)
        for name in ("moved", "link"):
            if name == "link":
                moved_away.rename(first)
            with pytest.raises(UserError, match="is training in it"), hold(tmp_path / name):
                pass


def test_other_processes_wait_in_the_store_for_the_first_ones_lock(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(workdir.agreement, "agree", lambda facts, problem: asked.append(problem))
    with hold(tmp_path / "run"):
        assert asked == [""]
        with contextlib.suppress(UserError), hold(tmp_path / "run"):
            pass
        assert "is training in it" in str(asked[1])
        monkeypatch.setattr(workdir, "is_first", lambda: False)
        with hold(tmp_path / "other"):
            assert asked[2:] == [""]
    assert not (tmp_path / "other").exists()


# ---- a folder that is no longer this run's


def deleted(folder):
    shutil.rmtree(folder)


def made_again(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def moved(folder):
    folder.rename(folder.with_name("moved"))


def unlocked(folder):
    (folder / LOCK).unlink()


def taken(folder):
    leave_lock(folder, process=4711)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (deleted, "lock.json is missing; it was removed, or the folder was deleted, moved or replaced during the run"),
        (made_again, "lock.json is missing"),
        (moved, "lock.json is missing"),
        (unlocked, "lock.json is missing; it was removed, or"),
        (taken, r"process 4711 on \S+ \(since then\) has taken it"),
    ],
)
def test_a_run_notices_that_its_folder_is_gone(harm, said, tmp_path):
    folder = tmp_path / "run"
    with hold(folder) as held:
        held.check()
        harm(folder)
        with pytest.raises(UserError, match=f"{folder} is no longer this run's folder: {said}"):
            held.check()
        left = sorted(tmp_path.rglob("*"))
    assert sorted(tmp_path.rglob("*")) == left  # the end of the hold touches nothing of others


def without_checkpoints(folder):
    while finalized_steps(folder / "checkpoints")[:1] != [4]:
        time.sleep(0.01)
    shutil.rmtree(folder / "checkpoints")


@pytest.mark.parametrize(
    ("harm", "step", "said"),
    [
        (moved, 3, "{run} is no longer this run's folder: lock.json is missing"),
        (without_checkpoints, 5, "the checkpoint of step 4 was deleted from {run}/checkpoints"),
    ],
)
def test_training_ends_at_its_next_write(harm, step, said, quick, tmp_path, monkeypatch, capsys):
    run, update = tmp_path / "run", Progress.update

    def harmed(self, done, loss):
        if done == step:
            harm(run)
        return update(self, done, loss)

    monkeypatch.setattr(Progress, "update", harmed)
    assert train_on_one([*quick, f"--workdir={run}"]) == 2
    out, err = capsys.readouterr()
    assert said.format(run=run) in err.splitlines()[-1]
    assert "Done" not in out
    assert not (run / LOCK).exists()


def test_a_run_s_description_is_put_back_and_missed(quick, tmp_path, monkeypatch, capsys):
    run, update, names = tmp_path / "run", Progress.update, ("config.json", "inputs.json")
    content = {}

    def harmed(self, done, loss):
        if done in (3, 6):  # before a save in mid-run, and after the last
            for name in names:
                content.setdefault(name, (run / name).read_bytes())
                (run / name).unlink()
        return update(self, done, loss)

    monkeypatch.setattr(Progress, "update", harmed)
    assert train_on_one([*quick, f"--workdir={run}"]) == 0
    out, err = capsys.readouterr()
    assert "Done" in out
    assert {name: (run / name).read_bytes() for name in names} == content
    for name in names:
        assert err.count(f"lcm-jax train: warning: {run / name} was deleted during the run; writing it again\n") == 2
    (run / "config.json").unlink()
    assert train_on_one([*quick, f"--workdir={run}"]) == 2
    assert f"error: --workdir={run} has checkpoints, but no config.json" in capsys.readouterr().err


def test_a_second_training_is_one_line(quick, tmp_path, capsys):
    with hold(tmp_path):
        assert train_on_one([*quick, f"--workdir={tmp_path}"]) == 2
        err = capsys.readouterr().err
        assert f"error: --workdir={tmp_path}: process {os.getpid()} on " in err
        assert [path.name for path in tmp_path.iterdir()] == [LOCK]
