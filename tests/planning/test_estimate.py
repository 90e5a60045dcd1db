"""From paths in a compiled program to modules of the model."""

import pytest

from lcm_jax.planning.estimate import place


@pytest.mark.parametrize(
    ("source", "module", "operation"),
    [
        (
            "jit(step)/shard_map/transpose(jvp(student))/down_blocks.0/checkpoint/resnets.1/conv1/conv_general_dilated",
            "student/down_blocks.0/resnets.1/conv1 (backward)",
            "conv_general_dilated",
        ),
        (
            "jit(step)/jvp(student/up_blocks.2)/attentions.0/dot_general",
            "student/up_blocks.2/attentions.0 (forward)",
            "dot_general",
        ),
        ("jit(step)/while/body/closed_call/teacher/conv_in/add", "teacher/conv_in (forward)", "add"),
        ("jit(step)/jvp(jit(_where))/select_n", "step (forward)", "select_n"),
        ("jit(step)/transpose(jvp())/mul", "step (backward)", "mul"),
        ("", "step (forward)", "other"),
    ],
)
def test_module_and_operation(source, module, operation):
    assert place(source) == (module, operation)
