"""The masks of stage segment over the raw pictures from which they were made."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import zarr

from zoosplat.config.experiment import Experiment
from zoosplat.formats import media
from zoosplat.recording import video
from zoosplat.recording.segmented_source import MASK_THRESHOLD
from zoosplat.storage import schema
from zoosplat_flows.least_agreeing import least_agreeing_views
from zoosplat_flows.report.pictures import draw_outline

KINDS = ("outline", "probability")  # what is drawn over a picture
MOST_LISTED = 60  # views in the list of those that agree least
LISTED_APART = 1 / 50  # of the recording: the least time between two views of a camera in the list
MARGIN = 0.4  # of the mask's longer side: how much is shown round the mask
LEAST_SIDE = 64  # pixels that are shown at least along an axis
TINT = (255, 60, 90)  # RGB where the probability is 1
TINT_WEIGHT = 0.6  # share of the tint in the colour of such a pixel


class MaskOverlays:
    """Masks over the pictures of the videos, as the cameras saw them. They are read from the videos frame by frame.

    Args:
        experiment: the configuration.
        segments: the finished segments.zarr of T kept frames and C cameras.

    Attributes:
        names: of the cameras.
        agreement: [T, C] float32, soft IoU with what the other views tell; NaN where a view took no part.
        seen: [T, C] bool, False where a view is left out.
    """

    def __init__(self, experiment: Experiment, segments: zarr.Group) -> None:
        self._data = experiment.data
        self.names = [str(name) for name in segments.attrs["camera_names"]]  # type: ignore[union-attr]
        self.agreement, self.seen = (schema.read(segments, key) for key in ("agreement", "seen"))
        self._frames = schema.read(segments, "frame")
        self._probability = schema.FrameArray(segments, "probability")
        self._infos: dict[int, video.VideoInfo] = {}

    @cached_property
    def least_agreeing(self) -> list[tuple[int, int]]:
        """Kept frame and camera of the views that agree least, the least agreeing one first."""
        apart = max(1, round(LISTED_APART * len(self.agreement)))
        return least_agreeing_views(self.agreement, MOST_LISTED, apart)

    def draw(self, t: int, camera: int, kind: str, whole: bool) -> media.Picture:
        """The picture of a camera in kept frame t with its mask, [h, w, 3] uint8.

        Args:
            t: kept frame.
            camera: number of the camera.
            kind: of `KINDS`: the outline of the mask, or the probability as a tint.
            whole: the whole picture; else what is round the mask, if the mask is not empty.

        Raises:
            UserError: the video or the mask cannot be read.
        """
        picture, probability = self._picture(t, camera), self._probability[t][camera]
        mask = probability >= MASK_THRESHOLD
        rows, columns = (slice(0, n) for n in mask.shape) if whole else part_round(mask)
        picture, probability, mask = picture[rows, columns], probability[rows, columns], mask[rows, columns]
        if kind == "outline":
            return draw_outline(picture, mask)
        weight = probability[..., None] * np.float32(TINT_WEIGHT / 255)
        return np.asarray(np.rint(picture * (1 - weight) + weight * np.asarray(TINT, np.float32)), np.uint8)

    def _picture(self, t: int, camera: int) -> media.Picture:
        if camera not in self._infos:
            file = self._data.videos[camera]
            self._infos[camera] = video.probe(self._data.url(file), f"data.videos[{camera}] = {file}")
        info, frame = self._infos[camera], int(self._frames[t])
        decoded: Any = next(video.read_frames(info, frame, frame + 1))
        return video.window_rgb(video.planes(decoded), (0, 0), (info.width, info.height), 1)


def part_round(mask: npt.NDArray[np.bool_]) -> tuple[slice, slice]:
    """Rows and columns of the part of a picture that holds its mask [h, w] and a margin; all if the mask is empty."""
    x, y, width, height = cv2.boundingRect(mask.astype(np.uint8))
    if width == 0:
        return slice(0, mask.shape[0]), slice(0, mask.shape[1])
    spare = MARGIN * max(width, height)
    return _widened(y, height, spare, mask.shape[0]), _widened(x, width, spare, mask.shape[1])


def _widened(start: int, length: int, spare: float, limit: int) -> slice:
    half = max(length / 2 + spare, LEAST_SIDE / 2)
    middle = start + length / 2
    return slice(max(0, round(middle - half)), min(limit, round(middle + half)))
