"""An objective with two trained networks, each with its own loss, optimizer and rate of updates."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiling import QUICK
from little import SIZE, assert_weights_equal, batch

from lcm_jax.config import EMAConfig, OptimizerConfig
from lcm_jax.host.images import to_signed
from lcm_jax.interop.tokenizer import load_tokenizer
from lcm_jax.objectives.base import Objective, Roles, Update
from lcm_jax.parallel.mesh import MeshConfig, make_mesh
from lcm_jax.parallel.partition import place
from lcm_jax.training.networks import frozen_params, initial_params, make_parts
from lcm_jax.training.optimizer import make_optimizer
from lcm_jax.training.program import make_program

STEPS, EVERY, RATE = 3, 2, 3e-3
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, eps=1e-3, warmup_steps=4)  # so that each step has its own rate


@dataclasses.dataclass(frozen=True)
class Options:
    """How strongly the critic's noise counts."""

    noise: float = 0.1


def critic_loss(critic, images, noise):
    return jnp.mean((critic(images) - (images + noise)) ** 2)


def generator_loss(generator, critic, images):
    return jnp.mean((generator(images) - jax.lax.stop_gradient(critic(images))) ** 2)


def updates(options, process):
    def of_critic(networks, inputs, noise):
        loss = critic_loss(networks.by_role["critic"], inputs.images, noise)
        return loss, {"twice": 2 * loss}

    def of_generator(networks, inputs, draws):
        return generator_loss(networks.by_role["generator"], networks.by_role["critic"], inputs.images), {}

    def noise(key, shape):
        return options.noise * jax.random.normal(key, (shape[0], SIZE, SIZE, 3))

    def nothing(key, shape):
        return jnp.zeros(shape[:1])

    return {
        "critic": Update(noise, of_critic, trains=("critic",), learning_rate=RATE),
        "generator": Update(nothing, of_generator, trains=("generator",), every=EVERY),
    }


ADVERSARY = Objective(
    name="adversary",
    options=Options,
    needs=frozenset({"images"}),
    result="model",
    roles=lambda options, family: Roles({"generator": "vae", "critic": "vae"}, exported={"generator": "vae"}),
    updates=updates,
)


@pytest.fixture(scope="module")
def parts(little, configure):
    config, _ = configure(ema=EMAConfig(decay=0.9))
    return make_parts(config, little, load_tokenizer(little), (ADVERSARY, Options()))


@pytest.fixture(scope="module")
def history(little, configure, parts):
    """The state and the metrics after each step, on two devices that share the weights."""
    config, _ = configure(ema=EMAConfig(decay=0.9), optimizer=OPTIMIZER, mesh=MeshConfig(1, 2))
    program = make_program(config, parts, make_mesh(config.mesh, jax.devices()[:2]))
    state = program.start(place(initial_params(config, parts, little), program.state["params"]))
    frozen = place(frozen_params(parts, little), program.frozen)
    assert frozen == {}
    step = program.lower().compile(compiler_options=QUICK)
    history = []
    for i in range(STEPS):
        state, metrics = step(state, frozen, program.put(batch(i)), program.put_stop(0))
        history.append(jax.device_get((state, metrics)))
        state = jax.tree.map(lambda array, like: jax.device_put(array, like.sharding), history[-1][0], program.state)
    return history


def test_each_network_is_updated_at_its_own_rate(history):
    generator = [state["params"]["vae"] for state, _ in history]
    critic = [state["params"]["critic"] for state, _ in history]
    path = "decoder.conv_out.kernel"
    assert (generator[0][path] == generator[1][path]).all()  # step 1 is not due
    assert (generator[1][path] != generator[2][path]).any()
    assert (critic[0][path] != critic[1][path]).any()
    assert [np.isnan(metrics["generator/loss"]).item() for _, metrics in history] == [False, True, False]
    assert all(metrics["critic/twice"] == 2 * metrics["critic/loss"] for _, metrics in history)
    assert "loss" not in history[0][1]  # which of the two would it be?
    assert history[-1][1]["skipped"] == 0
    assert history[-1][0]["ema"].keys() == {"vae"}  # nothing reads the critic's
    averages = [state["ema"]["vae"][path] for state, _ in history]
    assert (averages[0] == averages[1]).all()
    counts = {
        name: {int(count) for _, count in optax.tree.get_all_with_path(state, "count")}
        for name, state in history[-1][0]["opt_state"].items()
    }
    assert counts == {"critic": {STEPS}, "generator": {2}}


def test_it_is_what_two_optimizers_by_hand_do(little, configure, parts, history):
    config, _ = configure(optimizer=OPTIMIZER)
    vae = parts.networks["vae"]
    weights = initial_params(config, parts, little)
    optimizers = {
        "critic": make_optimizer(config.optimizer, config.steps, RATE),
        "vae": make_optimizer(config.optimizer, config.steps, every=EVERY),
    }
    states = {name: optimizer.init(weights[name]) for name, optimizer in optimizers.items()}

    @jax.jit
    def of_critic(flat, images, noise):
        return jax.value_and_grad(lambda flat: critic_loss(lambda x: vae.apply(flat, x), images, noise))(flat)

    @jax.jit
    def of_generator(flat, critic, images):
        def loss(flat):
            return generator_loss(lambda x: vae.apply(flat, x), lambda x: vae.apply(critic, x), images)

        return jax.value_and_grad(loss)(flat)

    def change(name, grads):
        changes, states[name] = optimizers[name].update(grads, states[name], weights[name])
        weights[name] = optax.apply_updates(weights[name], changes)

    for i in range(STEPS):
        images = to_signed(batch(i)["image"])
        key = jax.random.fold_in(jax.random.key(config.seed), i)
        noise = Options().noise * jax.random.normal(key, images.shape)
        loss, grads = of_critic(weights["critic"], images, noise)
        change("critic", grads)
        np.testing.assert_allclose(history[i][1]["critic/loss"], loss, rtol=1e-5)
        if i % EVERY == 0:
            loss, grads = of_generator(weights["vae"], weights["critic"], images)  # the critic that was just updated
            change("vae", grads)
            np.testing.assert_allclose(history[i][1]["generator/loss"], loss, rtol=1e-5)
    for name, flat in weights.items():
        assert_weights_equal(history[-1][0]["params"][name], {path: np.asarray(a) for path, a in flat.items()}, 1e-4)
