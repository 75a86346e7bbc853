"""Measures stage segment: its masks against true ones and against what other views leave, its speed and its memory.

    python benchmarks/segment.py [RECORDING ...] [--out FILE]

A recording is a configuration, whose mask files (if it names any) are taken for the truth, or a kind of synthetic
recording: `mouse` or one of the hard ones. Without arguments all kinds are measured. Each recording is run from its raw
videos alone to the end of stage ingest, as `zoosplat run --set data.masks=auto` does it. A row of the table has

    IoU     of masks and true masks, without lens distortion: mean of all, mean of the worst camera, and each camera's
    absent  share of the views that the stage leaves out; they do not count in the other columns
    hull    IoU of a view's mask with what the masks of all other views leave of it: median, median of the worst camera
    true    the same with the true masks
    instants/s, prepare   of the stage's shards, in processes beside one another; what it does before them, seconds
    peak memory           the most that one of the stage's processes has held, imports included

`--repeat 20` plays synthetic recordings 20 times over: speed and memory of a long recording, without filming it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from zoosplat.config.experiment import Experiment
from zoosplat.config.load import read_config
from zoosplat.geometry.projection import project, triangulate_pairs
from zoosplat.geometry.visual_hull import grid_axis, hull_indices
from zoosplat.stages.lookup import open_run
from zoosplat.stages.projects import Project
from zoosplat.stages.results import Result
from zoosplat.stages.runs import Run
from zoosplat.storage import objects, schema
from zoosplat.synthetic.difficulty import DIFFICULTIES
from zoosplat.synthetic.stand_in import loop_video

Bool = npt.NDArray[np.bool_]

KINDS = ("mouse", *DIFFICULTIES)
PARTS = ("videos", "masks")  # Folders of a synthetic recording, a video a camera in each.
SYNTHETIC = """
name: {name}
data:
  directory: {folder}
  videos: [{videos}]
  masks: [{masks}]
  calibration: camera_params.h5
  up: vertical_lines.npz
holdout_views: [1, 5]
center_rotation: {{ell: 0.25}}
crop: {{ell: 0.22}}
"""
COARSE_POINTS = 64  # Grid points along an edge of the tracking cube of the hull that bounds the exact one.
STEP = 2  # Of so many pixels along an axis one is looked at where a view is compared with the others.
HEADER = """
| recording | IoU mean | worst camera | by camera | absent | hull | worst | true | instants/s | prepare | peak memory |
|---|---|---|---|---|---|---|---|---|---|---|"""


def make_synthetic(kind: str, folder: Path, frames: int, size: tuple[int, int], repeat: int) -> str:
    """Write a synthetic recording, unless it is there, and return the path of its configuration."""
    from zoosplat.synthetic.hard import make_hard_recording
    from zoosplat.synthetic.recording import make_recording

    width, height = size
    name = f"{kind}_{frames}_{width}x{height}"
    data, config = folder / name, folder / f"{name}.yaml"
    if not config.exists():  # It is written last.
        if kind == "mouse":
            make_recording(data, n_frames=frames, width=width, height=height)
        else:
            make_hard_recording(data, kind, frames, width, height)
        write_config(config, kind, data)
    if repeat == 1:
        return str(config)
    looped, config = folder / f"{name}_x{repeat}", folder / f"{name}_x{repeat}.yaml"
    if not config.exists():
        for part in PARTS:
            (looped / part).mkdir(parents=True, exist_ok=True)
            for video in (data / part).glob("*.mp4"):
                loop_video(video, looped / part / video.name, repeat)
        for file in ("camera_params.h5", "vertical_lines.npz"):
            shutil.copy(data / file, looped)
        write_config(config, f"{kind} x {repeat}", looped)
    return str(config)


def write_config(path: Path, name: str, data: Path) -> None:
    """The configuration of a synthetic recording in the folder `data`."""
    files = {part: ", ".join(f"{part}/{c}.mp4" for c in range(6)) for part in PARTS}
    path.write_text(SYNTHETIC.format(name=name, folder=data.resolve(), **files))


def run_ingest(config: str, url: str, overrides: list[str]) -> Run:
    """Run the stages up to ingest in a process of their own."""
    words = [word for override in overrides for word in ("--set", override)]
    command = ["zoosplat", "run", config, "--project", url, "--until", "ingest", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"segment: {' '.join(command)} failed\n{done.stderr}")
    return open_run(Project.at(url))


class Masks:
    """The masks of a run's stage ingest: without distortion, at working resolution."""

    def __init__(self, run: Run) -> None:
        group = run.open_input("ingest")
        self._masks = schema.FrameArray(group, "mask")
        self.n_frames, self.n_cameras = self._masks.shape[:2]
        self.seen = schema.read_seen(group)
        self.intrinsics, self.world_to_camera = (schema.read(group, key) for key in ("intrinsics", "world_to_camera"))

    def __getitem__(self, t: int) -> Bool:
        return np.asarray(self._masks[t], bool)


def iou(a: Bool, b: Bool) -> float:
    """Intersection over union; 1 where both are empty."""
    union = np.count_nonzero(a | b)
    return np.count_nonzero(a & b) / union if union else 1.0


def ious(masks: Masks, truth: Masks) -> npt.NDArray[np.float64]:
    """IoU [T, C] of two runs' masks; NaN where a view is absent."""
    found = np.full(masks.seen.shape, np.nan)
    for t in range(masks.n_frames):
        mine, true = masks[t], truth[t]
        for c in np.flatnonzero(masks.seen[t]):
            found[t, c] = iou(mine[c], true[c])
    return found


def others_silhouette(silhouettes: Bool, masks: Masks, view: int, others: list[int], ell_m: float) -> Bool:
    """Which pixels of a view have rays that meet a place inside the masks of all other views: every `STEP`-th [h', w'].

    Args:
        silhouettes: [C, h, w] masks of a frame.
        masks: of which they are a frame.
        view: number of the view.
        others: numbers of the views that count.
        ell_m: edge of a cube that holds the animal, metres.
    """
    height, width = silhouettes.shape[1:]
    found: Bool = np.zeros((-(-height // STEP), -(-width // STEP)), bool)
    if not all(silhouettes[c].any() for c in others):
        return found
    k, pose = masks.intrinsics, masks.world_to_camera
    middles = np.stack([np.argwhere(silhouettes[c]).mean(0)[::-1] for c in others])
    center = np.nanmedian(triangulate_pairs(middles, (k @ pose[:, :3])[others]), axis=0)
    axis = grid_axis(1.5 * ell_m, COARSE_POINTS)
    cells, _ = hull_indices(
        silhouettes[others], k[others], pose[others], (axis, axis, axis), center, 0.0, max(2, len(others) - 1)
    )
    if not len(cells):
        return found
    # The coarse hull of all views but one bounds pixels and depths; the rays are then walked in steps of a pixel.
    size = axis[1] - axis[0]
    pixels, depths = project(center + axis[cells], k[[view]], pose[[view]])
    corner = pixels[0].min(axis=0), pixels[0].max(axis=0)
    near, far = depths.min() - size, depths.max() + size
    margin = np.ceil(size * k[view, 0, 0] / near) + 1
    low = np.maximum((corner[0] - margin) / STEP, 0).astype(int)
    high = np.minimum(np.ceil((corner[1] + margin) / STEP) + 1, (found.shape[1], found.shape[0])).astype(int)
    columns, rows = (part.ravel() for part in np.meshgrid(np.arange(low[0], high[0]), np.arange(low[1], high[1])))
    rays = (
        np.stack([STEP * columns, STEP * rows, np.ones(len(rows))], 1) @ np.linalg.inv(k[view]).T @ pose[view, :3, :3]
    )
    camera = -pose[view, :3, :3].T @ pose[view, :3, 3]
    for depth in np.arange(near, far, near / k[view, 0, 0]):
        left = np.arange(len(rows))
        for c in others:
            seen, ahead = project(camera + depth * rays[left], k[[c]], pose[[c]])
            x, y = np.rint(seen[0]).transpose()
            inside = (ahead[0] > 0) & (x >= 0) & (y >= 0) & (x < width) & (y < height)
            inside[inside] = silhouettes[c, y[inside].astype(int), x[inside].astype(int)]
            left = left[inside]
        found[rows[left], columns[left]] = True
        rest = np.ones(len(rows), bool)
        rest[left] = False
        rows, columns, rays = rows[rest], columns[rest], rays[rest]
    return found


def hull_agreement(masks: Masks, ell_m: float, n_instants: int) -> npt.NDArray[np.float64]:
    """IoU [n, C] of masks with what all other views leave of them, in n frames spread evenly; NaN for absent views."""
    instants = np.unique(np.linspace(0, masks.n_frames - 1, n_instants).astype(int))
    found = np.full((len(instants), masks.n_cameras), np.nan)
    for i, t in enumerate(instants):
        silhouettes, seen = masks[t], np.flatnonzero(masks.seen[t]).tolist()
        for view in seen:
            others = [c for c in seen if c != view]
            if len(others) >= 2:
                left = others_silhouette(silhouettes, masks, view, others, ell_m)
                found[i, view] = iou(silhouettes[view, ::STEP, ::STEP], left)
    return found


def speed(result: Result, n_frames: int) -> dict[str, float]:
    """Seconds that the stage took for what comes before its shards, instants a second of its shards, and its memory."""
    mark, plan = result.require(), result.plan() or {}
    shards = [objects.read_json(result.shard_mark_url(i, mark["shards"])) or {} for i in range(mark["shards"])]
    began, ended = min(s["started"] for s in shards), max(s["started"] + s["seconds"] for s in shards)
    return {
        "prepare_s": plan["seconds"],
        "instants_a_second": n_frames / (ended - began),
        "peak_memory_bytes": mark["peak_memory_bytes"],
    }


def by_camera(values: npt.NDArray[np.float64], middle: Any) -> dict[str, Any]:
    """A mean or median of values [n, C] over all, over the worst camera, and over each."""
    each = [round(float(middle(v[np.isfinite(v)])), 4) if np.isfinite(v).any() else None for v in values.T]
    known = [value for value in each if value is not None]
    return {
        "all": round(float(middle(values[np.isfinite(values)])), 4) if known else None,
        "worst": min(known, default=None),
        "cameras": each,
    }


def measure(config: str, url: str, overrides: list[str], hull_instants: int) -> dict[str, Any]:
    """A row of the table, as plain values."""
    experiment: Experiment = read_config(config, overrides)
    began = time.monotonic()
    run = run_ingest(config, f"{url}/auto", [*overrides, "data.masks=auto"])
    row: dict[str, Any] = {"recording": experiment.name, "wall_s": round(time.monotonic() - began, 1)}
    masks, ell = Masks(run), run.experiment.center_rotation.ell
    row |= {"instants": masks.n_frames, "absent": round(1 - float(masks.seen.mean()), 4)}
    row |= speed(run.result("segment"), masks.n_frames)
    row["hull"] = by_camera(hull_agreement(masks, ell, hull_instants), np.median)
    if not isinstance(experiment.data.masks, str):
        truth = Masks(run_ingest(config, f"{url}/true", overrides))
        row["iou"] = by_camera(ious(masks, truth), np.mean)
        row["true_hull"] = by_camera(hull_agreement(truth, ell, hull_instants), np.median)
    return row


def line(row: dict[str, Any]) -> str:
    """A row of the printed table."""
    none: dict[str, Any] = {"all": None, "worst": None, "cameras": []}
    given, hull, true = row.get("iou", none), row["hull"], row.get("true_hull", none)

    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.3f}"

    cells = [row["recording"], number(given["all"]), number(given["worst"]), " ".join(map(number, given["cameras"]))]
    cells += [number(row["absent"]), number(hull["all"]), number(hull["worst"]), number(true["all"])]
    cells += [
        f"{row['instants_a_second']:.2f}",
        f"{row['prepare_s']:.0f} s",
        f"{row['peak_memory_bytes'] / 2**30:.2f} GiB",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recordings", nargs="*", metavar="RECORDING", help=f"configurations, or of {', '.join(KINDS)}")
    parser.add_argument("--folder", type=Path, default=Path("segment"), help="of recordings and projects")
    parser.add_argument("--frames", type=int, default=200, help="of synthetic recordings")
    parser.add_argument("--size", default="1152x1024", metavar="WxH", help="of synthetic recordings, pixels")
    parser.add_argument("--repeat", type=int, default=1, help="times that synthetic recordings are played")
    parser.add_argument("--hull-instants", type=int, default=12, help="frames in which views are compared")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path, help="a JSON file of the rows")
    args = parser.parse_args()
    width, height = map(int, args.size.split("x"))
    args.folder.mkdir(parents=True, exist_ok=True)
    rows = []
    print(HEADER, flush=True)
    for recording in args.recordings or KINDS:
        synthetic = recording in KINDS
        size = (width, height)
        config = make_synthetic(recording, args.folder, args.frames, size, args.repeat) if synthetic else recording
        url = str((args.folder / "projects" / Path(config).stem).resolve())
        rows.append(measure(config, url, args.overrides, args.hull_instants))
        print(line(rows[-1]), flush=True)
        if args.out is not None:
            args.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
