"""Means of metrics, the choice of frames for the gallery, and pictures of an evaluation."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]
Kind = Literal["worst", "best", "even"]


def camera_means(values: Values) -> Values:
    """Means [C, M] over frames of metrics [T, C, M]. Frames in which a metric is not defined (NaN) do not count."""
    return _mean(values, 0)


def frame_means(values: Values, cameras: Sequence[int]) -> Values:
    """Means [T] over some cameras of a metric [T, C]. Views that are absent (NaN) do not count; NaN where all are."""
    return _mean(values[:, list(cameras)], 1)


def _mean(values: Values, axis: int) -> Values:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Mean of empty slice", category=RuntimeWarning)
        return np.asarray(np.nanmean(values, axis=axis))


def group_means(means: Values, cameras: Sequence[int]) -> Values:
    """Means [M] over some cameras of the camera means [C, M]; NaN where no camera has a value."""
    return camera_means(means[list(cameras)])


def choose_frames(iou: Values, count: int) -> list[tuple[int, Kind]]:
    """Choose the frames to show: the worst, the best, then `count` evenly spaced ones, none twice.

    Args:
        iou: [T] of each frame; NaN where all views that are judged are absent, but not in all frames.
        count: number of evenly spaced frames; the first and the last frame are among them if there are two or more.
    """
    chosen: dict[int, Kind] = {int(np.nanargmin(iou)): "worst"}
    chosen.setdefault(int(np.nanargmax(iou)), "best")
    last = len(iou) - 1
    even = np.linspace(0, last, count) if count > 1 else np.full(count, last / 2)
    for i in np.rint(even).astype(int):
        chosen.setdefault(int(i), "even")
    return list(chosen.items())


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
