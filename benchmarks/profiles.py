"""Tests the profiles on one GPU: each trains, evaluates and renders a recording under its cap of memory.

    python benchmarks/profiles.py CONFIG [--folder profiles] [--minutes 1] [default 12gb 24gb 48gb 80gb]

`default` is the configuration without a profile. All train for the same time, each in a process of its own in which
PyTorch may hold no more memory than the cap. Their metrics are computed on pictures of the same size. The benchmark
prints the table of docs/benchmarks.md: the most memory that PyTorch held plus what CUDA took, beside the prediction of
`zoosplat plan`. Stages that are done already are not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import zoosplat_center_rotation.stage
import zoosplat_crop.stage
import zoosplat_evaluate.stage
import zoosplat_ingest.stage
import zoosplat_pack.stage
import zoosplat_render.stage
import zoosplat_train.stage
from zoosplat.config.experiment import Experiment
from zoosplat.config.load import read_config
from zoosplat.machine import usable_cores
from zoosplat.stages.begin import begin_run
from zoosplat.stages.contract import Stage
from zoosplat.stages.lookup import open_run
from zoosplat.stages.memory import GIB, measured_sizes, peak_gpu_bytes
from zoosplat.stages.projects import Project
from zoosplat.stages.runner import run_stage
from zoosplat.stages.runs import Run
from zoosplat_flows.profiles import profile_overrides
from zoosplat_model.registry import open_predictor

CAPS = {"default": 11, "12gb": 11, "24gb": 22, "48gb": 45, "80gb": 76}  # GiB that PyTorch may hold
CPU_STAGES: tuple[Stage, ...] = (
    zoosplat_ingest.stage.STAGE,
    zoosplat_center_rotation.stage.STAGE,
    zoosplat_crop.stage.STAGE,
    zoosplat_pack.stage.STAGE,
)
GPU_STAGES: tuple[Stage, ...] = (
    zoosplat_train.stage.STAGE,
    zoosplat_evaluate.stage.STAGE,
    zoosplat_render.stage.STAGE,
)
FRAMES = 40  # number of frames whose reconstruction is timed
HEADER = """
| | cap | predicted | peak of training | evaluation | rendering | ms a step | frames/s trained | \
frames/s reconstructed | held-out IoU | PSNR | SSIM | observed IoU | PSNR |
|---|---|---|---|---|---|---|---|---|---|---|---|---|---|"""


def experiments(config: str, names: list[str], overrides: list[str]) -> dict[str, Experiment]:
    """The configuration under each profile. All measure on pictures of a size that each can be averaged to."""
    sets = {name: [*([] if name == "default" else profile_overrides(name)), *overrides] for name in names}
    read = [read_config(config, given) for given in sets.values()]
    coarsest = math.lcm(*(e.ingest.image_downsample for e in read), *(e.evaluate.image_downsample or 1 for e in read))
    return {
        name: read_config(config, [*given, f"evaluate.image_downsample={coarsest}"]) for name, given in sets.items()
    }


def measure(name: str, run: Run) -> dict[str, Any]:
    """Train, evaluate and render under the profile's cap."""
    row: dict[str, Any] = {"predicted": peak_gpu_bytes(run.experiment, measured_sizes(run))}
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, CAPS[name] * GIB / total))
    for stage in GPU_STAGES:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        run_stage(stage, run)
        free, total = torch.cuda.mem_get_info()
        context = total - free - torch.cuda.memory_reserved()
        row[stage.name] = torch.cuda.max_memory_reserved() + context
    predictor = open_predictor(run)
    reader, views = predictor.reader, list(range(predictor.reader.n_cameras))
    seconds = []
    for frame in reader.prefetch(reader.split("test")[:FRAMES]):
        torch.cuda.synchronize()
        began = time.perf_counter()
        gaussians = predictor.gaussians(frame.t)
        size = reader.width, reader.height
        predictor.render(gaussians, frame.world_to_camera, frame.intrinsics, *size, cameras=views)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    row["reconstructed"] = 1 / statistics.median(seconds)
    for name in ("train", "evaluate"):
        row[f"{name} figures"] = run.result(name).require()["figures"]
    return row


def line(name: str, row: dict[str, Any], batch: int) -> str:
    """A row of the table."""
    trained, evaluated = row["train figures"], row["evaluate figures"]
    second = trained["seconds"] / trained["steps"]
    cells = [f"{row[key] / GIB:.1f} GiB" for key in ("predicted", "train", "evaluate", "render")]
    cells += [f"{1000 * second:.1f}", f"{batch / second:.0f}", f"{row['reconstructed']:.0f}"]
    held, observed = evaluated.get("held_out", {}), evaluated["observed"]
    figures = [held.get("iou"), held.get("psnr"), held.get("ssim"), observed["iou"], observed["psnr"]]
    forms = ["{:.3f}", "{:.2f}", "{:.4f}", "{:.3f}", "{:.2f}"]
    cells += ["" if value is None else form.format(value) for form, value in zip(forms, figures, strict=True)]
    return f"| {name} | {CAPS[name]} GiB | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("config")
    parser.add_argument("names", nargs="*", metavar="PROFILE", help=f"any of {', '.join(CAPS)}; default: all")
    parser.add_argument("--folder", type=Path, default=Path("profiles"), help="folder of the projects")
    parser.add_argument("--minutes", type=float, default=1.0, help="minutes that each training takes")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--prepare", action="store_true", help="run only the stages that need no GPU")
    parser.add_argument("--measure", metavar="PROFILE", help=argparse.SUPPRESS)  # this program starts itself with it
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, open_run(Project.at(str(args.folder / args.measure))))))
        return

    names = args.names or list(CAPS)
    long = [f"train.max_minutes={args.minutes}", "train.epochs=100000", "train.plot_every=1000"]
    found = experiments(args.config, names, [*long, *args.overrides])
    prepared: dict[int, str] = {}  # resolution -> project; profiles of one resolution share it
    for name, experiment in found.items():
        project = Project.at(str((args.folder / name).resolve()))
        before = prepared.setdefault(experiment.ingest.image_downsample, project.url)
        if before != project.url:
            experiment = experiment.model_copy(update={"reuse": before})
        with begin_run(project, experiment, [stage.name for stage in (*CPU_STAGES, *GPU_STAGES)], []) as run:
            for stage in CPU_STAGES:
                run_stage(stage, run, workers=usable_cores())
        print(f"{name} prepared", file=sys.stderr, flush=True)
    if args.prepare:
        return
    print(HEADER, flush=True)
    for name, experiment in found.items():
        command = [sys.executable, __file__, args.config, "--folder", str(args.folder), "--measure", name]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            print(f"| {name} | {CAPS[name]} GiB | {(done.stderr.strip().splitlines() or ['failed'])[-1]} |", flush=True)
            continue
        print(line(name, json.loads(done.stdout.splitlines()[-1]), experiment.train.batch_frames), flush=True)


if __name__ == "__main__":
    main()
