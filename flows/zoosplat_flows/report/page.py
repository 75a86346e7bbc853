"""The report of a run: one self-contained page, with what is done so far."""

from __future__ import annotations

import base64
import csv
import importlib.resources
import io
import json
import re
from collections.abc import Callable
from datetime import datetime
from pathlib import PurePosixPath
from typing import Any

import cv2
import jinja2
import numpy as np
import numpy.typing as npt
import zarr

from zoosplat.config.experiment import Experiment
from zoosplat.errors import UserError
from zoosplat.formats import media
from zoosplat.stages import runs
from zoosplat.stages.run_state import in_words, run_state
from zoosplat.stages.runs import Run
from zoosplat.storage import listing, objects, schema, urls
from zoosplat_flows.execution.status import (
    StageState,
    duration,
    failures,
    memory,
    peak_memory,
    seconds,
    states,
)
from zoosplat_flows.report import plots

OUTLINE = (255, 60, 90)
GALLERY_PICTURES = 24
FILM_BYTES = 40 << 20
CUT_OUT = 132  # pixels of a photograph among others
ALIKE_ROWS, ALIKE_PICTURES, STATE_PICTURES = 8, 6, 8
TYPES = {".png": "image/png", ".mp4": "video/mp4"}
Part = dict[str, Any]


def build_report(run: Run, state: str = "") -> str:
    """Write the page of a run, with a line in place of every part whose stage is not done or cannot be read.

    Args:
        run: whose results are shown.
        state: of the run, for the page's head; default: as its record says.

    Returns:
        Its URL, see `report_url`.

    Raises:
        UserError: it cannot be written.
    """
    experiment, record = run.experiment, run.record()
    stages = {s.stage: s for s in states(run)}
    parts: dict[str, Part | None] = {}
    missing: dict[str, str] = {}
    for name, stage, make in PARTS:
        parts[name] = None
        if stages[stage].state == "damaged":
            missing[name] = f"What stage {stage} has made cannot be read: {stages[stage].reason}"
            continue
        if stages[stage].mark is None:
            missing[name] = f"Stage {stage} has not finished."
            continue
        try:
            _check_files(run, stage)
            parts[name] = make(run, experiment, stages)
        except Exception as error:
            # Whatever a damaged or half-removed result leads to, it must not cost the page that helps to find it.
            what = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            missing[name] = f"Stage {stage} is marked as done, but its output cannot be read: {what}"
    if record:
        state = in_words(state or run_state(run.project, record), record)
    page = render_page(
        "report.html.j2",
        experiment=experiment,
        run=run,
        state=state,
        parts=parts,
        missing=missing,
        stages=[_stage_row(s, run) for s in stages.values()],
        tiles=_tiles(stages),
        longest_s=max((seconds(s.mark) for s in stages.values() if s.mark), default=0.0) or 1.0,
        failures=sorted(failures(run).items()),
        warnings=[(s.stage, w) for s in stages.values() if s.mark for w in s.mark["warnings"]],
        provenance=_provenance(stages),
        config=experiment.describe(),
        built=f"{datetime.now().astimezone():%Y-%m-%d %H:%M %Z}",
    )
    url = report_url(run)
    objects.write_bytes(url, page.encode())
    return url


def report_url(run: Run) -> str:
    """Where the page of a run lies: in the run's folder; in a project of the layout before runs, where it did then."""
    home = run.project.path("report") if runs.is_legacy(run.project) else run.path("report")
    return urls.join(home, "index.html")


def render_page(template: str, **values: Any) -> str:
    """A page of this package's templates, self-contained."""
    folder = importlib.resources.files("zoosplat_flows")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    style = (folder / "page.css").read_text()
    return environment.from_string((folder / template).read_text()).render(style=style, **values)


def _check_files(run: Run, stage: str) -> None:
    """Raise UserError, naming the file, where one of a complete result is missing or truncated."""
    result = run.result(stage)
    files = result.manifest()
    if files is not None:
        listing.check_manifest(result.data_folder, files)


# -- parts --------------------------------------------------------------------------------------------------------
def _recording(run: Run, experiment: Experiment, stages: dict[str, StageState]) -> Part:
    masks = run.open_input("ingest")
    mask = schema.array(masks, "mask")
    n_frames, n_cameras, height, width = mask.shape
    attributes: Any = masks.attrs
    box = schema.read(masks, "box")
    seen = box[..., 2] > box[..., 0]
    area = np.where(seen, (box[..., 2] - box[..., 0]) * (box[..., 3] - box[..., 1]), 0)
    # The frame in which the animal is seen best: the largest of the smallest boxes.
    t = int(area.min(axis=1).argmax())
    packed, why_not = _packed(run, stages)
    cameras = []
    for c in range(n_cameras):
        if packed is None:
            silhouette = np.asarray(mask[t, c])
            picture = np.where(silhouette[..., None], 205, 90).astype(np.uint8).repeat(3, axis=2)
        else:
            silhouette = np.asarray(schema.array(packed, "mask")[t, c])
            picture = np.asarray(schema.array(packed, "rgb")[t, c])
        sizes = np.sqrt(area[:, c][seen[:, c]])
        cameras.append(
            {
                "name": attributes["camera_names"][c],
                "video": experiment.data.videos[c],
                "held_out": c in experiment.holdout_views,
                "picture": as_jpeg(_outlined(picture, silhouette)),
                "seen": f"{100 * seen[:, c].mean():.1f} %",
                "size": f"{np.median(sizes):.0f} px" if len(sizes) else "",
            }
        )
    fps = float(attributes["fps"])
    window = "" if packed is None else "{2} x {1}".format(*schema.array(packed, "mask").shape[1:])
    step = int(attributes["frame_jump"])
    d = int(attributes["image_downsample"])
    facts = {
        "cameras": f"{n_cameras}, {len(experiment.holdout_views)} of them held out",
        "frames": f"{n_frames} kept of {attributes['n_video_frames']}" + (f", 1 in {step}" if step > 1 else ""),
        "rate": f"{fps:g} frames per second: {n_frames * step / fps:.1f} s of behaviour",
        "working size": f"{width} x {height} px" + (f", videos averaged {d} x {d}" if d > 1 else ""),
        "window": f"{window} px ({experiment.pack.window})" if window else why_not,
    }
    return {"cameras": cameras, "facts": facts, "t": t}


def _packed(run: Run, stages: dict[str, StageState]) -> tuple[zarr.Group | None, str]:
    """The images; where they are not packed yet, or damaged, None and why: then silhouettes are shown."""
    if stages["pack"].mark is None:
        return None, stages["pack"].reason or "not packed yet"
    try:
        _check_files(run, "pack")
        return run.open_input("pack"), ""
    except UserError as error:
        return None, str(error)


def _tracking(run: Run, experiment: Experiment, stages: dict[str, StageState]) -> Part:
    group = run.open_input("center_rotation")
    keys = ("centers", "angles", "n_voxels", "valid")
    centers, angles, n_voxels, valid = (schema.read(group, key) for key in keys)
    attributes: Any = run.open_input("ingest").attrs
    time_s = np.arange(len(centers)) * attributes["frame_jump"] / attributes["fps"]
    steps_m = np.linalg.norm(np.diff(centers[:, :2], axis=0), axis=1)
    facts = {
        "frames without a hull": f"{(~valid).sum()} of {len(valid)}, interpolated" if (~valid).any() else "none",
        "path length": f"{steps_m.sum():.2f} m",
        "median speed": f"{100 * np.median(steps_m) / time_s[1]:.1f} cm/s" if len(steps_m) else "",
        "median hull": f"{np.median(n_voxels[valid]):.0f} voxels" if valid.any() else "",
    }
    return {
        "facts": facts,
        "plot": plots.tracking(time_s, centers, angles, n_voxels, valid),
        "top_view": plots.top_view(time_s, centers, angles),
    }


def _crop(run: Run, experiment: Experiment, stages: dict[str, StageState]) -> Part:
    group = run.open_input("crop")
    ranges, counts = schema.read(group, "volume_idx"), schema.read(group, "marginals")
    voxel_m = float(group.attrs["ell_m"]) / max(1, counts.shape[1] - 1)  # type: ignore[arg-type]
    lengths = ranges[:, 1] - ranges[:, 0]
    facts = {
        "grid": f"{counts.shape[1]} points an axis, {1000 * voxel_m:.2f} mm apart",
        "kept": " x ".join(str(n) for n in lengths) + " points",
        "box": " x ".join(f"{100 * n * voxel_m:.1f}" for n in lengths) + " cm",
        "chosen": "given in the configuration" if experiment.crop.volume_idx else "by the stage",
    }
    return {"facts": facts, "plot": plots.marginals(counts, ranges)}


def _training(run: Run, experiment: Experiment, stages: dict[str, StageState]) -> Part:
    url = run.input_url("train")
    figures = dict((stages["train"].mark or {})["figures"])
    for key, words in (("seconds", duration), ("peak_gpu_bytes", memory)):
        if key in figures:
            figures[key] = words(figures[key])
    facts = {
        key.replace("_", " "): _readable(value)
        for key, value in figures.items()
        if isinstance(value, str | int | float)
    }
    part: Part = {"facts": facts, "plot": "", "preview": ""}
    if objects.exists(urls.join(url, "history.csv")):
        part["plot"] = _history_plot(_read_csv(urls.join(url, "history.csv")))
    if objects.exists(urls.join(url, "preview.png")):
        part["preview"] = _picture_of(urls.join(url, "preview.png"))
    return part


def _history_plot(rows: list[dict[str, str]]) -> str:
    """Figures of training and validation against epochs (a dynamic training has none: against steps).

    Columns `train_X` and `valid_X` share a panel.
    """
    panels: dict[str, dict[str, npt.NDArray[np.float64]]] = {}
    for name in rows[0] if rows else ():
        split, _, quantity = name.partition("_")
        values = np.array([float(row[name] or "nan") for row in rows])
        # A loss whose weight is 0 is 0 throughout.
        if split in ("train", "valid") and np.isfinite(values).any() and np.nanmax(np.abs(values)) > 0:
            panels.setdefault(label(quantity), {})[split] = values
    panels = {key: panels[key] for key in sorted(panels, key=lambda k: {"loss": 0, "IoU": 1, "PSNR (dB)": 2}.get(k, 3))}
    if not panels:
        return ""
    x = "epoch" if "epoch" in rows[0] else "step"
    return plots.history(np.array([float(row[x]) for row in rows]), x, panels)


def _evaluation(run: Run, experiment: Experiment, stages: dict[str, StageState]) -> Part:
    url = run.input_url("evaluate")
    files = list(listing.list_files(url))
    tables = []
    for name in files:
        split = re.fullmatch(r"metrics_(\w+)\.csv", name)
        if split:
            rows = _read_csv(urls.join(url, name))
            tables.append({"split": split[1], **_metrics(rows)})
    over_time = [_over_time(_read_csv(urls.join(url, n))) for n in files if re.fullmatch(r"frames_\w+\.csv", n)]
    fitted = ""
    if experiment.train.method == "dynamic" or experiment.train.fit_to == "all":
        fitted = "Trained on all frames: observed views are training data, only held-out ones are new to the model."
    return {"tables": tables, "gallery": _gallery(url, files), "over_time": over_time, "fitted": fitted}


def _over_time(rows: list[dict[str, str]]) -> str:
    """Means over the observed and over the held-out views against the frame of the video."""
    frames = sorted({int(row["frame"]) for row in rows})
    panels: dict[str, dict[str, npt.NDArray[np.float64]]] = {}
    for metric in ("iou", "psnr", "ssim"):
        for group, name in (("0", "observed"), ("1", "held out")):
            values: dict[int, list[float]] = {frame: [] for frame in frames}
            for row in rows:
                if row["held_out"] == group and row[metric]:
                    values[int(row["frame"])].append(float(row[metric]))
            means = np.array([np.mean(values[frame]) if values[frame] else np.nan for frame in frames])
            if np.isfinite(means).any():
                panels.setdefault(label(metric), {})[name] = means
    return plots.history(np.array(frames, float), "frame of the video", panels) if panels else ""


def _metrics(rows: list[dict[str, str]]) -> Part:
    """Columns and rows for the page: means first, then held-out cameras, then the observed ones."""

    def order(row: dict[str, str]) -> tuple[bool, bool]:
        return (not row["camera"].startswith("mean_"), row["held_out"] != "1")

    columns = [c for c in rows[0] if c not in ("camera", "held_out") and any(row[c] for row in rows)] if rows else []
    body = [
        {
            "camera": row["camera"].replace("_", " "),
            "held_out": row["held_out"] == "1",
            "mean": row["camera"].startswith("mean_"),
            "values": [_readable(float(row[c])) if row[c] else "" for c in columns],
        }
        for row in sorted(rows, key=order)
    ]
    return {"columns": [label(c) for c in columns], "rows": body}


def _gallery(url: str, files: list[str]) -> list[Part]:
    """The comparisons that the stage chose, held-out views first."""
    if "gallery.json" not in files:
        return []
    pictures = json.loads(objects.read_bytes(urls.join(url, "gallery.json")))["pictures"]
    chosen = sorted(pictures, key=lambda p: (not p["held_out"], p["t"], p["camera"]))[:GALLERY_PICTURES]
    return [{**p, "data": _picture_of(urls.join(url, p["file"]))} for p in chosen]


def _renders(run: Run, experiment: Experiment, stages: dict[str, StageState]) -> Part:
    url = run.input_url("render")
    names = list(listing.list_files(url))
    stills = [{"name": _title(n), "data": _picture_of(urls.join(url, n))} for n in names if n.endswith(".png")]
    films, left = [], FILM_BYTES
    for name in sorted((n for n in names if n.endswith(".mp4")), key=lambda n: (n != "orbit.mp4", n)):
        left -= objects.size(urls.join(url, name))
        # A browser does not open a page of hundreds of megabytes: later films are named instead.
        data = _data_uri(urls.join(url, name)) if left >= 0 else ""
        films.append({"name": _title(name), "file": urls.join(url, name), "data": data})
    return {"films": films, "stills": stills}


def _behaviour(run: Run, experiment: Experiment, stages: dict[str, StageState]) -> Part:
    group = run.open_input("embedding")
    keys = ("valid", "map", "neighbours", "state", "time", "speed", "height")
    valid, places, neighbours, state, time_s, speed, height = (schema.read(group, key) for key in keys)
    attributes: Any = group.attrs
    shares, (before, after) = np.array(attributes["explained_variance"]), attributes["heading_r2"]
    facts = {
        "descriptor": f"{attributes['encoder']}, {attributes['descriptor']} numbers a frame",
        "dimensions": f"{len(shares)}, fitted to {attributes['training_frames']} frames"
        f"{' of the first third' if attributes.get('fit_to', 'third') == 'third' else ''}",
        "explained": f"{100 * shares.sum():.1f} % of their variance",
        "heading": f"R2 of telling it at other times {before:.2f} before, {after:.2f} after its removal (weight "
        f"{attributes['heading_removal']:g})",
    }
    colourings = {"time (s)": time_s, "speed (cm/s)": 100 * speed, "height (cm)": 100 * height}
    album = _Album(run)
    rows = np.flatnonzero(valid & (neighbours[:, 0] >= 0))
    asked = rows[np.unique(np.linspace(0, len(rows) - 1, min(len(rows), ALIKE_ROWS)).round().astype(int))]
    alike = []
    for t in map(int, asked):
        near = [int(other) for other in neighbours[t, : ALIKE_PICTURES - 1] if other >= 0]
        times = ", ".join(f"{time_s[other]:.2f}" for other in near)
        alike.append({"data": album.strip([t, *near]), "time": f"{time_s[t]:.2f}", "times": times})
    sheets = [_sheet(album, state, time_s, k) for k in range(int(state.max(initial=-1)) + 1)]
    return {
        "facts": facts,
        "explained": plots.explained(shares),
        "maps": plots.behaviour_maps(places[valid], {name: values[valid] for name, values in colourings.items()}),
        "alike": alike,
        "ethogram": plots.ethogram(time_s, state),
        "states": sheets,
    }


def _sheet(album: _Album, state: npt.NDArray[np.int32], time_s: npt.NDArray[np.float64], k: int) -> Part:
    """A state: how much of the time it takes, and pictures of the first second of its longest bout."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], state == k, [False])).astype(int)))
    starts, stops = edges[::2], edges[1::2]
    longest = int((stops - starts).argmax())
    start, stop = int(starts[longest]), int(stops[longest])
    stop = min(stop, int(np.searchsorted(time_s, time_s[start] + 1.0)) + 1)
    frames = np.unique(np.linspace(start, stop - 1, STATE_PICTURES).round().astype(int))
    step = float(time_s[1] - time_s[0]) if len(time_s) > 1 else 0.0
    return {
        "state": k,
        "share": f"{100 * (state == k).sum() / max((state >= 0).sum(), 1):.0f} %",
        "bouts": len(starts),
        "median": f"{np.median(stops - starts) * step:.2f}",
        "from": f"{time_s[start]:.2f}",
        "to": f"{time_s[stop - 1]:.2f}",
        "data": album.strip([int(t) for t in frames]),
    }


class _Album:
    """Photographs of the animal, from the camera that sees it largest."""

    def __init__(self, run: Run) -> None:
        self.images = run.open_input("pack")
        mask = schema.array(self.images, "mask")
        some = np.linspace(0, mask.shape[0] - 1, 8).round().astype(int)
        areas = [np.asarray(mask[int(t)]).sum((1, 2)) for t in some]
        self.camera = int(np.median(areas, axis=0).argmax())

    def strip(self, frames: list[int]) -> str:
        """Photographs of frames beside each other, as the source of an image."""
        return as_jpeg(media.side_by_side([self._cut_out(t) for t in frames]))

    def _cut_out(self, t: int) -> media.Picture:
        mask = np.asarray(schema.array(self.images, "mask")[t, self.camera])
        picture = np.asarray(schema.array(self.images, "rgb")[t, self.camera])
        ys, xs = np.nonzero(mask)
        if not len(xs):
            ys, xs = (np.array([0, n - 1]) for n in mask.shape)
        half = 0.6 * max(int(np.ptp(xs)), int(np.ptp(ys)), 8)
        x, y = (xs.min() + xs.max()) / 2, (ys.min() + ys.max()) / 2
        return media.zoom(picture, (x - half, y - half, x + half, y + half), CUT_OUT, CUT_OUT)


def _title(file: str) -> str:
    return PurePosixPath(file).stem.replace("_", " ")


PARTS: tuple[tuple[str, str, Callable[[Run, Experiment, dict[str, StageState]], Part]], ...] = (
    ("recording", "ingest", _recording),
    ("tracking", "center_rotation", _tracking),
    ("crop", "crop", _crop),
    ("training", "train", _training),
    ("evaluation", "evaluate", _evaluation),
    ("renders", "render", _renders),
    ("behaviour", "embedding", _behaviour),
)


def _tiles(stages: dict[str, StageState]) -> list[tuple[str, str]]:
    """The figures at the top: means of the evaluation, held-out views first."""
    mark = stages["evaluate"].mark
    found = []
    for group in ("held_out", "observed"):
        means = mark["figures"].get(group, {}) if mark else {}
        for key, label, form in (("iou", "IoU", "{:.3f}"), ("psnr", "PSNR", "{:.1f} dB"), ("ssim", "SSIM", "{:.3f}")):
            if means.get(key) is not None:
                found.append((form.format(means[key]), f"{label}, {group.replace('_', '-')} views"))
    return found


# -- pieces -------------------------------------------------------------------------------------------------------
def _stage_row(s: StageState, run: Run) -> Part:
    mark = s.mark
    return {
        "stage": s.stage,
        "state": s.state,
        "reason": s.reason or (f"reused from {run.results[s.stage].folder}" if s.state == "reused" else ""),
        "shards": f"{s.shards_done}/{s.shards}" if s.shards else "",
        "seconds": seconds(mark) if mark else 0.0,
        "time": duration(seconds(mark)) if mark else "",
        "work": duration(mark["cpu_seconds"]) if mark else "",
        "memory": peak_memory(mark) if mark else "",
        "finished": f"{datetime.fromtimestamp(mark['finished']):%Y-%m-%d %H:%M}" if mark else "",
    }


def _provenance(stages: dict[str, StageState]) -> Part:
    marks = {name: s.mark for name, s in stages.items() if s.mark}
    packages = sorted({package for mark in marks.values() for package in mark["versions"]})
    return {
        "stages": [(name, mark["version"], mark["id"]) for name, mark in marks.items()],
        "packages": [
            (package, ", ".join(sorted({m["versions"][package] for m in marks.values() if package in m["versions"]})))
            for package in packages
        ],
    }


def _outlined(picture: npt.NDArray[np.uint8], mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint8]:
    """A picture [h, w, 3] with the outline of its mask [h, w], enlarged so that the line is thin.

    The line lies outside the mask: it hides nothing of the animal.
    """
    factor = max(1, round(480 / picture.shape[1]))
    size = (picture.shape[1] * factor, picture.shape[0] * factor)
    large = np.ascontiguousarray(cv2.resize(picture, size, interpolation=cv2.INTER_CUBIC), dtype=np.uint8)
    contours, _ = cv2.findContours(
        cv2.resize(mask.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST),
        cv2.RETR_EXTERNAL,
        cv2.CHAIN_APPROX_NONE,
    )
    cv2.drawContours(large, contours, -1, OUTLINE, 2 if factor > 1 else 1, cv2.LINE_AA)
    return large


def as_jpeg(picture: npt.NDArray[np.uint8]) -> str:
    _, data = cv2.imencode(".jpg", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 88])
    return "data:image/jpeg;base64," + base64.b64encode(data.tobytes()).decode()


def _picture_of(url: str) -> str:
    """A PNG of a result, small enough to be one of dozens on a page."""
    picture = cv2.imdecode(np.frombuffer(objects.read_bytes(url), np.uint8), cv2.IMREAD_COLOR_RGB)
    if picture is None:
        raise ValueError(f"{url} is not a picture")
    return as_jpeg(np.asarray(picture, dtype=np.uint8))


def _data_uri(url: str) -> str:
    kind = TYPES[PurePosixPath(url).suffix.lower()]
    return f"data:{kind};base64," + base64.b64encode(objects.read_bytes(url)).decode()


def _read_csv(url: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(objects.read_bytes(url).decode())))


def label(name: str) -> str:
    """A column's name as people write it."""
    known = {"psnr": "PSNR (dB)", "ssim": "SSIM", "l1": "L1", "mae": "MAE"}
    known |= {f"{key}_corrected": f"{known[key]}, colours corrected" for key in ("l1", "psnr")}
    return known.get(name) or name.replace("_", " ").replace("iou", "IoU").replace("ssim", "SSIM")


def _readable(value: Any) -> str:
    if not isinstance(value, float) or value == int(value):
        return str(int(value) if isinstance(value, float) else value)
    return f"{value:.3f}" if 1e-3 <= abs(value) < 1e3 else f"{value:.3g}"
