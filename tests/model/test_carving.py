from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from zoosplat_model.carving import (
    ObservedViews,
    carve,
    grid_points,
    prepare_silhouette_evidence,
    sample_colors,
    triton_backend,
)
from zoosplat_model.carving.window_minimum import window_minimum
from zoosplat_model.rotations import rotation_about_z

FILL = 0.38


def opposite_cameras(focal: float, distance: float, side: int) -> tuple[Tensor, Tensor]:
    """One camera at the origin that looks along +z, one at z = distance that looks back; (pose, K), float64."""
    pose = torch.eye(4, dtype=torch.float64).repeat(2, 1, 1)
    pose[1, 0, 0] = pose[1, 2, 2] = -1
    pose[1, 2, 3] = distance
    middle = (side - 1) / 2
    k = torch.tensor([[focal, 0, middle], [0, focal, middle], [0, 0, 1]], dtype=torch.float64)
    return pose, k.repeat(2, 1, 1)


def red_and_blue(side: int) -> Tensor:
    rgb = torch.zeros(2, side, side, 3, dtype=torch.float64)
    rgb[0, ..., 0] = rgb[1, ..., 2] = 1
    return rgb


@pytest.mark.parametrize("size", [1, 3, 7])
@pytest.mark.parametrize("shape", [(2, 3, 9, 14), (4, 6, 5)])
def test_the_least_around_a_pixel_is_that_of_pooling(size: int, shape: tuple[int, ...]) -> None:
    torch.manual_seed(size)
    values = torch.rand(shape)
    values[values > 0.7] = torch.inf
    found = window_minimum(values, size)
    pooled = -torch.nn.functional.max_pool2d(-values.view(-1, 1, *shape[-2:]), size, stride=1, padding=size // 2)
    assert torch.equal(found, pooled.view(shape))
    assert found.is_contiguous()  # a kernel reads it


def test_hand_worked_voxels() -> None:
    pose, k = opposite_cameras(10.0, 3.0, 9)
    mask = torch.ones(2, 9, 9, dtype=torch.float64)
    mask[1, 4, 2] = 0
    # The first two are on the axis, one behind the other from either side. The third is at (8, 4) px in the first view,
    # and outside the mask of the second, at (2, 4): x = -0.4 * 10 / 2 + 4.
    points = torch.tensor([[0, 0, 1.0], [0, 0, 2.0], [0.4, 0, 1.0]], dtype=torch.float64).view(3, 1, 1, 3)
    volume = carve(ObservedViews(red_and_blue(9), mask, pose, k), points, 0.3, 1, FILL)[:4, :, 0, 0]
    expected = [
        [1, 0.8, 0, 0.2],  # (1 red + 0.25 blue) / 1.25
        [1, 0.2, 0, 0.8],
        [0.5, (FILL + 1) / 2, FILL / 2, FILL / 2],  # only in the larger hull, and there of the view that has it
    ]
    np.testing.assert_allclose(volume.T, expected, atol=1e-12)


def test_samples_are_exact_to_a_fraction_of_a_pixel() -> None:
    pose, k = opposite_cameras(10.0, 3.0, 9)
    ramp = (torch.arange(9, dtype=torch.float64) / 8).expand(1, 9, 9)[..., None].repeat(1, 1, 1, 3)
    points = torch.tensor([[0.03, 0, 1.0], [0.36, 0.1, 1.0]], dtype=torch.float64).view(2, 1, 1, 3)
    volume = carve(ObservedViews(ramp, torch.ones(1, 9, 9).double(), pose[:1], k[:1]), points, 0.3, 1, FILL)
    np.testing.assert_allclose(volume[1:4, :, 0, 0], [[4.3 / 8, 7.6 / 8]] * 3, atol=1e-12)


@pytest.mark.parametrize(("footprint", "closed"), [(3, True), (1, False)])
def test_nothing_shows_through_voxels_that_are_coarser_than_pixels(footprint: int, closed: bool) -> None:
    # Two planes of voxels, 2.4 and 2 pixels apart in the nearer and the farther one.
    pose, k = opposite_cameras(60.0, 11.0, 33)
    axis = torch.linspace(-0.8, 0.8, 9, dtype=torch.float64)
    points = torch.stack(torch.meshgrid(axis, axis, torch.tensor([5.0, 6.0], dtype=torch.float64), indexing="ij"), -1)
    views = ObservedViews(red_and_blue(33), torch.ones(2, 33, 33).double(), pose, k)
    volume = carve(views, points, 0.2, footprint, FILL)
    inner = volume[1, 1:-1, 1:-1]
    expected = torch.tensor([0.8, 0.2], dtype=torch.float64).expand(7, 7, 2)
    assert torch.allclose(inner, expected) == closed


def slow_twin(rgb: Any, mask: Any, pose: Any, k: Any, points: Any, voxel: float, footprint: int, fill: float) -> Any:
    """Voxel by voxel, view by view, as the docstring of `carve` says."""
    n_views, h, w = mask.shape
    half = footprint // 2
    flat = points.reshape(-1, 3)
    n = len(flat)
    place = np.array([[k[v] @ (pose[v] @ [*p, 1])[:3] for p in flat] for v in range(n_views)])
    depth = place[..., 2]
    place = place[..., :2] / depth[..., None]
    pixel = np.floor(place + 0.5).astype(int)

    def mean_over_footprint(v: int, column: int, row: int) -> Any:
        total = np.zeros(4)
        for r in range(max(row - half, 0), min(row + half + 1, h)):
            for c in range(max(column - half, 0), min(column + half + 1, w)):
                total += np.array([*(rgb[v, r, c] * mask[v, r, c]), mask[v, r, c]])
        return total / footprint**2

    samples = np.zeros((n_views, n, 4))
    for v in range(n_views):
        for i, (x, y) in enumerate(place[v]):
            for column in (math.floor(x), math.floor(x) + 1):
                for row in (math.floor(y), math.floor(y) + 1):
                    part = (1 - abs(x - column)) * (1 - abs(y - row))
                    samples[v, i] += part * mean_over_footprint(v, column, row)

    total = np.zeros((8, n))
    for rank in (0, 1):
        occupancy = np.sort(samples[..., 3], 0)[rank]
        solid = np.nonzero(occupancy >= 0.5)[0]
        for i in range(n):
            color, weights, bare = np.zeros(3), np.zeros(n_views), np.zeros(n_views)
            for v in range(n_views):
                apart = np.abs(pixel[v, solid] - pixel[v, i]).max(1)
                column, row = pixel[v, i]
                bare[v] = 0 <= column < w and 0 <= row < h and mask[v, row, column] and not (apart <= half).any()
                hidden = ((apart <= half) & (depth[v, solid] < depth[v, i] - voxel)).any()
                weights[v] = 0.25 if hidden else 1.0
                color += weights[v] * samples[v, i, :3]
            if rank == 0:
                larger = np.sort(samples[:, i, 3])[1] > 0
                total[4:6, i] = occupancy[i], bare.mean() * larger
            if occupancy[i] == 0:
                total[1:4, i] += fill / 2
                continue
            covered = weights * samples[:, i, 3]
            color /= covered.sum()
            own = samples[:, i, :3] / np.maximum(samples[:, i, 3:], 1e-3)
            spread = np.sqrt((covered * ((own - color) ** 2).sum(1)).sum() / covered.sum())
            total[:, i] += np.array([occupancy[i], *color, 0, 0, spread, (weights == 1).mean()]) / 2
    return total.reshape(8, *points.shape[:3])


def scattered_views(seed: int) -> tuple[Any, ...]:
    """Pictures, masks, poses and intrinsics of three cameras any way up, and points of 7^3 voxels; float64."""
    rng = np.random.default_rng(seed)
    h, w = 14, 18
    axis = np.linspace(-0.5, 0.5, 7)
    points = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1) + rng.uniform(-0.02, 0.02, 3)
    y, x = np.mgrid[:h, :w]
    mask = np.stack([((x - 8.3) ** 2 / 36 + (y - 6.1 - v / 3) ** 2 / 16 < 1) for v in range(3)]).astype(float)
    rgb = rng.uniform(size=(3, h, w, 3))
    pose, k = np.tile(np.eye(4), (3, 1, 1)), np.tile(np.eye(3), (3, 1, 1))
    for v in range(3):
        q, upper = np.linalg.qr(rng.normal(size=(3, 3)))
        q *= np.sign(np.diag(upper))
        pose[v, :3, :3] = q * np.sign(np.linalg.det(q))
        pose[v, :3, 3] = np.array([0.05 * v, 0.03, 2.0])
        k[v] = np.array([[21, 0, 8.6], [0, 22, 6.4], [0, 0, 1]])
    return rgb, mask, pose, k, points


@pytest.mark.parametrize("footprint", [1, 3])
def test_agrees_with_a_slow_twin(footprint: int) -> None:
    rgb, mask, pose, k, points = scattered_views(footprint)
    expected = slow_twin(rgb, mask, pose, k, points, 1 / 6, footprint, FILL)
    *views, grid = (torch.from_numpy(v) for v in (rgb, mask, pose, k, points))
    found = carve(ObservedViews(*views), grid, 1 / 6, footprint, FILL).numpy()
    assert (expected[0] == 0).any()
    assert (expected[0] == 1).any()
    assert ((expected[0] > 0) & (expected[0] < 1)).any()
    assert ((expected[5] > 0) & (expected[5] < 1)).any()
    np.testing.assert_allclose(found, expected, atol=1e-10)


def test_a_voxel_beyond_the_window_whose_footprint_reaches_into_it_is_carved_too() -> None:
    rgb, mask, pose, k, points = scattered_views(7)
    expected = slow_twin(rgb, mask, pose, k, points, 1 / 6, 7, FILL)
    *views, grid = (torch.from_numpy(v) for v in (rgb, mask, pose, k, points))
    found = carve(ObservedViews(*views), grid, 1 / 6, 7, FILL).numpy()
    np.testing.assert_allclose(found[[0, 4]], expected[[0, 4]], atol=1e-10)


def slow_evidence(occupancy: Any, hull: Any, mask: Any, pose: Any, k: Any, points: Any, voxel: float) -> Any:
    """As the docstring of `prepare_silhouette_evidence` says, with sigmoid(8 (occupancy - 0.4)) and every view."""
    h, w = mask.shape[1:]
    flat, found = points.reshape(-1, 3), np.zeros(points.shape[:3]).reshape(-1)
    for v in range(len(mask)):
        camera = flat @ pose[v, :3, :3].T + pose[v, :3, 3]
        depth = camera[:, 2]
        x, y = (camera @ k[v].T)[:, :2].T / depth
        focal = np.sqrt(k[v, 0, 0] * k[v, 1, 1])
        pixel = max(focal * voxel / pose[v, 2, 3], 1)  # larger ones, of a voxel's size where the points' origin is
        cells = [(int((y[i] + 0.5) // pixel), int((x[i] + 0.5) // pixel)) for i in range(len(flat))]
        visible = (x > -0.5) & (x < w - 0.5) & (y > -0.5) & (y < h - 0.5) & (hull.reshape(-1) > 0)
        for i in np.nonzero(visible)[0]:
            if not mask[v, int(y[i] + 0.5), int(x[i] + 0.5)]:
                continue
            total = 0.0
            for j in np.nonzero(visible)[0]:
                rows, columns = abs(cells[i][0] - cells[j][0]), abs(cells[i][1] - cells[j][1])
                if rows <= 1 and columns <= 1:
                    tent = (0.5 if rows == 0 else 0.25) * (0.5 if columns == 0 else 0.25)
                    total += tent / (1 + np.exp(-8 * (occupancy.reshape(-1)[j] - 0.4)))
            thick = total * (focal * voxel / depth[i] / pixel) ** 2
            found[i] = max(found[i], 1 / max(thick, 1))
    return found.reshape(points.shape[:3])


def random_occupancy(points: Any) -> tuple[Any, Any]:
    rng = np.random.default_rng(3)
    return rng.uniform(-0.2, 1.2, points.shape[:3]), rng.uniform(size=points.shape[:3]) * (points[..., 0] < 0.2)


def test_silhouette_evidence_agrees_with_a_slow_twin() -> None:
    rgb, mask, pose, k, points = scattered_views(5)
    occupancy, hull = random_occupancy(points)
    expected = slow_evidence(occupancy, hull, mask, pose, k, points, 1 / 6)
    *views, grid = (torch.from_numpy(v) for v in (rgb, mask, pose, k, points))
    evidence = prepare_silhouette_evidence(torch.from_numpy(hull), ObservedViews(*views), grid, 1 / 6, 8.0, 0.4)
    found = evidence(torch.from_numpy(occupancy)).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-10)
    assert (expected[hull <= 0] == 0).all()
    assert np.ptp(expected[expected > 0]) > 0.5
    # Where all others on its lines of sight are gone, the evidence for a voxel is 1.
    alone = np.where(np.arange(occupancy.size).reshape(occupancy.shape) == occupancy.argmax(), 1.0, -10)
    assert evidence(torch.from_numpy(alone)).max() == 1


KERNELS = """
import sys
import numpy as np
import torch
from zoosplat_model.carving import ObservedViews, triton_backend
rgb, mask, pose, k, points, used, occupancy, hull = (torch.from_numpy(v) for v in np.load(sys.argv[1]).values())
views, footprint = ObservedViews(rgb, mask, pose, k), int(sys.argv[2])
volume = triton_backend.carve(views, points, 1 / 6, footprint, 0.38, used)
evidence = triton_backend.prepare_silhouette_evidence(hull, views, points, 1 / 6, 8.0, 0.4, used)(occupancy)
solid = (hull > 0.5).flatten()
colors, seen = triton_backend.sample_colors(views, points.reshape(-1, 3), solid, 1 / 6, footprint, used)
least = triton_backend.window_minimum(occupancy, 3, (-1, -2, -3))
np.savez(sys.argv[3], volume=volume, evidence=evidence, colors=colors, seen=seen, least=least)
"""


@pytest.mark.parametrize(("footprint", "used"), [(1, [1, 1, 1]), (3, [1, 0, 1])])
def test_kernels_in_triton_s_interpreter(tmp_path: Path, footprint: int, used: list[int]) -> None:
    """The GPU's kernels in float32, without a GPU."""
    pytest.importorskip("triton")
    views = scattered_views(footprint)
    counted = np.array(used, bool)
    occupancy, hull = random_occupancy(views[-1])
    single = [v.astype(np.float32) for v in (*views, occupancy, hull)]
    np.savez(tmp_path / "views.npz", *single[:5], counted, *single[5:])
    files = [str(tmp_path / name) for name in ("views.npz", "found.npz")]
    command = [sys.executable, "-c", KERNELS, files[0], str(footprint), files[1]]
    subprocess.run(command, check=True, env={**os.environ, "TRITON_INTERPRET": "1"})
    found = np.load(files[1])
    *tensors, grid = (torch.from_numpy(v) for v in views)
    exact, chosen = ObservedViews(*tensors), torch.from_numpy(counted)
    np.testing.assert_allclose(found["volume"], carve(exact, grid, 1 / 6, footprint, FILL, chosen), atol=1e-4)
    asked = prepare_silhouette_evidence(torch.from_numpy(hull), exact, grid, 1 / 6, 8.0, 0.4, chosen)
    evidence = asked(torch.from_numpy(occupancy))
    np.testing.assert_allclose(found["evidence"], evidence, atol=2e-3)  # whole numbers of thousandths are counted
    solid = torch.from_numpy((hull > 0.5).flatten())
    colors, seen = sample_colors(exact, grid.reshape(-1, 3), solid, 1 / 6, footprint, chosen)
    assert 0.1 < seen.double().mean() < 0.9
    np.testing.assert_array_equal(found["seen"], seen)
    np.testing.assert_allclose(found["colors"][seen], colors[seen], atol=1e-4)
    least = window_minimum(torch.from_numpy(single[-2]), 3, (-1, -2, -3))
    np.testing.assert_array_equal(found["least"], least)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize(
    ("footprint", "used"), [(1, [True] * 4), (3, [True] * 4), (5, [True, True, False, True]), (7, [True] * 4)]
)
def test_kernels_agree_with_plain_functions(footprint: int, used: list[bool]) -> None:
    """A sphere in 4 views, the last of which sees a piece of it cut off."""
    torch.manual_seed(0)
    assert triton_backend.is_available(0)
    y, x = torch.meshgrid(torch.arange(96.0), torch.arange(128.0), indexing="ij")
    mask = ((x - 63.3).square() + (y - 47.1).square() < 30**2).double().repeat(4, 1, 1)
    mask[3, 50:] = 0
    rgb = torch.rand(4, 96, 128, 3, dtype=torch.float64)
    pose = torch.eye(4, dtype=torch.float64).repeat(4, 1, 1)
    for v in range(4):
        angle = torch.tensor(1.1 * v, dtype=torch.float64)
        pose[v, :3, :3] = rotation_about_z(angle)[[0, 2, 1]] * torch.tensor([[1], [-1], [1]])
        pose[v, 2, 3] = 3
    k = torch.tensor([[120.0, 0, 63.5], [0, 120.0, 47.5], [0, 0, 1]], dtype=torch.float64).repeat(4, 1, 1)
    points = grid_points(2.2, 40, [(0, 40), (2, 38), (1, 40)]).double() + torch.tensor([0.0123, 0.0071, 0.0037])
    exact, chosen, voxel = ObservedViews(rgb, mask, pose, k), torch.tensor(used), 2.2 / 39
    expected = carve(exact, points, voxel, footprint, FILL, chosen)
    assert (expected[0] > 0.5).double().mean() > 0.1

    def single(value: Tensor, device: str) -> Tensor:
        return value.to(device, torch.float32) if value.is_floating_point() else value.to(device)

    def rounded(device: str) -> tuple[ObservedViews, Tensor]:
        return ObservedViews(*(single(value, device) for value in exact)), single(points, device)

    # Where a voxel is just solid, or just hidden, rounding decides: on a CPU as here.
    off = []
    for device in ("cpu", "cuda"):
        found = carve(*rounded(device), voxel, footprint, FILL, chosen.to(device)).cpu()
        off.append(((found - expected).abs() > 1e-3).any(0).double().mean())
    assert off[0] < 0.02
    assert off[1] < 1.5 * off[0] + 1e-3
    occupancy = expected[0] - 0.1 * torch.rand_like(expected[0])
    evidence = prepare_silhouette_evidence(expected[0], exact, points, voxel, 16.0, 0.75, chosen)(occupancy)
    hull = single(expected[0], "cuda")
    on_gpu = prepare_silhouette_evidence(hull, *rounded("cuda"), voxel, 16.0, 0.75, chosen.cuda())
    found = on_gpu(single(occupancy, "cuda")).cpu()
    assert ((found - evidence).abs() > 0.01).double().mean() < 0.02
    assert (evidence > 0.2).double().mean() > 0.01
    surface = points[expected[0] > 0.3]
    solid = torch.rand(len(surface)) > 0.2
    colors, _ = sample_colors(exact, surface, solid, voxel, footprint, chosen)
    off = []
    for device in ("cpu", "cuda"):
        places = (single(surface, device), solid.to(device))
        sampled, _ = sample_colors(rounded(device)[0], *places, voxel, footprint, chosen.to(device))
        off.append(((sampled.cpu() - colors).abs() > 1e-3).any(1).double().mean())
    assert off[0] < 0.03
    assert off[1] < 1.5 * off[0] + 1e-3
    values = torch.rand(3, 40, 33, 20)
    assert torch.equal(
        window_minimum(values.cuda(), 5, (-1, -2, -3)).cpu(),
        window_minimum(values, 5, (-1, -2, -3)),
    )


def test_views_that_do_not_count_might_as_well_not_be_there() -> None:
    torch.manual_seed(0)
    pose, k = opposite_cameras(10.0, 3.0, 9)
    pose, k = torch.cat([pose, pose[:1]]), torch.cat([k, k[:1]])
    rgb, mask = torch.rand(3, 9, 9, 3).double(), (torch.rand(3, 9, 9) > 0.3).double()
    points = torch.rand(4, 4, 4, 3).double() * 0.6 + torch.tensor([-0.3, -0.3, 1.0])
    found = carve(ObservedViews(rgb, mask, pose, k), points, 0.3, 3, FILL, torch.tensor([True, True, False]))
    expected = carve(ObservedViews(rgb[:2], mask[:2], pose[:2], k[:2]), points, 0.3, 3, FILL)
    np.testing.assert_allclose(found[:7], expected[:7], atol=1e-12)
    np.testing.assert_allclose(found[7] * 3, expected[7] * 2, atol=1e-12)  # the share of all views


def test_colours_are_those_of_the_views_that_see_a_point() -> None:
    pose, k = opposite_cameras(10.0, 3.0, 9)
    # Red sees the first, blue the second; the third is not hidden by the fourth, which is not solid.
    points = torch.tensor([[0, 0, 1.0], [0, 0, 2.0], [0.3, 0, 1.4], [0.3, 0, 0.7]], dtype=torch.float64)
    solid = torch.tensor([True, True, True, False])
    rgb, mask = red_and_blue(9), torch.ones(2, 9, 9).double()
    views = ObservedViews(rgb, mask, pose, k)
    colors, seen = sample_colors(views, points, solid, 0.3, 1)
    assert seen.all()
    np.testing.assert_allclose(colors[0], [1 / 1.02, 0, 0.02 / 1.02], atol=1e-9)
    np.testing.assert_allclose(colors[1], [0.02 / 1.02, 0, 1 / 1.02], atol=1e-9)
    np.testing.assert_allclose(colors[2], [0.5, 0, 0.5], atol=1e-9)
    only_red = sample_colors(views, points, solid, 0.3, 1, torch.tensor([True, False]))[0]
    np.testing.assert_allclose(only_red[1], [1, 0, 0], atol=1e-9)
    empty = views._replace(mask=torch.zeros_like(mask))
    assert not sample_colors(empty, points, solid, 0.3, 1)[1].any()


def test_grid_is_that_of_the_method() -> None:
    points = grid_points(0.3, 4, ((1, 3), (0, 4), (3, 4)))
    assert points.shape == (2, 4, 1, 3)
    np.testing.assert_allclose(points[1, 0, 0], [0.05, -0.15, 0.15], atol=1e-7)
    turned = rotation_about_z(torch.tensor(math.pi / 2)) @ torch.tensor([1.0, 2, 3])
    np.testing.assert_allclose(turned, [-2, 1, 3], atol=1e-6)
