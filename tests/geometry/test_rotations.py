"""Rotations against SciPy and by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from zoosplat.geometry import rotations


@pytest.mark.parametrize(
    ("a", "b"),
    [([0, 0, 1], [0, 0, 1]), ([1, 0, 0], [0, 2, 0]), ([0, 0, -3], [0, 0, 1]), ([1, 2, 3], [-1, -2, -3 + 1e-6])],
)
def test_rotation_between(a: list[float], b: list[float]) -> None:
    rotation = rotations.rotation_between(a, b)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-14)
    assert np.linalg.det(rotation) == pytest.approx(1)
    unit_a, unit_b = np.array(a) / np.linalg.norm(a), np.array(b) / np.linalg.norm(b)
    np.testing.assert_allclose(rotation @ unit_a, unit_b, atol=1e-9)
    # Smallest: it turns by the angle between the two and no more.
    angle = np.arccos(np.clip(unit_a @ unit_b, -1, 1))
    assert Rotation.from_matrix(rotation).magnitude() == pytest.approx(angle, abs=1e-7)


def test_rotation_between_axes_by_hand() -> None:
    np.testing.assert_allclose(
        rotations.rotation_between([1, 0, 0], [0, 1, 0]), [[0, -1, 0], [1, 0, 0], [0, 0, 1]], atol=1e-15
    )


def test_quaternions_agree_with_scipy() -> None:
    quaternions = np.random.default_rng(3).normal(size=(7, 4))
    expected = Rotation.from_quat(quaternions, scalar_first=True).as_matrix()
    np.testing.assert_allclose(rotations.matrix_from_quaternion(quaternions), expected, atol=1e-14)


def test_turns_about_z() -> None:
    angles = np.array([[0.0, np.pi / 2], [-2.0, 7.0]])
    matrices = rotations.rotation_about_z(angles)
    assert matrices.shape == (2, 2, 3, 3)
    np.testing.assert_allclose(matrices[0, 1] @ [1, 0, 0], [0, 1, 0], atol=1e-15)
    for angle, matrix in zip(angles.ravel(), matrices.reshape(-1, 3, 3), strict=True):
        np.testing.assert_allclose(Rotation.from_euler("z", angle).as_matrix(), matrix, atol=1e-15)
        np.testing.assert_allclose(rotations.axis_angle((0, 0, 2), angle), matrix, atol=1e-15)


def test_level_cameras_see_the_horizon_level() -> None:
    directions = np.array([[[1.0, 0, 0], [0, -2, 0]], [[0.3, 0.4, -1.2], [-5, 1, 3]]])
    cameras = rotations.level_camera(directions)
    assert cameras.shape == (2, 2, 3, 3)
    np.testing.assert_allclose(cameras @ cameras.swapaxes(-1, -2), np.tile(np.eye(3), (2, 2, 1, 1)), atol=1e-15)
    np.testing.assert_allclose(np.linalg.det(cameras), 1)
    np.testing.assert_array_equal(cameras[..., 0, 2], 0)  # right is horizontal
    assert (cameras[..., 1, 2] < 0).all()  # down points down
    lengths = np.linalg.norm(directions, axis=-1, keepdims=True)
    np.testing.assert_allclose(cameras[..., 2, :], directions / lengths, atol=1e-15)
    # A level camera that looks along x has y to its left.
    np.testing.assert_allclose(cameras[0, 0], [[0, -1, 0], [0, 0, -1], [1, 0, 0]], atol=1e-15)
