"""From a compiled program to modules of the model, and the time they take."""

import pathlib

import pytest

from lcm_jax.planning import estimate
from lcm_jax.planning.compiled import Collective, HloProgram
from lcm_jax.planning.estimate import place
from lcm_jax.planning.topology import parse


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
        (
            "jit(step)/transpose(jvp(student))/up_blocks.3/jvp(student)/up_blocks.3/checkpoint/resnets.1/add_any",
            "student/up_blocks.3/resnets.1 (backward)",
            "add_any",
        ),
        (
            "jit(step)/transpose(jvp(student))/up_blocks.3/jvp(student)/up_blocks.3/checkpoint/rematted_computation/"
            "attentions.0/bhnm,bhmd->bhnd/dot_general",
            "student/up_blocks.3/attentions.0 (again)",
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


def test_a_pallas_kernel_takes_what_it_declares():
    program = HloProgram((pathlib.Path(__file__).parent / "program.hlo").read_text())
    found = {(row["module"], row["operation"]): row["seconds"] for row in estimate.profile(program, parse("v5p-8"))}
    assert found["attn (forward)", "pallas_call"] == pytest.approx(70 / 2765e9)  # more than 900 FLOPs take


@pytest.mark.parametrize(
    ("spans", "seconds", "waited"),
    [
        ([(10, 10), (10, 10), (40, 40)], [3, 4, 5], 12),  # each is waited for
        ([(0, 20)], [15], 0),
        ([(0, 20)], [25], 5),
        ([(0, 20), (0, 20)], [15, 15], 10),  # one after the other behind the same work
        ([(0, 20), (5, 40)], [25, 15], 5),  # the first is late by 5, and so all that follows: the second ends at 40
        ([(0, 10), (10, 20)], [15, 10], 5),
    ],
)
def test_exchanges_share_the_network(spans, seconds, waited):
    exchanges = [Collective("all-gather", 1, 1, (), start, end, "") for start, end in spans]
    assert estimate.waiting(exchanges, seconds, 1.0) == waited
