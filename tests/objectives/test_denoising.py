"""Diffusion training against diffusers' schedule and a numpy transcription of min-SNR weighting."""

import dataclasses

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from lcm_jax.diffusion.schedule import PREDICTION_TYPES, Schedule
from lcm_jax.errors import UserError
from lcm_jax.objectives.denoising import DenoisingConfig, Draws, denoising_loss, draw

B, SHAPE = 5, (5, 4, 6, 3)
CONFIG = DenoisingConfig()


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


BATCH = {"z_0": normal(0, *SHAPE), "condition": normal(1, B, 2, 7), "null_condition": normal(2, 1, 2, 7)}
DRAWS = Draws(normal(3, *SHAPE), np.array([0, 19, 250, 700, 999]), np.array([False, True, False, False, True]))


def network(z, t, context):
    return jnp.tanh(z + jnp.sin(t / 100.0)[:, None, None, None]) + context.mean((1, 2))[:, None, None, None]


def loss_of(process=Schedule(), draws=DRAWS, config=CONFIG, network=network, **batch):
    return denoising_loss(network, process, **{**BATCH, **batch}, draws=draws, config=config)


def transcription(prediction_type, gamma):
    """(weighted loss, plain loss) in numpy float64 and diffusers."""
    peer = diffusers.DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    tensors = torch.from_numpy(BATCH["z_0"]), torch.from_numpy(DRAWS.eps), torch.from_numpy(DRAWS.t)
    z_t = peer.add_noise(*tensors).numpy()
    velocity = peer.get_velocity(*tensors).numpy()
    target = {"epsilon": DRAWS.eps, "v_prediction": velocity, "sample": BATCH["z_0"]}[prediction_type]
    context = np.where(DRAWS.drop[:, None, None], BATCH["null_condition"], BATCH["condition"])
    square = (np.asarray(network(z_t, DRAWS.t, context), np.float64) - target) ** 2
    abar = peer.alphas_cumprod.double().numpy()[DRAWS.t]
    snr = abar / (1 - abar)
    clipped = np.minimum(snr, gamma) if gamma else None
    weight = {"epsilon": lambda: clipped / snr, "v_prediction": lambda: clipped / (snr + 1), "sample": lambda: clipped}
    weighted = square if clipped is None else weight[prediction_type]()[:, None, None, None] * square
    return weighted.mean(), square.mean()


@pytest.mark.parametrize("gamma", [0.0, 1.0, 5.0])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_loss(prediction_type, gamma):
    loss, aux = loss_of(Schedule(prediction_type=prediction_type), config=DenoisingConfig(min_snr_gamma=gamma))
    theirs, plain = transcription(prediction_type, gamma)
    np.testing.assert_allclose(loss, theirs, rtol=1e-4)
    np.testing.assert_allclose(aux["mse"], plain, rtol=1e-4)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_min_snr_means_the_same_for_every_prediction_type(prediction_type):
    """An error in x0 of one size weighs min(SNR, gamma), whatever the network puts out."""
    schedule = Schedule(prediction_type=prediction_type)
    alpha, sigma = (x[:, None, None, None] for x in (schedule.alpha(DRAWS.t), schedule.sigma(DRAWS.t)))
    eps = DRAWS.eps - alpha / sigma  # z_t is what it is, so an x0 too large by 1 is an eps too small by alpha / sigma

    def wrong(z, t, context):
        return schedule.target(BATCH["z_0"] + 1, eps, t)

    loss, _ = loss_of(schedule, config=DenoisingConfig(min_snr_gamma=5.0), network=wrong)
    np.testing.assert_allclose(loss, np.minimum((alpha / sigma) ** 2, 5.0).mean(), rtol=1e-3)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_a_perfect_network_has_no_loss(prediction_type):
    schedule = Schedule(prediction_type=prediction_type)

    def perfect(z, t, context):
        return schedule.target(BATCH["z_0"], DRAWS.eps, t)

    assert loss_of(schedule, network=perfect)[0] == 0


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_zero_terminal_snr_is_finite(prediction_type):
    schedule = Schedule(prediction_type=prediction_type, rescale_betas_zero_snr=True)
    for gamma in (0.0, 5.0):
        assert np.isfinite(loss_of(schedule, config=DenoisingConfig(min_snr_gamma=gamma))[0])


def test_what_the_network_is_called_with():
    def recorded(z, t, context):
        np.testing.assert_array_equal(z, Schedule().add_noise(BATCH["z_0"], DRAWS.eps, DRAWS.t))
        np.testing.assert_array_equal(t, DRAWS.t)
        null, given = BATCH["null_condition"][0], BATCH["condition"]
        np.testing.assert_array_equal(context, np.stack([given[0], null, given[2], given[3], null]))
        return z

    loss_of(network=recorded)


def test_draws():
    draws = draw(jax.random.key(0), (6000, 1, 2, 1), DenoisingConfig(caption_dropping=0.3), 50)
    np.testing.assert_array_equal(np.unique(draws.t), np.arange(50))
    np.testing.assert_allclose([draws.eps.mean(), draws.eps.std()], [0, 1], atol=0.05)
    np.testing.assert_allclose(draws.drop.mean(), 0.3, atol=0.03)
    other = draw(jax.random.key(1), (6000, 1, 2, 1), DenoisingConfig(caption_dropping=0.3), 50)
    assert all((a != b).any() for a, b in zip(draws, other, strict=True))


def timesteps(shift, total=1000, n=20000):
    return np.asarray(draw(jax.random.key(0), (n, 1, 1, 1), DenoisingConfig(timestep_shift=shift), total).t)


def test_timesteps_are_uniform_without_a_shift():
    t, n = timesteps(1.0, total=10), 20000
    counts = np.bincount(t, minlength=10)
    assert len(counts) == 10
    assert np.abs(counts - n / 10).max() < 5 * (n / 10) ** 0.5
    np.testing.assert_array_equal(t, np.arange(n)[t])  # whole numbers
    np.testing.assert_array_equal(t, timesteps(DenoisingConfig().timestep_shift, total=10))


@pytest.mark.parametrize("shift", [0.5, 6.0])
def test_shifted_timesteps_have_the_papers_quantiles(shift):
    """t / T is a u / (1 + (a - 1) u) for u uniform (arXiv 2403.03206, eq. 23); for a = 6, 6 of 7 are above a half."""
    u = np.array([0.05, 0.25, 0.5, 0.75, 0.95])
    expected = shift * u / (1 + (shift - 1) * u)
    np.testing.assert_allclose(np.quantile(timesteps(shift), u) / 1000, expected, atol=0.015)
    assert np.mean(timesteps(shift) >= 500) == pytest.approx(shift / (shift + 1), abs=0.015)


@pytest.mark.parametrize("shift", [1e-6, 0.1, 1.0, 3.0, 6.0, 1e3, 1e9])
def test_shifted_timesteps_stay_in_range(shift, monkeypatch):
    for total in (2, 1000):
        t = timesteps(shift, total)
        assert t.dtype == np.int32
        assert 0 <= t.min() <= t.max() <= total - 1
    ends = jnp.array([0.0, np.nextafter(np.float32(1), np.float32(0))])
    monkeypatch.setattr(jax.random, "uniform", lambda key, shape: ends)
    first, last = timesteps(shift, n=2)
    assert first == 0
    assert last == (999 if shift > 1e-3 else last) <= 999


@pytest.mark.parametrize(
    "change", [{"caption_dropping": 0.9}, {"min_snr_gamma": 5.0}, {"timestep_shift": 6.0}], ids=str
)
def test_each_option_changes_the_loss(change):
    def loss(config):
        return loss_of(draws=draw(jax.random.key(0), SHAPE, config, 1000), config=config)[0]

    assert abs(loss(dataclasses.replace(CONFIG, **change)) / loss(CONFIG) - 1) > 1e-4


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"caption_dropping": -0.1}, "caption_dropping is -0.1"),
        ({"caption_dropping": 1.0}, r"caption_dropping is 1.0; it must be in \[0, 1\)"),
        ({"timestep_shift": 0.0}, "timestep_shift is 0.0; it must be positive"),
        ({"timestep_shift": -1.0}, "timestep_shift is -1.0"),
        ({"timestep_shift": float("inf")}, "timestep_shift is inf"),
        ({"timestep_shift": float("nan")}, "timestep_shift is nan"),
        ({"min_snr_gamma": -5.0}, "min_snr_gamma is -5.0"),
        ({"min_snr_gamma": float("nan")}, "min_snr_gamma is nan"),
    ],
    ids=str,
)
def test_wrong_values_are_named(values, message):
    with pytest.raises(UserError, match=message):
        DenoisingConfig(**values)
