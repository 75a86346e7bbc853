"""The sections of a report but the one on behaviour: what each shows of the result of a stage."""

from __future__ import annotations

import json
import re
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

from zoosplat.config.experiment import Experiment
from zoosplat.errors import UserError
from zoosplat.stages.runs import Run
from zoosplat.storage import listing, objects, schema, urls
from zoosplat_flows.execution.stage_states import StageState
from zoosplat_flows.formatting import format_duration, format_memory
from zoosplat_flows.report import plots
from zoosplat_flows.report.behaviour import Section
from zoosplat_flows.report.pictures import draw_outline, jpeg_data_uri, read_data_uri, read_picture
from zoosplat_flows.report.values import check_result_files, format_value, metric_label, read_csv

GALLERY_PICTURES = 24  # pictures of an evaluation that a page shows
FILM_BYTES = 40 << 20  # of all films of a page together: a browser does not open a page of hundreds of megabytes


def recording_section(run: Run, experiment: Experiment, stages: dict[str, StageState]) -> Section:
    """Cameras with a picture each, and facts of the recording."""
    masks = run.open_input("ingest")
    mask = schema.array(masks, "mask")
    n_frames, n_cameras, height, width = mask.shape
    attributes: Any = masks.attrs
    box, seen = schema.read(masks, "box"), schema.read_seen(masks)
    shown = seen & (box[..., 2] > box[..., 0])
    area = np.where(shown, (box[..., 2] - box[..., 0]) * (box[..., 3] - box[..., 1]), 0)
    # The frame in which the animal is seen best: the largest of the smallest boxes.
    t = int(area.min(axis=1).argmax())
    packed, why_not = _open_images(run, stages)
    cameras = []
    for c in range(n_cameras):
        if packed is None:
            silhouette = np.asarray(mask[t, c])
            picture = np.where(silhouette[..., None], 205, 90).astype(np.uint8).repeat(3, axis=2)
        else:
            silhouette = np.asarray(schema.array(packed, "mask")[t, c])
            picture = np.asarray(schema.array(packed, "rgb")[t, c])
        sizes, absent = np.sqrt(area[:, c][shown[:, c]]), int((~seen[:, c]).sum())
        cameras.append(
            {
                "name": attributes["camera_names"][c],
                "video": experiment.data.videos[c],
                "held_out": c in experiment.holdout_views,
                "picture": jpeg_data_uri(draw_outline(picture, silhouette & seen[t, c])),
                "seen": f"{100 * shown[:, c].mean():.1f} %",
                "absent": f"{absent} of {n_frames}" if absent else "",
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


def _open_images(run: Run, stages: dict[str, StageState]) -> tuple[zarr.Group | None, str]:
    """The images of stage pack and an empty string; where they cannot be read, None and why."""
    if stages["pack"].mark is None:
        return None, stages["pack"].reason or "not packed yet"
    try:
        check_result_files(run, "pack")
        return run.open_input("pack"), ""
    except UserError as error:
        return None, str(error)


def tracking_section(run: Run, experiment: Experiment, stages: dict[str, StageState]) -> Section:
    """Plots of the animal's centre and heading, and facts of its path."""
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
        "plot": plots.plot_tracking(time_s, centers, angles, n_voxels, valid),
        "top_view": plots.plot_top_view(time_s, centers, angles),
    }


def crop_section(run: Run, experiment: Experiment, stages: dict[str, StageState]) -> Section:
    """Plot of the hull's voxels with the range that is kept, and facts of the grid."""
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
    return {"facts": facts, "plot": plots.plot_marginals(counts, ranges)}


def training_section(run: Run, experiment: Experiment, stages: dict[str, StageState]) -> Section:
    """Figures of the training, their history, and the last preview."""
    url = run.input_url("train")
    figures = dict((stages["train"].mark or {})["figures"])
    for key, words in (("seconds", format_duration), ("peak_gpu_bytes", format_memory)):
        if key in figures:
            figures[key] = words(figures[key])
    facts = {
        key.replace("_", " "): format_value(value)
        for key, value in figures.items()
        if isinstance(value, str | int | float)
    }
    section: Section = {"facts": facts, "plot": "", "preview": ""}
    if objects.exists(urls.join(url, "history.csv")):
        section["plot"] = _plot_history(read_csv(urls.join(url, "history.csv")))
    if objects.exists(urls.join(url, "preview.png")):
        section["preview"] = read_picture(urls.join(url, "preview.png"))
    return section


def _plot_history(rows: list[dict[str, str]]) -> str:
    """Plot of the figures of training and validation against epochs, or against steps where there are no epochs.

    The columns `train_X` and `valid_X` share a panel.
    """
    panels: dict[str, dict[str, npt.NDArray[np.float64]]] = {}
    for name in rows[0] if rows else ():
        split, _, quantity = name.partition("_")
        values = np.array([float(row[name] or "nan") for row in rows])
        # A loss whose weight is 0 is 0 throughout, and is not shown.
        if split in ("train", "valid") and np.isfinite(values).any() and np.nanmax(np.abs(values)) > 0:
            panels.setdefault(metric_label(quantity), {})[split] = values
    panels = {key: panels[key] for key in sorted(panels, key=lambda k: {"loss": 0, "IoU": 1, "PSNR (dB)": 2}.get(k, 3))}
    if not panels:
        return ""
    x = "epoch" if "epoch" in rows[0] else "step"
    return plots.plot_curves(np.array([float(row[x]) for row in rows]), x, panels)


def evaluation_section(run: Run, experiment: Experiment, stages: dict[str, StageState]) -> Section:
    """Tables of metrics, their course over time, and pictures with truth, render and error."""
    url = run.input_url("evaluate")
    files = list(listing.list_files(url))
    tables = []
    for name in files:
        split = re.fullmatch(r"metrics_(\w+)\.csv", name)
        if split:
            rows = read_csv(urls.join(url, name))
            tables.append({"split": split[1], **_metrics_table(rows)})
    over_time = [_plot_over_time(read_csv(urls.join(url, n))) for n in files if re.fullmatch(r"frames_\w+\.csv", n)]
    fitted = ""
    if experiment.train.method == "dynamic" or experiment.train.fit_to == "all":
        fitted = "Trained on all frames: observed views are training data, only held-out ones are new to the model."
    raw = ""
    if any(metric_label("raw_psnr") in table["columns"] for table in tables):
        raw = (
            "Raw metrics lay the rendering over the camera's plate and compare it with the raw picture in a window "
            "round the animal, so that no mask plays a part. The others compare with what the masks cut out."
        )
    return {"tables": tables, "gallery": _gallery(url, files), "over_time": over_time, "fitted": fitted, "raw": raw}


def _plot_over_time(rows: list[dict[str, str]]) -> str:
    """Plot of the means over the observed and over the held-out views against the frame of the video."""
    frames = sorted({int(row["frame"]) for row in rows})
    panels: dict[str, dict[str, npt.NDArray[np.float64]]] = {}
    for metric in [metric for metric in ("iou", "psnr", "ssim", "raw_psnr") if rows and metric in rows[0]]:
        for group, name in (("0", "observed"), ("1", "held out")):
            values: dict[int, list[float]] = {frame: [] for frame in frames}
            for row in rows:
                if row["held_out"] == group and row[metric]:
                    values[int(row["frame"])].append(float(row[metric]))
            means = np.array([np.mean(values[frame]) if values[frame] else np.nan for frame in frames])
            if np.isfinite(means).any():
                panels.setdefault(metric_label(metric), {})[name] = means
    return plots.plot_curves(np.array(frames, float), "frame of the video", panels) if panels else ""


def _metrics_table(rows: list[dict[str, str]]) -> Section:
    """Columns and rows of a table of metrics: means come first, then held-out cameras, then observed ones."""

    def order(row: dict[str, str]) -> tuple[bool, bool]:
        return (not row["camera"].startswith("mean_"), row["held_out"] != "1")

    # A column without values is left out, and so is that of absent views where there are none.
    columns = [
        c
        for c in (rows[0] if rows else ())
        if c not in ("camera", "held_out") and any(row[c] not in ("", "0" if c == "absent" else "") for row in rows)
    ]
    body = [
        {
            "camera": row["camera"].replace("_", " "),
            "held_out": row["held_out"] == "1",
            "mean": row["camera"].startswith("mean_"),
            "values": [format_value(float(row[c])) if row[c] else "" for c in columns],
        }
        for row in sorted(rows, key=order)
    ]
    return {"columns": [metric_label(c) for c in columns], "rows": body}


def _gallery(url: str, files: list[str]) -> list[Section]:
    """The comparisons that the stage has chosen, held-out views first, at most `GALLERY_PICTURES`."""
    if "gallery.json" not in files:
        return []
    pictures = json.loads(objects.read_bytes(urls.join(url, "gallery.json")))["pictures"]
    chosen = sorted(pictures, key=lambda p: (not p["held_out"], p["t"], p["camera"]))[:GALLERY_PICTURES]
    keys = {"data": "file", "raw_data": "raw_file"}
    # Without plates there is no picture over the background.
    return [
        {**p, **{key: read_picture(urls.join(url, p[file])) if file in p else "" for key, file in keys.items()}}
        for p in chosen
    ]


def renders_section(run: Run, experiment: Experiment, stages: dict[str, StageState]) -> Section:
    """Films and stills."""
    url = run.input_url("render")
    names = list(listing.list_files(url))
    stills = [{"name": _title(n), "data": read_picture(urls.join(url, n))} for n in names if n.endswith(".png")]
    films, left = [], FILM_BYTES
    for name in sorted((n for n in names if n.endswith(".mp4")), key=lambda n: (n != "orbit.mp4", n)):
        left -= objects.size(urls.join(url, name))
        # Films for which no bytes are left are named instead.
        data = read_data_uri(urls.join(url, name)) if left >= 0 else ""
        films.append({"name": _title(name), "file": urls.join(url, name), "data": data})
    return {"films": films, "stills": stills}


def _title(file: str) -> str:
    """The title of a picture or film, from the name of its file."""
    return PurePosixPath(file).stem.replace("_", " ")
