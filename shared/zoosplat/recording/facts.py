"""Facts about a recording that are known before anything of it is decoded."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from zoosplat.config.experiment import Experiment
from zoosplat.errors import UserError
from zoosplat.geometry.cameras import Cameras, WorldTransform
from zoosplat.geometry.rotations import FloatArray
from zoosplat.recording.mask_files import MaskInfo
from zoosplat.recording.video import VideoInfo

# Frame rate in 1/s where neither the configuration nor a video names one.
DEFAULT_FPS = 25.0


@dataclass(frozen=True)
class Footage:
    """What the videos or the pictures of a recording hold.

    Attributes:
        masks, videos: one a camera, in the order of the cameras; `n_frames` is what all have. They are empty where they
            were not asked for, and for a D-NeRF scene.
        width, height: pixels of every picture.
        n_frames: frames that all cameras have; times of a D-NeRF scene.
        fps: frames per second of the videos, as configured, or else as they say.
        warnings: a line for each thing that is odd and does not stop a run.
    """

    masks: tuple[MaskInfo, ...]
    videos: tuple[VideoInfo, ...]
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
    """Everything that is known of a recording before anything of it is decoded.

    Attributes:
        cameras: as calibrated, in the calibration's world, metres; for a D-NeRF scene at its first time.
        up: [3] unit vector from floor to ceiling, in the calibration's world.
    """

    cameras: Cameras
    up: FloatArray


def kept_frames(experiment: Experiment, n_frames: int) -> int:
    """How many of a recording's frames are kept: every `ingest.frame_jump`-th, `ingest.max_frames` at most."""
    kept = -(-n_frames // experiment.ingest.frame_jump)
    return kept if experiment.ingest.max_frames is None else min(kept, experiment.ingest.max_frames)


@dataclass(frozen=True)
class MaskGeometry:
    """Cameras and world of masks.zarr for T kept frames and C cameras.

    Attributes:
        camera_names: C names.
        intrinsics: [C, 3, 3] pixels of the downsampled pictures.
        world_to_camera: [C, 4, 4] in the oriented world, metres; for moving cameras at the first frame.
        unit_m: metres in a unit of the classic, normalized world.
        world: from the calibration's world to the oriented world.
        moving: arrays of moving cameras by name, see `schema.MOVING`; empty where the cameras stand.
        seen: [T, C], False where a view is absent from a frame; None where all views are there in all frames.
    """

    camera_names: list[str]
    intrinsics: FloatArray
    world_to_camera: FloatArray
    unit_m: float
    world: WorldTransform
    moving: dict[str, npt.NDArray[np.generic]]
    seen: npt.NDArray[np.bool_] | None = None
