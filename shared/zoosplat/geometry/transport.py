"""Optimal transport between Gaussian distributions, in NumPy."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

# Share of the largest eigenvalue below which a Gaussian counts as flat in a direction.
FLAT = 1e-12


def gaussian_transport_map(
    cov1: npt.ArrayLike,  # [3, 3]
    cov2: npt.ArrayLike,  # [3, 3]
) -> FloatArray:
    """A [3, 3] float64, symmetric, of the optimal-transport map x -> mean2 + A (x - mean1) from N1 to N2.

    A = S1^-1/2 (S1^1/2 S2 S1^1/2)^1/2 S1^-1/2 (Gelbrich 1990; Peyre and Cuturi, Computational Optimal Transport,
    remark 2.31), so A S1 A = S2. Directions in which N1 is flat carry no mass and are mapped to 0.
    """
    values, vectors = np.linalg.eigh(np.asarray(cov1, dtype=np.float64))
    values = np.where(values > FLAT * values[-1], values, 0.0)
    root = np.sqrt(values)
    inverse = np.divide(1.0, root, out=np.zeros_like(root), where=root > 0)
    root1: FloatArray = (vectors * root) @ vectors.T
    inverse_root1: FloatArray = (vectors * inverse) @ vectors.T
    values, vectors = np.linalg.eigh(root1 @ np.asarray(cov2, dtype=np.float64) @ root1)
    middle: FloatArray = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    return inverse_root1 @ middle @ inverse_root1
