"""`zoosplat embed`: embeds the recordings of several projects together."""

from __future__ import annotations

import re

import typer

from zoosplat.errors import UserError
from zoosplat.stages.lookup import open_run
from zoosplat.stages.projects import Project
from zoosplat.stages.runs import Run
from zoosplat.storage import urls


def embed_runs(projects: list[str], output: str) -> None:
    """Embed runs together, with the settings of the first, and print the URL of the table.

    Args:
        projects: `URL` or `URL@RUN` of each run.
        output: folder or S3 prefix that holds nothing yet.

    Raises:
        UserError: stage embedding is not installed, or as `zoosplat_embedding.stage.embed_together`.
    """
    try:
        from zoosplat_embedding.stage import CSV, embed_together
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is missing; pip install 'zoosplat[embedding]'") from None
    folder = urls.normalize(output)
    for warning in embed_together([_find_run(text) for text in projects], folder):
        typer.echo(f"note: {warning}", err=True)
    typer.echo(urls.join(folder, CSV))


def _find_run(text: str) -> Run:
    """The run that `URL` or `URL@RUN` names. Where a project's own URL ends like `@RUN`, the project is meant."""
    found = re.fullmatch(r"(.+)@(\d[\d-]*[0-9a-f]*)", text)
    if found is None or Project.at(text).exists():
        return open_run(Project.at(text))
    return open_run(Project.at(found[1]), found[2])
