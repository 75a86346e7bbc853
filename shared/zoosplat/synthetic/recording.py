"""Synthetic recordings with known truth: a walking, articulated, textured mouse filmed by calibrated cameras.

The animal is a union of simple solids, so its silhouettes are exact: every picture is ray cast at twice the resolution
and averaged, and the same solids tell whether a point lies inside. The calibration's world is tilted and shifted
against the arena, so nothing may assume that its z axis points up.

Everything is a function of seed and time: the first n frames of a longer recording equal those of a shorter one.
Importing this module needs NumPy only; writing a recording needs PyAV and h5py.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from zoosplat.errors import UserError
from zoosplat.formats.media import Mp4Writer
from zoosplat.geometry.rotations import axis_angle
from zoosplat.synthetic.cameras import ring_of_cameras
from zoosplat.synthetic.mouse import KEYPOINT_NAMES, Mouse
from zoosplat.synthetic.rendering import View
from zoosplat.synthetic.solids import Bools, Floats, Solids, centroid
from zoosplat.synthetic.traits import Traits

# Options of x264 for the videos. With one thread their bytes do not depend on the number of cores.
X264_OPTIONS = {"preset": "veryfast", "g": "50", "threads": "1"}
VIDEO_CRF, MASK_CRF = 16, 12
# The sensor noise of a frame is a window of one larger field of noise, at one of so many offsets along each axis.
NOISE_OFFSETS = 97
CENTROID_CELL_M = 1.5e-3


@dataclass(frozen=True)
class Truth:
    """The truth of T frames of a recording. Positions are in the frame of the calibration, in metres.

    Attributes:
        root_position: [T, 3] pelvis, inside the body.
        centroid: [T, 3] centroid of the animal's volume.
        forward: [T, 3] unit vector, horizontal, from pelvis to shoulders.
        heading: [T] angle of `forward` about up in radians, in (-pi, pi]: atan2(y, x) after the smallest rotation that
            takes `up` to +z.
        keypoints: [T, K, 3] in the order of KEYPOINT_NAMES.
        up: [3] unit vector from floor to ceiling.
    """

    root_position: Floats
    centroid: Floats
    forward: Floats
    heading: Floats
    keypoints: Floats
    up: Floats


@dataclass(frozen=True)
class SyntheticRecording:
    """A seeded recording that is computed and never read from disk.

    Attributes:
        n_frames: number of frames.
        n_cameras: number of cameras, which stand on a ring.
        width: of the pictures, pixels, even and at least 16.
        height: of the pictures, pixels, even and at least 16.
        fps: frames per second.
        seed: of the animal, the world, the table and the noise.
        coat: RGB of the back, 0 to 1.
        distortion: OpenCV's (k1, k2, p1, p2[, k3]) of all cameras, or None.
        noise_std: standard deviation of the sensor noise in grey levels.

    Raises:
        UserError: sizes that a yuv420p video cannot hold, or counts that are not positive.
    """

    n_frames: int = 120
    n_cameras: int = 6
    width: int = 288
    height: int = 256
    fps: float = 50.0
    seed: int = 0
    coat: tuple[float, float, float] = (0.47, 0.35, 0.25)
    distortion: tuple[float, ...] | None = None
    noise_std: float = 1.2

    def __post_init__(self) -> None:
        if self.n_frames < 1 or self.n_cameras < 1 or self.fps <= 0:
            raise UserError("synthetic scene: n_frames, n_cameras and fps must be positive")
        if min(self.width, self.height) < 16 or self.width % 2 or self.height % 2:
            raise UserError(f"synthetic scene: {self.width} x {self.height} px: both must be even and at least 16")
        if self.distortion is not None and len(self.distortion) not in (4, 5):
            raise UserError("synthetic scene: distortion is (k1, k2, p1, p2) or (k1, k2, p1, p2, k3)")

    @cached_property
    def _world(self) -> tuple[Floats, Floats]:
        """Rotation Q [3, 3] and origin o [3] of the calibration's world: x_world = Q x_arena + o."""
        rng = np.random.default_rng((self.seed, 1))
        lean = rng.uniform(0, 2 * np.pi)
        tilt = axis_angle((np.cos(lean), np.sin(lean), 0.0), np.deg2rad(12.0))
        return tilt @ axis_angle((0, 0, 1), rng.uniform(0, 2 * np.pi)), rng.uniform(-0.1, 0.1, 3)

    @cached_property
    def _arena_cameras(self) -> tuple[Floats, Floats, Floats]:
        heights = [0.17 if i % 2 else 0.28 for i in range(self.n_cameras)]
        focal_px = 1.40 * min(self.width, 1.1 * self.height)
        return ring_of_cameras(
            self.n_cameras, 0.36, heights, focal_px=focal_px, width=self.width, height=self.height, target=(0, 0, 0.015)
        )

    @property
    def cameras(self) -> tuple[Floats, Floats, Floats]:
        """K [C, 3, 3], R [C, 3, 3] and t [C, 3] in metres of the calibration: x_cam = R x_world + t."""
        intrinsic, rotation, translation = self._arena_cameras
        to_world, origin = self._world
        rotation = rotation @ to_world.T
        return intrinsic, rotation, translation - rotation @ origin

    @property
    def up(self) -> Floats:
        """[3] unit vector from floor to ceiling in the calibration's world."""
        return self._world[0][:, 2].copy()

    @property
    def distortion_coefficients(self) -> Floats | None:
        """[5] k1 k2 p1 p2 k3 of all cameras, or None."""
        return None if self.distortion is None else np.append(self.distortion, 0.0)[:5]

    @cached_property
    def mouse(self) -> Mouse:
        """The animal, in the frame of the arena."""
        return Mouse(Traits.draw(self.seed, self.coat), self.n_frames, self.fps)

    @cached_property
    def poses(self) -> list[Solids]:
        """The solids of the animal at every frame, in the frame of the arena."""
        return [self.mouse.pose(frame)[0] for frame in range(self.n_frames)]

    def inside(self, frame: int, points: Floats) -> Bools:
        """Whether points [..., 3] of the calibration's world lie in the animal: [...] bool."""
        to_world, origin = self._world
        solids = self.mouse.pose(frame)[0]
        local = (np.asarray(points, float) - origin) @ to_world
        return np.asarray(np.logical_or.reduce([solids.inside(i, local) for i in range(len(solids.a))]))

    @cached_property
    def truth(self) -> Truth:
        """The truth of every frame. The centroid is computed on a grid of 1.5 mm."""
        to_world, origin = self._world
        keypoints, forwards, centroids = [], [], []
        for frame in range(self.n_frames):
            solids, points, forward = self.mouse.pose(frame)
            keypoints.append(points @ to_world.T + origin)
            forwards.append(to_world @ forward)
            centroids.append(to_world @ centroid(solids, CENTROID_CELL_M) + origin)
        forward_world = np.stack(forwards)
        up = self.up
        axis = np.cross(up, (0.0, 0.0, 1.0))
        level = axis_angle(tuple(axis), float(np.arctan2(np.linalg.norm(axis), up[2]))) if axis.any() else np.eye(3)
        flat = forward_world @ level.T
        stacked = np.stack(keypoints)
        root = stacked[:, KEYPOINT_NAMES.index("pelvis")]
        return Truth(root, np.stack(centroids), forward_world, np.arctan2(flat[:, 1], flat[:, 0]), stacked, up)

    @cached_property
    def views(self) -> dict[int, tuple[View, NDArray[np.float32]]]:
        """Views with their pictures of the empty table, by camera; `render` fills it."""
        return {}

    @cached_property
    def noise(self) -> NDArray[np.float32]:
        """[height + NOISE_OFFSETS, width + NOISE_OFFSETS, 3] grey levels of sensor noise."""
        rng = np.random.default_rng((self.seed, 4))
        shape = (self.height + NOISE_OFFSETS, self.width + NOISE_OFFSETS, 3)
        return self.noise_std * rng.standard_normal(shape, np.float32)

    def view(self, camera: int) -> View:
        """One of the cameras, in the frame of the arena."""
        intrinsic, rotation, translation = (part[camera] for part in self._arena_cameras)
        return View(intrinsic, rotation, translation, self.width, self.height, self.distortion_coefficients)

    def forget(self, camera: int) -> None:
        """Free the memory of what `render` keeps of a camera."""
        self.views.pop(camera, None)

    def render(self, solids: Solids, frame: int, camera: int) -> tuple[NDArray[np.uint8], Bools]:
        """The picture [h, w, 3] and the mask [h, w] of a posed animal in one camera; `frame` selects the noise."""
        if camera not in self.views:
            view = self.view(camera)
            self.views[camera] = view, view.backdrop(self.seed)
        view, background = self.views[camera]
        picture = background.copy()
        mask = np.zeros((self.height, self.width), bool)
        drawn = view.cast(solids, self.mouse.traits)
        if drawn is not None:
            rows, columns, colour, coverage = drawn
            picture[rows, columns] = picture[rows, columns] * (1 - coverage[..., None]) + colour
            mask[rows, columns] = coverage >= 0.5
        if self.noise_std > 0:
            dy, dx = np.random.default_rng((self.seed, 3, camera, frame)).integers(0, NOISE_OFFSETS, 2)
            picture += self.noise[dy : dy + self.height, dx : dx + self.width]
        return np.clip(picture + 0.5, 0, 255).astype(np.uint8), mask


def render_views(
    recording: SyntheticRecording, frame: int, cameras: Sequence[int] | None = None
) -> tuple[NDArray[np.uint8], Bools]:
    """The exact pictures of a frame, which `make_recording` encodes.

    Args:
        recording: what is filmed.
        frame: number of the frame.
        cameras: numbers of C cameras; None: all.

    Returns:
        rgb [C, h, w, 3] uint8 and mask [C, h, w] bool, where the animal covers at least half of the pixel.
    """
    chosen = range(recording.n_cameras) if cameras is None else cameras
    solids = recording.mouse.pose(frame)[0]
    drawn = [recording.render(solids, frame, camera) for camera in chosen]
    return np.stack([rgb for rgb, _ in drawn]), np.stack([mask for _, mask in drawn])


def make_recording(
    folder: Path,
    *,
    n_frames: int = 120,
    n_cameras: int = 6,
    width: int = 288,
    height: int = 256,
    fps: float = 50.0,
    seed: int = 0,
    distortion: tuple[float, ...] | None = None,
) -> Truth:
    """Write a recording into `folder`, which is made if it is absent, and return its truth. Files are replaced.

    videos/{c}.mp4: H.264, yuv420p, BT.709 limited range, tagged. masks/{c}.mp4: the silhouettes, grey 0 or 255.
    camera_params.h5: camera_parameters/{rotation [C, 3, 3], translation [C, 3], intrinsic [C, 3, 3]}, metres, and
    with `distortion` also distortion [C, 5] (k1, k2, p1, p2, k3).
    vertical_lines.npz: `up` [3], the NEGATIVE of the true up, as the classic tool writes it.
    truth.npz: the fields of Truth, and keypoint_names [K].

    Raises:
        UserError: as SyntheticRecording, whose attributes the arguments are.
    """
    recording = SyntheticRecording(n_frames, n_cameras, width, height, fps, seed, distortion=distortion)
    with ThreadPoolExecutor(2) as pool:
        return write_recording(Path(folder), recording, pool)


def write_recording(folder: Path, recording: SyntheticRecording, pool: Executor, video_crf: int = VIDEO_CRF) -> Truth:
    """Write the files of a recording (see `make_recording`) and return its truth.

    Args:
        folder: is made if it is absent. Files in it are replaced.
        recording: what is written.
        pool: films the cameras.
        video_crf: constant rate factor of H.264 for the videos.
    """
    import h5py

    for name in ("videos", "masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    intrinsic, rotation, translation = recording.cameras
    with h5py.File(folder / "camera_params.h5", "w") as file:
        group = file.create_group("camera_parameters")
        for key, value in (("rotation", rotation), ("translation", translation), ("intrinsic", intrinsic)):
            group.create_dataset(key, data=value)
        coefficients = recording.distortion_coefficients
        if coefficients is not None:
            group.create_dataset("distortion", data=np.tile(coefficients, (recording.n_cameras, 1)))
    np.savez(folder / "vertical_lines.npz", up=-recording.up)
    truth = recording.truth
    np.savez(folder / "truth.npz", **vars(truth), keypoint_names=np.array(KEYPOINT_NAMES))
    _ = recording.poses, recording.noise, recording.views  # Threads must not compute these properties twice.
    list(pool.map(partial(_film, folder, recording, video_crf), range(recording.n_cameras)))
    return truth


def _film(folder: Path, recording: SyntheticRecording, video_crf: int, camera: int) -> None:
    """Write the videos of one camera."""
    fps = recording.fps
    pictures = Mp4Writer(str(folder / "videos" / f"{camera}.mp4"), fps, {"crf": str(video_crf), **X264_OPTIONS})
    silhouettes = Mp4Writer(str(folder / "masks" / f"{camera}.mp4"), fps, {"crf": str(MASK_CRF), **X264_OPTIONS})
    for frame, solids in enumerate(recording.poses):
        rgb, mask = recording.render(solids, frame, camera)
        pictures.add(rgb)
        silhouettes.add(np.repeat(np.where(mask, np.uint8(255), np.uint8(0))[..., None], 3, 2))
    pictures.close()
    silhouettes.close()
    recording.forget(camera)
