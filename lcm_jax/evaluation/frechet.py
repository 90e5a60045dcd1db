"""Fréchet distance between two sets of features, modelled as normal distributions (FID, arXiv 1706.08500)."""

import numpy as np
from jaxtyping import Float


def frechet_distance(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"]) -> float:
    """Returns |mean_a - mean_b|² + tr(A + B - 2 (A B)^½) with covariances A and B, computed in float64.

    It is biased upwards for small sets: compare only distances of equally many images, and use more than d.
    """
    (mean_a, A), (mean_b, B) = (
        (x.mean(0), np.cov(x, rowvar=False)) for x in (a.astype(np.float64), b.astype(np.float64))
    )
    # A B has the eigenvalues of the symmetric A^½ B A^½, which are negative only by rounding
    root = _square_root(A)
    cross = np.sqrt(np.clip(np.linalg.eigvalsh(root @ B @ root), 0, None)).sum()
    return float(np.sum((mean_a - mean_b) ** 2) + np.trace(A) + np.trace(B) - 2 * cross)


def _square_root(symmetric: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(symmetric)
    return (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
