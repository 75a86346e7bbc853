"""The optimal-transport map between Gaussians, by hand and by its definition."""

from __future__ import annotations

import numpy as np
from scipy.spatial.transform import Rotation

from zoosplat.geometry.transport import gaussian_transport_map


def test_transport_map_by_hand_and_by_its_definition() -> None:
    # Aligned axes: standard deviations 1, 2, 3 to 2, 1, 6.
    by_hand = gaussian_transport_map(np.diag([1.0, 4, 9]), np.diag([4.0, 1, 36]))
    np.testing.assert_allclose(by_hand, np.diag([2, 0.5, 2]), atol=1e-14)
    rng = np.random.default_rng(4)
    roots = rng.normal(size=(2, 3, 3)) * 1e-2
    cov1, cov2 = roots @ roots.transpose(0, 2, 1)
    a = gaussian_transport_map(cov1, cov2)
    # The optimal map is the only symmetric positive one that carries one covariance into the other.
    np.testing.assert_allclose(a @ cov1 @ a, cov2, atol=1e-12 * np.abs(cov2).max())
    np.testing.assert_allclose(a, a.T, atol=1e-10)
    assert (np.linalg.eigvalsh(a) > 0).all()


def test_transport_map_of_a_flat_cloud_is_finite() -> None:
    # Turned, so that rounding leaves the third eigenvalue near 0 but not at it.
    for turn in Rotation.random(20, random_state=5).as_matrix():
        cov1, cov2, expected = (turn @ np.diag(d) @ turn.T for d in ([1.0, 4, 0], [4.0, 4, 1], [2.0, 1, 0]))
        np.testing.assert_allclose(gaussian_transport_map(cov1, cov2), expected, atol=1e-6)
