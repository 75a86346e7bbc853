"""What the rasterisers take and give."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class Cameras(NamedTuple):
    """C views.

    Attributes:
        world_to_camera: [C, 4, 4] rigid, OpenCV axes: x_camera = R x_world + t.
        intrinsics: [C, 3, 3] pixels, no skew. The centre of the top-left pixel is (0, 0), but for the backends it is
            (0.5, 0.5).
        width: of the pictures, pixels.
        height: of the pictures, pixels.
    """

    world_to_camera: Tensor
    intrinsics: Tensor
    width: int
    height: int


class Rendering(NamedTuple):
    """Rendered views: `rgb` [C, H, W, D] composited on the background, `alpha` [C, H, W] in [0, 1]."""

    rgb: Tensor
    alpha: Tensor


class PairBuffer(NamedTuple):
    """The size of the list of (Gaussian, tile) pairs in a CUDA graph of the gsplat backend.

    Attributes:
        capacity: pairs that a captured graph has memory for; the picture is wrong where there are more.
        required: [] int64 on the device, raised to the number of pairs of each picture. It is to be compared with
            `capacity` now and then.
    """

    capacity: int
    required: Tensor


@dataclass
class ScreenStatistics:
    """What densification needs from the projection (3D mode, backends gsplat and torch).

    Attributes:
        offsets: [C, N, 2] pixels, added to the projected centres. Zeros with `requires_grad` change nothing, and their
            gradient is that of the centres.
        radii: [C, N] pixels, set by `rasterize`: half the larger side of what is drawn, 0 where nothing is.
    """

    offsets: Tensor
    radii: Tensor | None = None
