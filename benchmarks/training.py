"""Measures trainings of a recording on one GPU or several: frames a second, and how busy the GPUs are.

    python benchmarks/training.py --gpus 1 2 4                        # does the speed grow with the GPUs?
    python benchmarks/training.py --same --gpus 1 1 2 4               # is the result that of one GPU? 1 1: rounding
    python benchmarks/training.py --frames 1300 --url s3://bucket/it  # do the GPUs wait for frames? Local by default
    python benchmarks/training.py --frames 1300 --latency 30          # the same, each request answered 30 ms later

The recording shows the animal of train_step.py in six views of 288 x 256 pixels, with noise like that of a camera. It
is made once. 1300 frames are too many to stay on the GPU, so each is read again in every epoch. An epoch is a third of
the frames. The first epoch does not count, because libraries choose their kernels and steps are recorded in it. The
benchmark prints JSON lines.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from train_step import CAMERAS, Scene, settings
from zarr.abc.store import Store

from zoosplat.config.experiment import Experiment
from zoosplat.stages.drafts import draft_run
from zoosplat.stages.projects import Project
from zoosplat.stages.run_records import record_run
from zoosplat.stages.runner import run_stage
from zoosplat.stages.runs import Run
from zoosplat.storage import groups, objects, schema, urls
from zoosplat.synthetic.stand_in import begin_with_results
from zoosplat_model import checkpoints, frames
from zoosplat_model.frames import Frame
from zoosplat_train.stage import STAGE

WIDTH, HEIGHT = 288, 256
POSES = 48  # number of different poses; noise makes frames of the same pose differ
NOISE = 5  # strength of the noise, grey levels of 255
NEVER = 1_000_000


@lru_cache(maxsize=POSES)
def pose(number: int) -> Frame:
    return Scene(torch.device("cpu"), WIDTH, HEIGHT).frame(number)


def write_block(url: str, start: int, stop: int, empty: bool) -> None:
    """Write frames `start` to `stop` of images.zarr; where they are to be `empty`, they show no animal."""
    torch.set_num_threads(1)
    group = groups.open_group(url, write=True)
    if empty:
        for key in ("rgb", "mask"):
            array = schema.array(group, key)
            array[start:stop] = array.fill_value
        return
    rgb, mask = [], []
    for t in range(start, stop):
        frame = pose(t % POSES)
        inside = frame.mask.numpy() > 0
        noisy = 255 * frame.rgb.numpy() + np.random.default_rng(t).normal(0, NOISE, frame.rgb.shape)
        rgb.append(np.where(inside[..., None], noisy.clip(0, 255), 255).astype(np.uint8))
        mask.append(inside)
    schema.array(group, "rgb")[start:stop] = np.array(rgb)
    schema.array(group, "mask")[start:stop] = np.array(mask)


def write_group(url: str, n_frames: int, block: int, attributes: dict[str, Any], values: dict[str, Any]) -> None:
    """Write a group without its pictures; values that are not given are the arrays' fill value."""
    scene = Scene(torch.device("cpu"), WIDTH, HEIGHT)
    sizes = {"T": n_frames, "C": CAMERAS, "h": HEIGHT, "w": WIDTH, "n": scene.grid_size, "S": 1}
    name = url.rpartition("/")[2]
    group = schema.create(url, name, sizes, block, attributes)
    for key, spec in schema.GROUPS[name].items():
        if spec.layout != "sharded":
            array = schema.array(group, key)
            array[...] = np.broadcast_to(values.get(key, array.fill_value), array.shape)


def make(url: str, n_frames: int, experiment: Experiment) -> tuple[Project, Experiment]:
    """A project whose stages before training are done, and the configuration that names its recording.

    The recording itself does not exist. Data that exist already are not made again. The last third of the frames is
    empty.
    """
    project = Project.at(url)
    data = experiment.data.model_copy(update={"directory": project.path("recording")})
    experiment = experiment.model_copy(update={"data": data})
    scene = Scene(torch.device("cpu"), WIDTH, HEIGHT)
    block = schema.block_frames(CAMERAS * HEIGHT * WIDTH * 3)
    grid = {"ell_m": scene.ell_m, "grid_size": scene.grid_size}

    def track(url: str) -> None:
        poses = [pose(number) for number in range(POSES)]
        each = np.arange(n_frames) % POSES
        values = {
            "principal_shift": 0,
            "centers": np.array([poses[i].center.numpy() for i in each]),
            "angles": np.array([float(poses[i].angle) for i in each]),
            "valid": True,
        }
        write_group(url, n_frames, block, grid, values)

    def crop(url: str) -> None:
        write_group(url, n_frames, block, grid, {"volume_idx": np.array(scene.volume_idx)})

    def pack(url: str) -> None:
        about: dict[str, Any] = {"full_width": WIDTH, "full_height": HEIGHT, "image_downsample": 1, "unit_m": 0.4}
        about |= {"fps": 50.0, "frame_jump": 1, "camera_names": [str(c) for c in range(CAMERAS)]}
        cameras = {"intrinsics": scene.intrinsics.numpy(), "world_to_camera": scene.world_to_camera.numpy()}
        write_group(url, n_frames, block, about, cameras)
        starts = range(0, n_frames, block)
        ends = [min(start + block, n_frames) for start in starts]
        empty = [start >= 2 * n_frames // 3 for start in starts]
        with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn"), max_workers=12) as pool:
            list(pool.map(write_block, [url] * len(starts), starts, ends, empty))

    begin_with_results(project, experiment, {"center_rotation": track, "crop": crop, "pack": pack})
    return project, experiment


def answer_late(milliseconds: float) -> None:
    """Delay every read of frames, as a storage that is far away does."""
    at_once = groups.read_part

    def late(store: Store, key: str, start: int, length: int) -> bytes:
        time.sleep(milliseconds / 1000)
        return at_once(store, key, start, length)

    groups.read_part = late


def history(run: Run) -> list[dict[str, float]]:
    text = objects.read_bytes(urls.join(run.output_url("train"), "history.csv")).decode()
    return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(text.splitlines())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--url", help="the project, made if absent; default: a temporary folder")
    parser.add_argument("--frames", type=int, default=600)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1])
    parser.add_argument("--each", type=int, default=1, help="frames that each GPU takes in a step")
    parser.add_argument("--read", action="store_true", help="read every frame in every epoch; one GPU only")
    parser.add_argument("--same", action="store_true", help="take equal steps: --each times the most GPUs")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--latency", type=float, default=0.0, metavar="MS", help="delay of a request; one GPU only")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    args = parser.parse_args()
    folder = tempfile.TemporaryDirectory()
    once = [f"train.{what}_every={NEVER}" for what in ("valid", "plot", "save")]
    experiment = settings([f"train.epochs={args.epochs}", *once, *args.overrides])
    project, experiment = make(args.url or f"{folder.name}/project", args.frames, experiment)
    if args.read:
        frames.CACHE_BYTES = 0  # type: ignore[attr-defined]
    if args.latency:
        answer_late(args.latency)
    first: dict[str, Any] = {}
    for n in args.gpus:
        batch = args.each * (max(args.gpus) if args.same else n)
        train = experiment.train.model_copy(update={"gpus": n, "batch_frames": batch})
        draft = draft_run(project, experiment.model_copy(update={"train": train}), ["train"])
        run = record_run(draft, ["train"])
        run_stage(STAGE, run)
        rows, found = history(run), checkpoints.load(run.output_url("train"), "latest")
        assert found is not None
        seconds = rows[-1]["seconds"] - rows[0]["seconds"]
        line = {
            "gpus": n,
            "frames_of_a_step": batch,
            "frames_per_second": round(len(range(args.frames // 3)) * (len(rows) - 1) / seconds, 2),
            "utilisation": [row["utilisation"] for row in rows],
            "train_loss": [row["train_loss"] for row in rows],
            "valid_loss": rows[-1]["valid_loss"],
        }
        if args.same:
            weights = torch.cat([value.flatten() for _, value in sorted(found.model.items())])
            average = torch.cat([value.flatten() for _, value in sorted(found.average.items())])
            first = first or {"weights": weights, "average": average, "fps": line["frames_per_second"]}
            line["weights_differ_by"] = float((weights - first["weights"]).norm() / first["weights"].norm())
            line["averages_differ_by"] = float((average - first["average"]).norm() / first["average"].norm())
        first = first or {"fps": line["frames_per_second"]}
        line["times_one"] = round(line["frames_per_second"] / first["fps"], 3)
        figures = run.result("train").require()["figures"]
        print(json.dumps({**line, "device": figures["device"], "gpu_bytes": figures.get("peak_gpu_bytes")}), flush=True)


if __name__ == "__main__":
    main()
