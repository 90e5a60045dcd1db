"""Runs commands as a user does, but in the test process."""

import functools

import jax

from lcm_jax import cli, train


def train_on_one(argv):
    """Runs the train command on one device and returns its exit code.

    Eight copies of each array would slow Orbax down and test nothing more.
    """
    return cli.run(functools.partial(train.main, devices=jax.devices()[:1]), argv, "train")
