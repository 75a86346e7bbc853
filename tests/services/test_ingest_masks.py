"""Stage ingest reads masks of other kinds as it reads mask videos."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import cv2
import numpy as np
import pytest

from zoosplat.config.experiment import Experiment
from zoosplat.errors import UserError
from zoosplat.recording import video
from zoosplat.stages.begin import begin_run
from zoosplat.stages.projects import Project
from zoosplat.stages.runner import run_stage
from zoosplat.storage import schema
from zoosplat_ingest.stage import STAGE

if TYPE_CHECKING:
    from tests.conftest import Recording

CAMERAS = range(4)


@pytest.fixture
def ingest(recording: Recording, tmp_path: Path) -> Callable[..., Any]:
    """Run stage ingest of a copy of the recording; returns the masks [T, C, h, w]."""

    def run_ingest(folder: Path, masks: list[str], **changes: Any) -> Any:
        experiment = Experiment.model_validate(recording.config(folder, data__masks=masks, **changes))
        with begin_run(Project.at(str(tmp_path / "project")), experiment, ["ingest"], []) as run:
            run_stage(STAGE, run, workers=2)
            return schema.read(run.open_input("ingest"), "mask")

    return run_ingest


def write_film(path: Path, frames: Any, codec: str, pixels: str) -> None:
    with av.open(str(path), "w") as file:
        stream: Any = file.add_stream(codec, rate=25)
        stream.height, stream.width = frames.shape[1:]
        stream.pix_fmt = pixels
        for picture in frames:
            frame = av.VideoFrame.from_ndarray(picture, "gray")
            file.mux(stream.encode(frame if pixels == "gray" else frame.reformat(format=pixels)))
        file.mux(stream.encode())


def test_every_kind_gives_the_masks_of_the_videos(
    recording: Recording, tmp_path: Path, ingest: Callable[..., Any]
) -> None:
    folder = recording.copy(tmp_path / "recording")
    expected = ingest(folder, [f"masks/{c}.mp4" for c in CAMERAS])
    for c in CAMERAS:
        info = video.probe(str(folder / f"masks/{c}.mp4"), "masks")
        truth = np.stack([video.luma_mask(video.planes(f), 1) for f in video.read_frames(info, 0, info.n_frames)])
        write_film(folder / f"masks/{c}.mkv", truth.astype(np.uint8), "ffv1", "gray")
        write_film(folder / f"masks/{c}-labels.mkv", truth * np.uint8(3), "ffv1", "gray")
        write_film(folder / f"masks/{c}-compressed.mp4", truth.astype(np.uint8), "libx264", "yuv420p")
        (folder / f"masks/{c}").mkdir()
        for t, mask in enumerate(truth):
            cv2.imwrite(str(folder / f"masks/{c}/{t + 1:04d}.png"), mask * np.uint8(255))
    mixed = ["masks/0.mkv", "masks/1", "masks/2/%04d.png", "masks/3.mp4"]
    assert (ingest(folder, mixed) == expected).all()
    labels = [f"masks/{c}-labels.mkv" for c in CAMERAS]
    assert (ingest(folder, labels, data__mask_values=[3]) == expected).all()
    assert (ingest(folder, mixed, ingest__frame_jump=7) == expected[::7]).all()
    with pytest.raises(UserError, match=r"masks/0-labels\.mkv \(mask of camera 0\): frame 0 has the values 0, 3"):
        ingest(folder, labels)
    with pytest.raises(UserError, match=r"is empty in all 144 frames; .* 0 and 1 must be PNG pictures or FFV1"):
        ingest(folder, [f"masks/{c}-compressed.mp4" for c in CAMERAS])
