"""Fixtures of the tests of foreign formats."""

import pathlib
import shutil

import pytest


@pytest.fixture
def copy(teacher_folder, tmp_path):
    """A teacher folder that a test may break."""
    return pathlib.Path(shutil.copytree(teacher_folder, tmp_path / "model"))
