"""The UNet against diffusers' with the same weights; its options."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from compiling import QUICK
from jax.extend.core import jaxprs_in_params
from torch_weights import assert_close, nchw, network, nhwc, normal, random_weights

from lcm_jax.errors import UserError
from lcm_jax.interop.network_configs import read_unet
from lcm_jax.models import Network, Policy, UNet2DConditionModel, UNetConfig, attention
from lcm_jax.models.kernels.attend import IMPLEMENTATIONS

TOKENS, WIDTH, W_DIM = 5, 12, 10
SD = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": WIDTH,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}
SDXL = {
    **SD,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (2, 4),
    "transformer_layers_per_block": (1, 2),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 7 + 6 * 4,
    "upcast_attention": None,
}
DEEP = {
    "block_out_channels": (8, 8, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}

CASES = {
    "sd1: convolutional projection": (SD, (8, 8)),
    "lcm of sd1: w-embedding": ({**SD, "time_cond_proj_dim": W_DIM}, (8, 8)),
    "sd2: linear projection, heads differ by level": (
        {**SD, "use_linear_projection": True, "attention_head_dim": (2, 8)},
        (8, 8),
    ),
    "lcm of sd2, two layers a block": (
        {**SD, "use_linear_projection": True, "layers_per_block": 2, "time_cond_proj_dim": W_DIM},
        (6, 8),
    ),
    "two transformer layers, convolutional": ({**SD, "transformer_layers_per_block": 2}, (8, 4)),
    "odd sizes, three levels": ({**SD, **DEEP, "attention_head_dim": (1, 2, 4)}, (7, 9)),
    "even sizes that turn odd, layers differ by level": ({**SD, **DEEP, "layers_per_block": (1, 2, 1)}, (6, 10)),
    "sdxl": (SDXL, (8, 8)),
    "ssd-1b: depths by transformer, the up blocks' own, one residual block in the middle": (
        {
            **SDXL,
            "layers_per_block": 2,
            "transformer_layers_per_block": (1, (2, 1)),
            "reverse_transformer_layers_per_block": ((1, 2, 3), 1),
            "mid_block_type": "UNetMidBlock2D",
        },
        (6, 8),
    ),
    "koala: no middle block, with a w-embedding": (
        {**SDXL, "mid_block_type": None, "time_cond_proj_dim": W_DIM},
        (8, 6),
    ),
    "an odd number of channels, whose sinusoids end in a zero": (
        {**SD, "block_out_channels": (9, 18), "norm_num_groups": 3, "attention_head_dim": 3, "sample_size": [4, 6]},
        (4, 6),
    ),
    "sinusoids the other way round, other channels, eps": (
        {**SD, "flip_sin_to_cos": False, "freq_shift": 1, "norm_eps": 0.3, "in_channels": 9, "out_channels": 3},
        (4, 4),
    ),
}


def build(options: dict) -> diffusers.UNet2DConditionModel:
    return diffusers.UNet2DConditionModel(**options)


def inputs(config: UNetConfig, size: tuple[int, int], seed: int) -> tuple:
    """z, t (one of them not a whole number), context, w_embedding, added, in our layout."""
    z = normal(seed, 2, *size, config.in_channels)
    t = np.array([999.0, 3.625], np.float32)
    context = normal(seed + 1, 2, TOKENS, WIDTH)
    w = normal(seed + 2, 2, config.time_cond_proj_dim) if config.time_cond_proj_dim else None
    added = None
    if config.addition_embed_type:
        ids = np.array([[64, 48, 0, 8, 64, 64], [32, 64, 4, 0, 64, 48]], np.float32)
        added = {"text_embeds": normal(seed + 3, 2, 7), "time_ids": ids}
    return z, t, context, w, added


@torch.no_grad()
def reference(peer, z, t, context, w, added) -> np.ndarray:
    added = added and {name: torch.from_numpy(array) for name, array in added.items()}
    return nhwc(
        peer(
            nchw(z),
            torch.from_numpy(t),
            torch.from_numpy(context),
            timestep_cond=None if w is None else torch.from_numpy(w),
            added_cond_kwargs=added,
        ).sample
    )


@pytest.mark.parametrize(("options", "size"), CASES.values(), ids=CASES)
def test_equals_the_peer(options, size):
    peer = build(options)
    params = random_weights(peer, seed=1)
    net = network(peer)
    given = inputs(net.config, size, seed=2)
    assert_close(jax.jit(net.apply, compiler_options=QUICK)(params, *given), reference(peer, *given))


@pytest.fixture(scope="module")
def micro():
    """diffusers' UNet, and the parameters and inputs in our layout, for one LCM form."""
    peer = build({**SD, "time_cond_proj_dim": W_DIM})
    params = random_weights(peer, seed=3)
    return peer, params, inputs(network(peer).config, (8, 8), seed=4)


def test_bfloat16_is_close_and_ends_in_float32(micro):
    peer, params, given = micro
    net = network(peer, policy=Policy.named("bfloat16"))
    ours = jax.jit(net.apply, compiler_options=QUICK)(params, *given)
    theirs = reference(peer, *given)
    assert_close(ours, theirs, tolerance=5e-2)
    assert np.abs(ours - theirs).max() > 1e-4 * np.abs(theirs).max()  # and it did compute in bfloat16
    np.testing.assert_array_equal(ours[0] != ours[0].astype(jnp.bfloat16), True)  # the output was not rounded to it


def test_bfloat16_keeps_times_apart(micro):
    """bfloat16(999) is bfloat16(1000): times 999 and 1000 must still give different features."""
    peer, params, (z, _, context, w, _) = micro
    net = network(peer, policy=Policy.named("bfloat16"))
    z, context, w = (np.repeat(x[:1], 2, axis=0) for x in (z, context, w))
    params = {**params, "time_embedding.linear_1.kernel": 30 * params["time_embedding.linear_1.kernel"]}
    out = jax.jit(net.apply, compiler_options=QUICK)(params, z, np.array([999, 1000], np.int32), context, w)
    assert np.abs(out[0] - out[1]).max() > 1e-2 * np.abs(out).max()


def test_bfloat16_does_its_heavy_work_in_bfloat16_and_the_rest_not(micro):
    peer, params, given = micro
    net = network(peer, policy=Policy.named("bfloat16"))
    equations = list(walk(jax.make_jaxpr(net.apply)(params, *given).jaxpr))
    convolutions = [e.invars[0].aval.dtype for e in equations if e.primitive.name == "conv_general_dilated"]
    assert convolutions[-1] == jnp.float32  # conv_out
    assert set(convolutions[:-1]) == {jnp.dtype("bfloat16")}
    for name in ("exp", "sin", "cos", "rsqrt"):  # softmax; sinusoids; norms
        found = [e.invars[0].aval.dtype for e in equations if e.primitive.name == name]
        assert found, name
        assert set(found) == {jnp.dtype("float32")}, name
    products = [e.invars[0].aval.dtype for e in equations if e.primitive.name == "dot_general"]
    assert products.count(jnp.dtype("float32")) <= 1 + count(equations, "exp")  # cond_proj; weights times values
    assert products.count(jnp.dtype("bfloat16")) > 20


def test_whole_steps_may_be_given_as_ints(micro):
    peer, params, (z, _, context, w, _) = micro
    apply = jax.jit(network(peer).apply, compiler_options=QUICK)
    t = np.array([999, 19], np.int32)
    np.testing.assert_array_equal(apply(params, z, t, context, w), apply(params, z, t.astype(np.float32), context, w))


# Blocks; or layers: residual blocks, transformer layers and what is around them, down- and upsampling.
@pytest.mark.parametrize(("remat", "parts"), [("block", 2 + 1 + 2), ("layer", 8 + 3 * 4 + 2)])
def test_remat_recomputes_blocks_and_changes_no_value(micro, remat, parts):
    peer, params, given = micro

    def program(remat):
        net = network(peer, remat=remat)
        return lambda p: jnp.mean(net.apply(p, *given) ** 2)

    plain, again = program("none"), program(remat)
    blocks = [count(walk(jax.make_jaxpr(f)(params).jaxpr), "remat2", "checkpoint") for f in (plain, again)]
    assert blocks == [0, parts]
    compiled = [jax.jit(jax.value_and_grad(f), compiler_options=QUICK)(params) for f in (plain, again)]
    (loss, gradients), (loss_again, gradients_again) = compiled
    np.testing.assert_allclose(loss, loss_again, rtol=1e-6)
    assert all(np.abs(g).max() > 0 for g in gradients.values())
    for name, gradient in gradients.items():
        np.testing.assert_allclose(
            gradient, gradients_again[name], atol=1e-5 * float(np.abs(gradient).max()), err_msg=name
        )


def test_remat_keeps_what_it_says(micro):
    """Softmax is always recomputed; its product with the values is not if attention outputs are saved."""
    peer, params, given = micro

    def products(remat):
        net = network(peer, remat=remat)
        gradient = jax.make_jaxpr(jax.grad(lambda p: jnp.mean(net.apply(p, *given) ** 2)))(params)
        equations = list(walk(gradient.jaxpr))
        return count(equations, "dot_general"), count(equations, "exp")

    none, block, save = products("none"), products("block"), products("block_save_attention")
    layers = 2 * (1 + 1 + 2)
    assert none[0] < save[0] == block[0] - layers
    assert none[1] < save[1] == block[1]


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_attention_is_the_named_implementation(micro, monkeypatch, name):
    peer, _, given = micro
    net = network(peer, attention=name)
    seen = []

    def attend(q, k, v, implementation):
        seen.append(implementation)
        return q

    monkeypatch.setattr(attention, "attend", attend)
    jax.eval_shape(net.apply, net.shapes, *given)
    assert seen == [name] * 2 * (1 + 1 + 2)  # to itself and to the text; on the way down, in the middle, on the way up


@pytest.mark.parametrize("options", [{"remat": "blocks"}, {"attention": "flash"}])
def test_a_wrong_option_is_refused(options):
    with pytest.raises(UserError, match=f"{next(iter(options))} is '{next(iter(options.values()))}'"):
        Network(UNet2DConditionModel, read_unet(SD), **options)


def test_the_w_embedding_starts_without_effect():
    """A fresh student is its teacher at every w, bit for bit."""
    net = Network(UNet2DConditionModel, read_unet({**SD, "time_cond_proj_dim": W_DIM}))
    params = net.init(jax.random.key(0))
    assert not params["time_embedding.cond_proj.kernel"].any()
    assert "time_embedding.cond_proj.bias" not in params
    z, t, context, w, _ = inputs(net.config, (4, 4), seed=5)
    apply = jax.jit(net.apply, compiler_options=QUICK)
    np.testing.assert_array_equal(apply(params, z, t, context, w), apply(params, z, t, context, 100 * w))


def test_conditions_that_do_not_belong_are_refused():
    z, t, context, w, _ = inputs(read_unet({**SD, "time_cond_proj_dim": W_DIM}), (4, 4), seed=6)
    for options, given, message in (
        (SD, (w,), "no time_cond_proj_dim"),
        (SDXL, (None, None), "this UNet needs added="),
        (SDXL, (None, {"time_ids": np.zeros((2, 6), np.float32)}), "this UNet needs added="),
    ):
        net = Network(UNet2DConditionModel, read_unet(options))
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(net.apply, net.shapes, z, t, context, *given)


def walk(jaxpr):
    """All equations, those of inner programs too."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from walk(inner)


def count(equations, *names: str) -> int:
    return sum(equation.primitive.name in names for equation in equations)
