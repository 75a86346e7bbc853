"""The soft hull of an instant: masks of windows carve a cube round the animal, which each camera then looks at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from zoosplat_segment import hull
from zoosplat_segment.mask_pieces import SURE
from zoosplat_segment.rig import Rig
from zoosplat_segment.windows import Window, pixels_of

GRID = 32, 64  # voxels along an edge of the hull, for small pictures and for large ones
PIXELS_PER_VOXEL = 6  # pixels of the picture's longer edge for each voxel between the two
CUBE_GRID = 28  # voxels along an edge where the cube round the animal is looked for
FEWEST_VOXELS = 8  # voxels of a hull from which its extent is told
PRIOR_STEP = 4.0  # pixels of a window between the rays along which the hull is looked at
SAMPLES = 80  # places on a ray
HALF = 0.6  # half the edge of the first cube, in edges of the tracking cube
LEAST_HALF = 0.15  # half the edge of the second cube at least, in the same unit
ROOM = 1.25  # edge of the second cube over the extent of the hull

Cube = tuple[Tensor, float]  # centre [3] and half the edge, metres


@dataclass(frozen=True, eq=False)
class Evidence:
    """What a hull is carved from.

    Attributes:
        windows: C windows.
        masks: of each window, [height, width].
        trusted: the views that carve.
        cube: where.
    """

    windows: Sequence[Window]
    masks: Sequence[Tensor]
    trusted: Sequence[int]
    cube: Cube


class Carver:
    """Carves hulls from masks in windows of a rig's pictures.

    Args:
        rig: the cameras.
        ell_m: edge of a cube that has room for the animal, metres.
        floor_m: height of the floor, below which there is nothing; None: it is not known.
        observed: the cameras that find the cube.
    """

    def __init__(self, rig: Rig, ell_m: float, floor_m: float | None, observed: Sequence[int]) -> None:
        self.rig, self.ell_m, self.floor_m, self.observed = rig, ell_m, floor_m, observed
        self.grid = int(np.clip(max(rig.size) // PIXELS_PER_VOXEL, *GRID))
        self.voxels, self.few_voxels = (hull.cube_voxels(grid, rig.device) for grid in (self.grid, CUBE_GRID))

    def fit_cube(self, windows: Sequence[Window], masks: Sequence[Tensor], center: Tensor) -> Cube:
        """The cube that just holds the hull of the observed views, found from the centre of one that has room.

        Args:
            windows: C windows.
            masks: of each window, [height, width].
            center: [3] metres.
        """
        half = HALF * self.ell_m
        flags = self._flags(self.observed)
        for _ in range(2):
            world = center + half * self.few_voxels
            values = self._values(windows, masks, world, 2 * half / CUBE_GRID)
            together = hull.all_views(values, flags) * self._above_floor(world)
            inside = world[together > SURE]
            if len(inside) < FEWEST_VOXELS:
                return center, HALF * self.ell_m
            low, high = inside.amin(0), inside.amax(0)
            center = (low + high) / 2
            half = min(HALF * self.ell_m, max(ROOM / 2 * float((high - low).max()), LEAST_HALF * self.ell_m))
        return center, half

    def priors(self, evidence: Evidence, targets: Mapping[int, Window]) -> dict[int, Tensor]:
        """What the trusted views, but for the view itself, tell of windows.

        Args:
            evidence: what carves.
            targets: windows that are asked for, by camera.

        Returns:
            [height, width] of each target, 0 to 1; 0 outside the picture.
        """
        center, half = evidence.cube
        world = center + half * self.voxels
        values = self._values(evidence.windows, evidence.masks, world, 2 * half / self.grid)
        volumes = hull.leave_one_out(values, self._flags(evidence.trusted)) * self._above_floor(world)
        volumes = volumes.view(-1, *(self.grid,) * 3)
        out = {}
        for c, target in targets.items():
            places = pixels_of(target, PRIOR_STEP, self.rig.device)
            points = hull.ray_points(self.rig.centers[c], self.rig.rays_at(c, places), center, half, SAMPLES)
            small = hull.look(volumes[c : c + 1], points[None]) * self.rig.inside(places)
            size = target.height, target.width
            out[c] = F.interpolate(small[None], size=size, mode="bilinear", align_corners=False)[0, 0]
        return out

    def _values(self, windows: Sequence[Window], masks: Sequence[Tensor], world: Tensor, spacing_m: float) -> Tensor:
        """[C, N] values of masks in windows at voxels [N, 3], which are so far apart."""
        pixels, _ = self.rig.project(world)
        seen = self.rig.inside(pixels)
        per_metre = self.rig.pixels_per_metre(world.mean(0))
        out = []
        for c, (window, mask) in enumerate(zip(windows, masks, strict=True)):
            corner = torch.tensor([window.x, window.y], dtype=torch.float32, device=self.rig.device)
            place = (pixels[c] - corner + 0.5) / window.scale - 0.5
            footprint = max(1, round(float(per_metre[c]) * spacing_m / window.scale))
            out.append(hull.sample_views(mask[None], place[None], seen[c : c + 1], footprint)[0])
        return torch.stack(out)

    def _above_floor(self, world: Tensor) -> Tensor:
        if self.floor_m is None:
            return torch.ones(len(world), dtype=torch.bool, device=self.rig.device)
        return world[:, 2] > self.floor_m

    def _flags(self, views: Sequence[int]) -> Tensor:
        flags = torch.zeros(len(self.rig), dtype=torch.bool, device=self.rig.device)
        flags[list(views)] = True
        return flags
