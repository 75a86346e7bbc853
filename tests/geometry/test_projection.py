"""Projection against closed forms, triangulation against known points and the optimum of the reprojection error."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from scipy.optimize import least_squares
from scipy.spatial.transform import Rotation

from zoosplat.geometry.projection import project, triangulate_pairs
from zoosplat.geometry.rotations import level_camera

FloatArray = npt.NDArray[np.float64]

K = np.array([[1600.0, 0, 600], [0, 1500, 500], [0, 0, 1]])


def camera_at(center: npt.ArrayLike) -> FloatArray:
    """World-to-camera [4, 4] of an upright camera at `center` whose optical axis meets the origin."""
    position = np.asarray(center, dtype=np.float64)
    pose = np.eye(4)
    pose[:3, :3] = level_camera(-position)
    pose[:3, 3] = -pose[:3, :3] @ position
    return pose


@pytest.fixture
def rig() -> tuple[FloatArray, FloatArray, FloatArray]:
    """K, poses and P of four cameras about 0.4 m from the origin."""
    poses = np.stack([camera_at(c) for c in ([0.3, 0, 0.2], [0, 0.35, 0.1], [-0.3, 0.1, 0.3], [0.1, -0.4, 0.15])])
    intrinsics = np.tile(K, (4, 1, 1))
    return intrinsics, poses, intrinsics @ poses[:, :3]


def test_project_by_hand() -> None:
    # Camera 0 at the origin looking along +z; camera 1 half a metre behind it.
    poses = np.stack([np.eye(4), np.eye(4)])
    poses[1, 2, 3] = 0.5
    pixels, depth = project([[0.1, -0.2, 2.0], [0, 0, -1.0]], np.stack([K, K]), poses)
    np.testing.assert_allclose(depth, [[2.0, -1.0], [2.5, -0.5]])
    np.testing.assert_allclose(pixels[0, 0], [600 + 1600 * 0.05, 500 - 1500 * 0.1])
    np.testing.assert_allclose(pixels[1, 0], [600 + 1600 * 0.04, 500 - 1500 * 0.08])


def test_project_keeps_the_shape_of_the_points(rig: tuple[FloatArray, FloatArray, FloatArray]) -> None:
    points = np.random.default_rng(0).uniform(-0.1, 0.1, (2, 5, 3))
    pixels, depth = project(points, *rig[:2])
    assert pixels.shape == (4, 2, 5, 2)
    assert depth.shape == (4, 2, 5)
    one = rig[2][3] @ np.append(points[1, 4], 1)
    np.testing.assert_allclose(pixels[3, 1, 4], one[:2] / one[2], atol=1e-9)
    np.testing.assert_allclose(depth[3, 1, 4], one[2])
    assert project([0, 0, 0], *rig[:2])[0].shape == (4, 2)


def test_triangulation_recovers_a_known_point(rig: tuple[FloatArray, FloatArray, FloatArray]) -> None:
    point = np.array([0.031, -0.047, 0.022])
    pixels, _ = project(point, *rig[:2])
    np.testing.assert_allclose(triangulate_pairs(pixels, rig[2]), np.tile(point, (6, 1)), atol=1e-10)


def test_triangulation_is_close_to_the_reprojection_optimum(rig: tuple[FloatArray, FloatArray, FloatArray]) -> None:
    rng = np.random.default_rng(1)
    point = np.array([0.02, 0.01, -0.03])
    intrinsics, poses, matrices = (part[:2] for part in rig)
    pixels = project(point, intrinsics, poses)[0] + rng.normal(0, 0.5, (2, 2))
    best = least_squares(lambda x: (project(x, intrinsics, poses)[0] - pixels).ravel(), point).x
    found = triangulate_pairs(pixels, matrices)[0]
    # Half a pixel is 0.15 mm here; the algebraic answer may differ from the optimum by a small part of that.
    assert np.linalg.norm(best - point) > 1e-5
    assert np.linalg.norm(found - best) < 3e-5


def test_pairs_do_not_depend_on_other_views(rig: tuple[FloatArray, FloatArray, FloatArray]) -> None:
    pixels = project([0.01, 0.02, 0.03], *rig[:2])[0] + np.random.default_rng(2).normal(0, 3, (4, 2))
    pixels[2, 1] = np.nan
    pairs = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    single = [triangulate_pairs(pixels[list(pair)], rig[2][list(pair)])[0] for pair in pairs]
    found = triangulate_pairs(pixels, rig[2])
    np.testing.assert_allclose(found, single, atol=1e-12)
    np.testing.assert_array_equal(np.isnan(found[:, 0]), [False, True, False, True, False, True])


def test_degenerate_pairs_are_nan() -> None:
    side, same, ahead = np.eye(4), np.eye(4), np.eye(4)
    side[0, 3] = -0.2
    ahead[2, 3] = 0.5
    at = np.array([[600.0, 500.0], [600.0, 500.0]])
    # Parallel optical axes; one centre and two rays; one ray twice; a point on the line through both centres.
    for pose, second in ((side, at[1]), (same, at[1] + 40), (same, at[1]), (ahead, at[1])):
        p = K @ np.stack([np.eye(4), pose])[:, :3]
        assert np.isnan(triangulate_pairs([at[0], second], p)).all()
    # The same with rounding: parallel rays of cameras turned alike, and turned cameras that look at each other.
    for turn in Rotation.random(20, random_state=6).as_matrix():
        pair = np.tile(np.eye(4), (2, 1, 1))
        pair[:, :3, :3] = turn
        pair[:, :3, 3] = [[0.1, 0.2, 0.7], [-0.3, 0.1, 0.9]]
        assert np.isnan(triangulate_pairs([[311.7, 222.3]] * 2, K @ pair[:, :3])).all()
        facing = np.stack([camera_at(turn[0]), camera_at(-turn[0])])
        centers = np.stack([-turn[0], turn[0]])
        pixels = [project(c, K[None], pose[None])[0][0] for c, pose in zip(centers, facing, strict=True)]
        assert np.isnan(triangulate_pairs(pixels, K @ facing[:, :3])).all()
