"""Scenes in the format of D-NeRF (Pumarola 2021): pictures of a moving camera, each with its pose and its time.

    transforms_train.json, transforms_test.json
        camera_angle_x      horizontal field of view, radians
        frames: file_path (with or without .png), time (0 to 1), transform_matrix [4, 4], camera to world in
                OpenGL's axes (x right, y up, z backwards)
    PNG pictures with transparency

To the stages, such a scene is a recording of two cameras that move: `train`, and `test`, which is held out. A kept
frame is a time; where a camera has no picture at that time, its mask is empty. The world is the scene's own, +z up; its
unit counts as a metre.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from zoosplat.config.dnerf_defaults import TRANSFORMS_FILES
from zoosplat.errors import UserError
from zoosplat.storage import objects, urls

# Largest difference of times, in units of the scene, at which two pictures belong to one time.
SAME_TIME = 1e-6
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Bit of the color type in a PNG's header that says that there is an alpha channel.
HAS_ALPHA = 4
# Bytes from the beginning of a PNG in which its header and its chunk of transparency are searched.
HEADER_BYTES = 1 << 16
NO_PICTURE = "no such picture, or not a PNG of 8 bits with transparency"
F64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class DnerfScene:
    """The pictures and poses of a scene at T times, for two cameras.

    Attributes:
        width, height: of the pictures, pixels.
        focal_px: focal length, pixels.
        times: [T] 0 to 1, ascending; a time that a split has several pictures of is there as often.
        pictures: for each time and camera the URL of its picture, or None.
        world_to_camera: [T, 2, 4, 4] OpenCV axes; where there is no picture, the camera's pose at the nearest time.
    """

    width: int
    height: int
    focal_px: float
    times: F64
    pictures: list[list[str | None]]
    world_to_camera: F64

    def intrinsics(self, downsample: int) -> F64:
        """K [3, 3] of pictures averaged over `downsample` pixels squared; the centre of the first pixel is (0, 0)."""
        d = downsample
        center = [(n / d - 1) / 2 for n in (self.width, self.height)]
        return np.array([[self.focal_px / d, 0, center[0]], [0, self.focal_px / d, center[1]], [0, 0, 1]])


def read_scene(folder: str) -> DnerfScene:
    """A scene below a folder or URL.

    Raises:
        UserError: files or keys are missing, a pose is not rigid, or a picture cannot be read.
    """
    rows: list[tuple[float, int, str, F64]] = []  # time, camera, picture, pose
    angle = math.nan
    for camera, name in enumerate(TRANSFORMS_FILES):
        url = urls.join(folder, name)
        try:
            found = json.loads(objects.read_bytes(url))
            if camera == 0:
                angle = float(found["camera_angle_x"])
            for i, entry in enumerate(found["frames"]):
                where = f"{url}: frame {i}"
                path = str(entry["file_path"])
                if ".." in path.replace("\\", "/").split("/") or "://" in path:
                    raise UserError(f"{where}: file_path {path!r} leads out of the scene")
                picture = urls.join(folder, path.removeprefix("./"))
                picture = picture if picture.endswith(".png") else picture + ".png"
                rows.append((float(entry["time"]), camera, picture, _pose(entry["transform_matrix"], where)))
        except FileNotFoundError:
            raise UserError(f"{url}: no such file; a D-NeRF scene has {' and '.join(TRANSFORMS_FILES)}") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            what = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise UserError(f"{url}: not transforms of a D-NeRF scene ({what})") from None
    if not 0 < angle < math.pi:
        raise UserError(f"{urls.join(folder, TRANSFORMS_FILES[0])}: camera_angle_x = {angle}: must be between 0 and pi")
    for camera, name in enumerate(TRANSFORMS_FILES):
        if not any(row[1] == camera for row in rows):
            raise UserError(f"{urls.join(folder, name)}: holds no frames")
    height, width = read_picture(rows[0][2], 1).shape[:2]

    times: list[float] = []
    pictures: list[list[str | None]] = []
    poses: list[list[F64 | None]] = []
    for time, camera, picture, pose in sorted(rows, key=lambda row: row[:3]):
        at = len(times)
        while at > 0 and abs(times[at - 1] - time) <= SAME_TIME and pictures[at - 1][camera] is None:
            at -= 1
        if at == len(times):
            times.append(time)
            pictures.append([None, None])
            poses.append([None, None])
        pictures[at][camera], poses[at][camera] = picture, pose
    world_to_camera = np.empty((len(times), 2, 4, 4))
    for camera in range(2):
        there = [i for i, row in enumerate(poses) if row[camera] is not None]
        for i, time in enumerate(times):
            world_to_camera[i, camera] = poses[min(there, key=lambda j: abs(times[j] - time))][camera]
    focal = width / 2 / math.tan(angle / 2)
    return DnerfScene(width, height, focal, np.array(times), pictures, world_to_camera)


def _pose(matrix: Any, where: str) -> F64:
    """World to camera [4, 4] in OpenCV's axes, from camera to world in OpenGL's axes."""
    camera_to_world = np.array(matrix, dtype=np.float64)
    if camera_to_world.shape != (4, 4) or not np.isfinite(camera_to_world).all():
        raise UserError(f"{where}: transform_matrix is not a 4 x 4 matrix of numbers")
    camera_to_world[:, 1:3] *= -1
    rotation = camera_to_world[:3, :3]
    if np.abs(rotation @ rotation.T - np.eye(3)).max() > 1e-3 or np.linalg.det(rotation) < 0:
        raise UserError(f"{where}: transform_matrix is not a rotation and a translation")
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = rotation.T, -rotation.T @ camera_to_world[:3, 3]
    return pose


def picture_size(url: str) -> tuple[int, int]:
    """Width and height of a picture that `read_picture` reads, in pixels, by its header alone.

    Raises:
        UserError: it is not there, or not a PNG of 8 bits with transparency.
    """
    try:
        with objects.open_read(url) as file:
            head = file.read(HEADER_BYTES)
    except (FileNotFoundError, IsADirectoryError):
        head = b""
    is_png = head.startswith(PNG_SIGNATURE) and head[12:16] == b"IHDR" and len(head) > 25
    # Pictures without an alpha channel can have a chunk of transparency, which stands before the pixels.
    if not is_png or head[24] > 8 or not (head[25] & HAS_ALPHA or b"tRNS" in head.partition(b"IDAT")[0]):
        raise UserError(f"{url}: {NO_PICTURE}")
    width, height = struct.unpack(">II", head[16:24])
    return width, height


def read_picture(url: str, downsample: int) -> npt.NDArray[np.float32]:
    """A picture [h, w, 4] averaged over `downsample` pixels squared: colours on white, and opacity; 0 to 1.

    Raises:
        UserError: it is not there or not a picture.
    """
    import cv2

    try:
        found = cv2.imdecode(np.frombuffer(objects.read_bytes(url), np.uint8), cv2.IMREAD_UNCHANGED)
    except (FileNotFoundError, cv2.error):
        found = None
    if found is None or found.ndim != 3 or found.shape[2] != 4 or found.dtype != np.uint8:
        raise UserError(f"{url}: {NO_PICTURE}")
    rgba = found[..., [2, 1, 0, 3]].astype(np.float32) / 255
    rgba[..., :3] = rgba[..., :3] * rgba[..., 3:] + (1 - rgba[..., 3:])
    h, w, d = rgba.shape[0] // downsample, rgba.shape[1] // downsample, downsample
    small: npt.NDArray[np.float32] = rgba[: h * d, : w * d].reshape(h, d, w, d, 4).mean((1, 3))
    return small
