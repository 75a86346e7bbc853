"""A tiny scene with known truth: an ellipsoid, red in front and blue behind, walks and turns before five cameras."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from zoosplat.config.experiment import Experiment
from zoosplat.stages.projects import Project
from zoosplat.synthetic.cameras import ring_of_cameras

SEMI_AXES_M = np.array([0.045, 0.028, 0.024])
SIDE, CAMERAS, FRAMES, HELD_OUT = 32, 5, 9, 4
RED, BLUE = (200, 40, 30), (30, 60, 210)


def experiment(recording: Path) -> Experiment:
    names = [f"{c}.mp4" for c in range(CAMERAS)]
    return Experiment.model_validate(
        {
            "data": {"directory": str(recording), "videos": names, "masks": names, "calibration": "none.h5"},
            "holdout_views": [HELD_OUT],
            "center_rotation": {"ell": 0.16, "grid_size": 24},
            "crop": {"ell": 0.16, "grid_size": 24, "volume_idx": [[4, 20]] * 3},
            "model": {"num_unets": 2, "base_filters": 4, "poolings": 2, "bottleneck": 16, "min_gaussians": 64},
            "train": {"lr": 3e-3, "epochs": 4, "device": "cpu"},
        }
    )


def _picture(k: Any, r: Any, t: Any, center: Any, angle: float) -> tuple[Any, Any]:
    """Cast a ray through every pixel centre at the ellipsoid: (rgb uint8, mask)."""
    y, x = np.mgrid[:SIDE, :SIDE]
    rays = np.stack([(x - k[0, 2]) / k[0, 0], (y - k[1, 2]) / k[1, 1], np.ones_like(x)], -1) @ r
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    origin, rays = (-r.T @ t - center) @ turn / SEMI_AXES_M, rays @ turn / SEMI_AXES_M
    a, b, c = (rays**2).sum(-1), rays @ origin, origin @ origin - 1
    mask = b**2 - a * c > 0
    near = (-b - np.sqrt(np.maximum(b**2 - a * c, 0))) / a
    front = origin[0] + near * rays[..., 0] > 0
    rgb = np.where(front[..., None], RED, BLUE)
    return np.where(mask[..., None], rgb, 255).astype(np.uint8), mask


@pytest.fixture
def tiny(tmp_path: Path, finish: Callable[..., Any], write_group: Callable[..., None]) -> Project:
    """A project whose stages before training are done; 9 frames, of which frame 1 is not valid."""
    project = Project.at(str(tmp_path / "tiny"))
    k, r, t = ring_of_cameras(CAMERAS, 0.4, 0.2, focal_px=110.0, width=SIDE, height=SIDE)
    pose = np.tile(np.eye(4), (CAMERAS, 1, 1))
    pose[:, :3, :3], pose[:, :3, 3] = r, t
    centers = np.stack([np.linspace(-0.01, 0.01, FRAMES), np.linspace(0.008, -0.008, FRAMES), np.zeros(FRAMES)], 1)
    angles = np.linspace(0.3, 1.5, FRAMES)
    views = [[_picture(k[c], r[c], t[c], centers[i], angles[i]) for c in range(CAMERAS)] for i in range(FRAMES)]
    valid = np.ones(FRAMES, bool)
    valid[1] = False

    common: dict[str, Any] = {"full_width": SIDE, "full_height": SIDE, "image_downsample": 1}
    common |= {"fps": 50.0, "frame_jump": 1, "camera_names": [str(c) for c in range(CAMERAS)], "unit_m": 0.4}
    sizes = {"T": FRAMES, "C": CAMERAS, "h": SIDE, "w": SIDE, "n": 24, "S": 1}
    grid = {"ell_m": 0.16, "grid_size": 24}
    groups: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "ingest": (common, {"mask": [[mask for _, mask in row] for row in views], "intrinsics": k}),
        "center_rotation": (grid, {"principal_shift": 0, "centers": centers, "angles": angles, "valid": valid}),
        "crop": (grid, {"volume_idx": [[4, 20]] * 3}),
        "pack": (
            common,
            {
                "rgb": [[rgb for rgb, _ in row] for row in views],
                "mask": [[mask for _, mask in row] for row in views],
                "intrinsics": k,
                "world_to_camera": pose,
            },
        ),
    }
    writers = {
        stage: partial(write_group, sizes=sizes, attributes=attributes, values=values)
        for stage, (attributes, values) in groups.items()
    }
    finish(project, experiment(tmp_path / "recording"), writers)
    return project
