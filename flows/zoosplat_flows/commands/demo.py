"""`zoosplat demo`: makes a synthetic recording and runs the whole pipeline on it."""

from __future__ import annotations

import importlib.resources
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import typer
from rich.console import Console

from zoosplat.config.load import read_config
from zoosplat.recording import video
from zoosplat.recording.segmented_source import MASK_THRESHOLD
from zoosplat.stages.runs import Run
from zoosplat.storage import schema, urls
from zoosplat_flows.commands.run import run_stages
from zoosplat_flows.commands.storage_probe import check_writable

CONFIG = importlib.resources.files("zoosplat_flows.commands") / "demo.yaml"  # the configuration of the demo


def run_demo(url: str, frames: int, overrides: list[str], workers: int | None) -> None:
    """Make the synthetic recording, in the project or in ./demo for a project on S3, and run demo.yaml on it.

    The pipeline sees the raw videos alone. The true masks, which are made too, only tell how good its masks are.

    Args:
        url: path or URL of the project.
        frames: frames of the recording.
        overrides: changes of the configuration, such as `train.lr=5e-5`.
        workers: processes for the shards of a stage; None: one for each core.

    Raises:
        UserError: the project cannot be written.
        typer.Exit: see `run_stages`.
    """
    check_writable(urls.normalize(url))
    folder = (Path("demo") if urls.is_s3(url) else Path(urls.normalize(url))) / "recording"
    marker = folder / "frames.txt"  # written last: a recording whose making was stopped has none
    if not marker.exists() or marker.read_text() != str(frames):
        from zoosplat.synthetic.recording import make_recording

        marker.unlink(missing_ok=True)
        with Console(stderr=True).status(f"filming {frames} frames of a synthetic animal"):
            make_recording(folder, n_frames=frames)
        marker.write_text(str(frames))
    with importlib.resources.as_file(CONFIG) as config:
        experiment = read_config(str(config), [f"data.directory={folder.absolute()}", *overrides])
    run = run_stages(url, experiment, None, None, [], workers)
    if experiment.data.masks_are_made:
        typer.echo(describe_ious(mask_ious(run, folder / "masks")))


def mask_ious(run: Run, masks: Path) -> npt.NDArray[np.float64]:
    """IoU [T, C] of the masks that stage segment has made and the true ones, as the cameras saw them.

    It is NaN where a view is left out, and 1 where both masks are empty.

    Args:
        run: whose stage segment is finished.
        masks: folder of the true masks, a video `0.mp4` a camera, white on black.
    """
    group = run.open_input("segment")
    made, seen = schema.FrameArray(group, "probability"), schema.read(group, "seen")
    frames = schema.read(group, "frame").tolist()
    jump: Any = group.attrs["frame_jump"]
    truths = [
        video.read_frames(video.probe(str(masks / f"{c}.mp4"), f"true masks of camera {c}"), 0, frames[-1] + 1, jump)
        for c in range(seen.shape[1])
    ]
    found = np.full(seen.shape, np.nan)
    for t, pictures in enumerate(zip(*truths, strict=True)):
        probability = made[t]
        for c, picture in enumerate(pictures):
            mine, true = probability[c] >= MASK_THRESHOLD, video.luma_mask(video.planes(picture), 1)
            union = np.count_nonzero(mine | true)
            if seen[t, c]:
                found[t, c] = np.count_nonzero(mine & true) / union if union else 1.0
    return found


def describe_ious(ious: npt.NDArray[np.float64]) -> str:
    """A line about IoU [T, C] of masks, NaN where a view is left out."""
    cameras = [float(values[np.isfinite(values)].mean()) if np.isfinite(values).any() else 0.0 for values in ious.T]
    worst = int(np.argmin(cameras))
    left_out = np.count_nonzero(np.isnan(ious))
    words = f"masks from the videos alone, against the true ones: IoU {np.nanmean(ious):.3f} in the mean"
    return f"{words}, {cameras[worst]:.3f} in the worst camera ({worst}); {left_out} of {ious.size} views left out"
