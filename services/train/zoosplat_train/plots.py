"""What training shows of itself: history, loss curves, truth beside rendering, TensorBoard. Bytes, not files."""

from __future__ import annotations

import csv
import io
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from zoosplat.storage import objects, urls

Row = dict[str, float]


def history_csv(history: Sequence[Row]) -> bytes:
    """A row a finished epoch; what was not computed in an epoch is left empty."""
    keys = list(dict.fromkeys(key for row in history for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, keys, lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    return text.getvalue().encode()


def loss_curves(history: Sequence[Row]) -> bytes:
    """PNG: training and validation loss, validation IoU and PSNR, against epochs."""
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
    """PNG: pictures [V, h, w, 3] on white, truth above, rendering below."""
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


class Board:
    """TensorBoard scalars, written to a temporary folder and copied to a URL whole, which S3 can take too."""

    def __init__(self, folder: str, url: str, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.folder, self.url = Path(folder), url
        # What an interrupted run logged after its last checkpoint is hidden.
        self.writer = SummaryWriter(folder, purge_step=step)

    def add(self, row: Row) -> None:
        """`train_loss` becomes train/loss, at the row's step."""
        for key, value in row.items():
            if key not in ("epoch", "step"):
                self.writer.add_scalar(key.replace("_", "/", 1), value, int(row["step"]))

    def upload(self) -> None:
        self.writer.flush()
        for path in self.folder.iterdir():
            objects.write_bytes(urls.join(self.url, path.name), path.read_bytes())


@contextmanager
def tensorboard(url: str, step: int) -> Iterator[Board]:
    """A board whose events go to `url`; a resumed training adds a file from `step` on."""
    with tempfile.TemporaryDirectory() as folder:
        board = Board(folder, url, step)
        try:
            yield board
        finally:
            board.writer.close()
