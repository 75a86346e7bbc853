"""Runs and metrics of a project as pandas DataFrames."""

from __future__ import annotations

import io

import pandas as pd

from zoosplat.stages.history import VIEW_GROUPS, read_history
from zoosplat.stages.projects import Project

HEADLINE = ("iou", "psnr")  # The metrics of an evaluation that the table of runs shows.
TEXT_COLUMNS = {"camera": str}  # A camera may be called 0, which is no number.


def runs_table(project: Project) -> pd.DataFrame:
    """The runs of a project, the oldest first, a row each.

    Columns: `id`; `created` (datetime, UTC; NaT where it is not known); `state` in words; `latest`, whether it is the
    run that is read when none is named; `changes`, what differs from the run before, a tuple of lines; and the means
    of the evaluation: `held_out_iou`, `held_out_psnr` (dB), `observed_iou`, `observed_psnr`, NaN before it is done.

    Raises:
        UserError: the project holds no run.
    """
    found = read_history(project)
    latest = project.latest_id() or found[-1].id  # a project of the layout before runs has one
    columns = {
        "id": [entry.id for entry in found],
        "created": pd.to_datetime([entry.created or None for entry in found], format="ISO8601", utc=True),
        "state": [entry.state for entry in found],
        "latest": [entry.id == latest for entry in found],
        "changes": [tuple(entry.changes or ()) for entry in found],
    }
    for group in VIEW_GROUPS:
        for metric in HEADLINE:
            means = [entry.means.get(group, {}).get(metric) for entry in found]
            columns[f"{group}_{metric}"] = pd.Series(means, dtype=float)
    return pd.DataFrame(columns)


def metrics_table(csv: bytes) -> pd.DataFrame:
    """The metrics of an evaluation from its `frames_<split>.csv`, a row a frame and view; empty cells are NaN."""
    table = pd.read_csv(io.BytesIO(csv), dtype=TEXT_COLUMNS, keep_default_na=False, na_values=[""])
    return table.assign(held_out=table["held_out"].astype(bool))
