"""Pictures of a training's progress, as PNG: loss curves, and truth beside rendering."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from zoosplat_train.history import Row


def loss_curves(history: Sequence[Row]) -> bytes:
    """A PNG of training loss, validation loss, validation IoU and PSNR against epochs."""
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    panels: Sequence[Axes] = figure.subplots(1, 3)
    for axes, label, keys in zip(
        panels,
        ("loss", "IoU", "PSNR of observed views (dB, window)"),
        (("train_loss", "valid_loss"), ("valid_iou", "valid_left_out_iou"), ("valid_psnr",)),
        strict=True,
    ):
        for key in keys:
            rows = [row for row in history if key in row]
            label_of = "left-out view" if "left_out" in key else key.split("_")[0]
            axes.plot([r["epoch"] for r in rows], [r[key] for r in rows], marker=".", label=label_of)
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.legend()
    return _png(figure)


def preview(truth: NDArray[np.float32], rendered: NDArray[np.float32], names: Sequence[str], t: int) -> bytes:
    """A PNG of pictures of one frame, the truth above and the rendering below.

    Args:
        truth: [V, h, w, 3] on white, 0 to 1.
        rendered: [V, h, w, 3] likewise.
        names: of the V cameras.
        t: index of the kept frame.
    """
    n, h, w = truth.shape[:3]
    figure = Figure(figsize=(3 * n, 6 * h / w + 0.6), layout="constrained")
    panels = figure.subplots(2, n, squeeze=False)
    for row, label, pictures in zip(panels, ("truth", "rendering"), (truth, rendered), strict=True):
        for axes, picture, name in zip(row, pictures, names, strict=True):
            axes.imshow(picture.clip(0, 1))
            axes.set_title(f"{label}, camera {name}", fontsize=9)
            axes.axis("off")
    figure.suptitle(f"kept frame {t}", fontsize=10)
    return _png(figure)


def _png(figure: Figure) -> bytes:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=100)
    return data.getvalue()
