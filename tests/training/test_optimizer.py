"""The learning rate over the steps of a run, and the optimizers that need less memory than AdamW."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lcm_jax.config import OptimizerConfig
from lcm_jax.training.checkpoint import Checkpoints
from lcm_jax.training.optimizer import learning_rate, make_optimizer, stochastically_rounded

STEPS = 12


def rates(config, updates, **options):
    """The learning rates of successive updates: with a constant gradient, AdamW moves a weight by the rate."""
    optimizer, weight = make_optimizer(config, STEPS, **options), jnp.float32(0)
    state = optimizer.init(weight)
    found = []
    for _ in range(updates):
        change, state = jax.jit(optimizer.update)(jnp.float32(1), state, weight)
        found.append(-change)
    return np.array(found)


@pytest.mark.parametrize("decay", ["constant", "cosine"])
@pytest.mark.parametrize("warmup_steps", [0, 4])
@pytest.mark.parametrize("every", [1, 2, 3])
def test_rarer_updates_have_the_rate_of_their_step(decay, warmup_steps, every):
    config = OptimizerConfig(learning_rate=0.1, decay=decay, warmup_steps=warmup_steps, clip_norm=0.0)
    steps = range(0, STEPS, every)
    expected = [learning_rate(config, STEPS)(step) for step in steps]
    np.testing.assert_allclose(rates(config, len(steps), every=every), expected, rtol=1e-4, atol=1e-6)


def test_warm_up_reaches_an_own_rate_after_its_steps():
    config = OptimizerConfig(learning_rate=0.1, warmup_steps=4)
    found = rates(config, STEPS // 2, own_rate=0.2, every=2)
    np.testing.assert_allclose(found, [0.05, 0.15, 0.2, 0.2, 0.2, 0.2], rtol=1e-4)


SMALL = {"adafactor": {"name": "adafactor"}, "bfloat16": {"moments_dtype": "bfloat16"}}


@pytest.mark.parametrize("options", SMALL.values(), ids=SMALL)
def test_the_small_ones_have_the_same_learning_rate(options):
    config = OptimizerConfig(learning_rate=0.1, warmup_steps=4, clip_norm=0.0, weight_decay=0.5, **options)
    optimizer, weight = make_optimizer(config, STEPS, every=2), jnp.float32(2)
    state, update = optimizer.init(weight), jax.jit(optimizer.update)
    for rate in (0.025, 0.075, 0.1):
        change, state = update(jnp.float32(1), state, weight, key=jax.random.key(0))
        np.testing.assert_allclose(change, -rate * (1 + 0.5 * 2), rtol=1e-3)


def test_adafactor_is_the_papers():
    """Algorithms 4 and 5 of arXiv 1804.04235 in numpy: relative step sizes and momentum are left out."""
    random = np.random.default_rng(0)
    shapes = {"wide": (128, 130), "conv": (2, 2, 130, 128), "thin": (127, 200), "bias": (3,)}
    weights = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    config = OptimizerConfig(name="adafactor", learning_rate=0.1, weight_decay=0.01, clip_norm=0.0)
    optimizer = make_optimizer(config, 10)
    state, update, means = optimizer.init(weights), jax.jit(optimizer.update), {}
    for t in (1, 2, 3):
        grads = {name: (t * random.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}
        changes, state = update(grads, state, weights)
        decay = 1 - t**-0.8
        for name, grad in grads.items():
            square = grad.astype(np.float64) ** 2 + 1e-30
            rows, columns, whole = means.get(name, (0, 0, 0))
            rows = decay * rows + (1 - decay) * square.mean(-1, keepdims=True)
            columns = decay * columns + (1 - decay) * square.mean(-2, keepdims=True) if square.ndim > 1 else 0
            whole = decay * whole + (1 - decay) * square
            means[name] = rows, columns, whole
            factored = name in ("wide", "conv")
            second = rows * columns / rows.mean(-2, keepdims=True) if factored else whole
            scaled = grad / np.sqrt(second)
            scaled /= max(1, np.sqrt((scaled**2).mean()))
            np.testing.assert_allclose(changes[name], -0.1 * (scaled + 0.01 * weights[name]), rtol=1e-4, atol=1e-6)


def test_stochastic_rounding_is_right_in_the_mean():
    seeds = jax.random.bits(jax.random.key(0), (4000,), jnp.uint32)
    x = jnp.asarray([1.0, 1.001, 2.9e-12, 0.0], jnp.float32)
    rounded = np.asarray(jax.vmap(lambda seed: stochastically_rounded(x, seed))(seeds), np.float64)
    for values, exact in zip(rounded.T, np.asarray(x, np.float64), strict=True):
        assert len(set(values)) <= 2
        np.testing.assert_allclose(values.mean(), exact, rtol=2e-4)


def test_moments_in_bfloat16_follow_a_gradient_that_falls():
    """Rounded to the nearest, the mean of squares would stay where it was: several times too large here."""
    b2, count = 0.999, 512

    def train(**options):
        optimizer, weights = make_optimizer(OptimizerConfig(b2=b2, clip_norm=0.0, **options), 1), jnp.zeros(count)

        def step(state, i):
            key = jax.random.fold_in(jax.random.key(0), i)
            grad = jax.random.normal(key, (count,)) * jnp.where(i < 1500, 1.0, 0.1)
            change, state = optimizer.update(grad, state, weights, key=key)
            return state, jnp.sqrt(jnp.mean(change**2))

        return jax.jit(lambda: jax.lax.scan(step, optimizer.init(weights), jnp.arange(3000)))()

    (found, sizes), (expected, exact) = train(moments_dtype="bfloat16"), train()
    np.testing.assert_allclose(np.asarray(sizes)[::299], np.asarray(exact)[::299], rtol=0.03)
    ratio = np.asarray(found[0].nu, np.float64) / np.asarray(expected[0].nu, np.float64)
    assert abs(ratio.mean() - 1) < 0.02
    assert ratio.std() < 0.15


def test_the_memory_of_their_states():
    """AdamW has 8 bytes per weight, in bfloat16 4, Adafactor next to none."""
    weights = {"kernel": jax.ShapeDtypeStruct((1280, 10240), jnp.float32)}

    def bytes_per_weight(**options):
        state = jax.eval_shape(make_optimizer(OptimizerConfig(**options), 1).init, weights)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)) / (1280 * 10240)

    assert bytes_per_weight() == pytest.approx(8, abs=1e-5)
    assert bytes_per_weight(moments_dtype="bfloat16") == pytest.approx(4, abs=1e-5)
    assert bytes_per_weight(name="adafactor") < 0.004


@pytest.mark.parametrize("options", SMALL.values(), ids=SMALL)
def test_they_train(options):
    """The loss of a least-squares problem falls as it does with AdamW."""
    random = np.random.default_rng(0)
    inputs, true = random.standard_normal((64, 128)), random.standard_normal((128, 128)) / 11

    def loss(weights):
        return jnp.mean((inputs @ weights["kernel"] - inputs @ true) ** 2)

    def losses(**given):
        optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-2, clip_norm=0.0, **given), 1)
        weights = {"kernel": jnp.zeros((128, 128))}

        def step(carry, i):
            value, grads = jax.value_and_grad(loss)(carry[0])
            changes, state = optimizer.update(grads, carry[1], carry[0], key=jax.random.fold_in(jax.random.key(1), i))
            return (optax.apply_updates(carry[0], changes), state), value

        return jax.jit(lambda: jax.lax.scan(step, (weights, optimizer.init(weights)), jnp.arange(60)))()[1]

    found, adamw = losses(**options), losses()
    assert adamw[-1] < 0.05 * adamw[0]
    assert found[-1] < 2 * adamw[-1] + 0.02 * adamw[0]


@pytest.mark.parametrize("options", SMALL.values(), ids=SMALL)
def test_from_a_checkpoint_on_they_do_the_same(options, tmp_path):
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.1, **options), 1)
    update = jax.jit(optimizer.update)

    def trained(state, steps):
        for step in steps:
            key = jax.random.fold_in(jax.random.key(0), step)
            grads = {"unet": {"a.kernel": jax.random.normal(key, (128, 136))}}
            changes, opt_state = update(grads, state["opt_state"], state["params"], key=key)
            state = {**state, "params": optax.apply_updates(state["params"], changes), "opt_state": opt_state}
        return state

    params = {"unet": {"a.kernel": jnp.ones((128, 136))}}
    start = {
        "step": jnp.int32(0),
        "params": params,
        "ema": {},
        "opt_state": optimizer.init(params),
        "skipped": jnp.int32(0),
    }
    first = trained(start, range(2))
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        checkpoints.save(2, first, {})
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), first)
    restored = Checkpoints(tmp_path).restore_newest(like)
    assert restored
    for a, b in zip(
        jax.tree.leaves(trained(restored[0], [2, 3])), jax.tree.leaves(trained(start, range(4))), strict=True
    ):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
