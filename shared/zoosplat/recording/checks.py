"""The one checker of a recording, for `zoosplat config check`, for `zoosplat run` and for the stages that read it.

Headers, indices and calibration are read, and no picture is decoded. Whatever is wrong is reported together, a line
each, naming file, camera and what to do; what may pass, such as a server that does not answer, is raised as it is.
"""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np

from zoosplat.config.dnerf_defaults import SPLITS
from zoosplat.config.experiment import Experiment
from zoosplat.errors import Problems, UserError
from zoosplat.geometry.cameras import Cameras
from zoosplat.geometry.rotations import FloatArray
from zoosplat.recording import dnerf
from zoosplat.recording.calibration.reader import read_cameras
from zoosplat.recording.calibration.up import read_up
from zoosplat.recording.video import VideoInfo, probe
from zoosplat.storage import objects, urls

Kind = Literal["mask", "video"]
SAME_RATE = 0.01  # frame rates that differ by less, relatively, are written differently and mean the same
DEFAULT_FPS = 25.0  # where neither the configuration nor a container names a frame rate
REQUESTS = 16  # pictures whose headers are read at the same time: on S3 each waits for an answer


@dataclass(frozen=True)
class Footage:
    """What the files of pictures hold.

    Attributes:
        masks, videos: one a camera, in the order of the cameras; `n_frames` is what all have. Empty where they were not
            asked for, and of a D-NeRF scene.
        scene: of a D-NeRF scene; else None.
        width, height: pixels of every picture.
        n_frames: frames that all cameras have; times of a D-NeRF scene.
        fps: frames per second of the videos, as configured, or else as they say.
        warnings: a line for each thing that is odd and does not stop a run.
    """

    masks: tuple[VideoInfo, ...]
    videos: tuple[VideoInfo, ...]
    scene: dnerf.DnerfScene | None
    width: int
    height: int
    n_frames: int
    fps: float
    warnings: tuple[str, ...]

    def check_against_masks(self, width: int, height: int, last: int) -> None:
        """Check that a finished masks.zarr can have been made from this recording.

        Args:
            width, height: full size of the pictures that the masks were made from, pixels.
            last: the last video frame that they have.

        Raises:
            UserError: a line for each thing in which they differ.
        """
        problems = []
        what = self.videos[0].label if self.videos else "the scene"
        if (self.width, self.height) != (width, height):
            problems.append(
                f"{what}: {self.width} x {self.height} pixels, but the masks were made from {width} x {height}; videos "
                "and masks must have one size: export it again, or run stage ingest again"
            )
        if self.n_frames <= last:
            problems.append(
                f"{what}: {self.n_frames} frames, but the masks need {last + 1}; export it again, or run stage ingest "
                "again"
            )
        if problems:
            raise UserError("\n".join(problems))


@dataclass(frozen=True)
class RecordingFacts(Footage):
    """All that is known of a recording before anything of it is decoded.

    Attributes:
        cameras: as calibrated, in the calibration's world, metres; of a D-NeRF scene as they are at its first time.
        up: [3] unit vector from floor to ceiling, in the calibration's world.
    """

    cameras: Cameras
    up: FloatArray


def kept_frames(experiment: Experiment, n_frames: int) -> int:
    """How many of a recording's frames are kept: every `ingest.frame_jump`-th, `ingest.max_frames` at most."""
    kept = -(-n_frames // experiment.ingest.frame_jump)
    return kept if experiment.ingest.max_frames is None else min(kept, experiment.ingest.max_frames)


def check_recording(experiment: Experiment) -> RecordingFacts:
    """Check masks, videos, calibration and up direction against each other and against the configuration.

    Raises:
        UserError: a line for each problem.
    """
    if experiment.ingest.source == "dnerf":
        return _check_scene(experiment)
    data, problems = experiment.data, Problems()
    footage = cameras = up = None
    _check_folder(experiment)
    with problems.collect():
        footage = _check_videos(experiment, ("mask", "video"))
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
        with problems.collect():
            n_cameras = len(data.videos) if cameras is None else len(cameras)
            experiment.check(n_cameras, footage.width, footage.height)
    problems.report()
    assert footage is not None
    assert cameras is not None
    assert up is not None
    return RecordingFacts(**vars(footage), cameras=cameras, up=up)


def check_videos(experiment: Experiment) -> Footage:
    """Check what is to be seen alone, as for packing the pictures of a recording whose masks have been read.

    Raises:
        UserError: a line for each problem.
    """
    if experiment.ingest.source == "dnerf":
        facts = _check_scene(experiment)
        return Footage(**{field.name: getattr(facts, field.name) for field in dataclasses.fields(Footage)})
    _check_folder(experiment)
    return _check_videos(experiment, ("video",))


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


# -- videos -------------------------------------------------------------------------------------------------------
def _check_videos(experiment: Experiment, kinds: Sequence[Kind]) -> Footage:
    data, problems = experiment.data, Problems()
    files = {"mask": data.masks, "video": data.videos}
    names = data.camera_names or tuple(str(i) for i in range(len(data.videos)))
    infos: dict[Kind, list[VideoInfo]] = {"mask": [], "video": []}
    for kind in kinds:
        for camera, file in zip(names, files[kind], strict=True):
            with problems.collect():
                infos[kind].append(probe(data.url(file), f"{file} ({kind} of camera {camera})"))
    found = [info for kind in kinds for info in infos[kind]]
    if not found:
        problems.report()
    problems.lines += _size_problems(found)
    lengths = _length_problems(found)
    shortest = min(info.n_frames for info in found)
    warnings = list(_rate_warnings(found))
    if lengths and experiment.ingest.on_short == "error":
        problems.lines += [f"{line}; export it again, or set ingest.on_short: truncate" for line in lengths]
    elif lengths:
        warnings.append(f"{'; '.join(lengths)}; all are used up to frame {shortest}")
    problems.report()
    # The masks may be of another program, which knows nothing of the recording's rate.
    fps = data.fps or (infos["video"] or found)[0].fps or DEFAULT_FPS
    masks, videos = (
        tuple(dataclasses.replace(i, n_frames=shortest) for i in infos[kind]) for kind in ("mask", "video")
    )
    return Footage(masks, videos, None, found[0].width, found[0].height, shortest, fps, tuple(warnings))


def _size_problems(infos: Sequence[VideoInfo]) -> Iterator[str]:
    """A line for each file whose size is not that of most."""
    usual = Counter((info.width, info.height) for info in infos).most_common(1)[0][0]
    like = next(info for info in infos if (info.width, info.height) == usual)
    for info in infos:
        if (info.width, info.height) != usual:
            yield (
                f"{info.label}: {info.width} x {info.height} pixels, but {like.label} has {usual[0]} x {usual[1]}; "
                "videos and masks must have one size: export it again"
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


# -- D-NeRF scenes ------------------------------------------------------------------------------------------------
def _check_scene(experiment: Experiment) -> RecordingFacts:
    """Check a D-NeRF scene: its files, and the size of each of its pictures that are kept."""
    problems = Problems()
    scene = dnerf.read_scene(urls.normalize(experiment.data.directory))
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
        scene=scene,
        width=scene.width,
        height=scene.height,
        n_frames=len(scene.times),
        fps=experiment.data.fps or DEFAULT_FPS,
        warnings=(),
        cameras=cameras,
        up=np.array([0.0, 0.0, 1.0]),
    )
