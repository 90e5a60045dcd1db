"""Decoding in strips: the same image as at once, with less memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import QUICK
from fixtures_folders import latents

from lcm_jax.models import Network, strips
from lcm_jax.models.vae import AutoencoderKL, VAEConfig


def vae(channels, **options):
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * len(channels)}
    blocks["up_block_types"] = ("UpDecoderBlock2D",) * len(channels)
    return Network(AutoencoderKL, VAEConfig(block_out_channels=channels, norm_num_groups=4, **blocks, **options))


def decoded(network, pixels):
    """Returns (params, z) → what the decoder makes of z; 0 pixels: at once."""

    def function(params, z):
        decoder = network.bind(params).decoder
        return strips.decode(decoder, z, pixels) if pixels else decoder(z)

    return jax.jit(function, compiler_options=QUICK)


@pytest.mark.parametrize(
    ("channels", "attention", "pixels"),
    # strips of a row; of rows that don't divide the height; blocks with and without a shortcut at the full resolution
    [((8, 16, 16), True, 1), ((8, 16), False, 43), ((8, 8), True, 39), ((8,), True, 10)],
    ids=["rows", "uneven", "equal widths", "one level"],
)
def test_the_image_is_the_same(channels, attention, pixels):
    network = vae(channels, mid_block_add_attention=attention)
    params = {path: a + 0.2 * latents(1, *a.shape) for path, a in network.init(jax.random.key(0)).items()}
    z = latents(2, 2, 7, 5, 4)
    whole, ours = (np.asarray(decoded(network, given)(params, z)) for given in (0, pixels))
    assert np.abs(whole - ours).max() <= 2e-6 * np.abs(whole).max()


def test_it_takes_less_memory():
    """Two maps of the full resolution, where the whole decoder has one of twice the channels and its norm as well."""
    network = vae((8, 16, 16), mid_block_add_attention=False)
    z = jax.ShapeDtypeStruct((1, 64, 64, 4), jnp.float32)
    whole, ours = (
        decoded(network, pixels).lower(network.used, z).compile().memory_analysis().temp_size_in_bytes
        for pixels in (0, 2**12)
    )
    assert ours < 0.7 * whole
