"""Projection of points into cameras and triangulation of points from pixels, in NumPy.

Conventions: OpenCV cameras (x right, y down, z forward), x_cam = R x_world + t, pixel = K x_cam. The centre of the
top-left pixel is (0, 0).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

# Smallest ratio of singular values, of homogeneous coordinates and of depth to distance at which rays fix a point. It
# lies far above rounding (1e-16) and far below what two real views of one animal give.
DEGENERATE = 1e-9


def project(
    points_m: npt.ArrayLike,  # [..., 3]
    intrinsics: npt.ArrayLike,  # [C, 3, 3]
    world_to_camera: npt.ArrayLike,  # [C, 4, 4]
) -> tuple[FloatArray, FloatArray]:
    """Pixels [C, ..., 2] float64 (x, y) and depths [C, ...] float64 of world points in every camera.

    The last row of K is (0, 0, 1). Depth is z in the camera frame, in the unit of the points; points at or behind the
    camera have depth <= 0 and meaningless (possibly infinite or nan) pixels: test the depth. No distortion.
    """
    points = np.asarray(points_m, dtype=np.float64)
    k = np.asarray(intrinsics, dtype=np.float64)
    pose = np.asarray(world_to_camera, dtype=np.float64)
    in_camera = points.reshape(1, -1, 3) @ pose[:, :3, :3].transpose(0, 2, 1) + pose[:, None, :3, 3]
    depth: FloatArray = in_camera[..., 2]
    with np.errstate(divide="ignore", invalid="ignore"):
        pixels: FloatArray = (in_camera @ k.transpose(0, 2, 1))[..., :2] / depth[..., None]
    shape = (len(k), *points.shape[:-1])
    return pixels.reshape(*shape, 2), depth.reshape(shape)


def triangulate_pairs(
    pixels: npt.ArrayLike,  # [C, 2]
    projections: npt.ArrayLike,  # [C, 3, 4]
) -> FloatArray:
    """World points [C (C - 1) / 2, 3] float64, one for every pair of views, in the order (0,1), (0,2), ... (1,2), ...

    Args:
        pixels: undistorted pixels (x, y) of one point in each of C views.
        projections: the views' matrices P = K [R | t].

    Direct linear transformation (Hartley and Zisserman, Multiple View Geometry, section 12.2): each view gives two
    planes through the point, whose normals are scaled to unit length. The point is the right singular vector of the
    smallest singular value. A pair is nan where a pixel is not finite (empty mask) or where the two rays do not fix a
    point: parallel rays, one camera centre for both, or a point on the line through both centres.
    """
    seen = np.asarray(pixels, dtype=np.float64)
    matrices = np.asarray(projections, dtype=np.float64)
    pairs = np.stack(np.triu_indices(len(seen), k=1), axis=1)
    points = np.full((len(pairs), 3), np.nan)
    finite: npt.NDArray[np.bool_] = np.all(np.isfinite(seen)[pairs], axis=(1, 2))
    points[finite] = _intersect(seen[pairs[finite]], matrices[pairs[finite]])
    return points


def _intersect(
    pixels: FloatArray,  # [N, V, 2]
    projections: FloatArray,  # [N, V, 3, 4]
) -> FloatArray:
    """Least-squares common point [N, 3] of the 2 V planes of each of N sets of rays; nan where there is none."""
    depth_row = projections[:, :, 2:3]
    planes = pixels[..., None] * depth_row - projections[:, :, :2]
    planes = planes / np.linalg.norm(planes[..., :3], axis=-1, keepdims=True)
    _, singular, vectors = np.linalg.svd(planes.reshape(len(planes), 2 * pixels.shape[1], 4))
    point = vectors[:, -1]
    with np.errstate(divide="ignore", invalid="ignore"):
        xyz = point[:, :3] / point[:, 3:]
        depth = np.abs((depth_row[:, :, 0] * point[:, None]).sum(-1) / point[:, 3:]).min(axis=1)
    # Rays that share a camera centre meet there, at depth 0, whatever the pixels are.
    usable = (singular[:, 2] > DEGENERATE * singular[:, 0]) & (np.abs(point[:, 3]) > DEGENERATE)
    usable &= depth > DEGENERATE * (1 + np.linalg.norm(xyz, axis=1))
    return np.where(usable[:, None], xyz, np.nan)
