"""`zoosplat compare`: two runs of a project side by side: settings, metrics, and a page with their pictures."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import cv2
import numpy as np
import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from zoosplat.errors import UserError
from zoosplat.formats import media
from zoosplat.stages.history import GROUPS, Change, differences, flat, means_of, other_causes
from zoosplat.stages.runs import Run
from zoosplat.storage import objects, urls
from zoosplat_flows.report.page import as_jpeg, label, render_page

GAP = 4  # grey columns between the pictures of a gallery, see `media.side_by_side`
Metric = tuple[str, float | None, float | None]  # its name, and its mean in either run


@dataclass(frozen=True)
class Pair:
    """A picture that both evaluations have.

    Attributes:
        camera: its name.
        frame: index in the video.
        held_out: whether the camera is, in the second run.
        panels: what is seen in it and the picture, as the source of an image: truth and both renders.
        scores: of either run, in words.
    """

    camera: str
    frame: int
    held_out: bool
    panels: list[tuple[str, str]]
    scores: tuple[str, str]


def changes(first: Run, second: Run) -> list[Change]:
    """Settings that differ between two runs, and other reasons why their results do."""
    found = differences(*(flat(run.experiment.model_dump(mode="json")) for run in (first, second)))
    return found + [(cause, "", "") for cause in other_causes(first.record(), second.record())]


def metrics(first: Run, second: Run) -> list[Metric]:
    """Means of the views that either evaluation has, held-out ones first."""
    a, b = (means_of(run.read_mark("evaluate")) for run in (first, second))
    found: list[Metric] = []
    for group in GROUPS:
        for name in dict.fromkeys([*a.get(group, {}), *b.get(group, {})]):
            title = f"{group.replace('_', '-')} views, {label(name)}"
            found.append((title, a.get(group, {}).get(name), b.get(group, {}).get(name)))
    return found


def remarks(first: Run, second: Run) -> list[str]:
    """What makes the metrics of two runs not comparable, or keeps them from being compared."""
    found = []
    for run in (first, second):
        if run.read_mark("evaluate") is None:
            found.append(f"run {run.id} has no evaluation; run stage evaluate")
    splits = [run.experiment.evaluate.split for run in (first, second)]
    if splits[0] != splits[1]:
        found.append(f"the first is evaluated on its {splits[0]} frames, the second on its {splits[1]} frames")
    if first.experiment.holdout_views != second.experiment.holdout_views:
        found.append("other views are held out in the second run than in the first: their means are not comparable")
    ids = [run.results["ingest"].id if "ingest" in run.results else "" for run in (first, second)]
    if ids[0] != ids[1]:
        found.append("the two are of different frames or masks: see what differs in data and ingest")
    return found


def compare(first: Run, second: Run) -> str:
    """Print what differs and write the page.

    Returns:
        URL of the page, in the folder of the second run.

    Raises:
        UserError: both are the same run, or the page cannot be written.
    """
    if first.id == second.id:
        raise UserError(f"run {first.id} is compared with itself; name two runs of `zoosplat runs {first.project.url}`")
    found, means, notes = changes(first, second), metrics(first, second), remarks(first, second)
    console = Console()
    table = Table("settings that differ", first.id, second.id, box=box.SIMPLE_HEAD, pad_edge=False)
    for key, old, new in found:
        table.add_row(escape(key), escape(old), escape(new))
    if found:
        console.print(table)
    else:
        typer.echo("no setting differs")
    table = Table("mean", first.id, second.id, "difference", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for title, a, b in means:
        table.add_row(title, *_numbers(a, b))
    if means:
        console.print(table)
    for note in notes:
        typer.echo(f"note: {note}", err=True)
    page = render_page(
        "compare.html.j2",
        first=first,
        second=second,
        changes=found,
        means=[(title, *_numbers(a, b)) for title, a, b in means],
        notes=notes,
        pairs=pairs(first, second),
        built=f"{datetime.now().astimezone():%Y-%m-%d %H:%M %Z}",
    )
    url = second.path(f"compare-{first.id}.html")
    objects.write_bytes(url, page.encode())
    return url


def _numbers(a: float | None, b: float | None) -> tuple[str, str, str]:
    """Two means and their difference, as printed."""
    shown = ["" if value is None else f"{value:.4f}" for value in (a, b)]
    return shown[0], shown[1], "" if a is None or b is None else f"{b - a:+.4f}"


def pairs(first: Run, second: Run) -> list[Pair]:
    """The pictures that both evaluations have, held-out views first; none where one is missing.

    Raises:
        UserError: a picture is missing or damaged.
    """
    galleries = [_gallery(run) for run in (first, second)]
    found = []
    for key in sorted(galleries[0].keys() & galleries[1].keys()):
        frame, camera = key
        entries = [gallery[key] for gallery in galleries]
        (truth, render), (truth_there, render_there) = (_panels(entry["url"]) for entry in entries)
        panels = [("truth", truth), (f"run {first.id}", render)]
        # The pictures are cut out round animal and render: with another render it may be another cut.
        if truth.shape != truth_there.shape or (truth != truth_there).any():
            panels.append((f"truth, as run {second.id} shows it", truth_there))
        panels.append((f"run {second.id}", render_there))
        found.append(
            Pair(
                camera,
                frame,
                bool(entries[1]["held_out"]),
                [(name, as_jpeg(picture)) for name, picture in panels],
                (_score(entries[0]), _score(entries[1])),
            )
        )
    return sorted(found, key=lambda pair: not pair.held_out)


def _gallery(run: Run) -> dict[tuple[int, str], dict[str, Any]]:
    """Pictures of an evaluation by frame of the video and camera; empty where it is not done."""
    if run.read_mark("evaluate") is None:
        return {}
    url = run.input_url("evaluate")
    try:
        pictures = json.loads(objects.read_bytes(urls.join(url, "gallery.json")))["pictures"]
    except FileNotFoundError:
        raise UserError(f"{url}/gallery.json: is missing; run stage evaluate with --force") from None
    jump = run.experiment.ingest.frame_jump
    return {(jump * p["t"], p["camera"]): {**p, "url": urls.join(url, p["file"])} for p in pictures}


def _panels(url: str) -> tuple[media.Picture, media.Picture]:
    """Truth and render of a gallery's picture, which shows truth, render and error, each square."""
    try:
        data = objects.read_bytes(url)
    except FileNotFoundError:
        raise UserError(f"{url}: is missing; run stage evaluate with --force") from None
    picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB) if data else None
    if picture is None:
        raise UserError(f"{url}: is damaged; run stage evaluate with --force")
    side = picture.shape[0]
    whole = np.asarray(picture, dtype=np.uint8)
    return whole[:, :side], whole[:, side + GAP : 2 * side + GAP]


def _score(entry: dict[str, Any]) -> str:
    return f"IoU {entry['iou']:.3f}, PSNR {entry['psnr']:.1f} dB"
