"""A camera of the recording as viser draws it: a frustum that is symmetric about the optical axis."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class CameraFrustum:
    """A camera of the recording, for drawing it.

    Attributes:
        name: name of the camera in the configuration.
        held_out: whether the camera is never seen in training.
        world_to_camera: [4, 4] rigid transform, metres.
        intrinsics: [3, 3] of the whole frame, pixels.
        width, height: of the camera's picture, pixels. The picture is the frame, widened until the optical axis meets
            its middle.
        offset: x, y of the frame's first pixel in that picture.
    """

    name: str
    held_out: bool
    world_to_camera: F64
    intrinsics: F64
    width: int
    height: int
    offset: tuple[int, int]

    @classmethod
    def from_calibration(
        cls, name: str, held_out: bool, world_to_camera: F64, intrinsics: F64, width: int, height: int
    ) -> CameraFrustum:
        """The frustum of a camera whose frames are `width` x `height` pixels."""
        sides, offsets = [], []
        for principal, n in ((intrinsics[0, 2], width), (intrinsics[1, 2], height)):
            half = math.ceil(max(principal + 0.5, n - 0.5 - principal))
            sides.append(2 * half)
            offsets.append(round(half - 0.5 - principal))
        return cls(name, held_out, world_to_camera, intrinsics, sides[0], sides[1], (offsets[0], offsets[1]))

    @property
    def position(self) -> F64:
        """[3] the camera's centre in the world, metres."""
        return np.asarray(-self.world_to_camera[:3, :3].T @ self.world_to_camera[:3, 3])

    @property
    def to_world(self) -> F64:
        """[3, 3] rotation from the camera's axes (x right, y down, z forwards) to the world's."""
        return np.asarray(self.world_to_camera[:3, :3].T)

    @property
    def fov_rad(self) -> float:
        """Angle from the lower to the upper edge of the picture."""
        return 2 * math.atan(self.height / 2 / self.intrinsics[1, 1])

    @property
    def aspect(self) -> float:
        """Width of the picture over its height, at one distance from the camera."""
        return float(self.width / self.intrinsics[0, 0] / (self.height / self.intrinsics[1, 1]))
