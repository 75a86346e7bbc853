"""Masks of one instant of all cameras. The interface is that of the package; see preparation.py for the cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from zoosplat.config.experiment import Experiment
from zoosplat.geometry.cameras import Cameras
from zoosplat.recording.video import Planes, window_rgb
from zoosplat_segment.preparation import Preparation

U8 = npt.NDArray[np.uint8]
DIFFERENCE = 24.0  # Grey levels from the plate from which a pixel is animal.


@dataclass(frozen=True, eq=False)
class InstantMasks:
    """The masks of an instant of C cameras of W x H pixels, of which Ch are held out.

    Attributes:
        probability: [C, H, W] uint8, 0 to 255, that a pixel is animal. Of observed cameras it comes from all observed
            views together, of a held-out camera from that camera alone.
        all_views: [Ch, H, W] uint8, the same of the held-out cameras, ascending, with the help of the observed views.
        light: [C, 3, 4] float32, how the background differs from the plate: see the README of the service.
        agreement: [C] float32, soft IoU of the view's mask with the silhouette that the other observed views tell; NaN
            where the view took no part.
        seen: [C] bool, False where the view is absent. A held-out view that disagrees is not: it must serve as truth.
    """

    probability: U8
    all_views: U8
    light: npt.NDArray[np.float32]
    agreement: npt.NDArray[np.float32]
    seen: npt.NDArray[np.bool_]


class Segmenter:
    """Segments one instant after the other, each without regard to the others.

    Args:
        preparation: of the recording.
        experiment: the configuration.
        cameras: at full resolution, with distortion, in the oriented world, metres.
        size: width and height of the pictures, pixels.
        device: where to compute.
    """

    def __init__(
        self,
        preparation: Preparation,
        experiment: Experiment,
        cameras: Cameras,
        size: tuple[int, int],
        device: torch.device,
    ) -> None:
        self._plates, self._size = preparation.plates.astype(np.float32), size
        self._held_out = list(experiment.holdout_views)

    def segment(self, frames: Sequence[Planes]) -> InstantMasks:
        """The masks of an instant.

        Args:
            frames: C whole frames as the cameras saw them.
        """
        n = len(frames)
        rgb = np.stack([window_rgb(frame, (0, 0), self._size, 1) for frame in frames])
        difference = np.abs(rgb.astype(np.float32) - self._plates).max(axis=-1)
        probability = np.clip(difference * (128 / DIFFERENCE), 0, 255).astype(np.uint8)
        light = np.zeros((n, 3, 4), np.float32)
        light[..., 0] = 1
        agreement = np.ones(n, np.float32)
        return InstantMasks(probability, probability[self._held_out], light, agreement, np.ones(n, bool))
