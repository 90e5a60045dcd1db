"""Adapters as trees: which modules, how they start, weight differences, merging; the side branch in bfloat16."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures_loras import UNET_TARGETS, random_adapter

from lcm_jax.adapters import lora, side_branch
from lcm_jax.errors import UserError
from lcm_jax.interop.folder import make_network, read_folder

SD15 = {
    "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}
SDXL = {
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
VEGA = {**SDXL, "transformer_layers_per_block": [1, 1, 2], "mid_block_type": "UNetMidBlock2D"}
KOALA = {**SDXL, "transformer_layers_per_block": [1, 2, 5], "layers_per_block": 1, "mid_block_type": None}
COUNTS = {  # modules and parameters of an LCM-LoRA of rank 64; of SDXL and SSD-1B: tests/planning/test_published.py
    "SD 1.5": (SD15, 278, 67_252_224),
    "Segmind-Vega": (VEGA, 233, 59_781_120),
    "KOALA-700M": (KOALA, 261, 62_951_424),
}
SHAPES = {
    "conv_in.kernel": jax.ShapeDtypeStruct((3, 3, 4, 8), jnp.float32),
    "conv_in.bias": jax.ShapeDtypeStruct((8,), jnp.float32),
    "mid.attn1.to_q.kernel": jax.ShapeDtypeStruct((8, 6), jnp.float32),
    "mid.attn2.to_q.kernel": jax.ShapeDtypeStruct((5, 6), jnp.float32),
    "mid.norm.scale": jax.ShapeDtypeStruct((8,), jnp.float32),
}


@pytest.mark.parametrize(("config", "modules", "parameters"), COUNTS.values(), ids=COUNTS)
def test_published_counts(config, modules, parameters):
    """By shapes only."""
    network = make_network("UNet2DConditionModel", config, where="test")
    chosen = lora.choose(network.shapes, [lora.Target()])
    assert len(chosen) == modules
    assert sum(np.prod(shape) for shape in lora.shapes(network.shapes, chosen).values()) == parameters


def test_first_target_that_matches():
    targets = [lora.Target(r"attn2\.to_q", rank=2), lora.Target("to_q|conv_in", rank=4, alpha=8.0)]
    chosen = lora.choose(SHAPES, targets)
    assert {module: target.rank for module, target in chosen.items()} == {
        "conv_in": 4,
        "mid.attn1.to_q": 4,
        "mid.attn2.to_q": 2,
    }
    assert lora.shapes(SHAPES, chosen) == {
        "conv_in.lora_A.kernel": (3, 3, 4, 4),
        "conv_in.lora_B.kernel": (1, 1, 4, 8),
        "mid.attn1.to_q.lora_A.kernel": (8, 4),
        "mid.attn1.to_q.lora_B.kernel": (4, 6),
        "mid.attn2.to_q.lora_A.kernel": (5, 2),
        "mid.attn2.to_q.lora_B.kernel": (2, 6),
    }
    adapter = lora.init(jax.random.key(0), SHAPES, chosen)
    assert adapter.alphas == {"conv_in": 8.0, "mid.attn1.to_q": 8.0, "mid.attn2.to_q": 2.0}
    assert adapter.ranks == {"conv_in": 4, "mid.attn1.to_q": 4, "mid.attn2.to_q": 2}


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (lora.Target("to_queue"), "'to_queue' matches no linear layer or convolution; did you mean 'to_q'"),
        (lora.Target("o_q"), "'o_q' matches no"),  # not in the middle of a name
        (lora.Target("norm"), "'norm' matches no"),
        (lora.Target("(to_q"), r"'\(to_q' is not a regular expression: "),
        (lora.Target("to_q", rank=0), "the LoRA rank of 'to_q' is 0"),
        (lora.Target("to_q", alpha=-1.0), "the LoRA alpha of 'to_q' is -1.0"),
    ],
)
def test_wrong_target(target, message):
    with pytest.raises(UserError, match=message) as error:
        lora.choose(SHAPES, [target])
    assert "\n" not in str(error.value)


def test_start():
    """As peft: B zero; A uniform in ±1/sqrt(fan-in), or normal with deviation 1/rank."""
    shapes = {"conv.kernel": jax.ShapeDtypeStruct((3, 3, 64, 8), jnp.float32)}
    chosen = lora.choose(shapes, [lora.Target("conv", rank=32)])
    kaiming, again, other, gaussian = (
        lora.init(jax.random.key(seed), shapes, chosen, how).params
        for seed, how in ((0, "kaiming"), (0, "kaiming"), (1, "kaiming"), (0, "gaussian"))
    )
    assert not np.any(kaiming["conv" + lora.B])
    a, bound = np.asarray(kaiming["conv" + lora.A]), (9 * 64) ** -0.5
    assert 0.99 * bound < np.abs(a).max() <= bound
    assert a.std() == pytest.approx(bound / 3**0.5, rel=0.02)
    np.testing.assert_array_equal(a, again["conv" + lora.A])
    assert not np.any(a == np.asarray(other["conv" + lora.A]))
    assert np.std(gaussian["conv" + lora.A]) == pytest.approx(1 / 32, rel=0.02)
    with pytest.raises(UserError, match="LoRA init is 'zeros'"):
        lora.init(jax.random.key(0), shapes, chosen, "zeros")


# ---- with a network


@pytest.fixture(scope="module")
def unet(teacher_folder):
    folder = read_folder(teacher_folder, only=("unet",))
    return folder.components["unet"], random_adapter(folder, "unet", UNET_TARGETS)


def test_merged_by_numpy_and_by_jax(unet):
    base, adapter = unet[0].params, unet[1]
    merged = lora.merge(base, adapter.params, adapter.alphas, 0.5)
    module = "mid_block.resnets.0.conv1"
    a, b = adapter.params[module + lora.A], adapter.params[module + lora.B]
    expected = base[f"{module}.kernel"] + 0.5 * 1.0 / 2 * np.einsum("hwir,ro->hwio", a, b[0, 0])
    np.testing.assert_allclose(merged[f"{module}.kernel"], expected, rtol=1e-5, atol=1e-6)
    changed = {path for path in base if merged[path] is not base[path]}
    assert changed == {f"{module}.kernel" for module in adapter.alphas}
    params = {path: jnp.asarray(array) for path, array in adapter.params.items()}
    kernel = f"{module}.kernel"
    few = {module: adapter.alphas[module]}
    np.testing.assert_allclose(lora.merge(base, params, few, 0.5)[kernel], merged[kernel], rtol=1e-6, atol=1e-6)


def test_weight_zero_is_the_base(unet):
    base, adapter = unet[0].params, unet[1]
    merged = lora.merge(base, adapter.params, adapter.alphas, 0.0)
    assert merged.keys() == base.keys()
    assert all(merged[path] is base[path] for path in base)


def test_half_precision_is_added_in_float32(unet):
    base = {path: array.astype(np.float16) for path, array in unet[0].params.items()}
    adapter = unet[1]
    params = {path: array.astype(jnp.bfloat16) for path, array in adapter.params.items()}
    merged = lora.merge(base, params, adapter.alphas)
    for path, difference in lora.differences(params, adapter.alphas).items():
        assert difference.dtype == merged[path].dtype == np.float32
        np.testing.assert_array_equal(merged[path], base[path].astype(np.float32) + difference)


def test_side_branch_keeps_what_bfloat16_rounds_away():
    """A thousandth of the weight: W + dW rounds to W in bfloat16, but the side branch keeps it."""
    from lcm_jax.models import Policy

    config = {"block_out_channels": [8], "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}
    config |= {"norm_num_groups": 4, "attention_head_dim": 2, "cross_attention_dim": 8, "layers_per_block": 1}
    network = make_network("UNet2DConditionModel", config, where="test", policy=Policy.named("bfloat16"))
    base = {path: jnp.ones(leaf.shape) for path, leaf in network.shapes.items()}
    adapter = lora.init(
        jax.random.key(0), network.shapes, lora.choose(network.shapes, [lora.Target("conv_in", rank=1)])
    )
    params = {
        path: jnp.full(array.shape, 1e-3 if path.endswith(lora.B) else 1.0) for path, array in adapter.params.items()
    }
    merged = lora.merge(base, params, adapter.alphas)["conv_in.kernel"]
    assert np.all(merged != 1)
    assert np.all(merged.astype(jnp.bfloat16) == 1)
    model = network.bind(base)
    branch = side_branch.WithBranch(model.conv_in, params["conv_in" + lora.A], params["conv_in" + lora.B], 1.0)
    z = jnp.ones((1, 4, 4, 4))
    np.testing.assert_allclose(
        branch.down(z) @ branch.up[...].astype(jnp.bfloat16), 1e-3 * (model.conv_in(z) - 1), rtol=0.02
    )
