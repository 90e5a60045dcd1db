"""Runs with three checkpoints."""

import shutil

import pytest
from little_state import save


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A workdir with the checkpoints of steps 1, 2, 3."""
    workdir = tmp_path_factory.mktemp("three")
    save(workdir, 1, 2, 3)
    return workdir


@pytest.fixture
def workdir(three, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(three, tmp_path / "run")
