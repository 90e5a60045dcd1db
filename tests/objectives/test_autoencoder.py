"""The autoencoder's loss against torch's own KL divergence, and the moments that its scaling_factor comes from."""

import diffusers.models.autoencoders.vae as peer
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from lcm_jax.errors import UserError
from lcm_jax.objectives.autoencoder import AutoencoderConfig, autoencoder_loss, deviation, summary

KEY = jax.random.key(0)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


IMAGES, KERNEL, LOGVAR = normal(0, 3, 4, 4, 3), normal(1, 3, 4), -1.0 + 0.5 * normal(2, 3, 4, 4, 4)


def encode(images):
    return images @ KERNEL, jnp.asarray(LOGVAR)


def decode(z):
    return jnp.tanh(z @ KERNEL.T)


def loss_of(kl_weight=1e-6, encode=encode, decode=decode, key=KEY):
    noise = jax.random.normal(key, encode(IMAGES)[0].shape)
    return autoencoder_loss(encode, decode, IMAGES, noise, AutoencoderConfig(kl_weight))


def test_against_the_peer():
    loss, aux = loss_of(kl_weight=0.3)
    mean, logvar = (np.moveaxis(np.asarray(x), -1, 1) for x in encode(IMAGES))
    moments = torch.from_numpy(np.concatenate([mean, logvar], axis=1))
    kl = peer.DiagonalGaussianDistribution(moments).kl().mean() / mean[0].size  # theirs is a sum for each sample
    eps = np.asarray(jax.random.normal(KEY, LOGVAR.shape))
    z = torch.from_numpy(IMAGES @ KERNEL + np.exp(LOGVAR / 2) * eps)
    reconstruction = torch.nn.functional.l1_loss(torch.tanh(z @ torch.from_numpy(KERNEL.T)), torch.from_numpy(IMAGES))
    np.testing.assert_allclose(aux["kl"], kl, rtol=1e-5)
    np.testing.assert_allclose(aux["reconstruction"], reconstruction, rtol=1e-5)
    np.testing.assert_allclose(loss, reconstruction + 0.3 * kl, rtol=1e-5)


def test_latent_moments():
    _, aux = loss_of()
    z = np.asarray(IMAGES @ KERNEL + np.exp(LOGVAR / 2) * jax.random.normal(KEY, LOGVAR.shape), np.float64)
    np.testing.assert_allclose(aux["latent_mean"], z.mean(), atol=1e-6)
    np.testing.assert_allclose(aux["latent_mean_square"], (z**2).mean(), rtol=1e-5)
    np.testing.assert_allclose(summary(aux)["latent_deviation"], z.std(), rtol=1e-5)


def test_deviation_over_several_batches():
    batches = [
        loss_of(key=jax.random.key(i), encode=lambda x, i=i: (x + i, jnp.zeros_like(x)), decode=lambda z: z)[1]
        for i in range(3)
    ]
    whole = [IMAGES + i + np.asarray(jax.random.normal(jax.random.key(i), IMAGES.shape)) for i in range(3)]
    mean, mean_square = (np.mean([b[name] for b in batches]) for name in ("latent_mean", "latent_mean_square"))
    np.testing.assert_allclose(deviation(mean, mean_square), np.std(whole), rtol=1e-5)


def test_prior_has_no_divergence():
    _, aux = loss_of(encode=lambda x: (jnp.zeros_like(x), jnp.zeros_like(x)), decode=lambda z: z)
    assert aux["kl"] == 0


def test_gradients_reach_encoder_and_decoder():
    def loss(kernels):
        return autoencoder_loss(
            lambda x: (x @ kernels["mean"], x @ kernels["logvar"]),
            lambda z: z @ kernels["decoder"],
            IMAGES,
            jax.random.normal(KEY, LOGVAR.shape),
            AutoencoderConfig(),
        )[0]

    grads = jax.grad(loss)({"mean": KERNEL, "logvar": 0.1 * KERNEL, "decoder": KERNEL.T})
    assert all(jnp.abs(g).max() > 1e-3 for g in grads.values())


def test_each_draw_and_weight_counts():
    assert loss_of()[0] != loss_of(key=jax.random.key(1))[0]
    assert loss_of(kl_weight=1.0)[0] > loss_of()[0]


@pytest.mark.parametrize("value", [-1e-6, float("nan"), float("inf")])
def test_wrong_values_are_named(value):
    with pytest.raises(UserError, match="kl_weight is"):
        AutoencoderConfig(kl_weight=value)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_wrong_latent_std_is_named(value):
    with pytest.raises(UserError, match="latent_std is"):
        AutoencoderConfig(latent_std=value)
