"""Latent consistency distillation against a torch transcription of the paper's algorithm, and its identities."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch_lcd import Algorithm1

from lcm_jax.diffusion.distances import DISTANCES
from lcm_jax.diffusion.guidance import w_embedding
from lcm_jax.diffusion.schedule import PREDICTION_TYPES, Schedule
from lcm_jax.diffusion.solvers import SOLVERS
from lcm_jax.errors import UserError
from lcm_jax.objectives.lcd import Draws, LCDConfig, draw, lcd_loss, summary

B, H, W, C, L, D, HIDDEN, W_DIM = 5, 4, 6, 3, 3, 5, 16, 8
CONFIG = LCDConfig(w_embedding_dim=W_DIM)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def make_params(seed, *, w=True):
    """A two-layer network on each pixel, with inputs t, context and w."""
    rng = np.random.default_rng(seed)
    shapes = {"z": (C, HIDDEN), "t": (2, HIDDEN), "condition": (D, HIDDEN), "out": (HIDDEN, C)}
    params = {name: rng.standard_normal(shape).astype(np.float32) * 0.5 for name, shape in shapes.items()}
    return {**params, "w": 0.3 * normal(seed + 100, W_DIM, HIDDEN)} if w else params


def network(library, params, z, t, context, w_emb=None):
    """The same in numpy's dialect of jax and of torch; no w: a teacher."""
    t = t / 300.0
    hidden = library.stack([library.sin(t), library.cos(t)], 1) @ params["t"] + context.mean(1) @ params["condition"]
    if w_emb is not None:
        hidden = hidden + w_emb @ params["w"]
    return library.tanh(z @ params["z"] + hidden[:, None, None]) @ params["out"]


def jax_network(params):
    return lambda z, t, context, w_emb=None: network(jnp, params, z, t, context, w_emb)


BATCH = {"z_0": normal(0, B, H, W, C), "condition": normal(1, B, L, D), "null_condition": normal(2, 1, L, D)}
DRAWS = Draws(
    eps=normal(3, B, H, W, C),
    i=np.array([0, 1, 24, 48, 49]),
    w=np.array([2.0, 14.0, 7.5, 3.25, 9.0], np.float32),
    drop=np.array([False, False, True, False, False]),
)
STUDENT, TARGET, TEACHER = make_params(0), make_params(1), make_params(2, w=False)


def loss_of(params=STUDENT, target=TARGET, teacher=TEACHER, process=Schedule(), draws=DRAWS, config=CONFIG, **batch):
    return lcd_loss(
        jax_network(params),
        jax_network(target),
        jax_network(teacher),
        process,
        draws=draws,
        config=config,
        **{**BATCH, **batch},
    )


# ---- the paper's algorithm, in torch


def torch_network(params):
    return lambda z, t, context, w_emb=None: network(torch, params, z, t, context, w_emb)


def torch_loss(params, target, teacher, prediction_type, config):
    networks = map(torch_network, (params, target, teacher))
    algorithm = Algorithm1(*networks, prediction_type=prediction_type, solver=config.solver)
    z_0, context, null = (torch.from_numpy(BATCH[name]) for name in ("z_0", "condition", "null_condition"))
    # the two libraries' sin(1000 w) differ by more than this test allows: both get one embedding
    w_emb = torch.from_numpy(np.array(w_embedding(DRAWS.w, W_DIM)))
    eps, distance = torch.from_numpy(DRAWS.eps), {"huber_c": config.huber_c, "distance": config.distance}
    return algorithm.loss(z_0, eps, context, null.expand(B, L, D), w_emb, DRAWS, **distance)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_golden_loss_and_gradient(prediction_type, solver, distance):
    config = dataclasses.replace(CONFIG, solver=solver, distance=distance)
    schedule = Schedule(prediction_type=prediction_type)

    def ours(params):
        return loss_of(params, process=schedule, config=config)

    (loss, _), grads = jax.value_and_grad(ours, has_aux=True)(STUDENT)
    tensors = {name: torch.from_numpy(value.copy()).requires_grad_() for name, value in STUDENT.items()}
    constant = ({name: torch.from_numpy(value) for name, value in params.items()} for params in (TARGET, TEACHER))
    theirs = torch_loss(tensors, *constant, prediction_type, config)
    theirs.backward()
    assert abs(loss - theirs.item()) <= 1e-4 * theirs.item()
    for name, tensor in tensors.items():
        gradient = tensor.grad.numpy()
        assert np.abs(grads[name] - gradient).max() <= 1e-4 * np.abs(gradient).max(), name


# ---- identities


def test_no_gradient_into_the_target():
    grads = jax.grad(lambda target: loss_of(target=target)[0])(TARGET)
    assert all((g == 0).all() for g in grads.values())
    grads = jax.grad(lambda both: loss_of(both, both)[0])(STUDENT)  # without EMA the target is the student itself
    alone = jax.grad(lambda params: loss_of(params, STUDENT)[0])(STUDENT)
    for name, gradient in grads.items():
        np.testing.assert_array_equal(gradient, alone[name])


def test_the_student_starts_as_the_teacher():
    """With the teacher's weights and a projection of zero, w changes no bit of the student's output."""
    student = {**TEACHER, "w": np.zeros((W_DIM, HIDDEN), np.float32)}
    seen = []

    def recorded(z, t, context, w_emb):
        seen.append(network(jnp, student, z, t, context, w_emb))
        np.testing.assert_array_equal(seen[-1], network(jnp, TEACHER, z, t, context))
        return seen[-1]

    arguments = jax_network(student), jax_network(TEACHER), Schedule(), *BATCH.values()
    for w in (DRAWS.w, np.zeros(B, np.float32)):
        lcd_loss(recorded, *arguments, DRAWS._replace(w=w), CONFIG)
    np.testing.assert_array_equal(*seen)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_student_that_knows_the_answer_has_no_loss(solver):
    """Where every network says x0 = z_0, psi stays on the line to it, and f is z_0 at each end, except at s = 0."""
    schedule = Schedule(prediction_type="sample")

    def oracle(z, t, context, w_emb=None):
        return jnp.repeat(BATCH["z_0"], len(z) // B, axis=0)

    draws = DRAWS._replace(i=np.array([1, 2, 24, 48, 49]))
    arguments = oracle, oracle, oracle, schedule, *BATCH.values(), draws, dataclasses.replace(CONFIG, solver=solver)
    loss, aux = lcd_loss(*arguments)
    np.testing.assert_allclose(loss, 0, atol=1e-6)
    np.testing.assert_allclose(summary(aux)["rms_difference"], 0, atol=1e-4)


def test_the_last_step_ends_where_f_is_the_identity():
    """i = 0: from t = 19 to s = 0, where the target's network has no effect."""
    first, last = (DRAWS._replace(i=np.full(B, i)) for i in (0, 49))
    other = make_params(9)
    np.testing.assert_array_equal(loss_of(draws=first)[0], loss_of(target=other, draws=first)[0])
    assert loss_of(draws=last)[0] != loss_of(target=other, draws=last)[0]


def test_what_the_networks_are_called_with():
    calls = {}

    def record(name, params):
        def call(z, t, context, *w_emb):
            calls[name] = z, t, context, *w_emb
            return network(jnp, params, z, t, context, *w_emb)

        return call

    lcd_loss(
        record("student", STUDENT), record("target", TARGET), record("teacher", TEACHER), Schedule(), **BATCH,
        draws=DRAWS, config=CONFIG,
    )  # fmt: skip
    t = [19, 39, 499, 979, 999]
    np.testing.assert_array_equal(calls["student"][1], t)
    np.testing.assert_array_equal(calls["target"][1], [0, 19, 479, 959, 979])
    np.testing.assert_array_equal(calls["teacher"][1], np.repeat(t, 2))
    np.testing.assert_array_equal(calls["teacher"][0][::2], calls["student"][0])
    for name in ("student", "target"):
        np.testing.assert_array_equal(calls[name][3], w_embedding(DRAWS.w, W_DIM))
        np.testing.assert_array_equal(calls[name][2][2], BATCH["null_condition"][0])  # dropped
        np.testing.assert_array_equal(calls[name][2][1], BATCH["condition"][1])
    np.testing.assert_array_equal(calls["teacher"][2][1::2], np.repeat(BATCH["null_condition"], B, 0))
    lcd_loss(
        record("student", STUDENT), record("target", TARGET), record("teacher", TEACHER), Schedule(), **BATCH,
        draws=DRAWS, config=dataclasses.replace(CONFIG, w_embedding_dim=0),
    )  # fmt: skip
    assert calls["student"][3] is calls["target"][3] is None


def test_a_dropped_prompt_is_not_guided():
    """With the empty condition both halves are equal, so guidance has no effect on the teacher."""
    drop = DRAWS._replace(drop=np.full(B, True))
    student = {**STUDENT, "w": np.zeros((W_DIM, HIDDEN), np.float32)}
    losses = [loss_of(student, student, draws=drop._replace(w=np.full(B, w, np.float32)))[0] for w in (0, 9)]
    np.testing.assert_allclose(*losses, rtol=1e-4)
    losses = [loss_of(student, student, draws=DRAWS._replace(w=np.full(B, w, np.float32)))[0] for w in (0, 9)]
    assert abs(losses[0] / losses[1] - 1) > 0.1


# ---- draws


def test_draws():
    config = dataclasses.replace(CONFIG, guidance_min=2.0, guidance_max=5.0, empty_prompts=0.25)
    draws = draw(jax.random.key(0), (4000, 1, 2, 1), config, 1000)
    np.testing.assert_array_equal(np.unique(draws.i), np.arange(50))
    assert draws.w.min() >= 1
    assert draws.w.max() <= 4  # guidance_scale - 1
    np.testing.assert_allclose([draws.w.mean(), draws.eps.mean(), draws.eps.std()], [2.5, 0, 1], atol=0.05)
    np.testing.assert_allclose(draws.drop.mean(), 0.25, atol=0.03)
    assert {leaf.dtype.name for leaf in draws} == {"float32", "int32", "bool"}
    other = draw(jax.random.key(1), (4000, 1, 2, 1), config, 1000)
    assert all((a != b).any() for a, b in zip(draws, other, strict=True))
    assert draw(jax.random.key(0), (4000, 1, 2, 1), CONFIG, 1000).drop.sum() == 0


def test_one_guidance_for_all():
    config = dataclasses.replace(CONFIG, guidance_min=4.0, guidance_max=4.0)
    np.testing.assert_array_equal(draw(jax.random.key(0), (3, 1, 1, 1), config, 1000).w, [3, 3, 3])


# ---- options


@pytest.mark.parametrize(
    "change",
    [
        {"skip": 10},
        {"solver": "dpm"},
        {"solver": "dpmpp"},
        {"guidance_min": 1.0},
        {"guidance_max": 30.0},
        {"distance": "l2"},
        {"huber_c": 0.1},
        {"timestep_scaling": 0.01},
        {"empty_prompts": 0.9},
        {"w_embedding_dim": 0},
    ],
    ids=str,
)
def test_each_option_changes_the_loss(change):
    def loss(config):
        return loss_of(draws=draw(jax.random.key(0), BATCH["z_0"].shape, config, 1000), config=config)[0]

    assert abs(loss(dataclasses.replace(CONFIG, **change)) / loss(CONFIG) - 1) > 1e-4


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"solver": "dpm++"}, r"solver is 'dpm\+\+'; did you mean .*dpmpp"),
        ({"distance": "l3"}, "distance is 'l3'; choose from huber, l2"),
        ({"w_embedding_init": "zero"}, "w_embedding_init is 'zero'; did you mean 'zeros'"),
        ({"skip": 0}, "skip is 0"),
        ({"guidance_min": 0.5}, "guidance_min is 0.5; it must be at least 1"),
        ({"guidance_min": float("nan")}, "guidance_min is nan"),
        ({"guidance_min": 5.0, "guidance_max": 4.0}, "guidance_max is 4.0; it can't be below guidance_min 5.0"),
        ({"guidance_max": float("inf")}, "guidance_max is inf"),
        ({"huber_c": 0.0}, "huber_c is 0.0; it must be positive"),
        ({"timestep_scaling": -1.0}, "timestep_scaling is -1.0"),
        ({"empty_prompts": 1.0}, r"empty_prompts is 1.0; it must be in \[0, 1\)"),
        ({"w_embedding_dim": 7}, "w_embedding_dim is 7"),
        ({"w_embedding_dim": 2}, "w_embedding_dim is 2"),
        ({"distance": "l2", "huber_c": 1.0}, "huber_c has no effect: distance is 'l2'"),
        ({"w_embedding_dim": 0, "w_embedding_init": "random"}, "w_embedding_init has no effect: w_embedding_dim is 0"),
    ],
    ids=str,
)
def test_wrong_values_are_named(values, message):
    with pytest.raises(UserError, match=message) as error:
        LCDConfig(**values)
    assert "\n" not in str(error.value)


def test_the_trained_grid_is_the_samplers():
    assert [LCDConfig(skip=k).solver_steps(1000) for k in (1, 15, 20, 45, 1000)] == [1000, 66, 50, 22, 1]
    with pytest.raises(UserError, match=r"skip is 60, but a sampler's 16 steps are 62 timesteps apart; use skip=62"):
        LCDConfig(skip=60).solver_steps(1000)
    with pytest.raises(UserError, match="skip is 1001"):
        LCDConfig(skip=1001).solver_steps(1000)
    assert LCDConfig(skip=62).solver_steps(1000) == 16


def test_options_are_plain():
    assert {type(f.default) for f in dataclasses.fields(LCDConfig)} <= {int, float, str, bool}
