"""Files of other programs in a project's folder, which must not be taken for results or overwritten."""

from __future__ import annotations

import re

from zoosplat.storage import listing, urls

RUN_ID = re.compile(r"\d{8}-\d{6}-[0-9a-f]{4}")  # The form of the ids that `record_run` makes.
# Names in a project's folder that zoosplat uses: those of today's layout, and those of the layout before runs.
RESERVED = (
    *("results", "runs", "latest", "latest.json"),
    *("masks.zarr", "tracking.zarr", "crop.zarr", "images.zarr", "model", "evaluation", "renders"),
    *("features.zarr", "embedding.zarr", "embedding.csv", "report"),
)


def foreign_names(project_url: str) -> list[str]:
    """What another program has under names that zoosplat would use, in a folder that is no project yet.

    Args:
        project_url: a folder, which may be a symbolic link, or an s3:// prefix; it need not exist.

    Returns:
        For each such name one file: the name itself, or the first file inside, such as `model/weights.pt`. Empty
        folders hold nothing that could be lost. Nothing where the folder is a project, or holds no such names.
    """
    project = urls.normalize(project_url)
    names = listing.list_names(project)
    taken = [name for name in RESERVED if name in names]
    if not taken or _is_project(project, names):
        return []
    files = [listing.first_file(urls.join(project, name)) for name in taken]
    return [f"{name}/{file}".rstrip("/") for name, file in zip(taken, files, strict=True) if file is not None]


def _is_project(project: str, names: list[str]) -> bool:
    """Whether zoosplat has begun a run here, with this version or one that kept its marks in `_marks`."""
    if "experiment.yaml" in names and "_marks" in names:
        return True
    runs = urls.join(project, "runs")
    return "runs" in names and any(
        # The name alone is enough, because a run may have been killed while its record was written.
        RUN_ID.fullmatch(run) or {"run.json", "config.yaml"} <= set(listing.list_names(urls.join(runs, run)))
        for run in listing.list_names(runs)
    )
