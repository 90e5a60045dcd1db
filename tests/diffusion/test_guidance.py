"""Guidance: the formula, the student's w input, and the single batched call."""

import copy
import re

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lcm_jax.diffusion.guidance import cfg_denoiser, drop_condition, guide, is_guided, w_embedding
from lcm_jax.diffusion.schedule import PREDICTION_TYPES, Schedule


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def network(z, t, context):
    """Different at every sample, timestep and context."""
    return jnp.tanh(z * context.mean((1, 2))[:, None, None, None] + jnp.sin(t / 100.0)[:, None, None, None])


@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.5, 1.0, 1.01, 7.5])
@pytest.mark.parametrize("lcm", [False, True])
def test_guidance_is_on_where_diffusers_has_it_on(teacher_pipeline, lcm_pipeline, scale, lcm):
    unet = (lcm_pipeline if lcm else teacher_pipeline).unet
    pipeline = copy.copy(teacher_pipeline)  # one class for both: the other has no such property to ask
    pipeline.__dict__.update(unet=unet, _guidance_scale=scale)
    assert is_guided(scale, unet.config.time_cond_proj_dim) == pipeline.do_classifier_free_guidance


def test_guide():
    cond, uncond = normal(0, 3, 2, 2, 1), normal(1, 3, 2, 2, 1)
    w = jnp.array([0.0, -1.0, 2.0])
    mixed = guide(cond, uncond, w)
    np.testing.assert_array_equal(mixed[0], cond[0])
    np.testing.assert_array_equal(mixed[1], uncond[1])
    np.testing.assert_allclose(mixed[2], 3 * cond[2] - 2 * uncond[2], rtol=1e-6)


@pytest.mark.parametrize("dim", [4, 32, 255, 256])
def test_w_embedding_is_the_peers(dim):
    w = np.array([0, 0.123, 1, 2, 6.5, 7.77, 13.999, 14], np.float32)
    peer = diffusers.LatentConsistencyModelPipeline.get_guidance_scale_embedding
    theirs = peer(None, torch.from_numpy(w), embedding_dim=dim)
    ours = w_embedding(w, dim)
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, theirs, atol=1e-3)
    assert np.abs(np.diff(ours, axis=0)).max(axis=1).min() > 0.1


def test_w_embedding_stays_float32_for_a_bfloat16_w():
    w = jnp.array([3.0, 7.0])
    np.testing.assert_array_equal(w_embedding(w.astype(jnp.bfloat16), 8), w_embedding(w, 8))


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("nulls", [1, 3], ids=["one_null_for_all", "a_null_each"])
def test_one_call_is_two_calls(prediction_type, nulls):
    """The mix of outputs is the mix of x0 and of eps."""
    schedule = Schedule(prediction_type=prediction_type)
    z, t, w = normal(0, 3, 4, 4, 2), jnp.array([19, 400, 999]), jnp.array([0.0, 2.5, 9.0])
    context, null = normal(1, 3, 5, 6), normal(2, nulls, 5, 6)
    sizes = []

    def counted(z, t, context):
        sizes.append(len(z))
        return network(z, t, context)

    x0, eps = cfg_denoiser(counted, schedule, context, null, w)(z, t)
    assert sizes == [6]
    cond = schedule.to_x0_eps(network(z, t, context), z, t)
    uncond = schedule.to_x0_eps(network(z, t, np.broadcast_to(null, context.shape)), z, t)
    np.testing.assert_allclose(x0, guide(cond[0], uncond[0], w), rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(eps, guide(cond[1], uncond[1], w), rtol=1e-4, atol=1e-4)


def test_the_doubled_batch_stays_on_its_devices():
    """No collective is needed for a batch over eight devices; a plain concatenation would move half of it."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    over_batch, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    schedule = Schedule()

    def x0(z, t, context, null, w):
        def pinned(z, t, context):
            z, t, context = jax.lax.with_sharding_constraint((z, t, context), over_batch)
            return network(z, t, context)

        return cfg_denoiser(pinned, schedule, context, null, w)(z, t)[0]

    arguments = normal(0, 16, 2, 2, 1), np.arange(16), normal(1, 16, 3, 4), normal(2, 1, 3, 4), normal(3, 16)
    shardings = (over_batch, over_batch, over_batch, whole, over_batch)
    compiled = jax.jit(x0, in_shardings=shardings, out_shardings=over_batch).lower(*arguments).compile()
    assert not re.findall(r"all-gather|all-to-all|collective-permute|all-reduce", compiled.as_text())
    np.testing.assert_allclose(
        compiled(*jax.device_put(arguments, shardings)), x0_plain(schedule, arguments), rtol=1e-5
    )


def x0_plain(schedule, arguments):
    z, t, context, null, w = arguments
    return cfg_denoiser(network, schedule, context, null, w)(z, t)[0]


def test_dropped_conditions_are_null():
    context, null = normal(0, 4, 3, 2), normal(1, 1, 3, 2)
    dropped = drop_condition(context, null, jnp.array([True, False, False, True]))
    np.testing.assert_array_equal(dropped, np.stack([null[0], context[1], context[2], null[0]]))
