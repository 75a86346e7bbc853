"""Measures GPU memory and time of training steps of many configurations, beside the prediction of `zoosplat plan`.

    python benchmarks/memory.py [12gb 24gb step ...]

The frames are those of train_step.py: a computed animal of which four of six views are observed. Each configuration
takes a dozen steps, in which PyTorch may hold no more memory than the cap, and then prints a line. Without arguments
all configurations are measured. `allocated` is the most memory that tensors took. `used` also counts what PyTorch
reserved besides, and what CUDA took.
"""

from __future__ import annotations

import gc
import math
import sys

import torch
from train_step import OBSERVED, Scene, median_ms, settings

from zoosplat.config.experiment import Experiment
from zoosplat.stages.memory import GIB, TrainingSizes, training_memory
from zoosplat_flows.profiles import profile_overrides
from zoosplat_train.trainer import NetworkTrainer

CAPS = {"12gb": 11, "24gb": 22, "48gb": 45, "80gb": 76}  # GiB that PyTorch may hold, by profile
WIDTH, HEIGHT = 1152, 1024
OTHERS = {
    "step": ["ingest.image_downsample=4"],
    "filters": ["ingest.image_downsample=4", "model.base_filters=32"],
    "one": ["ingest.image_downsample=4", "model.num_unets=1", "model.base_filters=16"],
    "grid": ["ingest.image_downsample=4", "crop.grid_size=224", "model.base_filters=8"],
    "pixels": ["ingest.image_downsample=1", "model.base_filters=16"],
    "gaussians": ["ingest.image_downsample=2", "model.max_gaussians=128000"],
    "batch": ["ingest.image_downsample=2", "train.batch_frames=8", "model.base_filters=16"],
    "fp32": ["ingest.image_downsample=2", "model.precision=fp32", "model.base_filters=16", "crop.grid_size=160"],
    "2d": ["ingest.image_downsample=4", "model.gaussian_mode=2d", "model.base_filters=16"],
    "published": ["ingest.image_downsample=4", "model.network=published"],
}


def measure(name: str, experiment: Experiment, cap_gib: int, context: int, device: torch.device) -> None:
    reduced = experiment.ingest.image_downsample
    width, height = WIDTH // reduced, HEIGHT // reduced
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, cap_gib * GIB / total))
    torch.cuda.reset_peak_memory_stats()
    scene = Scene(device, width, height, experiment.crop.grid_size)
    voxels: int = math.prod(stop - start for start, stop in scene.volume_idx)
    sizes = TrainingSizes(voxels, width * height, len(OBSERVED), scene.n_cameras, 0)
    parts = training_memory(experiment, sizes)
    predicted = (sum(parts.values()) - parts["first validation"]) / GIB  # only steps are taken here
    result = f"{'out of memory':>38}"
    try:
        batch = experiment.train.batch_frames
        frames = [scene.frame(t) for t in range(2)] * batch
        trainer = NetworkTrainer(scene, experiment, device)  # type: ignore[arg-type]
        state = {"i": 0}

        def step() -> None:
            i = state["i"] = state["i"] + 1
            trainer.step(frames[:batch], [OBSERVED] * batch, [False] * batch, 1e-4, i)

        step()
        first = torch.cuda.max_memory_allocated() / GIB
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        step()
        step()
        milliseconds = median_ms(step, 9)
        allocated, held = torch.cuda.max_memory_allocated() / GIB, torch.cuda.max_memory_reserved() / GIB
        used = held + context / GIB
        result = f"{first:8.2f} {allocated:9.2f} {used:8.2f} {milliseconds:8.1f} {predicted / used:8.2f}"
    except torch.OutOfMemoryError:
        pass
    print(f"{name:10} {cap_gib:4} {voxels / 1e6:6.2f} {predicted:9.2f} {result}", flush=True)


def main() -> None:
    device = torch.device("cuda")
    torch.backends.cudnn.benchmark = True
    torch.zeros(1, device=device)
    known = {name: profile_overrides(name) for name in CAPS} | OTHERS
    print("name        cap Mvoxel predicted first    allocated     used  ms/step  predicted/used")
    measure("warm up", settings(OTHERS["step"]), 76, 0, device)  # the first steps load kernels and libraries
    for name in sys.argv[1:] or known:
        gc.collect()
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        context = total - free - torch.cuda.memory_reserved()
        measure(name, settings(known[name]), CAPS.get(name, 76), context, device)
    print(f"CUDA itself {context / GIB:.2f} GiB")


if __name__ == "__main__":
    main()
