"""A run that does not fit into memory ends in one line."""

import jax
import pytest
from commands import train_on_one

from lcm_jax.training import loop


def test_out_of_memory_is_one_line_with_what_may_help(quick, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nAllocations: many")

    monkeypatch.setattr(loop, "_train", fail)
    assert train_on_one([*quick, f"--workdir={tmp_path}/run"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "out of memory on cpu: RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.; try " in said
    assert "--config.accumulate=2 or --config.model.remat=block or a LoRA" in said
    assert "Allocations" not in said


def test_another_error_of_the_runtime_is_not_hidden(quick, tmp_path, monkeypatch):
    def fail(*_):
        raise jax.errors.JaxRuntimeError("INTERNAL: a bug")

    monkeypatch.setattr(loop, "_train", fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
        train_on_one([*quick, f"--workdir={tmp_path}/run"])
