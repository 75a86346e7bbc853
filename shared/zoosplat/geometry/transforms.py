"""Projection, triangulation, rotations and optimal transport in numpy: arrays in, arrays out.

Conventions: OpenCV cameras (x right, y down, z forward), x_cam = R x_world + t, pixel = K x_cam; the centre of the
top-left pixel is (0, 0); quaternions are (w, x, y, z).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

# Far above rounding (1e-16), far below anything two real views of one animal can give.
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


def look_at(eye: FloatArray, target: FloatArray) -> FloatArray:
    """World-to-camera matrix [4, 4] of an upright camera at `eye` [3] that sees `target` [3] in its middle.

    The world's +z is up. The camera must not be straight above or below the target: there, no side is up.
    """
    forward = (target - eye) / np.linalg.norm(target - eye)
    right = np.cross(forward, [0.0, 0.0, 1.0])
    right /= np.linalg.norm(right)
    rotation = np.stack([right, np.cross(forward, right), forward])
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = rotation, -rotation @ eye
    return pose


def triangulate_dlt(
    pixels: npt.ArrayLike,  # [C, 2]
    projections: npt.ArrayLike,  # [C, 3, 4]
) -> FloatArray:
    """World point [3] float64 seen at `pixels` (undistorted, x, y) by cameras with matrices P = K [R | t].

    Direct linear transformation (Hartley and Zisserman, Multiple View Geometry, section 12.2): each view gives two
    planes through the point; with unit normals, the right singular vector of the smallest singular value is the
    answer. Views with a non-finite pixel are left out; nan when fewer than two are left or they do not fix a point.
    """
    seen = np.asarray(pixels, dtype=np.float64)
    matrices = np.asarray(projections, dtype=np.float64)
    finite: npt.NDArray[np.bool_] = np.all(np.isfinite(seen), axis=1)
    if finite.sum() < 2:
        return np.full(3, np.nan)
    point: FloatArray = _intersect(seen[None, finite], matrices[None, finite])[0]
    return point


def triangulate_pairs(
    pixels: npt.ArrayLike,  # [C, 2]
    projections: npt.ArrayLike,  # [C, 3, 4]
) -> FloatArray:
    """World points [C (C - 1) / 2, 3] float64, one for every pair of views, in the order (0,1), (0,2), ... (1,2), ...

    As `triangulate_dlt`. A pair is nan where a pixel is not finite (empty mask) or the two rays do not fix a point:
    parallel rays, one camera centre for both, a point on the line through both centres.
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
    # Rays that share a camera centre meet there whatever they show: the depth is 0.
    usable = (singular[:, 2] > DEGENERATE * singular[:, 0]) & (np.abs(point[:, 3]) > DEGENERATE)
    usable &= depth > DEGENERATE * (1 + np.linalg.norm(xyz, axis=1))
    return np.where(usable[:, None], xyz, np.nan)


def rotation_about_z(angle_rad: npt.ArrayLike) -> FloatArray:
    """Rotation matrices [..., 3, 3] float64 that turn x towards y by `angle_rad` [...]."""
    angle = np.asarray(angle_rad, dtype=np.float64)
    cos, sin = np.cos(angle), np.sin(angle)
    zero, one = np.zeros_like(angle), np.ones_like(angle)
    entries = np.stack([cos, -sin, zero, sin, cos, zero, zero, zero, one], axis=-1)
    return entries.reshape(*angle.shape, 3, 3)


def rotation_between(
    a: npt.ArrayLike,  # [3], not zero
    b: npt.ArrayLike,  # [3], not zero
) -> FloatArray:
    """The rotation [3, 3] float64 by the smallest angle that takes the direction of `a` to that of `b`.

    Opposite directions: half a turn about an axis perpendicular to `a` (which one is arbitrary but fixed).
    """
    start = np.asarray(a, dtype=np.float64) / np.linalg.norm(a)
    end = np.asarray(b, dtype=np.float64) / np.linalg.norm(b)
    middle = start + end
    if np.linalg.norm(middle) < DEGENERATE:
        middle = np.eye(3)[np.argmin(np.abs(start))]
        middle = middle - start * (start @ middle)
    middle = middle / np.linalg.norm(middle)
    # Two reflections: across the plane normal to a (a -> -a), then across the plane normal to the bisector, negated.
    # Their product stays orthonormal where Rodrigues' formula divides by 1 + cos and loses digits.
    rotation: FloatArray = (2 * np.outer(middle, middle) - np.eye(3)) @ (2 * np.outer(start, start) - np.eye(3))
    return rotation


def quaternion_multiply(
    a: npt.ArrayLike,  # [..., 4]
    b: npt.ArrayLike,  # [..., 4]
) -> FloatArray:
    """Hamilton product a b [..., 4] float64 of (w, x, y, z) quaternions: rotation b first, then a. Broadcasts."""
    aw, ax, ay, az = np.moveaxis(np.asarray(a, dtype=np.float64), -1, 0)
    bw, bx, by, bz = np.moveaxis(np.asarray(b, dtype=np.float64), -1, 0)
    return np.stack(
        [
            aw * bw - ax * bx - ay * by - az * bz,
            aw * bx + ax * bw + ay * bz - az * by,
            aw * by - ax * bz + ay * bw + az * bx,
            aw * bz + ax * by - ay * bx + az * bw,
        ],
        axis=-1,
    )


def matrix_from_quaternion(quaternion: npt.ArrayLike) -> FloatArray:
    """Rotation matrices [..., 3, 3] float64 of (w, x, y, z) quaternions [..., 4] of any length but 0."""
    q = np.asarray(quaternion, dtype=np.float64)
    w, x, y, z = np.moveaxis(q / np.linalg.norm(q, axis=-1, keepdims=True), -1, 0)
    entries = np.stack(
        [
            *(1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
            *(2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
            *(2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
        ],
        axis=-1,
    )
    return entries.reshape(*q.shape[:-1], 3, 3)


def quaternion_from_z_angle(angle_rad: npt.ArrayLike) -> FloatArray:
    """Unit quaternions [..., 4] float64 (w, x, y, z) of the rotations `rotation_about_z(angle_rad)`."""
    half = np.asarray(angle_rad, dtype=np.float64) / 2
    zero = np.zeros_like(half)
    return np.stack([np.cos(half), zero, zero, np.sin(half)], axis=-1)


def ot_map_gaussians(
    cov1: npt.ArrayLike,  # [3, 3]
    cov2: npt.ArrayLike,  # [3, 3]
) -> FloatArray:
    """A [3, 3] float64, symmetric, of the optimal-transport map x -> mean2 + A (x - mean1) from N1 to N2.

    A = S1^-1/2 (S1^1/2 S2 S1^1/2)^1/2 S1^-1/2 (Gelbrich 1990; Peyre and Cuturi, Computational Optimal Transport,
    remark 2.31), so A S1 A = S2. Directions in which N1 is flat (eigenvalue below
    1e-12 of the largest) carry no mass and are mapped to 0.
    """
    values, vectors = np.linalg.eigh(np.asarray(cov1, dtype=np.float64))
    values = np.where(values > 1e-12 * values[-1], values, 0.0)
    root = np.sqrt(values)
    inverse = np.divide(1.0, root, out=np.zeros_like(root), where=root > 0)
    root1: FloatArray = (vectors * root) @ vectors.T
    inverse_root1: FloatArray = (vectors * inverse) @ vectors.T
    values, vectors = np.linalg.eigh(root1 @ np.asarray(cov2, dtype=np.float64) @ root1)
    middle: FloatArray = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    return inverse_root1 @ middle @ inverse_root1
