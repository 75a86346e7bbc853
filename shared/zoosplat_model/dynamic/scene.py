"""A recording as a dynamic scene: pictures, cameras and times in the animal's own frame, and points to start from.

In scene units the box of the crop is centred at the origin, and half of its longest side is 1.3. So the box of 1.6 of
the deformation field has a margin. The frame of reference is the animal's (its centre and heading), as tracking found
it. What is left of the animal's motion is how it moves its body.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from zoosplat_model.carving import ObservedViews, carve, grid_points
from zoosplat_model.frames import Frame, FrameReader
from zoosplat_model.rotations import rotation_about_z

HALF_BOX = 1.3  # scene units; half of the longest side of the crop's box
HULL_FRAMES = 8  # frames, evenly spread, of which the hulls are united
HULL_OCCUPANCY = 0.5  # occupancy above which a voxel is part of a hull


@dataclass(frozen=True)
class SceneUnits:
    """The map from scene units to the animal's frame: a point p of the scene lies at `unit_m * p + middle` there.

    Attributes:
        unit_m: metres in a scene unit.
        middle: [3] the origin of the scene in the animal's frame, metres.
    """

    unit_m: float
    middle: Tensor

    @classmethod
    def from_reader(cls, reader: FrameReader) -> SceneUnits:
        """The scene units of a recording, from its crop."""
        axis = np.linspace(-reader.ell_m / 2, reader.ell_m / 2, reader.grid_size)
        ends = np.array([[axis[start], axis[stop - 1]] for start, stop in reader.volume_idx])
        middle = torch.as_tensor(ends.mean(1), dtype=torch.float32, device=reader.device)
        return cls(float(np.ptp(ends, axis=1).max()) / 2 / HALF_BOX, middle)

    def to_cameras(self, frame: Frame) -> Tensor:
        """The rigid transformations [C, 4, 4] from the scene to the cameras of a frame, in scene units."""
        turn = rotation_about_z(frame.angle)
        rotation, translation = frame.world_to_camera[:, :3, :3], frame.world_to_camera[:, :3, 3]
        poses = frame.world_to_camera.clone()
        poses[:, :3, :3] = rotation @ turn
        poses[:, :3, 3] = (rotation @ (turn @ self.middle + frame.center) + translation) / self.unit_m
        return poses


@dataclass(frozen=True)
class DynamicScene:
    """F frames of V training views, all on one device.

    Attributes:
        pictures: [F, V, h, w, 3] uint8, composited on white.
        masks: [F, V, h, w] bool.
        poses: [F, V, 4, 4] float32, scene to camera.
        intrinsics: [F, V, 3, 3] float32, calibration pixels of the window.
        times: [F] float32 in [0, 1].
        shown: of each frame, the views that are there and whose mask is not empty; at least one.
    """

    pictures: Tensor
    masks: Tensor
    poses: Tensor
    intrinsics: Tensor
    times: Tensor
    shown: list[list[int]]

    @property
    def extent(self) -> float:
        """1.1 times the largest distance of a camera from the mean of all cameras, as in 3DGS; scene units."""
        poses = self.poses.flatten(0, 1)
        eyes = -(poses[:, :3, :3].mT @ poses[:, :3, 3:])[..., 0]
        return 1.1 * float((eyes - eyes.mean(0)).norm(dim=1).max())

    @classmethod
    def from_reader(
        cls, reader: FrameReader, progress: Callable[[int, int], None] = lambda done, total: None
    ) -> DynamicScene:
        """Read all valid frames of a recording in its observed views.

        Args:
            reader: the recording.
            progress: called after each frame with the number of frames read and the number of all.
        """
        units, observed = SceneUnits.from_reader(reader), reader.observed
        frames = [int(t) for t in np.flatnonzero(reader.valid)]
        columns: tuple[list[Tensor], ...] = ([], [], [], [])
        times, shown = [], []
        for done, frame in enumerate(reader.prefetch(frames)):
            mask = frame.mask[observed] > 0
            there = mask.flatten(1).any(1).cpu().numpy() & reader.seen[frame.t, observed]
            some = np.flatnonzero(there).tolist()
            if some:
                picture = (255 * frame.composite_on_white()[observed]).round().to(torch.uint8)
                row = (picture, mask, units.to_cameras(frame)[observed], frame.intrinsics[observed])
                for column, value in zip(columns, row, strict=True):
                    column.append(value)
                times.append(float(reader.times[frame.t]))
                shown.append(some)
            progress(done + 1, len(frames))
        pictures, masks, poses, intrinsics = (torch.stack(column) for column in columns)
        return cls(pictures, masks, poses, intrinsics, torch.tensor(times, device=reader.device), shown)


def initial_points(reader: FrameReader, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Points [count, 3] in scene units and their colours [count, 3], sampled from the union of visual hulls.

    The hulls are those of 8 frames, carved from the observed views that are there. A recording with a single observed
    view has no hulls. Then the points lie anywhere in the box, in any colour.
    """
    rng = np.random.default_rng([seed, 4])
    if len(reader.observed) < 2:
        points = torch.from_numpy(rng.uniform(-HALF_BOX, HALF_BOX, (count, 3)).astype(np.float32))
        colors = torch.from_numpy(rng.uniform(0, 1, (count, 3)).astype(np.float32))
        return points.to(reader.device), colors.to(reader.device)
    units = SceneUnits.from_reader(reader)
    grid = grid_points(reader.ell_m, reader.grid_size, reader.volume_idx).to(reader.device)
    valid = np.flatnonzero(reader.valid)
    observed = reader.observed
    found: list[Tensor] = []
    for t in valid[np.unique(np.linspace(0, len(valid) - 1, HULL_FRAMES).round().astype(int))]:
        frame = reader.frame(int(t))
        place = torch.eye(4, device=reader.device)
        place[:3, :3], place[:3, 3] = rotation_about_z(frame.angle), frame.center
        poses = frame.world_to_camera[observed] @ place
        views = ObservedViews(frame.rgb[observed], frame.mask[observed], poses, frame.intrinsics[observed])
        used = None if frame.seen is None else frame.seen[observed]
        volume = carve(views, grid, reader.voxel_size_m, reader.footprint_px(), fill_color=0.5, used=used)
        inside = volume[0] > HULL_OCCUPANCY
        found.append(torch.cat([grid[inside], volume[1:4, inside].T], 1))
    voxels = torch.cat(found)
    chosen = torch.from_numpy(rng.integers(len(voxels), size=count)).to(reader.device)
    points, colors = voxels[chosen, :3], voxels[chosen, 3:]
    shift = rng.uniform(-0.5, 0.5, (count, 3)).astype(np.float32) * reader.voxel_size_m
    points = points + torch.from_numpy(shift).to(reader.device)
    return (points - units.middle) / units.unit_m, colors
