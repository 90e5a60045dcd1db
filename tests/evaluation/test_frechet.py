"""Tests the Fréchet distance against closed forms and scipy's matrix square root."""

import numpy as np
import pytest
import scipy.linalg

from lcm_jax.evaluation.frechet import frechet_distance

RANDOM = np.random.default_rng(0)


def samples(mean, covariance, n=500):
    """Returns random samples with exactly this mean and covariance."""
    x = RANDOM.standard_normal((n, len(mean)))
    x -= x.mean(0)
    white = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
    return white @ np.linalg.cholesky(covariance).T + mean


def covariance(d):
    root = RANDOM.standard_normal((d, d))
    return root @ root.T + 0.1 * np.eye(d)


def test_a_dimension_without_spread_adds_its_difference_of_means():
    a, b = (
        np.pad(samples([m, 0], np.diag([s**2, 1])), ((0, 0), (0, 1)), constant_values=m) for m, s in ((1, 2), (4, 7))
    )
    assert frechet_distance(a, b) == pytest.approx(2 * (4 - 1) ** 2 + (7 - 2) ** 2)


def test_of_commuting_covariances():
    a, b = samples([0, 0, 0], np.diag([1.0, 4, 9])), samples([1, 2, -2], np.diag([16.0, 1, 25]))
    assert frechet_distance(a, b) == pytest.approx(9 + (1 - 4) ** 2 + (2 - 1) ** 2 + (3 - 5) ** 2)


def test_of_two_dimensions():
    """In two dimensions tr (A B)^½ = (tr A B + 2 (det A det B)^½)^½."""
    A, B = np.array([[2.0, 1], [1, 3]]), np.array([[5.0, -2], [-2, 1]])
    root = np.sqrt(np.trace(A @ B) + 2 * np.sqrt(np.linalg.det(A) * np.linalg.det(B)))
    expected = np.trace(A) + np.trace(B) - 2 * root
    assert frechet_distance(samples([7, 7], A), samples([7, 7], B)) == pytest.approx(expected)


@pytest.mark.parametrize("n", [100, 40])  # 40 images: rank-deficient covariances, 25 of 64 dimensions without spread
def test_scipys_square_root(n):
    a, b = ((RANDOM.standard_normal((n, 64)) @ covariance(64) + shift).astype(np.float32) for shift in (0.0, 0.5))
    A, B = np.cov(a.T.astype(np.float64)), np.cov(b.T.astype(np.float64))
    mean = a.astype(np.float64).mean(0) - b.astype(np.float64).mean(0)
    expected = mean @ mean + np.trace(A + B - 2 * np.real(scipy.linalg.sqrtm(A @ B)))
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-4)


def test_zero_for_itself_symmetric_and_positive():
    a, b = (RANDOM.standard_normal((200, 64)).astype(np.float32) * scale for scale in (1.0, 1.5))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, RANDOM.permutation(a)) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a))
    assert frechet_distance(a, b) > 5


def test_a_shift_of_both_changes_nothing():
    """Sums are float64, so a mean of 1000 loses no precision."""
    a, b = (np.round(RANDOM.standard_normal((200, 8)) * 64).astype(np.float32) / 64 for _ in range(2))
    assert frechet_distance(a + 1000, b + 1000) == pytest.approx(frechet_distance(a, b), rel=1e-6)
