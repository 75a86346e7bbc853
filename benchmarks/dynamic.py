"""Measures the iterations a second of the dynamic trainer on one GPU, in stage fine.

    python benchmarks/dynamic.py [GAUSSIANS ...]

The Gaussians, 100,000 by default, fill an ellipsoid, and the pictures have 288 x 256 pixels. The planes have 35.7
million parameters. Statistics for densification are gathered, but no Gaussian is added. The benchmark prints a JSON
line for each number of Gaussians and of views an iteration.
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np
import torch

from zoosplat.config.training import Dynamic
from zoosplat_model.dynamic.hexplane import DeformationField, HexPlane
from zoosplat_model.dynamic.scene import DynamicScene
from zoosplat_model.dynamic.trainer import DynamicTrainer

FRAMES, VIEWS, WIDTH, HEIGHT = 50, 4, 288, 256
WARM, TIMED = 50, 300


def scene(device: torch.device) -> DynamicScene:
    """A scene of grey pictures. Its cameras stand at a distance of 6, and each sees all that lies within 1.3."""
    poses = torch.eye(4).repeat(FRAMES, VIEWS, 1, 1)
    for v in range(VIEWS):
        a = 2 * np.pi * v / VIEWS
        rotation = [[-np.sin(a), np.cos(a), 0], [0, 0, -1], [-np.cos(a), -np.sin(a), 0]]
        poses[:, v, :3, :3] = torch.tensor(rotation)
        poses[:, v, 2, 3] = 6.0
    focal = 0.8 * WIDTH / 2 * 6 / 1.3
    intrinsics = torch.tensor([[focal, 0.0, WIDTH / 2], [0.0, focal, HEIGHT / 2], [0.0, 0.0, 1.0]])
    pictures = torch.full((FRAMES, VIEWS, HEIGHT, WIDTH, 3), 128, dtype=torch.uint8)
    return DynamicScene(
        pictures.to(device),
        torch.ones(pictures.shape[:-1], dtype=torch.bool, device=device),
        poses.to(device),
        intrinsics.repeat(FRAMES, VIEWS, 1, 1).to(device),
        torch.linspace(0, 1, FRAMES, device=device),
        [list(range(VIEWS))] * FRAMES,
    )


def measure(count: int, views: int) -> dict[str, float]:
    device = torch.device("cuda")
    torch.cuda.reset_peak_memory_stats()
    rng = np.random.default_rng(0)
    points = rng.normal(size=(count, 3))
    points *= (rng.uniform(size=(count, 1)) ** (1 / 3)) / np.linalg.norm(points, axis=1, keepdims=True)
    first = torch.tensor(points * [1.3, 0.6, 0.5], dtype=torch.float32, device=device)
    config = Dynamic(views=views, densify_from_iter=10**6, opacity_reset_interval=10**6)
    trainer = DynamicTrainer(scene(device), first, torch.rand_like(first), DeformationField(HexPlane()), config, 0)
    trainer.begin("fine")
    for _ in range(WARM):
        trainer.step()
    torch.cuda.synchronize()
    begun = time.monotonic()
    for _ in range(TIMED):
        trainer.step()
    torch.cuda.synchronize()
    return {
        "gaussians": count,
        "views": views,
        "iterations_per_second": round(TIMED / (time.monotonic() - begun), 1),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
    }


if __name__ == "__main__":
    for count in [int(text) for text in sys.argv[1:]] or [100_000]:
        for views in (1, 2, 4):
            print(json.dumps(measure(count, views)), flush=True)
