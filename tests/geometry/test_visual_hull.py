"""The visual hull against a twin that projects every voxel, and against numbers worked out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from zoosplat.geometry import visual_hull
from zoosplat.synthetic.cameras import ring_of_cameras


def slow_hull(
    masks: Any, intrinsics: Any, world_to_camera: Any, axes: Any, center: Any, angle: float, needed: int
) -> Any:
    """Every voxel, one at a time, straight from the definition."""
    found = {}
    c, s = np.cos(angle), np.sin(angle)
    rotation = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    for index in np.ndindex(*(len(a) for a in axes)):
        world = rotation @ [a[i] for a, i in zip(axes, index, strict=True)] + center
        votes = 0
        for mask, k, m in zip(masks, intrinsics, world_to_camera, strict=True):
            x, y, z = k @ (m[:3, :3] @ world + m[:3, 3])
            if z > 0:
                u, v = int(np.floor(x / z + 0.5)), int(np.floor(y / z + 0.5))
                votes += 0 <= u < mask.shape[1] and 0 <= v < mask.shape[0] and bool(mask[v, u])
        if votes >= needed:
            found[index] = votes
    return found


def rig(n: int = 4, size: int = 96) -> tuple[Any, Any]:
    k, r, t = ring_of_cameras(n, 0.4, 0.2, focal_px=1.1 * size, width=size, height=size, target=(0.0, 0.0, 0.0))
    m = np.tile(np.eye(4), (n, 1, 1))
    m[:, :3, :3], m[:, :3, 3] = r, t
    return k, m


def sphere_masks(k: Any, m: Any, center: Any, radius: float, size: int = 96) -> Any:
    """Exact silhouettes of a sphere: pixels whose ray passes it closer than its radius."""
    v, u = np.mgrid[:size, :size]
    rays = np.linalg.inv(k)[:, None, None] @ np.stack([u, v, np.ones_like(u)], -1)[None, ..., None].astype(float)
    rays = rays[..., 0] / np.linalg.norm(rays[..., 0], axis=-1, keepdims=True)
    at = m[:, :3, :3] @ center + m[:, :3, 3]
    along = np.einsum("chwi,ci->chw", rays, at)
    return (np.sum(at**2, -1)[:, None, None] - along**2) <= radius**2


@pytest.mark.parametrize("seed", range(4))
def test_equals_projecting_every_voxel(seed: int) -> None:
    rng = np.random.default_rng(seed)
    k, m = rig()
    center, angle = rng.uniform(-0.03, 0.03, 3), rng.uniform(-3, 3)
    masks = sphere_masks(k, m, rng.uniform(-0.03, 0.03, 3), 0.03) | (rng.random((4, 96, 96)) > 0.995)
    axes = (np.linspace(-0.1, 0.1, 19), np.linspace(-0.1, 0.1, 24), np.linspace(-0.1, 0.1, 21))
    cells, votes = visual_hull.hull_indices(masks, k, m, axes, center, angle, 3)
    fast = {tuple(int(i) for i in cell): int(v) for cell, v in zip(cells, votes, strict=True)}
    assert len(fast) > 50
    assert fast == slow_hull(masks, k, m, axes, center, angle, 3)


def test_volume_of_a_sphere() -> None:
    k, m = rig(8, 256)
    masks = sphere_masks(k, m, np.zeros(3), 0.05, 256)
    axis = visual_hull.grid_axis(0.16, 81)
    cells, votes = visual_hull.hull_indices(masks, k, m, (axis, axis, axis), np.zeros(3), 0.0, 8)
    volume = len(cells) * (axis[1] - axis[0]) ** 3
    true = 4 / 3 * np.pi * 0.05**3
    assert (votes == 8).all()
    # A hull holds the body; eight views round it leave little more (mostly above and below).
    assert true < volume < 1.35 * true
    radii = np.linalg.norm(axis[cells], axis=1)
    inside = np.linalg.norm(np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1), axis=-1) < 0.0485
    kept = np.zeros(inside.shape, bool)
    kept[tuple(cells.T)] = True
    assert kept[inside].all()
    assert radii.max() < 0.07


def test_a_voxel_by_hand() -> None:
    # One camera at the origin looking along +z: the point (0.1, 0.2, 1) falls on pixel (10, 20) with f = 100, c = 0.
    k = np.array([[[100.0, 0, 0], [0, 100, 0], [0, 0, 1]]])
    m = np.eye(4)[None]
    mask = np.zeros((1, 32, 32), bool)
    mask[0, 20, 10] = True
    axes = (np.array([0.1]), np.array([0.2]), np.array([1.0]))
    for shift, seen in ((0.0, 1), (0.0049, 1), (0.0051, 0), (-0.0049, 1), (-0.0051, 0)):
        cells, _ = visual_hull.hull_indices(mask, k, m, axes, np.array([shift, 0.0, 0.0]), 0.0, 1)
        assert len(cells) == seen, shift


def test_behind_and_outside_is_not_seen() -> None:
    k, m = np.array([[[50.0, 0, 16], [0, 50, 16], [0, 0, 1]]]), np.eye(4)[None]
    mask = np.ones((1, 32, 32), bool)
    axes = (np.linspace(-1, 1, 9), np.linspace(-1, 1, 9), np.linspace(-1, 1, 9))
    cells, _ = visual_hull.hull_indices(mask, k, m, axes, np.zeros(3), 0.0, 1)
    assert set(map(tuple, cells.tolist())) == set(slow_hull(mask, k, m, axes, np.zeros(3), 0.0, 1))
    assert (axes[2][cells[:, 2]] > 0).all()


def test_views_needed() -> None:
    assert [visual_hull.min_views(n) for n in (2, 3, 4, 6)] == [2, 2, 3, 5]
    assert [visual_hull.min_views(6, absent) for absent in range(6)] == [5, 5, 4, 3, 2, 2]
    assert [visual_hull.min_views(4, absent) for absent in range(4)] == [3, 3, 2, 2]
