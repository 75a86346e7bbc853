"""`zoosplat masks export`: writes the masks of stage segment as files that `data.masks` reads."""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import typer

from zoosplat.errors import UserError
from zoosplat.formats.media import GreyVideoWriter, encode_grey_png, encode_png
from zoosplat.recording.facts import DEFAULT_FPS
from zoosplat.recording.segmented_source import MASK_THRESHOLD
from zoosplat.stages.runs import Run
from zoosplat.storage import schema, urls

U8 = npt.NDArray[np.uint8]
Write = Callable[[int, U8], None]  # Writes the mask [H, W] of a frame of the videos.

FORMATS = ("video", "png")
# Digits of the number in the name of a picture, at least: those of the frames of eleven hours at 25 a second.
DIGITS = 6


def export_masks(run: Run, out: str, format: str | None) -> None:
    """Write the masks of a run, distorted and at full resolution, white on black, and print how they are read back.

    Beside them is a picture of each camera's background, with which a run of the masks as files has raw metrics too.

    Args:
        run: whose stage segment has finished.
        out: a folder on this machine, new or empty. It is complete, or it is not there.
        format: one of `FORMATS`; None: video, if the run keeps every frame of its videos, else png.

    Raises:
        UserError: the run has no such masks, the folder holds files, or the format cannot tell which frames are kept.
    """
    if format is not None and format not in FORMATS:
        raise UserError(f"--format {format}: choose one of {', '.join(FORMATS)}")
    if not run.experiment.data.masks_are_made:
        raise UserError(
            f"{run.project.url}: run {run.id} read its masks from files (data.masks), so correct those; its masks.zarr "
            "holds them without the distortion of the lenses, which could not be read back"
        )
    folder = _empty_folder(out)
    group = run.open_input("segment")
    frames = schema.read(group, "frame")
    all_kept = len(frames) == int(str(group.attrs["n_video_frames"]))
    if format == "video" and not all_kept:
        raise UserError(
            "--format video: the run does not keep all frames (ingest.frame_jump, ingest.max_frames), and a video "
            "cannot tell which; use --format png, whose numbers are those of the frames"
        )
    kind = format or ("video" if all_kept else "png")
    names: Any = group.attrs["camera_names"]
    entries = _entries(names, kind)
    unfinished = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.partial")
    try:
        unfinished.mkdir(parents=True)
        _write(
            schema.FrameArray(group, "probability"), frames, [unfinished / entry for entry in entries], kind, _fps(run)
        )
        plates = [f"{entry.removesuffix('.mkv')}.plate.png" for entry in entries]
        for plate, name in zip(schema.read(group, "plate"), plates, strict=True):
            (unfinished / name).write_bytes(encode_png(plate))
        unfinished.replace(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    seen = schema.read(group, "seen")
    for c, name in enumerate(names):
        absent = frames[~seen[:, c]]
        if len(absent):
            typer.echo(
                f"note: camera {name} is left out in {len(absent)} of {len(frames)} frames, first in frame {absent[0]}"
                "; its masks count there when they are read back, so correct them (an empty one says: no animal)",
                err=True,
            )
    _print_use(run, folder, entries, plates)


def _empty_folder(out: str) -> Path:
    url = urls.normalize(out)
    if urls.is_s3(url):
        raise UserError(
            f"{out}: masks are exported to this machine; name a folder, and copy it to S3 when it is corrected"
        )
    folder = Path(url)
    if folder.is_dir():
        held = next(folder.iterdir(), None)
        if held is not None:
            raise UserError(f"{out}: is not empty (it holds {held.name}); name another folder, or empty it")
    elif os.path.lexists(folder):
        raise UserError(f"{out}: is a file; name another folder")
    return folder


def _entries(names: Sequence[str], kind: str) -> list[str]:
    """Names of the cameras' files or folders. Where a name is no file name, its index stands before what is left."""
    safe = [re.sub(r"[^\w-]+", "_", name).strip("_") for name in names]
    if list(names) != safe or len(set(safe)) < len(safe):
        safe = [f"{c}_{name}" if name else str(c) for c, name in enumerate(safe)]
    return [f"{name}.mkv" if kind == "video" else name for name in safe]


def _fps(run: Run) -> float:
    """Frames per second of the videos, as far as the run knows it."""
    if run.read_mark("ingest") is not None:
        return float(str(run.open_input("ingest").attrs["fps"]))
    return run.experiment.data.fps or DEFAULT_FPS


def _write(
    probability: schema.FrameArray, frames: npt.NDArray[np.int64], targets: Sequence[Path], kind: str, fps: float
) -> None:
    """Write all frames, the cameras in parallel; one frame is held at a time."""
    _, _, height, width = probability.shape
    with ExitStack() as stack, ThreadPoolExecutor(min(len(targets), os.cpu_count() or 1)) as pool:
        writers: list[Write] = []
        for target in targets:
            if kind == "video":
                film = stack.enter_context(GreyVideoWriter(str(target), width, height, fps))
                writers.append(partial(_add_to_film, film))
            else:
                target.mkdir()
                writers.append(partial(_write_png, target))
        for t, frame in enumerate(frames.tolist()):
            masks = np.where(probability[t] >= MASK_THRESHOLD, np.uint8(255), np.uint8(0))
            list(pool.map(lambda write, mask, f=frame: write(f, mask), writers, masks))


def _add_to_film(film: GreyVideoWriter, frame: int, mask: U8) -> None:
    film.add(mask)


def _write_png(folder: Path, frame: int, mask: U8) -> None:
    (folder / f"{frame:0{DIGITS}d}.png").write_bytes(encode_grey_png(mask))


def _print_use(run: Run, folder: Path, entries: Sequence[str], plates: Sequence[str]) -> None:
    """Print the keys that read the masks and the backgrounds."""
    recording = urls.normalize(run.experiment.data.directory)
    inside = not urls.is_s3(recording) and folder.is_relative_to(recording)
    place = folder.relative_to(recording).as_posix() if inside else folder.name
    typer.echo(f"masks of {len(entries)} cameras: {folder}")
    if not inside:
        typer.echo(f"when they are corrected, copy the folder into that of the recording, {recording}")
    for key, names in (("data.masks", entries), ("data.backgrounds", plates)):
        typer.echo(f"and set {key}: {json.dumps([f'{place}/{name}' for name in names], ensure_ascii=False)}")
