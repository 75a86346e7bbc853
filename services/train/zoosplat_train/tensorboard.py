"""TensorBoard's event file of a training."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from zoosplat.storage import objects, urls
from zoosplat_train.history import Row


class Board:
    """Scalars for TensorBoard. It writes into a temporary folder, whose files are then copied to a URL."""

    def __init__(self, folder: str, url: str, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.folder, self.url = Path(folder), url
        # TensorBoard then hides what an interrupted run has logged after its last checkpoint.
        self.writer = SummaryWriter(folder, purge_step=step)

    def add(self, row: Row) -> None:
        """Add a row's figures at the row's step; `train_loss` becomes train/loss."""
        for key, value in row.items():
            if key not in ("epoch", "step"):
                self.writer.add_scalar(key.replace("_", "/", 1), value, int(row["step"]))

    def upload(self) -> None:
        """Copy the files to the URL."""
        self.writer.flush()
        for path in self.folder.iterdir():
            objects.write_bytes(urls.join(self.url, path.name), path.read_bytes())


@contextmanager
def open_board(url: str, step: int) -> Iterator[Board]:
    """A board whose event files go to `url`; a resumed training adds a file that begins at `step`."""
    with tempfile.TemporaryDirectory() as folder:
        board = Board(folder, url, step)
        try:
            yield board
        finally:
            board.writer.close()
