"""Commands as a user runs them, but in this process."""

import functools

import jax

from lcm_jax import cli, train


def train_on_one(argv):
    """Runs the train command on one device: eight copies of each array make Orbax slow and nothing clearer.

    Returns its exit code.
    """
    return cli.run(functools.partial(train.main, devices=jax.devices()[:1]), argv, "train")
