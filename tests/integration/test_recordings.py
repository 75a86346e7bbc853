"""The CPU stages on whole recordings: a synthetic one with truth, and a real mouse."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from zoosplat.config.experiment import Experiment
from zoosplat.geometry import projection, rotations, visual_hull
from zoosplat.geometry.cameras import WorldTransform
from zoosplat.stages.begin import begin_run
from zoosplat.stages.projects import Project
from zoosplat.stages.runner import run_stage
from zoosplat.stages.runs import Run
from zoosplat.storage import schema

CPU_STAGES = ("ingest", "center_rotation", "crop", "pack")


def preprocess(experiment: Experiment, folder: Path) -> Run:
    with begin_run(Project.at(str(folder)), experiment, list(CPU_STAGES), []) as run:
        for name in CPU_STAGES:
            run_stage(importlib.import_module(f"zoosplat_{name}.stage").STAGE, run, workers=2)
    return run


def group(run: Run, stage: str) -> Any:
    """A stage's group, its arrays and attributes untyped."""
    return run.open_input(stage)


def experiment(**sections: Any) -> Experiment:
    return Experiment.model_validate(sections)


@pytest.fixture(scope="module")
def mouse6(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    names = range(6)
    return preprocess(
        experiment(
            data={
                "directory": str(shared_data / "mouse6"),
                "videos": tuple(f"videos/{c}.mp4" for c in names),
                "masks": tuple(f"masks/{c}.mp4" for c in names),
                "calibration": "camera_params.h5",
                "up": "vertical_lines.npz",
            },
            holdout_views=(1, 5),
            ingest={"image_downsample": 4},
            center_rotation={"ell": 0.25},
            crop={"ell": 0.24},
        ),
        tmp_path_factory.mktemp("mouse6"),
    )


@pytest.fixture(scope="module")
def cylinder5(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    names = [f"cam{c}" for c in range(1, 6)]
    return preprocess(
        experiment(
            data={
                "directory": str(shared_data / "cylinder5"),
                "videos": tuple(f"videos/{n}.mp4" for n in names),
                "masks": tuple(f"masks/{n}.mp4" for n in names),
                "camera_names": tuple(names),
                "calibration": tuple(f"hires_{n}_params.mat" for n in names),
                "up": (0.0, 0.0, 1.0),
            },
            holdout_views=(4,),
            ingest={"image_downsample": 2, "frame_jump": 4},
            center_rotation={"ell": 0.2},
            crop={"ell": 0.16},
        ),
        tmp_path_factory.mktemp("cylinder5"),
    )


def test_mouse6_tracking_against_truth(mouse6: Run, shared_data: Path) -> None:
    masks, tracking = group(mouse6, "ingest"), group(mouse6, "center_rotation")
    world = WorldTransform.from_json(masks.attrs["world"])
    with np.load(shared_data / "mouse6" / "truth.npz") as truth:
        centroid, heading = world.to_oriented(truth["centroid"]), truth["heading"]
    assert schema.read(tracking, "valid").all()
    error_mm = 1e3 * np.linalg.norm(schema.read(tracking, "centers") - centroid, axis=1)
    off_deg = np.degrees(np.abs(np.angle(np.exp(1j * (schema.read(tracking, "angles") - heading)))))
    print(f"centre: median {np.median(error_mm):.2f} mm")
    print(f"heading: median {np.median(off_deg):.1f} degrees, largest {off_deg.max():.1f}")
    assert np.median(error_mm) <= 2.5
    assert np.median(off_deg) <= 12
    assert off_deg.max() < 90  # no flip


def test_mouse6_crop_holds_the_whole_animal(mouse6: Run) -> None:
    """Every hull voxel of every frame, carved again here, lies in the crop."""
    masks, tracking, crop = (group(mouse6, s) for s in ("ingest", "center_rotation", "crop"))
    ranges = schema.read(crop, "volume_idx")
    axis = visual_hull.grid_axis(float(crop.attrs["ell_m"]), int(crop.attrs["grid_size"]))
    intrinsics, world_to_camera = schema.read(masks, "intrinsics"), schema.read(masks, "world_to_camera")
    centers, angles = schema.read(tracking, "centers"), schema.read(tracking, "angles")
    observed = [0, 2, 3, 4]
    assert (np.diff(ranges, axis=1) % 16 == 0).all()
    for t in range(0, 300, 3):
        cells, _ = visual_hull.hull_indices(
            np.asarray(masks["mask"][t])[observed],
            intrinsics[observed],
            world_to_camera[observed],
            (axis, axis, axis),
            centers[t],
            float(angles[t]),
            3,
        )
        assert ((cells >= ranges[:, 0]) & (cells < ranges[:, 1])).all(), t
    assert not (mouse6.read_mark("crop") or {})["warnings"]


def test_mouse6_windows_hold_the_masks(mouse6: Run) -> None:
    masks, images = group(mouse6, "ingest"), group(mouse6, "pack")
    for t in (0, 150, 299):
        whole, small, origin = masks["mask"][t], images["mask"][t], images["origin"][t]
        h, w = small.shape[1:]
        for c in range(6):
            x, y = origin[c]
            np.testing.assert_array_equal(whole[c, y : y + h, x : x + w], small[c])
            assert whole[c].sum() == small[c].sum()


def test_cylinder5_center_reprojects_into_the_masks(cylinder5: Run) -> None:
    masks, tracking = group(cylinder5, "ingest"), group(cylinder5, "center_rotation")
    mask = schema.read(masks, "mask")
    pixels, depth = projection.project(
        schema.read(tracking, "centers"), schema.read(masks, "intrinsics"), schema.read(masks, "world_to_camera")
    )
    assert (depth > 0).all()
    at = np.rint(pixels).astype(int)
    hit = [
        [mask[t, c, at[c, t, 1].clip(0, mask.shape[2] - 1), at[c, t, 0].clip(0, mask.shape[3] - 1)] for c in range(5)]
        for t in range(len(mask))
    ]
    print(f"reprojected centre in the mask: {100 * np.mean(hit):.2f}% of frames and views")
    assert np.mean(hit) >= 0.99


def test_cylinder5_hull_meets_the_held_out_mask(cylinder5: Run) -> None:
    masks, tracking = group(cylinder5, "ingest"), group(cylinder5, "center_rotation")
    intrinsics, world_to_camera = schema.read(masks, "intrinsics"), schema.read(masks, "world_to_camera")
    centers, angles = schema.read(tracking, "centers"), schema.read(tracking, "angles")
    axis = visual_hull.grid_axis(0.16, 160)  # 1 mm voxels, about a pixel wide in this view: no holes between them
    ious = []
    for t in range(0, len(centers), 5):
        views = np.asarray(masks["mask"][t])
        cells, _ = visual_hull.hull_indices(
            views[:4], intrinsics[:4], world_to_camera[:4], (axis,) * 3, centers[t], float(angles[t]), 4
        )
        points = axis[cells] @ rotations.rotation_about_z(float(angles[t])).T + centers[t]
        pixels, _ = projection.project(points, intrinsics[4:], world_to_camera[4:])
        seen = np.zeros_like(views[4])
        at = np.rint(pixels[0]).astype(int)
        inside = (at >= 0).all(axis=1) & (at < seen.shape[::-1]).all(axis=1)
        seen[at[inside, 1], at[inside, 0]] = True
        ious.append((seen & views[4]).sum() / (seen | views[4]).sum())
    print(f"hull of four views in the fifth: IoU median {np.median(ious):.3f}, min {min(ious):.3f}")
    assert np.median(ious) >= 0.75
