"""`zoosplat compare`: prints what differs between two runs of a project, and writes the page that compares them."""

from __future__ import annotations

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from zoosplat.errors import UserError
from zoosplat.stages.runs import Run
from zoosplat_flows.report.comparison import compare_metrics, compare_settings, format_means, remarks, write_comparison


def compare_runs(first: Run, second: Run) -> str:
    """Print the settings and metrics that differ, and write the page.

    Returns:
        URL of the page, in the folder of the second run.

    Raises:
        UserError: both are the same run, or the page cannot be written.
    """
    if first.id == second.id:
        raise UserError(f"run {first.id} is compared with itself; name two runs of `zoosplat runs {first.project.url}`")
    changes, means = compare_settings(first, second), compare_metrics(first, second)
    console = Console()
    table = Table("settings that differ", first.id, second.id, box=box.SIMPLE_HEAD, pad_edge=False)
    for key, old, new in changes:
        table.add_row(escape(key), escape(old), escape(new))
    if changes:
        console.print(table)
    else:
        typer.echo("no setting differs")
    table = Table("mean", first.id, second.id, "difference", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for title, a, b in means:
        table.add_row(title, *format_means(a, b))
    if means:
        console.print(table)
    for note in remarks(first, second):
        typer.echo(f"note: {note}", err=True)
    return write_comparison(first, second)
