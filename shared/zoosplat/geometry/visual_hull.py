"""Visual hull of a frame on a regular grid, by projecting blocks of voxels before single voxels.

A block whose projection meets no mask pixel in too many views holds no voxel of the hull. The animal fills a few
percent of the volume, so most voxels are never projected. The result is the same as that of projecting every voxel.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
import numpy.typing as npt

from zoosplat.geometry.rotations import rotation_about_z

F64 = npt.NDArray[np.float64]
Bool = npt.NDArray[np.bool_]
# Sides in voxels of the blocks that are projected one after the other.
BLOCKS = (16, 4, 1)


def grid_axis(ell_m: float, grid_size: int) -> F64:
    """Coordinates of the grid points along an axis, metres, centred on 0 (method section 5)."""
    return np.linspace(-ell_m / 2, ell_m / 2, grid_size)


def min_views(n_observed: int, n_absent: int = 0) -> int:
    """Views that must see a hull voxel inside their mask: all but one, and never fewer than two.

    Args:
        n_observed: observed views of the rig.
        n_absent: how many of them are absent from the frame. One of these is the one that may be missing, so then all
            that are there must see a voxel. Hulls of all but one of three views have long bulges.
    """
    return max(2, n_observed - max(1, n_absent))


def grid_projection(intrinsics: F64, world_to_camera: F64, center_m: F64, angle_rad: float) -> F64:
    """Matrices [V, 3, 4] from grid coordinates (rotated by the angle about z, moved to the centre) to pixels."""
    to_world = np.eye(4)
    to_world[:3, :3] = rotation_about_z(angle_rad)
    to_world[:3, 3] = center_m
    return np.asarray(intrinsics @ (world_to_camera @ to_world)[:, :3])


def hull_indices(
    masks: Sequence[Bool] | Bool,
    intrinsics: F64,
    world_to_camera: F64,
    axes: tuple[F64, F64, F64],
    center_m: F64,
    angle_rad: float,
    views_needed: int,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int8]]:
    """Grid indices of the hull's voxels, and how many views agree on each.

    Args:
        masks: V masks [h, w] bool.
        intrinsics: [V, 3, 3], pixels of those masks (pixel centres at integers).
        world_to_camera: [V, 4, 4], metres.
        axes: grid coordinates along x, y, z in the animal's frame, metres, ascending.
        center_m: [3] world position of the grid's origin.
        angle_rad: rotation of the grid about +z.
        views_needed: how many views must see a voxel inside their mask (nearest pixel).

    Returns:
        indices [n, 3] int64, in no particular order; votes [n] int8: views that see the voxel inside their mask.
    """
    to_pixels = grid_projection(intrinsics, world_to_camera, center_m, angle_rad)
    tables = [np.asarray(cv2.integral(np.ascontiguousarray(m, dtype=np.uint8)), np.int32) for m in masks]
    n = np.array([len(a) for a in axes])
    cells = np.stack(np.meshgrid(*(np.arange(0, k, BLOCKS[0]) for k in n), indexing="ij"), -1).reshape(-1, 3)
    for size, smaller in zip(BLOCKS, (*BLOCKS[1:], 0), strict=True):
        if size > 1:
            possible = _blocks_meeting_masks(cells, size, axes, to_pixels, tables, views_needed)
            steps = np.arange(0, size, smaller)
            offsets = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), -1).reshape(-1, 3)
            cells = (cells[possible, None] + offsets).reshape(-1, 3)
            cells = cells[(cells < n).all(axis=1)]
        else:
            votes = _votes(cells, axes, to_pixels, masks)
            cells, votes = cells[votes >= views_needed], votes[votes >= views_needed]
    return cells, votes


def _votes(
    cells: npt.NDArray[np.int64], axes: tuple[F64, F64, F64], to_pixels: F64, masks: Sequence[Bool] | Bool
) -> npt.NDArray[np.int8]:
    points = np.stack([a[cells[:, k]] for k, a in enumerate(axes)])
    votes = np.zeros(len(cells), dtype=np.int8)
    for matrix, mask in zip(to_pixels, masks, strict=True):
        h, w = mask.shape
        x, y, z = matrix[:, :3] @ points + matrix[:, 3:]
        with np.errstate(divide="ignore", invalid="ignore"):
            u, v = x / z + 0.5, y / z + 0.5
        inside = (z > 0) & (u >= 0) & (u < w) & (v >= 0) & (v < h)
        u, v = (np.where(inside, c, 0).astype(np.intp) for c in (u, v))
        votes += inside & mask.reshape(-1)[v * w + u]
    return votes


def _blocks_meeting_masks(
    cells: npt.NDArray[np.int64],
    size: int,
    axes: tuple[F64, F64, F64],
    to_pixels: F64,
    tables: Sequence[npt.NDArray[np.int32]],
    views_needed: int,
) -> Bool:
    """Which blocks of `size` voxels an axis have a mask pixel in the bounding box of their projection, in enough views.

    The projection of a box in front of the camera lies in the convex hull of its projected corners, so no block with a
    hull voxel is dropped; boxes that reach behind a camera are kept.
    """
    low = np.stack([a[cells[:, k]] for k, a in enumerate(axes)])
    high = np.stack([a[np.minimum(cells[:, k] + size - 1, len(a) - 1)] for k, a in enumerate(axes)])
    votes = np.zeros(len(cells), dtype=np.int8)
    for matrix, table in zip(to_pixels, tables, strict=True):
        h, w = table.shape[0] - 1, table.shape[1] - 1
        # The projection of a corner is a sum of one of two terms an axis, so a block takes 6 products instead of 24.
        terms = [[matrix[:, k, None] * side[k] for side in (low, high)] for k in range(3)]
        behind = np.zeros(len(cells), dtype=bool)
        bounds: list[tuple[F64, F64]] = []
        for i in range(8):
            x, y, z = terms[0][i & 1] + terms[1][i >> 1 & 1] + terms[2][i >> 2] + matrix[:, 3:]
            behind |= z <= 0
            z[z <= 0] = 1.0  # A block behind a camera is kept in any case.
            bounds.append((x / z + 0.5, y / z + 0.5))
        u, v = ([b[k] for b in bounds] for k in (0, 1))
        x0, x1 = (np.clip(np.floor(reduce(u)), -1, w) for reduce in (np.minimum.reduce, np.maximum.reduce))
        y0, y1 = (np.clip(np.floor(reduce(v)), -1, h) for reduce in (np.minimum.reduce, np.maximum.reduce))
        x0, y0 = np.maximum(x0, 0).astype(np.intp), np.maximum(y0, 0).astype(np.intp)
        x1, y1 = np.minimum(x1 + 1, w).astype(np.intp), np.minimum(y1 + 1, h).astype(np.intp)
        x1, y1 = np.maximum(x1, x0), np.maximum(y1, y0)
        flat, stride = table.reshape(-1), w + 1
        pixels = flat[y1 * stride + x1] - flat[y0 * stride + x1] - flat[y1 * stride + x0] + flat[y0 * stride + x0]
        votes += (pixels > 0) | behind
    return votes >= views_needed
