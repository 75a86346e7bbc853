"""Calibrated cameras: one immutable value that every stage shares, and its checks.

Conventions: OpenCV axes (x right, y down, z forward), x_cam = R x_world + t, pixel = K x_cam, distortion in OpenCV's
order k1 k2 p1 p2 k3; the centre of the top-left pixel is (0, 0).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from zoosplat.errors import UserError
from zoosplat.geometry.rotations import FloatArray, rotation_between

# Largest deviation of R R^T from the identity at which R counts as a rotation.
ROTATION_TOLERANCE = 1e-3


@dataclass(frozen=True, eq=False)
class WorldTransform:
    """From the world of the calibration file to the oriented world: x_oriented = R (x - origin_m) / metres_per_unit.

    Attributes:
        rotation: [3, 3] float64 R.
        origin_m: [3] float64, calibration frame, metres.
        metres_per_unit: 1 where the oriented world is in metres; the distance of the farthest camera from the mean
            camera centre where it is in the classic, normalised unit.
    """

    rotation: FloatArray
    origin_m: FloatArray
    metres_per_unit: float

    def to_oriented(self, points_m: npt.ArrayLike) -> FloatArray:
        """Points [..., 3] of the calibration frame, metres, in the oriented world."""
        points = np.asarray(points_m, dtype=np.float64)
        oriented: FloatArray = (points - self.origin_m) @ self.rotation.T / self.metres_per_unit
        return oriented

    def to_calibration_m(self, points: npt.ArrayLike) -> FloatArray:
        """Points [..., 3] of the oriented world in the calibration frame, metres."""
        calibration: FloatArray = (
            np.asarray(points, dtype=np.float64) * self.metres_per_unit @ self.rotation + self.origin_m
        )
        return calibration

    def to_json(self) -> dict[str, Any]:
        """Plain lists and numbers; `from_json` gives the same floats back."""
        return {
            "rotation": self.rotation.tolist(),
            "origin_m": self.origin_m.tolist(),
            "metres_per_unit": self.metres_per_unit,
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> WorldTransform:
        return cls(
            rotation=np.array(values["rotation"], dtype=np.float64),
            origin_m=np.array(values["origin_m"], dtype=np.float64),
            metres_per_unit=float(values["metres_per_unit"]),
        )


@dataclass(frozen=True, eq=False)
class Cameras:
    """C calibrated cameras, with float64 arrays.

    After `oriented(up, unit="normalized")` lengths are in the normalised unit instead of metres.

    Attributes:
        names: C camera names.
        intrinsics: [C, 3, 3] K, pixels.
        rotation: [C, 3, 3] world to camera.
        translation_m: [C, 3] world to camera.
        distortion: [C, 5] k1 k2 p1 p2 k3; zeros for lenses without distortion.
    """

    names: tuple[str, ...]
    intrinsics: FloatArray
    rotation: FloatArray
    translation_m: FloatArray
    distortion: FloatArray

    def __len__(self) -> int:
        return len(self.names)

    @property
    def centers_m(self) -> FloatArray:
        """Camera centres in the world, [C, 3]: -R^T t."""
        centers: FloatArray = -np.einsum("cij,ci->cj", self.rotation, self.translation_m)
        return centers

    @property
    def world_to_camera(self) -> FloatArray:
        """Homogeneous matrices [C, 4, 4]."""
        matrices = np.tile(np.eye(4), (len(self), 1, 1))
        matrices[:, :3, :3] = self.rotation
        matrices[:, :3, 3] = self.translation_m
        return matrices

    @property
    def projections(self) -> FloatArray:
        """P = K [R | t], [C, 3, 4], for undistorted pixels."""
        projections: FloatArray = self.intrinsics @ self.world_to_camera[:, :3]
        return projections

    def downsampled(self, factor: int) -> Cameras:
        """Cameras of images that were area-averaged over factor x factor pixels.

        The centre of a small pixel is the mean of the centres it covers, hence (c - (d - 1) / 2) / d. Distortion is
        kept as it is: images are undistorted at full resolution first, with the cameras of full resolution.
        """
        small = self.intrinsics.copy()
        small[:, 0, 2] -= (factor - 1) / 2
        small[:, 1, 2] -= (factor - 1) / 2
        small[:, :2] /= factor
        return replace(self, intrinsics=small)

    def without_distortion(self) -> Cameras:
        """The cameras of undistorted images: same K, no distortion."""
        return replace(self, distortion=np.zeros_like(self.distortion))

    def select(self, indices: Sequence[int]) -> Cameras:
        """The cameras at `indices`, in that order."""
        chosen = list(indices)
        return Cameras(
            names=tuple(self.names[i] for i in chosen),
            intrinsics=self.intrinsics[chosen],
            rotation=self.rotation[chosen],
            translation_m=self.translation_m[chosen],
            distortion=self.distortion[chosen],
        )

    def oriented(self, up: npt.ArrayLike, unit: Literal["m", "normalized"] = "m") -> tuple[Cameras, WorldTransform]:
        """The same cameras in a world whose +z is `up` [3] (any length) and whose origin is the mean camera centre.

        The rotation is the smallest that does it. unit "normalized" divides lengths by the largest distance of a
        camera from the origin (arXiv 2505.18342, classic configs); pixels do not change, and
        WorldTransform.metres_per_unit recovers metres. Raises UserError when all cameras are at one place.
        """
        centers = self.centers_m
        origin = centers.mean(axis=0)
        scale = 1.0
        if unit == "normalized":
            scale = float(np.linalg.norm(centers - origin, axis=1).max())
            if not scale > 0:
                raise UserError("calibration: all cameras are at the same place; check the translations")
        turn = rotation_between(up, (0.0, 0.0, 1.0))
        cameras = replace(
            self,
            rotation=self.rotation @ turn.T,
            translation_m=(self.translation_m + self.rotation @ origin) / scale,
        )
        return cameras, WorldTransform(rotation=turn, origin_m=origin, metres_per_unit=scale)

    def undistort_maps(
        self, camera_index: int, width: int, height: int, window: tuple[int, int, int, int] | None = None
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """map_x, map_y [h, w] float32 for cv2.remap from a distorted full-resolution image of width x height pixels.

        The undistorted image has the same K, the same size and no distortion; window (x0, y0, w, h), in its pixels,
        gives the maps of that part only.
        """
        import cv2

        x0, y0, w, h = window or (0, 0, width, height)
        k = self.intrinsics[camera_index]
        shifted = k.copy()
        shifted[:2, 2] -= (x0, y0)
        maps = cv2.initUndistortRectifyMap(k, self.distortion[camera_index], np.eye(3), shifted, (w, h), cv2.CV_32FC1)
        return np.asarray(maps[0], dtype=np.float32), np.asarray(maps[1], dtype=np.float32)

    def to_json(self) -> dict[str, Any]:
        """Plain lists of names and numbers; `from_json` gives the same floats back, also through json.dumps."""
        return {
            "names": list(self.names),
            "intrinsics": self.intrinsics.tolist(),
            "rotation": self.rotation.tolist(),
            "translation_m": self.translation_m.tolist(),
            "distortion": self.distortion.tolist(),
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Cameras:
        arrays = ("intrinsics", "rotation", "translation_m", "distortion")
        return cls(names=tuple(values["names"]), **{key: np.array(values[key], dtype=np.float64) for key in arrays})


def validate_cameras(cameras: Cameras, files: Sequence[str]) -> None:
    """Raise UserError, naming file and camera, unless the values can belong to a rig of real cameras.

    files: the calibration file of each camera. Checked: at least 2 cameras, unique names, finite numbers, last row of
    K, positive focal lengths, rotation orthonormal within 1e-3 and right-handed. Values are never altered.
    """
    if len(cameras) < 2:
        found = "no camera" if not len(cameras) else "only 1 camera"
        raise UserError(f"{', '.join(files) or 'calibration'}: {found}; 3D needs at least 2")
    for i, name in enumerate(cameras.names):
        where = f"{files[i]}: camera {name!r}"
        if name in cameras.names[:i]:
            raise UserError(f"{where}: the name occurs twice; give every camera its own")
        for what in ("intrinsics", "rotation", "translation_m", "distortion"):
            if not np.isfinite(getattr(cameras, what)[i]).all():
                raise UserError(f"{where}: {what.removesuffix('_m')} holds NaN or infinity; calibrate it again")
        k = cameras.intrinsics[i]
        if not np.array_equal(k[2], (0, 0, 1)):
            raise UserError(f"{where}: the last row of K is {k[2].tolist()}, not [0, 0, 1]; is K transposed?")
        if min(k[0, 0], k[1, 1]) <= 0:
            raise UserError(f"{where}: focal lengths {k[0, 0]:g}, {k[1, 1]:g} must be positive")
        rotation = cameras.rotation[i]
        error = float(np.abs(rotation @ rotation.T - np.eye(3)).max())
        if error > ROTATION_TOLERANCE:
            raise UserError(f"{where}: the rotation is not orthonormal (off by {error:.2g}); check the file")
        if np.linalg.det(rotation) < 0:
            raise UserError(f"{where}: the rotation mirrors (determinant -1); check the axes of the calibration")
