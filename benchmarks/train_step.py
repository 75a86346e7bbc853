"""Measures the time of a training step and of the reconstruction of a frame on one GPU, with a computed animal.

    python benchmarks/train_step.py [--set model.base_filters=16 ...]

A step takes one frame, which is carved from four views of 288 x 256 pixels and compared with them. The volume has
96 x 80 x 64 voxels of a grid of 112, and 16,000 of them become Gaussians. Before the timing, the step that is recorded
as a CUDA graph is compared with the plain one. The benchmark prints JSON lines.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from zoosplat.config.experiment import Experiment
from zoosplat.config.load import apply_override
from zoosplat_model.carving import project
from zoosplat_model.frames import Frame
from zoosplat_train.trainer import TRAIN_FIGURES, NetworkTrainer

CAMERAS, OBSERVED = 6, [0, 2, 3, 4]
AXES_M = (0.062, 0.026, 0.024)  # metres; half axes of the animal, an ellipsoid that holds more than 16,000 voxels


class Scene:
    """Frames of a chequered ellipsoid; it has those parts of a FrameReader that a Trainer uses."""

    observed, held_out, n_cameras = OBSERVED, [1, 5], CAMERAS
    seen = np.ones((4, CAMERAS), bool)  # of four frames
    ell_m = 0.22

    def __init__(self, device: torch.device, width: int = 288, height: int = 256, grid_size: int = 112) -> None:
        self.device, self.width, self.height, self.grid_size = device, width, height, grid_size
        self.voxel_size_m = self.ell_m / (grid_size - 1)
        kept = [-(-edge * grid_size // (112 * 16)) * 16 for edge in (96, 80, 64)]
        self.volume_idx = tuple(((grid_size - n) // 2, (grid_size + n) // 2) for n in kept)
        angle = torch.arange(CAMERAS) * 2 * torch.pi / CAMERAS + 0.3
        eyes = torch.stack([0.4 * torch.cos(angle), 0.4 * torch.sin(angle), torch.full((CAMERAS,), 0.25)], 1)
        forward = torch.nn.functional.normalize(-eyes, dim=1)
        right = torch.nn.functional.normalize(torch.linalg.cross(forward, torch.tensor([[0.0, 0.0, 1.0]])), dim=1)
        rotation = torch.stack([right, torch.linalg.cross(forward, right), forward], 1)
        self.world_to_camera = torch.eye(4).repeat(CAMERAS, 1, 1)
        self.world_to_camera[:, :3, :3] = rotation
        self.world_to_camera[:, :3, 3] = -(rotation @ eyes[:, :, None])[..., 0]
        focal = self.focal = 1.9 * width
        self.intrinsics = torch.tensor(
            [[focal, 0.0, (width - 1) / 2], [0.0, focal, (height - 1) / 2], [0.0, 0.0, 1.0]]
        ).repeat(CAMERAS, 1, 1)

    def footprint_px(self) -> int:
        return 2 * int(np.ceil(self.focal * self.voxel_size_m / 0.47) // 2) + 1

    def frame(self, t: int) -> Frame:
        rng = np.random.default_rng(t)
        points = rng.normal(size=(max(400_000, 2 * self.width * self.height), 3))
        points /= np.linalg.norm(points, axis=1, keepdims=True)
        world = torch.tensor(points * AXES_M, dtype=torch.float32)
        x, y, _ = project(world.T, self.world_to_camera, self.intrinsics)
        flat = (y.round().long().clamp(0, self.height - 1) * self.width) + x.round().long().clamp(0, self.width - 1)
        mask = torch.zeros(CAMERAS, self.height * self.width).scatter_(1, flat, 1.0)
        squares = torch.from_numpy(rng.random((8, 8, 3))).float()
        down, across = -(-self.height // 8), -(-self.width // 8)
        rgb = squares.repeat_interleave(down, 0).repeat_interleave(across, 1)[: self.height, : self.width]
        frame = Frame(
            t=t,
            rgb=rgb.expand(CAMERAS, -1, -1, -1).contiguous(),
            mask=mask.view(CAMERAS, self.height, self.width),
            intrinsics=self.intrinsics,
            world_to_camera=self.world_to_camera,
            origin=torch.zeros(CAMERAS, 2, dtype=torch.int64),
            center=torch.tensor(rng.uniform(-0.002, 0.002, 3), dtype=torch.float32),
            angle=torch.tensor(float(rng.uniform(-0.1, 0.1))),
        )
        moved = {k: v.to(self.device) for k, v in vars(frame).items() if isinstance(v, torch.Tensor) and k != "origin"}
        return Frame(**{**vars(frame), **moved})


def settings(overrides: list[str]) -> Experiment:
    raw: dict[str, object] = {
        "name": "benchmark",
        "data": {"directory": "none", "calibration": "none.h5", "videos": [f"{i}.mp4" for i in range(CAMERAS)]},
        "holdout_views": [1, 5],
        "center_rotation": {"ell": 0.25},
        "crop": {"ell": 0.22},
        "train": {"lr": 1e-3},
    }
    raw["data"]["masks"] = [f"m{i}.mp4" for i in range(CAMERAS)]  # type: ignore[index]
    for override in overrides:
        apply_override(raw, override)
    return Experiment.model_validate(raw)


def median_ms(function: Callable[[], object], repeats: int) -> float:
    """Median time between the ends of consecutive calls on the GPU."""
    event_of: Any = torch.cuda.Event
    events = [event_of(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        function()
        event.record()
    torch.cuda.synchronize()
    return float(statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(events)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--repeats", type=int, default=200)
    args = parser.parse_args()
    device = torch.device("cuda")
    torch.backends.cudnn.benchmark = True
    experiment = settings(args.overrides)
    scene = Scene(device)
    frames = [scene.frame(t) for t in range(4)]
    views = [OBSERVED, OBSERVED[1:], OBSERVED[:2] + OBSERVED[3:], OBSERVED]

    # Recorded and plain steps begin with the same weights. The learning rate is low, because rounding errors grow with
    # it. They still have an effect: more than 16,000 voxels are surely inside, and rounding decides which of these
    # become Gaussians.
    both = []
    for plain in (False, True):
        trainer = NetworkTrainer(scene, experiment, device)  # type: ignore[arg-type]
        trainer.graphs.capture &= not plain
        found = [trainer.step([frames[i % 4]], [views[i % 4]], [i % 2 == 1], 1e-7, i).clone() for i in range(8)]
        both.append(torch.stack(found).cpu())
    worst = ((both[0] - both[1]).abs() / both[1].abs().clamp_min(1e-3))[:, 0]
    print(
        json.dumps(
            {"check": "recorded against plain step", "loss": both[0][:, 0].tolist(), "plain": both[1][:, 0].tolist()}
        )
    )
    if worst.max() > 1e-2:
        raise SystemExit(f"the recorded step's loss differs from the plain one's: {worst.tolist()}")

    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    trainer = NetworkTrainer(scene, experiment, device)  # type: ignore[arg-type]
    state = {"i": 0}

    def step() -> None:
        i = state["i"] = state["i"] + 1
        trainer.step([frames[i % 4]], [views[i % 4]], [i % 2 == 1], 1e-4, i)

    for _ in range(10):
        step()
    milliseconds = median_ms(step, args.repeats)
    figures = trainer.step([frames[0]], [views[0]], [False], 1e-4, 10).tolist()
    trainer.graphs.ensure_capacity(int(trainer.graphs.pair_buffer.required))
    with torch.no_grad():
        drawn = int((trainer.model([frames[0]])[0].opacities > 1 / 255).sum())
    line = {
        "step_ms": round(milliseconds, 3),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 3),
        "reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 3),
        "gaussians_drawn": drawn,
        "gpu": torch.cuda.get_device_name(),
        **dict(zip(TRAIN_FIGURES, figures, strict=True)),
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
