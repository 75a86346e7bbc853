"""The page that compares two runs of a project: their settings, metrics and pictures side by side."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import cv2
import numpy as np

from zoosplat.errors import UserError
from zoosplat.formats import media
from zoosplat.formats.comparison import split_comparison
from zoosplat.stages.history import (
    VIEW_GROUPS,
    SettingChange,
    evaluation_means,
    find_other_causes,
    find_setting_changes,
    flatten_settings,
)
from zoosplat.stages.runs import Run
from zoosplat.storage import objects, urls
from zoosplat_flows.report.page import render_page
from zoosplat_flows.report.pictures import jpeg_data_uri
from zoosplat_flows.report.values import metric_label

MetricMeans = tuple[str, float | None, float | None]  # name of a metric, and its mean in the first and second run


@dataclass(frozen=True)
class PicturePair:
    """The pictures of one frame and camera that both evaluations have.

    Attributes:
        camera: name of the camera.
        frame: index in the video.
        held_out: whether the camera is held out in the second run.
        panels: title and picture (as a data URI) of what is shown: the truth and both renders.
        scores: IoU and PSNR of the first and second run, in words.
    """

    camera: str
    frame: int
    held_out: bool
    panels: list[tuple[str, str]]
    scores: tuple[str, str]


def compare_settings(first: Run, second: Run) -> list[SettingChange]:
    """Settings that differ between two runs, and other reasons why their results differ."""
    found = find_setting_changes(*(flatten_settings(run.experiment.model_dump(mode="json")) for run in (first, second)))
    return found + [(cause, "", "") for cause in find_other_causes(first.record(), second.record())]


def compare_metrics(first: Run, second: Run) -> list[MetricMeans]:
    """Means over views that at least one of the two evaluations has; those of held-out views come first."""
    a, b = (evaluation_means(run.read_mark("evaluate")) for run in (first, second))
    found: list[MetricMeans] = []
    for group in VIEW_GROUPS:
        for name in dict.fromkeys([*a.get(group, {}), *b.get(group, {})]):
            title = f"{group.replace('_', '-')} views, {metric_label(name)}"
            found.append((title, a.get(group, {}).get(name), b.get(group, {}).get(name)))
    return found


def remarks(first: Run, second: Run) -> list[str]:
    """Why the metrics of two runs are missing or must not be compared, a sentence each."""
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
        means = [evaluation_means(run.read_mark("evaluate")) for run in (first, second)]
        if all(any("raw_psnr" in group for group in groups.values()) for groups in means):
            found.append("raw metrics judge both by the same pictures; the others take the masks of each for the truth")
    return found


def write_comparison(first: Run, second: Run) -> str:
    """Write the page that compares two runs, into the folder of the second one. Returns its URL.

    Raises:
        UserError: the page cannot be written, or a picture of an evaluation is missing or damaged.
    """
    page = render_page(
        "compare.html.j2",
        first=first,
        second=second,
        changes=compare_settings(first, second),
        means=[(title, *format_means(a, b)) for title, a, b in compare_metrics(first, second)],
        notes=remarks(first, second),
        pairs=picture_pairs(first, second),
        built=f"{datetime.now().astimezone():%Y-%m-%d %H:%M %Z}",
    )
    url = second.path(f"compare-{first.id}.html")
    objects.write_bytes(url, page.encode())
    return url


def format_means(a: float | None, b: float | None) -> tuple[str, str, str]:
    """Two means and their difference, as they are shown; empty strings where a mean is not known."""
    shown = ["" if value is None else f"{value:.4f}" for value in (a, b)]
    return shown[0], shown[1], "" if a is None or b is None else f"{b - a:+.4f}"


def picture_pairs(first: Run, second: Run) -> list[PicturePair]:
    """The pictures that both evaluations have, held-out views first; none where an evaluation is missing.

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
        # Each evaluation cuts its pictures out round animal and render, so the two may show different cut-outs.
        if truth.shape != truth_there.shape or (truth != truth_there).any():
            panels.append((f"truth, as run {second.id} shows it", truth_there))
        panels.append((f"run {second.id}", render_there))
        found.append(
            PicturePair(
                camera,
                frame,
                bool(entries[1]["held_out"]),
                [(name, jpeg_data_uri(picture)) for name, picture in panels],
                (_score(entries[0]), _score(entries[1])),
            )
        )
    return sorted(found, key=lambda pair: not pair.held_out)


def _gallery(run: Run) -> dict[tuple[int, str], dict[str, Any]]:
    """Pictures of a run's evaluation by frame of the video and camera; empty where there is no evaluation."""
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
    """Truth and render of a picture of an evaluation, [h, h, 3] each. Raises UserError: it is missing or damaged."""
    try:
        data = objects.read_bytes(url)
    except FileNotFoundError:
        raise UserError(f"{url}: is missing; run stage evaluate with --force") from None
    picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB) if data else None
    if picture is None:
        raise UserError(f"{url}: is damaged; run stage evaluate with --force")
    return split_comparison(np.asarray(picture, dtype=np.uint8))


def _score(entry: dict[str, Any]) -> str:
    return f"IoU {entry['iou']:.3f}, PSNR {entry['psnr']:.1f} dB"
