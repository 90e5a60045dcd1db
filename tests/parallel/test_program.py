"""The step on eight devices against one device: every mesh gives the same weights."""

import re

import jax
import numpy as np
import pytest
from compiling import QUICK
from jax.extend.core import jaxprs_in_params
from little import batch, collectives

from lcm_jax.adapters.lora import LoraConfig
from lcm_jax.errors import UserError
from lcm_jax.objectives.lcd import LCDConfig
from lcm_jax.parallel.mesh import MeshConfig, make_mesh
from lcm_jax.parallel.partition import place
from lcm_jax.training.networks import frozen_params, initial_params
from lcm_jax.training.program import make_program

STEPS = 3
REMAT = {"remat": "block"}
CASES = {
    "8x1": {"mesh": MeshConfig(8, 1)},
    "2x4, gathered once, remat, accumulation, sharded teacher": {
        "mesh": MeshConfig(2, 4, gather="step", frozen="sharded"),
        "accumulate": 2,
        "model": REMAT,
    },
    "1x8, remat but for attention, accumulation, sharded teacher": {
        "mesh": MeshConfig(1, 8, gather="block", frozen="sharded"),
        "accumulate": 2,
        "model": {"remat": "block_save_attention"},
    },
    "1x8, remat and gathered by layer": {"mesh": MeshConfig(1, 8, gather="block"), "model": {"remat": "layer"}},
}


def start(config, parts, little):
    """The weights to begin with: no bias is zero, or it would consist of its updates, which have fewer digits."""
    random = np.random.default_rng(0)
    return {
        name: {path: a + 0.1 * random.standard_normal(a.shape, np.float32) for path, a in flat.items()}
        for name, flat in initial_params(config, parts, little).items()
    }


def train(little, configure, devices, **changes):
    """Returns the state and the metrics after a few steps."""
    config, parts = configure(**changes)
    program = make_program(config, parts, make_mesh(config.mesh, devices))
    state = program.start(place(start(config, parts, little), program.state["params"]))
    frozen = place(frozen_params(parts, little), program.frozen)
    step = program.lower().compile(compiler_options=QUICK)
    for i in range(STEPS):
        state, metrics = step(state, frozen, program.put(batch(i)), program.put_stop(0))
    shardings = jax.tree.map(lambda x, like: x.sharding == like.sharding, state, program.state)
    assert all(jax.tree.leaves(shardings))
    return jax.device_get(state), jax.device_get(metrics)


@pytest.fixture(scope="module")
def alone(little, configure):
    return train(little, configure, jax.devices()[:1])


def assert_equal(found, expected, tolerance=1e-5):
    for (keys, a), b in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        name = jax.tree_util.keystr(keys)
        assert np.abs(a - b).max() <= tolerance * np.abs(b).max(), name


@pytest.mark.parametrize("case", CASES)
def test_eight_devices_train_as_one_does(case, little, configure, alone):
    state, metrics = train(little, configure, jax.devices(), **CASES[case])
    for name in ("params", "ema"):
        assert_equal(state[name], alone[0][name])
    assert_equal(metrics, alone[1])


LORA = {"lora": LoraConfig(rank=8), "lcd": LCDConfig(w_embedding_dim=0, empty_prompts=0.3, huber_c=0.1)}


@pytest.fixture(scope="module")
def adapters_alone(little, configure):
    return train(little, configure, jax.devices()[:1], **LORA)


def test_eight_devices_train_adapters_as_one_does(little, configure, adapters_alone):
    state, metrics = train(
        little, configure, jax.devices(), mesh=MeshConfig(2, 4, gather="block", frozen="sharded"), **LORA
    )
    assert {path.rpartition(".lora_")[2] for path in state["params"]["unet"]} == {"A.kernel", "B.kernel"}
    for name in ("params", "ema"):
        assert_equal(state[name], adapters_alone[0][name])
    assert_equal(metrics, adapters_alone[1])


def test_the_reference_moves(little, configure, alone):
    """Otherwise two runs that both change nothing would be equal."""
    config, parts = configure()
    moved = [
        np.abs(alone[0]["params"]["unet"][path] - array).max() / np.abs(array).max()
        for path, array in start(config, parts, little)["unet"].items()
    ]
    assert min(moved) > 1e-3


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mesh": MeshConfig(8, 1), "batch_size": 12}, "config.batch_size=12 is not divisible by the 8 devices"),
        ({"accumulate": 4}, "is not divisible by the 8 devices times config.accumulate=4"),
    ],
)
def test_a_batch_that_does_not_divide_is_one_line(changes, said, configure):
    config, parts = configure(**changes)
    with pytest.raises(UserError, match=said):
        make_program(config, parts, make_mesh(config.mesh))


def lowered(configure, **changes):
    """The types of what the step asks of the network between devices, before any compiler changes it."""
    config, parts = configure(**changes)
    text = make_program(config, parts, make_mesh(config.mesh)).lower().as_text()
    return {
        kind: re.findall(rf'"stablehlo\.{kind}".*? : \((.*?)\) -> ', text, re.DOTALL)
        for kind in ("all_gather", "reduce_scatter", "all_reduce", "all_to_all", "collective_permute")
    }


def test_each_option_changes_what_is_exchanged(configure):
    bf16 = {"dtype": "bfloat16"}
    usual = lowered(configure, mesh=MeshConfig(2, 4, gather="block"), model=bf16)
    once = lowered(configure, mesh=MeshConfig(2, 4, gather="step"), model=bf16)
    sharded = lowered(configure, mesh=MeshConfig(2, 4, gather="block", frozen="sharded"), model=bf16)
    short = lowered(configure, mesh=MeshConfig(2, 4, gather="block", grad_dtype="bfloat16"), model=bf16)
    replicated = lowered(configure, mesh=MeshConfig(8, 1), model=bf16)

    assert not replicated["all_gather"]
    assert not replicated["reduce_scatter"]
    assert not any(x["all_to_all"] or x["collective_permute"] for x in (usual, once, sharded, short, replicated))
    weights = len(usual["reduce_scatter"])  # of the student, each summed once
    assert len(once["reduce_scatter"]) == weights
    assert len(once["all_gather"]) == 2 * weights  # student and target
    assert 2 * weights < len(usual["all_gather"]) <= 3 * weights  # the student's blocks twice
    assert len(sharded["all_gather"]) > len(usual["all_gather"])
    in_bf16 = [line for line in usual["all_gather"] if "bf16" in line]
    assert len(usual["all_gather"]) - len(in_bf16) <= 5  # conv_out and cond_proj: float32 under each policy
    assert all("f32" in line and "bf16" not in line for line in usual["reduce_scatter"])
    assert all("bf16" in line for line in short["reduce_scatter"])


def test_nothing_but_weights_and_sums_is_exchanged(configure):
    """In the compiled program no activation leaves its device, however XLA handles the sharded weights."""
    config, parts = configure(mesh=MeshConfig(2, 4, frozen="sharded"))
    program = make_program(config, parts, make_mesh(config.mesh))
    found = collectives(program.lower().compile(compiler_options=QUICK).as_text())
    assert found["all-gather"] > 0
    assert found["all-to-all"] == found["collective-permute"] == 0


def primitives(jaxpr):
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for inner in jaxprs_in_params(equation.params):
            yield from primitives(getattr(inner, "jaxpr", inner))


@pytest.mark.parametrize("objective", ["lcd", "denoising", "autoencoder"])
def test_the_step_calls_nothing_on_the_host(objective, configure):
    lcd = {} if objective == "lcd" else {"lcd": LCDConfig()}
    config, parts = configure(objective=objective, **lcd)
    found = set(primitives(make_program(config, parts, make_mesh(MeshConfig(2, 4))).trace().jaxpr))
    assert "conv_general_dilated" in found
    assert not [name for name in found if "callback" in name or name in ("infeed", "outfeed", "debug_print")]
