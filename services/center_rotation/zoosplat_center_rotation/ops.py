"""Centre and heading of the animal from its visual hulls (method: arXiv 2505.18342, section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from zoosplat.geometry import visual_hull
from zoosplat.geometry.projection import project, triangulate_pairs
from zoosplat.geometry.transport import gaussian_transport_map

F64 = npt.NDArray[np.float64]
Bool = npt.NDArray[np.bool_]

# Smallest share of the hull's voxels that all views must see, for the statistics to be those of these voxels.
MIN_SHARE_OF_ALL_VIEWS = 0.25


def mask_medoid(mask: Bool) -> F64:
    """Weighted median column and row of a mask [h, w]: [2] float64 (x, y), pixels; NaN where it is empty."""
    out = np.full(2, np.nan)
    for k, axis in enumerate((0, 1)):
        cumulative = np.cumsum(mask.sum(axis=axis))
        if cumulative[-1]:
            out[k] = np.searchsorted(cumulative, cumulative[-1] / 2)
    return out


def rough_center(medoids: F64, intrinsics: F64, world_to_camera: F64) -> F64:
    """Component-wise median of the triangulations of every pair of views.

    Args:
        medoids: [V, 2] pixels, NaN where a view's mask is empty or the view is absent.
        intrinsics: [V, 3, 3].
        world_to_camera: [V, 4, 4].

    Returns:
        [3] metres; NaN where fewer than two views see the animal.
    """
    found = np.isfinite(medoids).all(axis=1)
    if found.sum() < 2:
        return np.full(3, np.nan)
    points = triangulate_pairs(medoids[found], intrinsics[found] @ world_to_camera[found, :3])
    points = points[np.isfinite(points).all(axis=1)]
    return np.median(points, axis=0) if len(points) else np.full(3, np.nan)


@dataclass(frozen=True)
class FrameHull:
    """Hull statistics of a frame: mean [3] m, covariance [3, 3] m^2 (NaN without a hull), voxels, shift [C, 2] px."""

    mean: F64
    cov: F64
    n_voxels: int
    shift: F64


def frame_hull(
    masks: Bool,
    seen: Bool,
    observed: list[int],
    intrinsics: F64,
    world_to_camera: F64,
    axis: F64,
    adaptive: bool,
) -> FrameHull:
    """Centre and spread of the visual hull in a cube round the rough centre.

    A view that is absent has no part in it, so a frame of fewer than two observed views has no hull. An empty mask of a
    view that is there says that nothing is where the view looks.

    Args:
        masks: [C, h, w] of all cameras.
        seen: [C], which views are there.
        observed: cameras that carve.
        intrinsics: [C, 3, 3], pixels of the masks.
        world_to_camera: [C, 4, 4], metres.
        axis: grid coordinates of the cube along each axis, metres.
        adaptive: re-aim each principal point so that the triangulated medoid projects onto the view's medoid.
    """
    observed = [c for c in observed if seen[c]]
    medoids = np.stack([mask_medoid(m) for m in masks])
    medoids[~seen] = np.nan
    center = rough_center(medoids[observed], intrinsics[observed], world_to_camera[observed])
    nothing = FrameHull(np.full(3, np.nan), np.full((3, 3), np.nan), 0, np.zeros((len(masks), 2)))
    if not np.isfinite(center).all():
        return nothing
    shift = np.zeros((len(masks), 2))
    if adaptive:
        pixels, _ = project(center, intrinsics, world_to_camera)
        shift = np.nan_to_num(medoids - pixels)
    aimed = intrinsics.copy()
    aimed[:, :2, 2] += shift
    cells, votes = visual_hull.hull_indices(
        masks[observed],
        aimed[observed],
        world_to_camera[observed],
        (axis, axis, axis),
        center,
        0.0,
        visual_hull.min_views(len(observed)),
    )
    if len(cells) < 4:
        return nothing
    # One missing view leaves bulges below the body. Voxels that all views see have none, which halves the error of
    # centre and heading on synthetic recordings. Where a mask fails, all voxels of the hull are used.
    seen_by_all = votes == len(observed)
    chosen = cells[seen_by_all] if seen_by_all.sum() >= MIN_SHARE_OF_ALL_VIEWS * len(cells) else cells
    points = axis[chosen] + center
    return FrameHull(points.mean(axis=0), np.cov(points.T, bias=True), len(cells), shift)


def principal_axis(cov: F64) -> F64:
    """Unit eigenvector [3] of the largest eigenvalue of a covariance [3, 3]."""
    return np.asarray(np.linalg.eigh(cov)[1][:, -1])


def headings(means: F64, covs: F64, valid: Bool) -> F64:
    """Heading over time, radians about +z, continuous (unwrapped).

    The axis of the body is the principal axis of each frame's hull. Its sign is carried from frame to frame: the
    point mean + axis moves by the optimal-transport map between the two Gaussians, and the new axis takes the side on
    which it lands. In the end the whole track is reversed if it runs against the displacement.

    Args:
        means: [T, 3] metres.
        covs: [T, 3, 3] metres^2.
        valid: [T]; other frames are passed over.

    Returns:
        [T] float64; interpolated where not valid, constant beyond the ends.
    """
    at = np.flatnonzero(valid)
    if not len(at):
        return np.zeros(len(means))
    axes = np.empty((len(at), 3))
    axes[0] = principal_axis(covs[at[0]])
    for i in range(1, len(at)):
        carried = gaussian_transport_map(covs[at[i - 1]], covs[at[i]]) @ axes[i - 1]
        axis = principal_axis(covs[at[i]])
        axes[i] = axis if axis @ carried >= 0 else -axis
    forward = np.sum(axes[:-1, :2] * np.diff(means[at, :2], axis=0))
    if forward < 0:
        axes = -axes
    angles = np.unwrap(np.arctan2(axes[:, 1], axes[:, 0]))
    return np.interp(np.arange(len(means)), at, angles)


def interpolate(values: F64, valid: Bool) -> F64:
    """Values [T, ...] with invalid rows interpolated linearly in time, constant beyond the ends."""
    flat = values.reshape(len(values), -1)
    at = np.flatnonzero(valid)
    out = np.stack([np.interp(np.arange(len(values)), at, flat[at, k]) for k in range(flat.shape[1])], axis=1)
    return out.reshape(values.shape)
