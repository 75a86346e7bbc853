"""Means of metrics, the choice of frames for the gallery, and pictures of an evaluation."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from typing import Literal

import cv2
import numpy as np
import numpy.typing as npt

from zoosplat.formats import media

Values = npt.NDArray[np.float64]
Kind = Literal["worst", "best", "even"]

GALLERY_SIDE = 320  # pixels of the side of each of the three squares
MARGIN = 1.2  # side of the square over that of the animal's box
ERROR_AT_END = 0.5  # mean |error| over the channels that the last colour of the error picture stands for, of 1


def camera_means(values: Values) -> Values:
    """Means [C, M] over frames of metrics [T, C, M]. Frames in which a metric is not defined (NaN) do not count."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Mean of empty slice", category=RuntimeWarning)
        return np.asarray(np.nanmean(values, axis=0))


def group_means(means: Values, cameras: Sequence[int]) -> Values:
    """Means [M] over some cameras of the camera means [C, M]; NaN where no camera has a value."""
    return camera_means(means[list(cameras)])


def choose_frames(iou: Values, count: int) -> list[tuple[int, Kind]]:
    """Choose the frames to show: the worst, the best, then `count` evenly spaced ones, none twice.

    Args:
        iou: [T] of each frame; at least one.
        count: number of evenly spaced frames; the first and the last frame are among them if there are two or more.
    """
    chosen: dict[int, Kind] = {int(np.argmin(iou)): "worst"}
    chosen.setdefault(int(np.argmax(iou)), "best")
    last = len(iou) - 1
    even = np.linspace(0, last, count) if count > 1 else np.full(count, last / 2)
    for i in np.rint(even).astype(int):
        chosen.setdefault(int(i), "even")
    return list(chosen.items())


def square_around(seen: npt.NDArray[np.bool_]) -> tuple[float, float, float, float]:
    """The square x0, y0, x1, y1 in pixels round what is `seen` [h, w], 1.2 times as large; it may reach outside."""
    ys, xs = np.nonzero(seen)
    if len(xs) == 0:
        return 0.0, 0.0, float(seen.shape[1]), float(seen.shape[0])
    x0, x1, y0, y1 = xs.min(), xs.max() + 1, ys.min(), ys.max() + 1
    half = MARGIN * max(x1 - x0, y1 - y0) / 2
    x, y = (x0 + x1) / 2, (y0 + y1) / 2
    return float(x - half), float(y - half), float(x + half), float(y + half)


def comparison(rgb: Values, alpha: Values, truth: Values, mask: npt.NDArray[np.bool_]) -> media.Picture:
    """A picture of truth, rendering and error side by side, each cut out round the animal and enlarged.

    Args:
        rgb: [h, w, 3] rendering on white, 0 to 1.
        alpha: [h, w] its opacity.
        truth: [h, w, 3] photograph on white.
        mask: [h, w].

    Returns:
        [320, 968, 3] uint8. Error is the mean over channels of |rgb - truth|, from white (0) through yellow and red to
        black (0.5 and more).
    """
    error = np.abs(rgb - truth).mean(axis=-1) / ERROR_AT_END
    heat = cv2.applyColorMap(media.to_uint8(1 - error), cv2.COLORMAP_HOT)[..., ::-1]
    box = square_around(mask | (alpha > 0.5))
    pictures = [media.to_uint8(truth), media.to_uint8(rgb), np.asarray(heat, dtype=np.uint8)]
    return media.side_by_side([media.zoom(p, box, GALLERY_SIDE, GALLERY_SIDE) for p in pictures])


def plot_over_time(video_frames: Values, curves: dict[str, tuple[Values, Values]]) -> bytes:
    """A PNG plot of IoU and PSNR over time.

    Args:
        video_frames: [T] indices in the video.
        curves: mean IoU [T] and PSNR [T] in dB, by the name of the group of cameras.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    for name, (iou, psnr) in curves.items():
        top.plot(video_frames, iou, ".-", markersize=3, linewidth=0.8, label=name)
        bottom.plot(video_frames, psnr, ".-", markersize=3, linewidth=0.8, label=name)
    top.set(ylabel="IoU")
    bottom.set(ylabel="PSNR (dB)", xlabel="frame of the video")
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
    bottom.xaxis.get_major_locator().set_params(integer=True)
    top.legend()
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=100)
    return data.getvalue()
