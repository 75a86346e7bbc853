"""Keypoints that another program found in the raw videos: files of SLEAP, DeepLabCut and Lightning Pose, one a camera.

A file of predictions by DeepLabCut or Lightning Pose has a row for each frame of its video. Files of labels, and those
of SLEAP, say which frames they speak of. Frames are told apart by their index in the video, from 0.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import pickle
import re
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from zoosplat.errors import Problems, UserError
from zoosplat.recording.video import VideoInfo
from zoosplat.storage import objects

F32 = npt.NDArray[np.float32]
HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"
LEVELS = ("scorer", "individuals", "bodyparts", "coords")  # header rows of the tables; individuals are not in all
KNOWN = "give a .slp or analysis .h5 of SLEAP, a .h5 or .csv of DeepLabCut, or a .csv of Lightning Pose"


@dataclass(frozen=True, eq=False)
class _Table:
    """Keypoints of N rows, of I individuals with K keypoints each.

    Attributes:
        frames: [N] index of each row's frame in the video.
        values: [N, I, K, 3] x, y in pixels from the centre of the picture's first pixel, and confidence 0 to 1; NaN
            where a keypoint is not told.
        every_frame: whether there is a row for each frame of the video.
    """

    frames: npt.NDArray[np.int64]
    values: F32
    every_frame: bool


def keypoints_label(camera: int, file: str) -> str:
    """The name of a file of `data.keypoints` in messages."""
    return f"data.keypoints[{camera}] = {file}"


def can_read_keypoints(url: str) -> bool:
    """Whether what reads a file is installed: SLEAP's need the package sleap-io."""
    return not url.endswith(".slp") or importlib.util.find_spec("sleap_io") is not None


def read_keypoints(url: str, label: str, n_frames: int, n_declared: int) -> F32:
    """The keypoints of the animal in the frames of one video.

    Where a frame has several animals, those are taken that are surest.

    Args:
        url: the file.
        label: its name in messages, with its key.
        n_frames: frames of the video that are used.
        n_declared: frames of the video as its header says.

    Returns:
        [n_frames, K, 3]: x, y in pixels of the video as the camera saw it, and confidence 0 to 1; NaN where a keypoint
        is not told. Labels of a person have confidence 1.

    Raises:
        UserError: the file is missing, is no such file, or does not fit the frames of the video.
    """
    try:
        data = objects.read_bytes(url)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise UserError(f"{label}: no such file; check data.keypoints and data.directory") from None
    try:
        table = _read(data, url)
    except (ValueError, KeyError, IndexError, OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{label}: cannot be read as keypoints ({error}); {KNOWN}") from None
    except ModuleNotFoundError as error:
        raise UserError(f"{label}: needs {error.name}; install zoosplat[keypoints]") from None
    if not len(table.frames) or not np.isfinite(table.values).any():
        raise UserError(f"{label}: holds no keypoints; export it again, or leave data.keypoints out")
    if table.every_frame and not n_frames <= len(table.frames) <= n_declared:
        raise UserError(
            f"{label}: has {len(table.frames)} rows, but the video has {n_declared} frames; export the keypoints of "
            "this very video again"
        )
    if table.frames.min() < 0 or table.frames.max() >= n_declared:
        raise UserError(
            f"{label}: has keypoints of frame {table.frames.max()}, but the video has {n_declared} frames, from 0 to "
            f"{n_declared - 1}; export the keypoints of this very video again"
        )
    out = np.full((n_declared, *table.values.shape[2:]), np.nan, np.float32)
    out[table.frames] = _surest(table.values)
    return out[:n_frames]


def read_all_keypoints(
    urls: Sequence[str], labels: Sequence[str], videos: Sequence[VideoInfo], frames: npt.NDArray[np.int64]
) -> F32:
    """The keypoints of all cameras in some frames.

    Args:
        urls: the files, one a camera.
        labels: their names in messages.
        videos: the cameras' videos.
        frames: [T] index in the video.

    Returns:
        [T, C, K, 3], see `read_keypoints`; K is the largest number of a camera.

    Raises:
        UserError: as `read_keypoints`, a line for each file.
    """
    found, problems = [], Problems()
    for url, label, info in zip(urls, labels, videos, strict=True):
        with problems.collect():
            found.append(read_keypoints(url, label, info.n_frames, info.n_declared)[frames])
    problems.report()
    out = np.full((len(frames), len(found), max(values.shape[1] for values in found), 3), np.nan, np.float32)
    for c, values in enumerate(found):
        out[:, c, : values.shape[1]] = values
    return out


def _read(data: bytes, url: str) -> _Table:
    if not data.startswith(HDF5_MAGIC):
        return _read_csv(data.decode("utf-8-sig"))
    import h5py

    with h5py.File(io.BytesIO(data), "r") as file:
        tables = [group["table"] for group in file.values() if isinstance(group, h5py.Group) and "table" in group]
        if tables and "values_block_0_kind" in tables[0].attrs:
            return _read_pytables(tables[0])
    return _read_sleap(data, analysis=not url.endswith(".slp"))


def _surest(values: F32) -> F32:
    """[N, K, 3] of the individual [N, I, K, 3] with the highest mean confidence in each row."""
    confidence = values[..., 2]
    told = np.isfinite(confidence)
    mean = np.where(told, confidence, 0).sum(-1) / np.maximum(told.sum(-1), 1)
    return np.asarray(values[np.arange(len(values)), mean.argmax(-1)])


# -- tables of DeepLabCut and Lightning Pose ----------------------------------------------------------------------
def _read_csv(text: str) -> _Table:
    rows = list(csv.reader(io.StringIO(text)))
    header = {row[0]: row for row in rows[: len(LEVELS)] if row and row[0] in LEVELS}
    if not {"bodyparts", "coords"} <= header.keys():
        raise ValueError("it has no header of bodyparts and coords")
    # Labels name their picture in one column or in three; the header has no coordinate there.
    first = next(i for i, name in enumerate(header["coords"]) if i and name)
    columns = [
        tuple(header[level][i] if level in header else "" for level in LEVELS[1:])
        for i in range(first, len(header["coords"]))
    ]
    body = [row for row in rows[len(header) :] if row]
    values = [[float(cell) if cell else np.nan for cell in row[first:]] for row in body]
    return _arrange([row[first - 1] for row in body], np.array(values, np.float32), columns)


class _PlainUnpickler(pickle.Unpickler):
    """Reads pickled lists, tuples and texts, and nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        raise ValueError(f"its header names {module}.{name}")


def _read_pytables(table: Any) -> _Table:
    """A table [N] of pandas' HDF5 (format "table"): blocks of values, and the pickled names of their columns."""
    columns: list[tuple[str, ...]] = []
    blocks = []
    for name in table.dtype.names:
        if not name.startswith("values_block_"):
            continue
        try:
            names = _PlainUnpickler(io.BytesIO(bytes(table.attrs[f"{name}_kind"]))).load()
        except (pickle.UnpicklingError, EOFError, AttributeError) as error:
            raise ValueError(f"its header is damaged: {error}") from None
        columns += [tuple(str(level) for level in column[1:]) for column in names]
        blocks.append(np.asarray(table[name], np.float32).reshape(len(table), -1))
    if "index" not in table.dtype.names:
        raise ValueError("its rows are named by several columns; give the .csv that lies beside it")
    index = [entry.decode() if isinstance(entry, bytes) else entry for entry in table["index"].tolist()]
    return _arrange(index, np.concatenate(blocks, 1), [(("",) * (3 - len(column)) + column) for column in columns])


def _arrange(index: Sequence[str | int], cells: F32, columns: Sequence[tuple[str, ...]]) -> _Table:
    """A table from cells [N, columns]; a column is an individual, a body part and a coordinate."""
    place = {column: i for i, column in enumerate(columns)}
    individuals, parts = (list(dict.fromkeys(column[level] for column in columns)) for level in (0, 1))
    if cells.shape != (len(index), len(columns)):
        raise ValueError(f"its rows have not {len(columns)} values each")
    values = np.full((len(index), len(individuals), len(parts), 3), np.nan, np.float32)
    found = False
    for i, individual in enumerate(individuals):
        for k, part in enumerate(parts):
            x, y, likelihood = (place.get((individual, part, name)) for name in ("x", "y", "likelihood"))
            if x is None or y is None:
                continue
            found = True
            values[:, i, k, 0], values[:, i, k, 1] = cells[:, x], cells[:, y]
            told = np.isfinite(values[:, i, k, :2]).all(-1)
            values[:, i, k, 2] = np.where(told, 1 if likelihood is None else cells[:, likelihood], np.nan)
    if not found:
        raise ValueError("it has no columns x and y")
    numbers = [str(entry) for entry in index]
    every_frame = all(number.isdecimal() for number in numbers)
    frames = [int(number) if every_frame else _frame_of_picture(number) for number in numbers]
    if every_frame and frames != list(range(len(frames))):
        raise ValueError("its rows are not numbered 0, 1, 2, ...")
    return _Table(np.array(frames, np.int64), values, every_frame)


def _frame_of_picture(name: str) -> int:
    """The frame that a labelled picture shows, by the last number in its name: img00042.png."""
    numbers = re.findall(r"\d+", re.split(r"[/\\]", name)[-1].rpartition(".")[0])
    if not numbers:
        raise ValueError(f"the picture {name} has no number in its name")
    return int(numbers[-1])


# -- SLEAP --------------------------------------------------------------------------------------------------------
def _read_sleap(data: bytes, analysis: bool) -> _Table:
    import sleap_io

    # The package reads files of the file system only.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "keypoints.h5" if analysis else "keypoints.slp")
        path.write_bytes(data)
        try:
            labels = (
                sleap_io.load_analysis_h5(str(path)) if analysis else sleap_io.load_slp(str(path), open_videos=False)
            )
        except Exception as error:  # The package raises whatever its parts raise.
            raise ValueError(f"sleap-io: {error}") from None
    if len(labels.videos) > 1:
        raise ValueError(f"it is about {len(labels.videos)} videos, and must be about this camera's alone")
    chosen = [(int(frame.frame_idx), _instances(frame)) for frame in labels.labeled_frames]
    chosen = [(number, instances) for number, instances in chosen if instances]
    shape = max((len(i) for _, i in chosen), default=1), max((len(i[0]) for _, i in chosen), default=1), 3
    values = np.full((len(chosen), *shape), np.nan, np.float32)
    for row, (_, instances) in enumerate(chosen):
        for i, points in enumerate(instances):
            values[row, i, : len(points)] = points
    return _Table(np.array([number for number, _ in chosen], np.int64), values, every_frame=False)


def _instances(frame: Any) -> list[F32]:
    """Points [K, 3] of the animals of a labelled frame: those that a person labelled, or else the predicted ones."""
    by_person = list(frame.user_instances)
    return [_points(instance, by_person=bool(by_person)) for instance in by_person or frame.predicted_instances]


def _points(instance: Any, by_person: bool) -> F32:
    xy = np.asarray(instance.numpy(), np.float32)[:, :2]
    scores = np.ones(len(xy)) if by_person else _scores(instance.points["score"])
    told = np.isfinite(xy).all(-1)
    return np.concatenate([xy, np.where(told, scores, np.nan)[:, None]], 1).astype(np.float32)


def _scores(values: Iterable[float]) -> npt.NDArray[np.float64]:
    """Confidence of predicted points; where a program told none, 1."""
    scores = np.asarray(list(values), np.float64)
    return np.where(np.isfinite(scores), scores, 1.0)
