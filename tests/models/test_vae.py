"""The autoencoder against diffusers'."""

import functools

import diffusers
import jax
import numpy as np
import pytest
import torch
from compiling import QUICK
from torch_weights import assert_close, nchw, network, nhwc, normal, random_weights

from lcm_jax.models import Policy

LEVELS = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
}
CASES = {
    "as SD's": (LEVELS, (16, 16)),
    "odd sizes, three levels, two layers": (
        {
            "block_out_channels": (8, 8, 12),
            "down_block_types": ("DownEncoderBlock2D",) * 3,
            "up_block_types": ("UpDecoderBlock2D",) * 3,
            "norm_num_groups": 4,
            "layers_per_block": 2,
        },
        (13, 18),
    ),
    "no quant_conv, no attention, grey, shifted": (
        {
            **LEVELS,
            "in_channels": 1,
            "out_channels": 1,
            "latent_channels": 3,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
            "mid_block_add_attention": False,
            "shift_factor": 0.25,
            "scaling_factor": 0.36,
        },
        (10, 8),
    ),
}


@pytest.mark.parametrize(("options", "size"), CASES.values(), ids=CASES)
def test_equals_the_peer(options, size):
    peer = diffusers.AutoencoderKL(**options)
    params = random_weights(peer, seed=1)
    net = network(peer)
    images = normal(2, 2, *size, net.config.in_channels)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def all_of_encode(params, images, noise):
        mean, logvar = net.apply(params, images, method="encode")
        drawn = net.apply(params, images, noise, method="to_latents")
        centre = net.apply(params, images, None, method="to_latents")
        return mean, logvar, drawn, centre

    with torch.no_grad():
        posterior = peer.encode(nchw(images)).latent_dist
        noise = normal(3, *nhwc(posterior.mean).shape)
        mean, logvar, drawn, centre = all_of_encode(params, images, noise)
        assert_close(mean, nhwc(posterior.mean))
        assert_close(logvar, nhwc(posterior.logvar))
        shift, scale = peer.config.shift_factor or 0.0, peer.config.scaling_factor
        assert_close(drawn, nhwc((posterior.mean + posterior.std * nchw(noise) - shift) * scale))
        assert_close(centre, nhwc((posterior.mean - shift) * scale))

        latents = normal(4, *mean.shape)
        decode = jax.jit(net.apply, static_argnames="method", compiler_options=QUICK)
        assert_close(decode(params, latents, method="decode"), nhwc(peer.decode(nchw(latents)).sample))
        from_scaled = decode(params, (latents - shift) * scale, method="to_images")
        assert_close(from_scaled, nhwc(peer.decode(nchw(latents)).sample), tolerance=2e-4)


def test_log_variance_is_clipped_and_bfloat16_is_close():
    peer = diffusers.AutoencoderKL(**LEVELS)
    params = random_weights(peer, seed=5)
    images = normal(6, 2, 8, 8, 3)
    wide = {**params, "quant_conv.kernel": 1e3 * params["quant_conv.kernel"]}
    encode = jax.jit(lambda p: network(peer).apply(p, images, method="encode"), compiler_options=QUICK)
    _, logvar = encode(wide)
    assert logvar.min() == -30.0
    assert logvar.max() == 20.0

    net = network(peer, policy=Policy.named("bfloat16"))
    half = jax.jit(lambda p: net.apply(p, images, method="encode"), compiler_options=QUICK)(params)
    for ours, exact in zip(half, encode(params), strict=True):
        assert_close(ours, exact, tolerance=5e-2)
        assert np.abs(ours - exact).max() > 1e-4
