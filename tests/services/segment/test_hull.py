"""The hull of soft masks, against the definition worked out voxel by voxel, and a ball against its outline."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from zoosplat_segment import hull

NAN = float("nan")


def slow_leave_one_out(values: torch.Tensor, trusted: torch.Tensor) -> np.ndarray:
    """Mean of the two lowest values of the other views, voxel by voxel."""
    views, voxels = values.shape
    out = np.zeros((views, voxels))
    for c in range(views):
        for n in range(voxels):
            others = sorted(
                float(values[i, n])
                for i in range(views)
                if i != c and bool(trusted[i, n]) and not np.isnan(float(values[i, n]))
            )
            if len(others) > hull.LOWEST:
                out[c, n] = (others[0] + others[1]) / 2
            elif len(others) >= hull.FEWEST_VIEWS:
                out[c, n] = others[0]
    return out


@pytest.mark.parametrize("views", [2, 3, 4, 7])
def test_leave_one_out_against_sorting(views: int) -> None:
    random = torch.Generator().manual_seed(views)
    values = torch.rand(views, 300, generator=random)
    values[:, ::3] = (4 * values[:, ::3]).round() / 4  # equal values
    values[torch.rand(views, 300, generator=random) < 0.3] = NAN
    for trusted in (torch.rand(views, 300, generator=random) < 0.8, torch.rand(views, generator=random) < 0.7):
        each = trusted if trusted.ndim == 2 else trusted[:, None].expand(views, 300)
        found = hull.leave_one_out(values, trusted)
        np.testing.assert_allclose(found, slow_leave_one_out(values, each), atol=1e-7)


def test_a_view_has_no_say_in_its_own_row() -> None:
    random = torch.Generator().manual_seed(0)
    values, trusted = torch.rand(5, 200, generator=random), torch.ones(5, dtype=torch.bool)
    before = hull.leave_one_out(values, trusted)
    for c in range(5):
        for other in (torch.rand(200, generator=random), torch.full((200,), NAN)):
            changed = values.clone()
            changed[c] = other
            assert torch.equal(hull.leave_one_out(changed, trusted)[c], before[c])


def test_all_views_together() -> None:
    values = torch.tensor([[0.9, 0.9, NAN, 0.2], [0.7, 0.1, NAN, NAN], [0.8, 0.9, 0.9, NAN], [0.0, 0.0, 0.0, 0.0]])
    found = hull.all_views(values, torch.tensor([True, True, True, False]))
    # One view alone tells nothing.
    assert found.tolist() == pytest.approx([0.75, 0.5, 0, 0])


def test_values_of_masks_at_voxels() -> None:
    mask = torch.zeros(1, 6, 8)
    mask[0, 2, 3] = 1
    places = torch.tensor([[[3.0, 2], [3.5, 2], [4, 2], [5, 3], [-30, 2], [NAN, NAN], [3, 2]]])
    seen = torch.tensor([[True, True, True, True, True, True, False]])
    exact = hull.sample_views(mask, places, seen, 1)[0]
    assert exact[:6].tolist() == pytest.approx([1, 0.5, 0, 0, 0, 0], abs=1e-6)
    assert exact[6].isnan()
    # A voxel of three pixels has the largest value of the nine pixels round its place.
    wide = hull.sample_views(mask, places, seen, 3)[0]
    assert wide[:6].tolist() == pytest.approx([1, 1, 1, 0, 0, 0], abs=1e-6)


def test_a_ball_looks_like_its_outline() -> None:
    """A ray at distance d from a ball's centre meets it where d is less than the radius."""
    grid, half, radius = 64, 0.1, 0.06
    center, eye = torch.tensor([0.3, -0.2, 0.1]), torch.tensor([0.9, 0.4, 0.5])
    voxels = hull.cube_voxels(grid, torch.device("cpu"))
    distance = (half * voxels).norm(dim=-1)
    spacing = 2 * half / (grid - 1)
    # Soft over one voxel, and half where the surface is.
    volume = ((radius - distance) / spacing + 0.5).clamp(0, 1).view(1, grid, grid, grid)
    toward = center - eye
    side = torch.linalg.cross(toward, torch.tensor([0.0, 0, 1]))
    up = torch.linalg.cross(side, toward)
    offsets = torch.linspace(-0.12, 0.12, 41)
    rows, columns = torch.meshgrid(offsets, offsets, indexing="ij")
    aims = center + columns[..., None] * side / side.norm() + rows[..., None] * up / up.norm()
    rays = torch.nn.functional.normalize(aims - eye, dim=-1)
    seen = hull.look(volume, hull.ray_points(eye, rays, center, half, 160)[None])[0]
    gap = torch.linalg.cross(rays, toward.expand_as(rays)).norm(dim=-1)
    sure = (gap - radius).abs() > spacing
    assert bool(((seen > 0.5) == (gap < radius))[sure].all())
    assert float(seen[gap > radius + 2 * spacing].max()) == 0
    assert float(seen[gap < radius - 2 * spacing].min()) > 0.99


def test_rays_reach_through_the_cube() -> None:
    origin, center = torch.tensor([0.0, 0, 0]), torch.tensor([1.0, 0, 0])
    points = hull.ray_points(origin, torch.tensor([1.0, 0, 0]), center, 0.5, 5)
    root = 3**0.5
    np.testing.assert_allclose(points[:, 0], [-root, -root / 2, 0, root / 2, root], atol=1e-6)
    assert not points[:, 1:].any()


def test_voxels_are_in_the_order_of_a_volume() -> None:
    voxels = hull.cube_voxels(3, torch.device("cpu")).view(3, 3, 3, 3)
    assert voxels[0, 1, 2].tolist() == [1, 0, -1]
    assert voxels[2, 2, 0].tolist() == [-1, 1, 1]
