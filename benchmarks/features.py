"""Measures how many frames a second the stage features describes, the inference of the trained model included.

    python benchmarks/features.py PROJECT [--frames 300] [--encoders gaussians images]

Frames are in memory, as they are after the first reading; `reading` is the speed of that first reading. The ResNet-18
of `images` has random weights, because the time does not depend on the weights. The benchmark prints JSON lines.
"""

from __future__ import annotations

import argparse
import json
import time

import torch
import torchvision.models as models

from zoosplat.stages.lookup import open_run
from zoosplat.stages.projects import Project
from zoosplat_features import encoders
from zoosplat_model.registry import open_predictor


def synchronize() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("project")
    parser.add_argument("--frames", type=int, default=300)
    parser.add_argument("--encoders", nargs="+", default=["gaussians", "images"])
    args = parser.parse_args()
    run = open_run(Project.at(args.project))
    predictor = open_predictor(run)
    reader = predictor.reader
    network: torch.nn.Module = models.resnet18(weights=None)
    network.fc = torch.nn.Identity()
    chosen: dict[str, encoders.Encoder] = {
        "gaussians": encoders.GaussiansEncoder(reader.ell_m / 2),
        "images": encoders.ImagesEncoder(predictor.render, reader.ell_m / 2, network, reader.device),
    }
    frames = [t for t in range(reader.n_frames) if reader.valid[t]][: args.frames]
    began = synchronize()
    for _ in reader.prefetch(frames):
        pass
    results = {"reading": len(frames) / (synchronize() - began)}
    for name in args.encoders:
        encoder = chosen[name]
        for _ in range(2):  # the first pass also chooses kernels and captures graphs
            began = synchronize()
            for _, _ in predictor.map_frames(frames, encoder, capture=encoder.capturable):
                pass
            results[name] = len(frames) / (synchronize() - began)
    grid = [stop - start for start, stop in reader.volume_idx]
    for name, rate in results.items():
        about = {"frames": len(frames), "grid": grid, "gaussians": run.experiment.model.max_gaussians}
        print(json.dumps({"what": name, "frames_a_second": round(rate, 1), **about}))


if __name__ == "__main__":
    main()
