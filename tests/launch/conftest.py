"""Runs the scripts of launch/ against stand-ins for gcloud, kubectl, srun and the like, which record each call.

The PATH has only these stand-ins and a few basic tools, so no test can reach a real cloud.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
TOOLS = """
bash cat cut dirname env false git grep gzip head hostname ls mkdir mktemp nohup od rm sed seq setsid sh sleep tail tar
tee touch true
"""
STAND_INS = ("gcloud", "kubectl", "nvidia-smi", "python3", "sbatch", "scontrol", "srun", "sudo")


@dataclasses.dataclass
class Result:
    """A script's exit code, output, and calls as lists of words that start with the tool's name."""

    code: int
    out: str
    err: str
    calls: list[list[str]]

    def calls_of(self, *words: str) -> list[list[str]]:
        """The calls that contain all these words."""
        return [call for call in self.calls if set(words) <= set(call)]

    def error(self) -> str:
        """The single error line; fails if there is none or more than one."""
        [line] = [line for line in self.err.splitlines() if ": error: " in line]
        return line


@dataclasses.dataclass
class Bench:
    """A checkout's launch folder, and a folder of files that set the stand-ins' answers."""

    folder: pathlib.Path

    def say(self, name: str, text: str | int) -> None:
        """Sets a stand-in's answer; see stand_in.py."""
        (self.folder / name).write_text(f"{text}\n")

    def home(self, worker: str) -> pathlib.Path:
        """The home folder of the worker NODE-NUMBER."""
        return self.folder / "workers" / worker

    def run(self, script: str, *words: str, without: str = "", **environment: str) -> Result:
        """Runs launch/`script`; `without` is a tool that is not installed."""
        (self.folder / "calls").unlink(missing_ok=True)
        if without:
            (self.folder / "bin" / without).unlink()
        quick = {"RETRY_SECONDS": "0", "POLL_SECONDS": "0.2", "STOP_SECONDS": "20", "TRIES": "3"}
        here = str(self.folder)
        ended = subprocess.run(
            [self.folder / "checkout" / "launch" / script, *words],
            env={"PATH": f"{here}/bin", "HOME": here, "FAKE": here, **quick, **environment},
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=300,
            stdin=subprocess.DEVNULL,
        )
        calls = self.folder / "calls"
        lines = calls.read_text().splitlines() if calls.exists() else []
        return Result(ended.returncode, ended.stdout, ended.stderr, [json.loads(line) for line in lines])


@pytest.fixture
def bench(tmp_path):
    """A Bench; at its end, trainings that still run on its workers are stopped."""
    checkout, tools = tmp_path / "checkout", tmp_path / "bin"
    shutil.copytree(ROOT / "launch", checkout / "launch")
    (checkout / "constraints.txt").write_text("")
    me = {f"GIT_{who}_{what}": "test@test" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), **me}
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "all"]):
        subprocess.run(["git", *command], cwd=checkout, check=True, env=environment)
    tools.mkdir()
    for name in TOOLS.split():
        found = shutil.which(name)
        assert found, f"the scripts use {name}"
        (tools / name).symlink_to(found)
    for name in STAND_INS:
        text = f'#!/bin/sh\nexec {sys.executable} -S -E {ROOT}/tests/launch/stand_in.py {name} "$@"\n'
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    yield Bench(tmp_path)
    for pid in tmp_path.glob("workers/*/train.pid"):
        with contextlib.suppress(ProcessLookupError, ValueError):
            os.killpg(int(pid.read_text()), signal.SIGKILL)


@pytest.fixture
def until():
    """until(test) waits until the test is true, at most a minute."""

    def wait(test) -> None:
        end = time.monotonic() + 60
        while not test():
            assert time.monotonic() < end, "it did not happen"
            time.sleep(0.02)

    return wait
