"""Recordings that are videos of masks and pictures with a calibration, and their checks."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
import numpy.typing as npt

from zoosplat.config.experiment import Experiment
from zoosplat.errors import Problems, UserError
from zoosplat.geometry.cameras import Cameras
from zoosplat.recording import mask_files, video
from zoosplat.recording.background import background_label, probe_empty_scene
from zoosplat.recording.calibration.reader import read_cameras
from zoosplat.recording.calibration.up import read_up
from zoosplat.recording.facts import DEFAULT_FPS, Footage, MaskGeometry, RecordingFacts, kept_frames
from zoosplat.recording.mask_files import MaskInfo
from zoosplat.recording.source import Bool, Picture, RecordingSource
from zoosplat.recording.video import VideoInfo, probe
from zoosplat.storage import objects, urls

Kind = Literal["mask", "video"]
Maps = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]] | None

# Relative difference of frame rates below which they mean the same and are only written differently.
SAME_RATE = 0.01


@dataclass(frozen=True)
class VideoPicture:
    """A frame of a video.

    Attributes:
        planes: of the frame at full resolution.
        downsample: integer factor from working pixels to full resolution.
        maps: undistortion maps at full resolution, or None.
    """

    planes: video.Planes
    downsample: int
    maps: Maps

    def window(self, origin: tuple[int, int], size: tuple[int, int]) -> npt.NDArray[np.uint8]:
        return video.window_rgb(self.planes, origin, size, self.downsample, self.maps)


class VideoSource(RecordingSource):
    """Videos of masks and pictures, one of each a camera, and a calibration of cameras that stand."""

    cameras_move = False
    kinds: tuple[Kind, ...] = ("mask", "video")  # The files that are checked.

    def check(self) -> RecordingFacts:
        experiment = self.experiment
        data, problems = experiment.data, Problems()
        footage = cameras = up = None
        _check_folder(experiment)
        with problems.collect():
            footage = _check_videos(experiment, self.kinds)
        with problems.collect():
            cameras = read_cameras(
                calibration_urls(experiment),
                format=data.calibration_format,
                unit=data.calibration_unit,
                names=data.camera_names,
                open_bytes=lambda url: _read_bytes(url, "data.calibration"),
            )
            _check_apart(cameras, calibration_urls(experiment)[0])
        with problems.collect():
            if cameras is not None or data.up != "auto":
                spec = up_url(experiment) or data.up
                up = read_up(spec, cameras, lambda url: _read_bytes(url, "data.up"))
        if footage is not None:
            for c, file in enumerate(data.backgrounds or ()):
                with problems.collect():
                    probe_empty_scene(data.url(file), background_label(c, file), (footage.width, footage.height))
            with problems.collect():
                n_cameras = len(data.videos) if cameras is None else len(cameras)
                experiment.check(n_cameras, footage.width, footage.height)
        problems.report()
        assert footage is not None
        assert cameras is not None
        assert up is not None
        return RecordingFacts(**vars(footage), cameras=cameras, up=up)

    def check_pictures(self) -> Footage:
        _check_folder(self.experiment)
        return _check_videos(self.experiment, ("video",))

    def list_files(self) -> list[str]:
        return []

    def mask_geometry(self, facts: RecordingFacts, frames: npt.NDArray[np.int64]) -> MaskGeometry:
        oriented, world = facts.cameras.oriented(facts.up)
        centers = oriented.centers_m
        small = oriented.downsampled(self.experiment.ingest.image_downsample)
        unit_m = float(np.linalg.norm(centers - centers.mean(axis=0), axis=1).max())
        return MaskGeometry(list(facts.cameras.names), small.intrinsics, small.world_to_camera, unit_m, world, {})

    def read_masks(
        self, infos: Sequence[MaskInfo], cameras: Cameras, start: int, stop: int, block: int
    ) -> Iterator[Bool]:
        jump, downsample = self.experiment.ingest.frame_jump, self.experiment.ingest.image_downsample
        maps = undistort_maps(cameras, [(info.width, info.height) for info in infos])
        wanted = self.experiment.data.mask_values
        readers = [mask_files.read_masks(info, start * jump, (stop - 1) * jump + 1, jump, wanted) for info in infos]

        def read(camera: int, count: int) -> Bool:
            frames = itertools.islice(readers[camera], count)
            return np.stack([video.luma_mask(frame, downsample, maps[camera]) for frame in frames])

        with ThreadPoolExecutor(min(len(infos), cv2.getNumberOfCPUs())) as pool:
            for first in range(start, stop, block):
                count = min(block, stop - first)
                yield np.stack(list(pool.map(read, range(len(infos)), [count] * len(infos))), axis=1)

    def read_pictures(
        self, infos: Sequence[VideoInfo], cameras: Cameras, start: int, stop: int
    ) -> list[Iterator[Picture | None]]:
        jump, downsample = self.experiment.ingest.frame_jump, self.experiment.ingest.image_downsample

        def read(info: VideoInfo, maps: Maps) -> Iterator[Picture | None]:
            for frame in video.read_frames(info, start * jump, (stop - 1) * jump + 1, jump):
                yield VideoPicture(video.planes(frame), downsample, maps)

        maps = undistort_maps(cameras, [(info.width, info.height) for info in infos])
        return [read(info, of_camera) for info, of_camera in zip(infos, maps, strict=True)]


def undistort_maps(cameras: Cameras, sizes: Sequence[tuple[int, int]]) -> list[Maps]:
    """Maps of every camera at full resolution, whose width and height are in `sizes`; None where no lens distorts."""
    return [
        cameras.undistort_maps(c, width, height) if cameras.distortion[c].any() else None
        for c, (width, height) in enumerate(sizes)
    ]


def calibration_urls(experiment: Experiment) -> list[str]:
    """Where the calibration lies: one file, or one a camera."""
    names = experiment.data.calibration
    return [experiment.data.url(name) for name in ([names] if isinstance(names, str) else names)]


def up_url(experiment: Experiment) -> str | None:
    """Where the file with the up direction lies; None: there is none."""
    up = experiment.data.up
    return experiment.data.url(up) if isinstance(up, str) and up != "auto" else None


def _read_bytes(url: str, key: str) -> bytes:
    try:
        return objects.read_bytes(url)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{url}: no such file; check {key} and data.directory") from None
    except IsADirectoryError:
        raise UserError(f"{url}: no such file, but a folder; check {key}") from None


def _check_folder(experiment: Experiment) -> None:
    """One line instead of one for each file in it. On S3 there are no folders."""
    folder = urls.normalize(experiment.data.directory)
    if not urls.is_s3(folder) and not os.path.isdir(folder):
        raise UserError(f"{folder}: no such folder; check data.directory")


def _check_apart(cameras: Cameras, file: str) -> None:
    if not np.ptp(cameras.centers_m, axis=0).max() > 0:
        raise UserError(f"{file}: all cameras are at the same place; check the translations")


def _check_videos(experiment: Experiment, kinds: Sequence[Kind]) -> Footage:
    data, problems = experiment.data, Problems()
    names = data.camera_names or tuple(str(i) for i in range(len(data.videos)))
    masks: list[MaskInfo] = []
    videos: list[VideoInfo] = []
    for camera, file in zip(names, data.masks if "mask" in kinds else (), strict=False):
        with problems.collect():
            label = f"{file} (mask of camera {camera})"
            masks.append(mask_files.probe_mask(data.url(file), file, label, experiment.ingest.frame_jump))
    for camera, file in zip(names, data.videos, strict=True):
        with problems.collect():
            videos.append(probe(data.url(file), f"{file} (video of camera {camera})"))
    if masks and len(masks) == len(videos) == len(names):
        with problems.collect():
            kept = kept_frames(experiment, min(info.n_frames for info in videos))
            masks = mask_files.fit_lengths(masks, videos, kept, experiment.ingest.frame_jump)
    if not masks and not videos:
        problems.report()
    width, height = _usual_size(masks, videos)
    masks = [mask_files.fit_size(mask, width, height) or mask for mask in masks]
    found = [*masks, *videos]
    problems.lines += _size_problems(found, width, height)
    lengths = _length_problems(found)
    shortest = min(info.n_frames for info in found)
    warnings = list(_rate_warnings([info for info in found if info.fps]))
    if lengths and experiment.ingest.on_short == "error":
        problems.lines += [f"{line}; export it again, or set ingest.on_short: truncate" for line in lengths]
    elif lengths:
        warnings.append(f"{'; '.join(lengths)}; all are used up to frame {shortest}")
    problems.report()
    masks = [dataclasses.replace(info, n_frames=shortest) for info in masks]
    videos = [dataclasses.replace(info, n_frames=shortest) for info in videos]
    if masks:
        kept = kept_frames(experiment, shortest)
        masks = mask_files.choose_readings(masks, data.mask_values, kept, experiment.ingest.frame_jump)
    # The masks may be of another program, which knows nothing of the recording's rate.
    fps = data.fps or (videos or found)[0].fps or DEFAULT_FPS
    return Footage(tuple(masks), tuple(videos), width, height, shortest, fps, tuple(warnings))


def _usual_size(masks: Sequence[VideoInfo], videos: Sequence[VideoInfo]) -> tuple[int, int]:
    """Width and height that most videos have and, where that does not decide, most masks."""
    of_videos, of_masks = (Counter((info.width, info.height) for info in infos) for infos in (videos, masks))
    return max({**of_videos, **of_masks}, key=lambda size: (of_videos[size], of_masks[size]))


def _size_problems(infos: Sequence[VideoInfo], width: int, height: int) -> Iterator[str]:
    """A line for each file that has not the usual size."""
    like = next(info for info in infos if (info.width, info.height) == (width, height))
    for info in infos:
        if (info.width, info.height) != (width, height):
            yield (
                f"{info.label}: {info.width} x {info.height} pixels, but {like.label} has {width} x {height}; videos "
                "must have one size, and masks that size or a smaller one of the same shape: export it again"
            )


def _length_problems(infos: Sequence[VideoInfo]) -> list[str]:
    """A line for each file that is cut off, and for each that is not as long as most are."""
    counts = Counter(info.n_declared for info in infos)
    usual = max(counts, key=lambda length: (counts[length], length))
    like = next(info for info in infos if info.n_declared == usual)
    problems = []
    for info in infos:
        if info.n_frames < info.n_declared:
            problems.append(f"{info.label} is truncated: {info.n_frames} of its {info.n_declared} frames are there")
        elif info.n_declared != usual:
            problems.append(f"{info.label} has {info.n_frames} frames, {like.label} has {usual}")
    return problems


def _rate_warnings(infos: Sequence[VideoInfo]) -> Iterator[str]:
    usual = sorted(info.fps for info in infos)[len(infos) // 2]
    like = next(info for info in infos if info.fps == usual)
    for info in infos:
        if abs(info.fps - usual) > SAME_RATE * max(usual, 1e-9):
            yield f"{info.label}: {info.fps:g} frames/s, but {like.label} has {usual:g}"
