"""`zoosplat runs`: a table of the runs of a project."""

from __future__ import annotations

from datetime import datetime

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from zoosplat.stages.history import VIEW_GROUPS, read_history
from zoosplat.stages.projects import Project
from zoosplat_flows.commands.status import OTHER_COLOUR, RUN_COLOURS


def format_local_time(iso: str) -> str:
    """An ISO time as the user's clock shows it, to the minute; an empty string for an empty string."""
    return f"{datetime.fromisoformat(iso).astimezone():%Y-%m-%d %H:%M}" if iso else ""


def show_runs(project: Project) -> None:
    """Print the runs of a project as a table. Raises UserError where there is no run."""
    found = read_history(project)
    latest = project.latest_id()
    table = Table(title=project.url, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("run, when", no_wrap=True)
    table.add_column("against the run before", overflow="fold", ratio=1)
    table.add_column("state", overflow="fold", max_width=28)
    for group in VIEW_GROUPS:
        table.add_column(f"{group.replace('_', '-')}\nIoU, PSNR", justify="right", no_wrap=True)
    for entry in found:
        shown = f"[bold]{entry.id}[/]" if entry.id == latest else entry.id
        changes = "" if entry.changes is None else "\n".join(entry.changes) or "the same"
        colour = RUN_COLOURS.get(entry.state.partition(" ")[0], OTHER_COLOUR)
        table.add_row(
            f"{shown}\n[dim]{format_local_time(entry.created)}[/]",
            escape(changes),
            f"[{colour}]{escape(entry.state)}[/]",
            *(_format_means(entry.means.get(group, {})) for group in VIEW_GROUPS),
        )
    Console().print(table)


def _format_means(means: dict[str, float | None]) -> str:
    """IoU and PSNR, a line each; empty lines where they are not known."""
    iou, psnr = means.get("iou"), means.get("psnr")
    return f"{'' if iou is None else f'{iou:.3f}'}\n{'' if psnr is None else f'{psnr:.2f} dB'}".rstrip()
