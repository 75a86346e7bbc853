"""The part of a report about masks that stage segment has made."""

from __future__ import annotations

from typing import Any

import numpy as np

from zoosplat.config.experiment import Experiment
from zoosplat.errors import UserError
from zoosplat.stages.runs import Run
from zoosplat.storage import schema
from zoosplat_flows.execution.stage_states import StageState
from zoosplat_flows.report.behaviour import Section
from zoosplat_flows.report.pictures import draw_outline, jpeg_data_uri


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
    return {"facts": facts, "rows": rows, "gallery": _least_agreeing(run, names, figures["least_agreeing"], agreement)}


def _least_agreeing(run: Run, names: list[str], views: list[list[int]], agreement: Any) -> list[dict[str, Any]]:
    """Raw pictures of views (kept frame and camera) with the outlines of their masks; none before stage pack."""
    try:
        images = run.open_input("pack")
        seen = schema.read_seen(images)
    except UserError:
        return []
    rgb, mask = (schema.FrameArray(images, key) for key in ("rgb", "mask"))
    return [
        {
            "camera": names[c],
            "t": t,
            "absent": not seen[t, c],
            "agreement": f"{agreement[t, c]:.3f}",
            "picture": jpeg_data_uri(draw_outline(np.asarray(rgb[t][c]), np.asarray(mask[t][c]))),
        }
        for t, c in views
    ]
