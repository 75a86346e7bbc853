"""Recordings that are D-NeRF scenes, and their checks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from zoosplat.config.dnerf_defaults import SPLITS, TRANSFORMS_FILES
from zoosplat.errors import Problems, UserError
from zoosplat.geometry.cameras import Cameras, WorldTransform
from zoosplat.recording import dnerf
from zoosplat.recording.facts import DEFAULT_FPS, Footage, MaskGeometry, RecordingFacts
from zoosplat.recording.mask_files import MaskInfo
from zoosplat.recording.source import Bool, Picture, RecordingSource
from zoosplat.recording.video import VideoInfo
from zoosplat.storage import urls

# Number of pictures whose headers are read at the same time, because on S3 each waits for an answer.
REQUESTS = 16


@dataclass(frozen=True, eq=False)
class ScenePicture:
    """A picture [h, w, 4] of a scene: colours on white, and opacity; 0 to 1."""

    rgba: npt.NDArray[np.float32]

    def window(self, origin: tuple[int, int], size: tuple[int, int]) -> npt.NDArray[np.uint8]:
        (x, y), (width, height) = origin, size
        return np.rint(255 * self.rgba[y : y + height, x : x + width, :3]).astype(np.uint8)


class DnerfSource(RecordingSource):
    """A scene of pictures of two moving cameras. The masks are where the pictures are not transparent."""

    cameras_move = True

    @cached_property
    def folder(self) -> str:
        """URL of the scene."""
        return urls.normalize(self.experiment.data.directory)

    @cached_property
    def scene(self) -> dnerf.DnerfScene:
        """The scene, without its pictures."""
        return dnerf.read_scene(self.folder)

    def check(self) -> RecordingFacts:
        experiment = self.experiment
        problems = Problems()
        scene = self.scene
        kept = scene.pictures[:: experiment.ingest.frame_jump][: experiment.ingest.max_frames]
        pictures = [url for row in kept for url in row if url is not None]

        def fault(url: str) -> UserError | None:
            try:
                width, height = dnerf.picture_size(url)
            except UserError as error:
                return error
            if (width, height) == (scene.width, scene.height):
                return None
            return UserError(
                f"{url}: {width} x {height} pixels, but others have {scene.width} x {scene.height}; all pictures of a "
                "scene must have one size"
            )

        with ThreadPoolExecutor(REQUESTS) as pool:
            for error in pool.map(fault, pictures):
                with problems.collect():
                    if error is not None:
                        raise error
        with problems.collect():
            experiment.check(len(SPLITS), scene.width, scene.height)
        problems.report()
        k, poses = np.tile(scene.intrinsics(1), (2, 1, 1)), scene.world_to_camera[0]
        cameras = Cameras(SPLITS, k, poses[:, :3, :3], poses[:, :3, 3], np.zeros((2, 5)))
        return RecordingFacts(
            masks=(),
            videos=(),
            width=scene.width,
            height=scene.height,
            n_frames=len(scene.times),
            fps=experiment.data.fps or DEFAULT_FPS,
            warnings=(),
            cameras=cameras,
            up=np.array([0.0, 0.0, 1.0]),
        )

    def check_pictures(self) -> Footage:
        facts = self.check()
        return Footage(**{field.name: getattr(facts, field.name) for field in dataclasses.fields(Footage)})

    def list_files(self) -> list[str]:
        pictures = {picture for row in self.scene.pictures for picture in row if picture is not None}
        return [urls.join(self.folder, name) for name in TRANSFORMS_FILES] + sorted(pictures)

    def mask_geometry(self, facts: RecordingFacts, frames: npt.NDArray[np.int64]) -> MaskGeometry:
        """The world is the scene's own."""
        scene, poses = self.scene, self.scene.world_to_camera[frames]
        seen = np.array([[picture is not None for picture in row] for row in scene.pictures])
        return MaskGeometry(
            camera_names=list(self.experiment.data.camera_names or SPLITS),
            intrinsics=np.tile(scene.intrinsics(self.experiment.ingest.image_downsample), (2, 1, 1)),
            world_to_camera=poses[0],
            unit_m=1.0,
            world=WorldTransform(np.eye(3), np.zeros(3), 1.0),
            moving={"time": scene.times[frames], "pose": poses},
            seen=seen[frames],
        )

    def read_masks(
        self, infos: Sequence[MaskInfo], cameras: Cameras, start: int, stop: int, block: int
    ) -> Iterator[Bool]:
        downsample = self.experiment.ingest.image_downsample
        height, width = self.scene.height // downsample, self.scene.width // downsample
        for first in range(start, stop, block):
            masks = np.zeros((min(block, stop - first), len(cameras), height, width), bool)
            for i, c in np.ndindex(*masks.shape[:2]):
                rgba = self._read(first + i, c)
                if rgba is not None:
                    masks[i, c] = rgba[..., 3] > 0
            yield masks

    def read_pictures(
        self, infos: Sequence[VideoInfo], cameras: Cameras, start: int, stop: int
    ) -> list[Iterator[Picture | None]]:
        def read(camera: int) -> Iterator[Picture | None]:
            for i in range(start, stop):
                rgba = self._read(i, camera)
                yield None if rgba is None else ScenePicture(rgba)

        _ = self.scene  # The readers may run in threads, which must not read the scene twice.
        return [read(camera) for camera in range(len(cameras))]

    def _read(self, kept_frame: int, camera: int) -> npt.NDArray[np.float32] | None:
        url = self.scene.pictures[kept_frame * self.experiment.ingest.frame_jump][camera]
        return None if url is None else dnerf.read_picture(url, self.experiment.ingest.image_downsample)
