"""A run whose workdir is in a bucket: killed, restarted, exported, on an emulator of Google Cloud Storage."""

import json
import os
import time

import pytest
from bucket_server import serve
from commands import train_on_one
from compiling import QUICK_FLAGS
from etils import epath
from event_files import visible
from forks import Fork, command

from lcm_jax import cli, export
from lcm_jax.errors import Unavailable, UserError
from lcm_jax.monitor import tensorboard
from lcm_jax.training import checkpoint, workdir

pytestmark = [
    pytest.mark.filterwarnings("ignore:Sending a large body directly"),  # gcsfs, of objects beyond a megabyte
]


@pytest.fixture(scope="module")
def bucket():
    with pytest.MonkeyPatch.context() as patch, serve("bucket", patch):
        yield epath.Path("gs://bucket")


@pytest.fixture(scope="module")
def quick(quick):
    return [*quick, "--config.log.samples_every=6", "--config.log.every=1"]


def start(options, workdir):
    return Fork(command, "train", [*options, f"--workdir={workdir}"], flags=QUICK_FLAGS)


def steps(workdir):
    """Read by the objects that are there, past the cache of gcsfs."""
    workdir._backend.fs(workdir).invalidate_cache()
    return checkpoint.finalized_steps(workdir / "checkpoints")


def state(workdir, step):
    """The checksum of each array of a checkpoint, and the data position."""
    return json.loads((workdir / "checkpoints" / str(step) / "meta" / "metadata").read_text())


def test_killed_in_a_bucket_as_if_never_stopped_in_a_folder(bucket, quick, tmp_path):
    there, here = bucket / "runs" / "killed", tmp_path / "run"
    quick = [*quick, "--config.checkpoint.every=6"]
    longer = [option.replace("steps=6", "steps=400") for option in quick]
    process = start(longer, there)
    deadline = time.monotonic() + 240
    while not steps(there):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.kill()
    process.communicate()
    last = steps(there)[0]
    last += -last % 6 + 6
    options = [option.replace("steps=6", f"steps={last}") for option in quick]
    said = [start(options, workdir).communicate() for workdir in (there, here)]
    assert said[0].endswith(f"--workdir={there} --out=runs/killed/model\n"), said[0]
    assert steps(there) == checkpoint.finalized_steps(here / "checkpoints") == [last, last - 6]
    assert state(there, last) == state(here, last)
    images = sorted(path.name for path in (here / "samples").iterdir())
    assert images[-1] == f"step_{last:06d}.png"
    assert (there / "samples" / images[-1]).read_bytes() == (here / "samples" / images[-1]).read_bytes()
    assert cli.run(export.main, [f"--workdir={there}", f"--out={tmp_path / 'a'}"]) == 0
    assert cli.run(export.main, [f"--workdir={here}", f"--out={tmp_path / 'b'}"]) == 0
    assert _files(tmp_path / "a" / "vae") == _files(tmp_path / "b" / "vae")


def _files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_is_damaged_or_cut_short_is_passed_over(bucket, quick, capsys):
    run = bucket / "runs" / "damaged"
    four = [*quick, f"--workdir={run}", "--config.steps=4"]
    assert train_on_one(four) == 0
    before = state(run, 4)
    meta = run / "checkpoints" / "4" / "meta" / "metadata"
    meta.write_text(meta.read_text().replace('"crc": ', '"crc": 1'))
    assert train_on_one(four) == 0
    said = "step 4 is damaged (its metadata does not match its checksum); resuming from step 2; the damaged one is kept"
    said = f"{said} as {run}"
    assert said in capsys.readouterr().err
    assert state(run, 4) == before
    assert (run / "checkpoints" / "4.damaged" / "meta" / "metadata").exists()

    (run / "checkpoints" / "4" / "commit_success.txt").unlink()  # the object that Orbax writes last
    assert steps(run) == [2]
    (run / "checkpoints" / "2" / "params" / "d").rmtree()
    assert train_on_one(four) == 2
    assert f"{run}/checkpoints: all checkpoints are damaged (step 2: " in capsys.readouterr().err


def test_a_profile_goes_to_the_bucket(bucket, quick):
    run = bucket / "runs" / "profile"
    assert train_on_one([*quick, f"--workdir={run}", "--config.profile.steps=(2, 3)", "--config.steps=4"]) == 0
    (session,) = (run / "profile" / "process_0" / "plugins" / "profile").iterdir()
    assert any(path.name.endswith(".xplane.pb") for path in session.iterdir())


def test_curves_grow_in_parts(bucket, monkeypatch):
    run = bucket / "runs" / "curves"
    monkeypatch.setattr(tensorboard, "PART", 2000)
    written = tensorboard.Metrics(run)
    for step in range(100):
        written.scalars(step, {"loss": step / 100})
        if step % 10 == 9:
            written.flush()
    written.scalars(100, {"loss": 1.0})
    assert [step for step, _ in visible(run)["loss"]] == list(range(100))  # the last one waits
    written.close()
    parts = list((run / "tensorboard").iterdir())
    assert 2 < len(parts) < 10
    assert [step for step, _ in visible(run)["loss"]] == list(range(101))
    resumed = tensorboard.Metrics(run, start_step=50)
    resumed.close()
    assert [step for step, _ in visible(run)["loss"]] == list(range(51))


@pytest.mark.parametrize(
    ("workdir", "message"),
    [
        ("gs://no-such-bucket/run", "gs://no-such-bucket/run/lock.json can't be written: "),
        ("gs://bucket", "--workdir=gs://bucket must name a bucket and a path in it: gs://BUCKET/PATH"),
        ("", "--workdir= is empty; give a folder, or gs://BUCKET/PATH"),
        ("gs:///run", "--workdir=gs:///run must name a bucket and a path in it: gs://BUCKET/PATH"),
        ("/gs/bucket/run", "--workdir=/gs/bucket/run would be read as a gs:// path; choose another folder"),
        ("s3://bucket/run", "--workdir=s3://bucket/run must be a local folder, or gs://BUCKET/PATH"),
    ],
)
def test_places_that_do_not_do(bucket, quick, tmp_path, monkeypatch, capsys, workdir, message):
    monkeypatch.chdir(tmp_path)
    assert train_on_one([*quick, f"--workdir={workdir}"]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("why", "code"), [("Forbidden: the address\nand why", 2), ("no answer from\nthe address", 1)])
def test_a_bucket_that_does_not_answer_is_not_an_empty_one(bucket, quick, monkeypatch, capsys, why, code):
    def refuse(self):
        raise OSError(why)

    monkeypatch.setattr(type(bucket), "iterdir", refuse)
    assert train_on_one([*quick, f"--workdir={bucket}/runs/refused"]) == code  # 1: worth another start
    said = f"gs://bucket/runs/refused/checkpoints can't be read: {' '.join(why.split())}\n"
    assert capsys.readouterr().err.endswith(said)


def test_without_gcsfs(bucket, quick, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert train_on_one([*quick, "--workdir=gs://bucket/run"]) == 2
    assert 'needs gcsfs: pip install gcsfs, or lcm_jax with its extra "tpu"' in capsys.readouterr().err


def test_one_run_a_place(bucket, monkeypatch):
    run = bucket / "runs" / "held"
    monkeypatch.setattr(workdir, "PATIENCE", 0.5)
    monkeypatch.setattr(workdir, "BEAT", 0.05)
    monkeypatch.setattr(workdir, "_LOOK", 0.1)
    with workdir.hold(run) as held:
        with pytest.raises(UserError, match=f"--workdir={run}: process {os.getpid()} on .* is training in it"):
            workdir.hold(run).__enter__()
        with monkeypatch.context() as patch:
            patch.setattr(workdir, "_here", lambda here=workdir._here(): {**here, "host": "another"})
            with pytest.raises(Unavailable, match="is training in it"):  # by its signs of life
                workdir.hold(run).__enter__()
        held.check()
        lock = workdir._BucketLock(run / workdir.LOCK)
        content, generation = lock.read()
        lock.remove(content, int(generation) - 1)  # that of a run before
        assert lock.read()[0] == content
        (run / workdir.LOCK).unlink()
        with pytest.raises(UserError):
            lock.renew(content, generation)  # a renewal that had read it before must not bring it back
        time.sleep(0.1)
        with pytest.raises(UserError, match=f"{run} is no longer this run's folder: lock.json is missing"):
            held.check()
        lock.create(content.replace(b'"host": "', b'"host": "of '))
    assert lock.read()  # that of another run, which gives no sign of life
    with workdir.hold(run) as held:
        held.check()
    assert lock.read() is None
