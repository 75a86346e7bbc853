"""The part of a report about masks that stage segment has made."""

from __future__ import annotations

from typing import Any

import numpy as np

from zoosplat.config.experiment import Experiment
from zoosplat.errors import UserError
from zoosplat.stages.runs import Run
from zoosplat.storage import schema
from zoosplat_flows.execution.stage_states import StageState
from zoosplat_flows.least_agreeing import least_agreeing_views
from zoosplat_flows.report.behaviour import Section
from zoosplat_flows.report.pictures import draw_outline, jpeg_data_uri

VIEWS_OF_A_CAMERA = 3  # pictures of each camera
APART = 1 / 20  # of the recording: the least time between two pictures of a camera


def masks_section(run: Run, experiment: Experiment, stages: dict[str, StageState]) -> Section:
    """How much each camera's masks agree with what the others tell, and pictures of the views that agree least."""
    group = run.open_input("segment")
    mark = stages["segment"].mark
    assert mark is not None
    figures = mark["figures"]
    names: Any = group.attrs["camera_names"]
    rows = []
    for c, name in enumerate(names):
        quantiles = figures["agreement_quantiles"][c]
        low, median = ("", "") if quantiles is None else (f"{quantiles[i]:.3f}" for i in (0, len(quantiles) // 2))
        held_out = c in experiment.holdout_views
        rows.append(
            {
                "camera": name,
                "held_out": held_out,
                "made_from": "this camera alone" if held_out else "all observed views together",
                "median": median,
                "low": low,
                "absent": f"{100 * figures['absent_share'][c]:.1f} %",
            }
        )
    agreement = schema.read(group, "agreement")
    facts = {"frames in which views disagree": f"{figures['disagreeing_frames']} of {len(agreement)}"}
    return {"facts": facts, "rows": rows, "gallery": _least_agreeing(run, names, agreement)}


def _least_agreeing(run: Run, names: list[str], agreement: Any) -> list[dict[str, Any]]:
    """Raw pictures with the outlines of their masks, camera by camera, the least agreeing view of each first.

    There are none before stage pack, which cuts the pictures out of the videos.
    """
    try:
        images = run.open_input("pack")
        seen, frames = schema.read_seen(images), schema.read(run.open_input("segment"), "frame")
    except UserError:
        return []
    rgb, mask = (schema.FrameArray(images, key) for key in ("rgb", "mask"))
    apart = max(1, round(APART * len(agreement)))
    return [
        {
            "camera": names[c],
            "frame": int(frames[t]),
            "absent": not seen[t, c],
            "agreement": f"{agreement[t, c]:.3f}",
            "picture": jpeg_data_uri(draw_outline(np.asarray(rgb[t][c]), np.asarray(mask[t][c]))),
        }
        for c in range(len(names))
        for t, _ in least_agreeing_views(agreement[:, [c]], VIEWS_OF_A_CAMERA, apart)
    ]
