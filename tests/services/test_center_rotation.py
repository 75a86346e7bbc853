"""Tracking against hand-worked numbers and moving Gaussians whose heading is known."""

from __future__ import annotations

import numpy as np

from zoosplat.geometry import projection, rotations, visual_hull
from zoosplat.synthetic.recording import SyntheticRecording, render_views
from zoosplat_center_rotation import ops


def test_medoid_by_hand() -> None:
    mask = np.zeros((6, 8), bool)
    mask[1, 2:5] = True  # 3 pixels in row 1
    mask[4, 6] = True  # 1 in row 4
    # Columns 2, 3, 4, 6 hold one pixel each: half of 4 is reached at column 3; rows: at row 1.
    assert ops.mask_medoid(mask).tolist() == [3, 1]
    assert np.isnan(ops.mask_medoid(np.zeros((4, 4), bool))).all()


def test_rough_center_outvotes_a_wrong_view() -> None:
    scene = SyntheticRecording(n_frames=1, n_cameras=5, width=128, height=128)
    k, r, t = scene.cameras
    m = np.tile(np.eye(4), (5, 1, 1))
    m[:, :3, :3], m[:, :3, 3] = r, t
    point = scene.truth.centroid[0]
    pixels, _ = projection.project(point, k, m)
    np.testing.assert_allclose(ops.rough_center(pixels, k, m), point, atol=1e-9)
    pixels[2] += 30
    assert np.linalg.norm(ops.rough_center(pixels, k, m) - point) < 0.002
    pixels[1:] = np.nan
    assert np.isnan(ops.rough_center(pixels, k, m)).all()


def turning_gaussians(n: int = 60) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """An elongated body on a circle, heading along the tangent, 1.5 turns."""
    heading = np.linspace(0.3, 0.3 + 3 * np.pi, n)
    means = 0.1 * np.stack([np.sin(heading), -np.cos(heading), 0 * heading], 1)
    r = rotations.rotation_about_z(heading)
    covs = r @ np.diag([9e-4, 2e-4, 1e-4]) @ r.transpose(0, 2, 1)
    return means, covs, heading


def test_heading_of_a_turning_body() -> None:
    means, covs, heading = turning_gaussians()
    angles = ops.headings(means, covs, np.ones(60, bool))
    np.testing.assert_allclose(angles - angles[0], heading - heading[0], atol=1e-9)
    assert abs(np.angle(np.exp(1j * (angles[0] - heading[0])))) < 1e-9


def test_heading_passes_over_lost_frames() -> None:
    means, covs, heading = turning_gaussians()
    valid = np.ones(60, bool)
    valid[[0, 20, 21, 59]] = False
    means[~valid], covs[~valid] = np.nan, np.nan
    error = np.angle(np.exp(1j * (ops.headings(means, covs, valid) - heading)))
    assert np.abs(error[1:59]).max() < 1e-6
    filled = ops.interpolate(means, valid)
    np.testing.assert_allclose(filled[20], (2 * means[19] + means[22]) / 3)
    np.testing.assert_array_equal(filled[0], means[1])


def test_adaptive_cameras_undo_a_shifted_principal_point() -> None:
    scene = SyntheticRecording(n_frames=1, n_cameras=4, width=128, height=128)
    _, masks = render_views(scene, 0)
    k, r, t = scene.cameras
    m = np.tile(np.eye(4), (4, 1, 1))
    m[:, :3, :3], m[:, :3, 3] = r, t
    axis = visual_hull.grid_axis(0.2, 48)
    straight = ops.frame_hull(masks, np.ones(4, bool), [0, 1, 2, 3], k, m, axis, False)
    assert not straight.shift.any()
    drifted = k.copy()
    drifted[2, :2, 2] += (9, -7)
    aimed = ops.frame_hull(masks, np.ones(4, bool), [0, 1, 2, 3], drifted, m, axis, True)
    broken = ops.frame_hull(masks, np.ones(4, bool), [0, 1, 2, 3], drifted, m, axis, False)
    assert np.abs(aimed.shift[2] + (9, -7)).max() < 5
    assert np.linalg.norm(aimed.mean - straight.mean) < np.linalg.norm(broken.mean - straight.mean)
    assert aimed.n_voxels > broken.n_voxels


def test_no_hull_without_two_views() -> None:
    scene = SyntheticRecording(n_frames=1, n_cameras=4, width=64, height=64)
    _, masks = render_views(scene, 0)
    k, r, t = scene.cameras
    m = np.tile(np.eye(4), (4, 1, 1))
    m[:, :3, :3], m[:, :3, 3] = r, t
    masks = masks.copy()
    masks[1:] = False
    hull = ops.frame_hull(masks, np.ones(4, bool), [0, 1, 2, 3], k, m, visual_hull.grid_axis(0.2, 32), False)
    assert hull.n_voxels == 0
    assert np.isnan(hull.mean).all()
