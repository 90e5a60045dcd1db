"""Shared by the tests of this folder: sizes of small runs, their data, and the collectives of their programs."""

import numpy as np

from lcm_jax.digits.presets import TOKENS

SIZE, BATCH = 8, 16
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


def batch(seed):
    random = np.random.default_rng(seed)
    return {
        "image": random.integers(0, 256, (BATCH, SIZE, SIZE, 3), np.uint8),
        "input_ids": random.integers(0, 300, (BATCH, TOKENS), np.int32),
    }


def collectives(text):
    """The collective operations in the text of a compiled program, by kind."""
    return {kind: text.count(f" {kind}(") + text.count(f" {kind}-start(") for kind in KINDS}


def assert_weights_equal(found, expected, tolerance=1e-5):
    """Each weight, relative to its largest element; not the biases of keys: no softmax sees them, they are rounding."""
    assert found.keys() == expected.keys()
    for path, array in expected.items():
        if not path.endswith("to_k.bias"):
            assert np.abs(found[path] - array).max() <= tolerance * np.abs(array).max(), path
