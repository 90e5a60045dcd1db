"""python stand_in.py TOOL WORD…: plays gcloud, kubectl, srun and the like from the files in the folder $FAKE.

Each call is recorded as a line of `calls`. Files that set the answers:
  project   gcloud's default project ("mine")
  state     state of the queued resource; each call uses up one of several lines; create writes ACTIVE, delete clears it
  nodes     names of the pod's nodes (default "pod"); each has two workers, with a home each in workers/NODE-NUMBER
  type      accelerator type (default v5p-16)
  fail_X    number of calls with the word X that fail first (X is ssh, scp, create, apply …)
  mute      a worker that ssh does not reach, without an error from gcloud
  tokens    written by srun: the job's token in its environment
  codes     exit codes of srun, one per call
  codes-X   exit codes of the training on worker X, one per start; "run", or no file: it runs until SIGTERM
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys

fake = pathlib.Path(os.environ["FAKE"])
tool, words = sys.argv[1], sys.argv[2:]

TRAINING = """#!/usr/bin/env bash
codes="$FAKE/codes-${HOME##*/}"
code=$(head -n 1 "$codes" 2> /dev/null || echo run)
[ ! -e "$codes" ] || [ "$(grep -c . "$codes")" = 1 ] || sed -i 1d "$codes"
env > "$HOME/environment"; printf '%s\\n' "$@" > "$HOME/words"; pwd > "$HOME/where"
[ "$code" = run ] || exit "$code"
trap 'echo saved > "$HOME/saved"; exit 143' TERM
touch "$HOME/ready"
while :; do sleep 0.05; done
"""


def read(name: str, default: str = "") -> str:
    path = fake / name
    return path.read_text().strip() if path.exists() else default


def pop(name: str, default: str = "") -> str:
    lines = read(name, default).splitlines()
    if len(lines) > 1:
        (fake / name).write_text("\n".join(lines[1:]) + "\n")
    return lines[0] if lines else ""


def workers() -> list[pathlib.Path]:
    homes = [fake / "workers" / f"{node}-{number}" for node in read("nodes", "pod").split() for number in range(2)]
    for home in homes:
        home.mkdir(parents=True, exist_ok=True)
    return homes


def option(name: str) -> str:
    return next(word.split("=", 1)[1] for word in words if word.startswith(name + "="))


def ssh() -> int:
    which = workers() if option("--worker") == "all" else [workers()[int(option("--worker"))]]
    codes = []
    for home in which:
        if home.name != read("mute"):
            environment = {**os.environ, "HOME": str(home)}
            codes.append(subprocess.run(["bash", "-c", option("--command")], cwd=home, env=environment).returncode)
    return max(codes, default=0)


def gcloud() -> int:
    if words == ["config", "get-value", "project"]:
        print(read("project", "mine"))
        return 0
    verb = next(word for word in words if word in ("list", "create", "delete", "describe", "scp", "ssh"))
    if verb == "list":
        print(pop("state"))
    elif verb == "create" and "queued-resources" in words:
        (fake / "state").write_text("ACTIVE\n")
    elif verb == "delete":
        (fake / "state").unlink(missing_ok=True)
        shutil.rmtree(fake / "workers", ignore_errors=True)
    elif verb == "describe":
        print(read("nodes", "pod").replace(" ", ";") if "queued-resources" in words else f"{read('type', 'v5p-16')}\t2")
    elif verb == "scp":
        for home in workers():
            shutil.copy(words[4], home / words[5].split(":")[1])
    elif verb == "ssh":
        return ssh()
    return 0


def install() -> None:
    """python3 -m pip install uv, on a worker: uv makes a Python that only writes down how it was called."""
    home = pathlib.Path(os.environ["HOME"])
    python = home / "lcm_jax_venv" / "bin" / "python"
    python.parent.mkdir(parents=True, exist_ok=True)
    python.write_text(TRAINING)
    python.chmod(0o755)
    uv = home / ".local" / "bin" / "uv"
    uv.parent.mkdir(parents=True, exist_ok=True)
    uv.write_text('#!/bin/sh\necho "$@" >> "$HOME/uv"\n')
    uv.chmod(0o755)


def main() -> int:
    with open(fake / "calls", "a") as calls:
        calls.write(json.dumps([tool, *words]) + "\n")
    for word in [tool, *words]:
        left = int(read(f"fail_{word}", "0")) if word.isidentifier() else 0
        if left:
            (fake / f"fail_{word}").write_text(str(left - 1))
            print(f"{tool}: this failed", file=sys.stderr)
            return 255
    if tool == "gcloud":
        return gcloud()
    if tool == "python3":
        install()
    if tool == "kubectl" and "apply" in words:
        (fake / "applied").write_text(sys.stdin.read())
    if tool == "kubectl" and words[:2] == ["get", "jobset"]:
        return 0 if read("jobset") else 1
    if tool == "nvidia-smi":
        print("0\n1")
    if tool == "srun":
        with open(fake / "tokens", "a") as tokens:
            tokens.write(os.environ["LCM_JAX_JOB_TOKEN"] + "\n")
        return int(pop("codes", "0"))
    return 0


sys.exit(main())
