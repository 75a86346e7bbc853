"""A run of the tiny recording whose stage segment is finished: its results are written by hand."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from zoosplat.config.experiment import Experiment
from zoosplat.stages.projects import Project
from zoosplat.stages.runner import run_stage
from zoosplat.stages.runs import Run
from zoosplat.storage import objects, schema, urls
from zoosplat.synthetic.stand_in import begin_with_results
from zoosplat_ingest.stage import STAGE as INGEST

if TYPE_CHECKING:
    from tests.conftest import Recording

KEPT, JUMP, CAMERAS, HEIGHT, WIDTH = 12, 3, 4, 80, 96
HELD_OUT = [1, 3]
# Rows and columns of the mask of kept frame t are 20 to 50 and 10 + t to 40 + t, in all cameras.
ROWS, FIRST_COLUMN, LAST_COLUMN = slice(20, 50), 10, 40
ABSENT = (4, 2)  # kept frame and camera of a view that is left out
TOOK_NO_PART = (5, 2)  # of one whose agreement is not known


def made_agreement() -> Any:
    """[T, C] float32: lower in later frames and in earlier cameras."""
    values = 0.9 - 0.05 * np.arange(KEPT)[:, None] + 0.01 * np.arange(CAMERAS)
    values[ABSENT], values[TOOK_NO_PART] = 0.1, np.nan
    return values.astype(np.float32)


def made_segments() -> dict[str, Any]:
    """The arrays of segments.zarr, by name."""
    probability = np.zeros((KEPT, CAMERAS, HEIGHT, WIDTH), np.uint8)
    for t in range(KEPT):
        probability[t, :, ROWS, FIRST_COLUMN + t : LAST_COLUMN + t] = 200 + t
    seen = np.ones((KEPT, CAMERAS), bool)
    seen[ABSENT] = False
    light = np.zeros((KEPT, CAMERAS, 3, 4), np.float32)
    light[..., 0] = 1
    return {
        "probability": probability,
        "all_views": probability[:, HELD_OUT] - 7,
        "plate": np.full((CAMERAS, HEIGHT, WIDTH, 3), 90, np.uint8),
        "noise": np.full(CAMERAS, 2, np.float32),
        "light": light,
        "agreement": made_agreement(),
        "seen": seen,
        "frame": np.arange(KEPT) * JUMP,
    }


def run_with_made_masks(recording: Recording, project: Path) -> Run:
    """The run, done up to stage ingest."""
    settings: dict[str, Any] = {"ingest": {"frame_jump": JUMP, "max_frames": KEPT}, "holdout_views": HELD_OUT}
    experiment = Experiment.model_validate(recording.config(data__masks="auto", **settings))
    arrays = made_segments()

    def write(url: str) -> None:
        sizes = {"T": KEPT, "C": CAMERAS, "Ch": len(HELD_OUT), "H": HEIGHT, "W": WIDTH}
        names = [str(c) for c in range(CAMERAS)]
        attributes: dict[str, Any] = {"camera_names": names, "n_video_frames": 144, "frame_jump": JUMP}
        attributes["holdout_views"] = HELD_OUT
        group = schema.create(url, "segments.zarr", sizes, 64, attributes)
        schema.add_all_views(group, sizes, 64)
        for key, values in arrays.items():
            schema.write_block(group, key, 0, values)
        objects.write_bytes(urls.join(url.rpartition("/")[0], "weights.safetensors"), b"0")

    run = begin_with_results(Project.at(str(project)), experiment, {"segment": write})
    run_stage(INGEST, run)
    return run
