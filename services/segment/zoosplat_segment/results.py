"""What is known of a recording, and what is found in an instant of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from zoosplat_segment.adaptation import Lesson

U8 = npt.NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Preparation:
    """What is known of a recording of C cameras of W x H pixels. Pictures are as the cameras saw them (distorted).

    Attributes:
        plates: [C, H, W, 3] uint8, RGB of the background.
        noise: [C] float32, standard deviation of a pixel against the plate, grey levels.
        floor_m: height of the floor in the oriented world (+z up, origin at the mean camera), metres; None: not known.
        weights: tensors of the network by name, as they are after it has learned from the recording; may be empty.
        warnings: lines for the user about what is odd.
    """

    plates: npt.NDArray[np.uint8]
    noise: npt.NDArray[np.float32]
    floor_m: float | None
    weights: dict[str, Tensor]
    warnings: tuple[str, ...] = ()


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


@dataclass(frozen=True, eq=False)
class Study:
    """What the preparation of a recording learns from an instant.

    Attributes:
        masks: [C, h, w] of whole pictures, downsampled; held-out cameras see for themselves.
        lesson: what the observed views teach the network; None where they do not agree on a place.
        lowest_m: height of the hull's lowest point, metres; None without a hull.
        agreement: mean soft IoU of the observed views with what the others tell; NaN without a hull.
    """

    masks: Tensor
    lesson: Lesson | None
    lowest_m: float | None
    agreement: float
