"""A killed export leaves the old model, the new model, or nothing if there was none, but never a partial one."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_killed_at_each_moment(teacher_folder, tmp_path):
    command = [sys.executable, "-W", "ignore", ROOT / "tests/interop/killed_exports.py", teacher_folder, tmp_path, "5"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.stdout.endswith("\nok\n"), done.stdout + done.stderr
