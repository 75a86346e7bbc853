"""The lists that gsplat's rasteriser is given, against boxes and tiles one by one."""

import pytest
import torch

from zoosplat_model.rasterize.gsplat_cuda import _tile_lists


@pytest.mark.parametrize("tile", [8, 16])
def test_every_tile_has_the_gaussians_whose_boxes_touch_it_near_to_far(tile: int) -> None:
    torch.manual_seed(tile)
    views, n, width, height = 3, 60, 41, 30
    centers = torch.rand(views, n, 2) * torch.tensor([60.0, 50.0]) - 10
    radii = torch.randint(0, 12, (views, n, 2), dtype=torch.int32)
    depths = torch.rand(views, n) + 0.5
    centers[0, 0] = torch.nan  # what gsplat leaves where it draws nothing
    radii[0, 0] = 0
    starts, ids, inside = _tile_lists(centers, radii, depths, width, height, tile, None)
    down, across = -(-height // tile), -(-width // tile)
    assert starts.shape == inside.shape == (views, down + 1, across)
    assert inside[:, :-1].all()
    assert not inside[:, -1].any()
    stops = torch.cat([starts.flatten()[1:], torch.tensor([len(ids)])]).view(starts.shape)
    for v in range(views):
        for row in range(down):
            for column in range(across):
                found = ids[starts[v, row, column] : stops[v, row, column]].tolist()
                low = torch.tensor([column, row]) * tile
                touches = (centers[v] + radii[v] > low).all(1) & (centers[v] - radii[v] < low + tile).all(1)
                touches &= (radii[v] > 0).all(1)
                expected = sorted((i for i in range(n) if touches[i]), key=lambda i: float(depths[v, i]))
                assert found == [v * n + i for i in expected]
