"""Metrics of pictures in a window round the animal that does not follow from the masks of the camera that is judged."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from zoosplat_model.metrics import PSNR_MAX, SSIM_RADIUS, ssim_map

# Of renderings laid over the plate, against raw pictures; see `raw_errors`.
RAW_METRICS = ("raw_l1", "raw_psnr", "raw_ssim")
Box = tuple[int, int, int, int]  # x0, y0, x1, y1 (exclusive) in the whole frame of a camera, pixels
# What is round the picture of a camera in a box of its whole frame: camera and box -> [h, w, 3], 0 to 1.
Surroundings = Callable[[int, Box], Tensor]
Measure = Callable[[Tensor, Tensor], Tensor]  # picture and truth, [1, 3, h, w] each -> [n] figures


def judged_windows(
    center: Tensor,  # [3]
    edge_m: float,
    intrinsics: Tensor,  # [C, 3, 3]
    world_to_camera: Tensor,  # [C, 4, 4]
    width: int,
    height: int,
) -> Tensor:
    """The windows in which the cameras' pictures of a frame are judged: [C, 4] int64 x0, y0, x1, y1 (exclusive).

    A window is a square round the projection of the animal's centre, as wide as a length of `edge_m` appears at the
    distance of the centre. So it depends on the masks only through the tracked centre, to which all observed cameras
    contribute. Its sides are rounded to whole pixels, and what lies outside the picture is cut off. The window of a
    camera that has the centre behind it is empty.

    Args:
        center: of the animal in the world, metres.
        edge_m: metres.
        intrinsics: pixels of the pictures.
        world_to_camera: metres.
        width: of the pictures, pixels.
        height: of the pictures, pixels.
    """
    in_camera = (world_to_camera[:, :3, :3].double() @ center.double()) + world_to_camera[:, :3, 3]
    depth = in_camera[:, 2:]
    k = intrinsics.double()
    place = (in_camera[:, None] @ k[:, :2].mT)[:, 0] / depth
    half = k[:, [0, 1], [0, 1]] * edge_m / 2 / depth
    # The pixel with the integer coordinate i reaches from i - 0.5 to i + 0.5.
    sides = torch.cat([place - half + 0.5, place + half + 0.5], 1)
    sides = torch.where(depth > 0, sides, 0.0).round()
    limits = torch.tensor([width, height, width, height], device=sides.device)
    return torch.minimum(sides.clamp(min=0), limits.to(sides)).long()


def raw_errors(picture: Tensor, truth: Tensor) -> Tensor:
    """Mean absolute error over pixels and channels, PSNR in dB for a peak of 1 (at most 100), and SSIM, [3]."""
    error = picture - truth
    psnr = (-10 * torch.log10(error.square().mean())).clamp(max=PSNR_MAX)
    return torch.stack([error.abs().mean(), psnr, ssim_map(picture, truth).mean()])


def white_beyond(camera: int, box: Box) -> Tensor:
    """The surroundings of pictures on white, for `compare_windows`."""
    x0, y0, x1, y1 = box
    return torch.ones(y1 - y0, x1 - x0, 3)


def compare_windows(
    pictures: Tensor,  # [C, h, w, 3]
    truths: Tensor,  # [C, h, w, 3]
    origin: Tensor,  # [C, 2]
    windows: Tensor,  # [C, 4]
    surroundings: Surroundings,
    downsample: int,
    measure: Measure,
    n_figures: int,
    least: int = SSIM_RADIUS + 1,
) -> Tensor:
    """Figures of the pictures of one frame against the truth within windows, [C, n_figures] float64.

    What the pictures do not hold of a window is taken from its surroundings, in picture and truth alike. So it counts
    as right, and the size of the pictures makes no difference to what is shown in them. All is averaged over d x d
    pixels first, as whole frames would be; squares that reach out of the window are left out. The figures of a window
    with a side below `least` pixels are NaN.

    Args:
        pictures: 0 to 1.
        truths: 0 to 1.
        origin: x, y of the pictures' corners in the whole frame, integer pixels.
        windows: x0, y0, x1, y1 in the whole frame, int64.
        surroundings: of a camera's picture.
        downsample: the integer d.
        measure: of one picture and its truth, float64.
        n_figures: the length of its result.
        least: pixels after averaging.
    """
    d, rows = downsample, []
    height, width = pictures.shape[1:3]
    for camera, (window, (x, y)) in enumerate(zip(windows.tolist(), origin.tolist(), strict=True)):
        x0, y0, x1, y1 = (*(-(-v // d) * d for v in window[:2]), *(v // d * d for v in window[2:]))
        if min(x1 - x0, y1 - y0) < least * d:
            rows.append(pictures.new_full((n_figures,), math.nan, dtype=torch.float64))
            continue
        both = surroundings(camera, (x0, y0, x1, y1)).to(pictures.device).double().repeat(2, 1, 1, 1)
        left, top, right, bottom = max(x0, x), max(y0, y), min(x1, x + width), min(y1, y + height)
        if left < right and top < bottom:
            shown = torch.stack([pictures[camera], truths[camera]])[:, top - y : bottom - y, left - x : right - x]
            both[:, top - y0 : bottom - y0, left - x0 : right - x0] = shown.double()
        both = both.permute(0, 3, 1, 2)
        if d > 1:
            both = torch.nn.functional.avg_pool2d(both, d)
        rows.append(measure(both[:1], both[1:]).double())
    return torch.stack(rows)
