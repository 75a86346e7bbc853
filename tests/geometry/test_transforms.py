from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from scipy.optimize import least_squares
from scipy.spatial.transform import Rotation

from zoosplat.geometry import transforms

FloatArray = npt.NDArray[np.float64]

K = np.array([[1600.0, 0, 600], [0, 1500, 500], [0, 0, 1]])


def look_at(center: npt.ArrayLike) -> FloatArray:
    """World-to-camera [4, 4] of an upright camera at `center` whose optical axis meets the origin."""
    position = np.asarray(center, dtype=np.float64)
    forward = -position / np.linalg.norm(position)
    right = np.cross(forward, [0, 0, 1])
    right /= np.linalg.norm(right)
    pose = np.eye(4)
    pose[:3, :3] = [right, np.cross(forward, right), forward]
    pose[:3, 3] = -pose[:3, :3] @ position
    return pose


@pytest.fixture
def rig() -> tuple[FloatArray, FloatArray, FloatArray]:
    """K, poses and P of four cameras about 0.4 m from the origin."""
    poses = np.stack([look_at(c) for c in ([0.3, 0, 0.2], [0, 0.35, 0.1], [-0.3, 0.1, 0.3], [0.1, -0.4, 0.15])])
    intrinsics = np.tile(K, (4, 1, 1))
    return intrinsics, poses, intrinsics @ poses[:, :3]


def test_project_by_hand() -> None:
    # Camera 0 at the origin looking along +z; camera 1 half a metre behind it.
    poses = np.stack([np.eye(4), np.eye(4)])
    poses[1, 2, 3] = 0.5
    pixels, depth = transforms.project([[0.1, -0.2, 2.0], [0, 0, -1.0]], np.stack([K, K]), poses)
    np.testing.assert_allclose(depth, [[2.0, -1.0], [2.5, -0.5]])
    np.testing.assert_allclose(pixels[0, 0], [600 + 1600 * 0.05, 500 - 1500 * 0.1])
    np.testing.assert_allclose(pixels[1, 0], [600 + 1600 * 0.04, 500 - 1500 * 0.08])


def test_project_keeps_the_shape_of_the_points(rig: tuple[FloatArray, FloatArray, FloatArray]) -> None:
    points = np.random.default_rng(0).uniform(-0.1, 0.1, (2, 5, 3))
    pixels, depth = transforms.project(points, *rig[:2])
    assert pixels.shape == (4, 2, 5, 2)
    assert depth.shape == (4, 2, 5)
    one = rig[2][3] @ np.append(points[1, 4], 1)
    np.testing.assert_allclose(pixels[3, 1, 4], one[:2] / one[2], atol=1e-9)
    np.testing.assert_allclose(depth[3, 1, 4], one[2])
    assert transforms.project([0, 0, 0], *rig[:2])[0].shape == (4, 2)


def test_triangulation_recovers_a_known_point(rig: tuple[FloatArray, FloatArray, FloatArray]) -> None:
    point = np.array([0.031, -0.047, 0.022])
    pixels, _ = transforms.project(point, *rig[:2])
    np.testing.assert_allclose(transforms.triangulate_dlt(pixels, rig[2]), point, atol=1e-10)
    np.testing.assert_allclose(transforms.triangulate_pairs(pixels, rig[2]), np.tile(point, (6, 1)), atol=1e-10)


def test_triangulation_is_close_to_the_reprojection_optimum(rig: tuple[FloatArray, FloatArray, FloatArray]) -> None:
    rng = np.random.default_rng(1)
    point = np.array([0.02, 0.01, -0.03])
    pixels = transforms.project(point, *rig[:2])[0] + rng.normal(0, 0.5, (4, 2))
    best = least_squares(lambda x: (transforms.project(x, *rig[:2])[0] - pixels).ravel(), point).x
    found = transforms.triangulate_dlt(pixels, rig[2])
    # Half a pixel is 0.15 mm here; the algebraic answer may differ from the optimum by a small part of that.
    assert np.linalg.norm(best - point) > 1e-5
    assert np.linalg.norm(found - best) < 3e-5


def test_pairs_agree_with_single_triangulations(rig: tuple[FloatArray, FloatArray, FloatArray]) -> None:
    pixels = transforms.project([0.01, 0.02, 0.03], *rig[:2])[0] + np.random.default_rng(2).normal(0, 3, (4, 2))
    pixels[2, 1] = np.nan
    pairs = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    single = [transforms.triangulate_dlt(pixels[list(pair)], rig[2][list(pair)]) for pair in pairs]
    found = transforms.triangulate_pairs(pixels, rig[2])
    np.testing.assert_allclose(found, single, atol=1e-12)
    np.testing.assert_array_equal(np.isnan(found[:, 0]), [False, True, False, True, False, True])
    without = transforms.triangulate_dlt(pixels[[0, 1, 3]], rig[2][[0, 1, 3]])
    np.testing.assert_allclose(transforms.triangulate_dlt(pixels, rig[2]), without, atol=1e-12)


def test_degenerate_pairs_are_nan() -> None:
    side, same, ahead = np.eye(4), np.eye(4), np.eye(4)
    side[0, 3] = -0.2
    ahead[2, 3] = 0.5
    at = np.array([[600.0, 500.0], [600.0, 500.0]])
    # Parallel optical axes; one centre and two rays; one ray twice; a point on the line through both centres.
    for pose, second in ((side, at[1]), (same, at[1] + 40), (same, at[1]), (ahead, at[1])):
        p = K @ np.stack([np.eye(4), pose])[:, :3]
        assert np.isnan(transforms.triangulate_pairs([at[0], second], p)).all()
        assert np.isnan(transforms.triangulate_dlt([at[0], second], p)).all()
    # The same with rounding: parallel rays of cameras turned alike, and turned cameras that look at each other.
    for turn in Rotation.random(20, random_state=6).as_matrix():
        pair = np.tile(np.eye(4), (2, 1, 1))
        pair[:, :3, :3] = turn
        pair[:, :3, 3] = [[0.1, 0.2, 0.7], [-0.3, 0.1, 0.9]]
        assert np.isnan(transforms.triangulate_pairs([[311.7, 222.3]] * 2, K @ pair[:, :3])).all()
        facing = np.stack([look_at(turn[0]), look_at(-turn[0])])
        centers = np.stack([-turn[0], turn[0]])
        pixels = [transforms.project(c, K[None], pose[None])[0][0] for c, pose in zip(centers, facing, strict=True)]
        assert np.isnan(transforms.triangulate_pairs(pixels, K @ facing[:, :3])).all()
    assert np.isnan(transforms.triangulate_dlt(at[:1], K[None] @ np.eye(4)[None, :3])).all()


@pytest.mark.parametrize(
    ("a", "b"),
    [([0, 0, 1], [0, 0, 1]), ([1, 0, 0], [0, 2, 0]), ([0, 0, -3], [0, 0, 1]), ([1, 2, 3], [-1, -2, -3 + 1e-6])],
)
def test_rotation_between(a: list[float], b: list[float]) -> None:
    rotation = transforms.rotation_between(a, b)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-14)
    assert np.linalg.det(rotation) == pytest.approx(1)
    unit_a, unit_b = np.array(a) / np.linalg.norm(a), np.array(b) / np.linalg.norm(b)
    np.testing.assert_allclose(rotation @ unit_a, unit_b, atol=1e-9)
    # Smallest: it turns by the angle between the two and no more.
    angle = np.arccos(np.clip(unit_a @ unit_b, -1, 1))
    assert Rotation.from_matrix(rotation).magnitude() == pytest.approx(angle, abs=1e-7)


def test_rotation_between_axes_by_hand() -> None:
    np.testing.assert_allclose(
        transforms.rotation_between([1, 0, 0], [0, 1, 0]), [[0, -1, 0], [1, 0, 0], [0, 0, 1]], atol=1e-15
    )


def test_quaternions_agree_with_scipy() -> None:
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(2, 7, 4))
    turn_a, turn_b = (Rotation.from_quat(q, scalar_first=True) for q in (a, b))
    np.testing.assert_allclose(transforms.matrix_from_quaternion(a), turn_a.as_matrix(), atol=1e-14)
    product = transforms.quaternion_multiply(a, b)
    np.testing.assert_allclose(transforms.matrix_from_quaternion(product), (turn_a * turn_b).as_matrix(), atol=1e-14)
    # i j = k, j i = -k.
    i, j = [0, 1, 0, 0], [0, 0, 1, 0]
    np.testing.assert_array_equal(transforms.quaternion_multiply(i, j), [0, 0, 0, 1])
    np.testing.assert_array_equal(transforms.quaternion_multiply(j, i), [0, 0, 0, -1])


def test_turns_about_z() -> None:
    angles = np.array([[0.0, np.pi / 2], [-2.0, 7.0]])
    matrices = transforms.rotation_about_z(angles)
    assert matrices.shape == (2, 2, 3, 3)
    np.testing.assert_allclose(matrices[0, 1] @ [1, 0, 0], [0, 1, 0], atol=1e-15)
    np.testing.assert_allclose(
        transforms.matrix_from_quaternion(transforms.quaternion_from_z_angle(angles)), matrices, atol=1e-15
    )
    np.testing.assert_allclose(transforms.quaternion_from_z_angle(np.pi), [0, 0, 0, 1], atol=1e-15)


def test_ot_map_by_hand_and_by_its_definition() -> None:
    # Aligned axes: standard deviations 1, 2, 3 to 2, 1, 6.
    by_hand = transforms.ot_map_gaussians(np.diag([1.0, 4, 9]), np.diag([4.0, 1, 36]))
    np.testing.assert_allclose(by_hand, np.diag([2, 0.5, 2]), atol=1e-14)
    rng = np.random.default_rng(4)
    roots = rng.normal(size=(2, 3, 3)) * 1e-2
    cov1, cov2 = roots @ roots.transpose(0, 2, 1)
    a = transforms.ot_map_gaussians(cov1, cov2)
    # The optimal map is the only symmetric positive one that carries one covariance into the other.
    np.testing.assert_allclose(a @ cov1 @ a, cov2, atol=1e-12 * np.abs(cov2).max())
    np.testing.assert_allclose(a, a.T, atol=1e-10)
    assert (np.linalg.eigvalsh(a) > 0).all()


def test_ot_map_of_a_flat_cloud_is_finite() -> None:
    # Turned, so that rounding leaves the third eigenvalue near 0 but not at it.
    for turn in Rotation.random(20, random_state=5).as_matrix():
        cov1, cov2, expected = (turn @ np.diag(d) @ turn.T for d in ([1.0, 4, 0], [4.0, 4, 1], [2.0, 1, 0]))
        np.testing.assert_allclose(transforms.ot_map_gaussians(cov1, cov2), expected, atol=1e-6)
