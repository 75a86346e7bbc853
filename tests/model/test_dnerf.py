"""Scenes in the format of D-NeRF: a synthetic one through all stages, and what is wrong with others."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from zoosplat.config.experiment import Experiment
from zoosplat.config.load import read_config
from zoosplat.errors import UserError
from zoosplat.recording import dnerf
from zoosplat.stages.begin import begin_run
from zoosplat.stages.lookup import open_run
from zoosplat.stages.projects import Project
from zoosplat.stages.runner import run_stage
from zoosplat.storage import schema
from zoosplat_center_rotation.stage import STAGE as CENTER_ROTATION
from zoosplat_crop.stage import STAGE as CROP
from zoosplat_evaluate.stage import STAGE as EVALUATE
from zoosplat_ingest.stage import STAGE as INGEST
from zoosplat_model.dynamic.scene import DynamicScene, SceneUnits
from zoosplat_model.frames import open_reader
from zoosplat_model.rasterize import rasterize
from zoosplat_pack.stage import STAGE as PACK
from zoosplat_render.stage import STAGE as RENDER
from zoosplat_train.stage import STAGE as TRAIN

TRAIN_TIMES, TEST_TIMES, SIDE, ANGLE = 7, 4, 48, 0.7
RED, BLUE = (0.9, 0.1, 0.1), (0.1, 0.2, 0.9)


def camera_to_world(azimuth: float, elevation: float) -> Any:
    """OpenGL's axes, 4 from the origin, looking at it, upright."""
    eye = 4 * np.array(
        [math.cos(azimuth) * math.cos(elevation), math.sin(azimuth) * math.cos(elevation), math.sin(elevation)]
    )
    backward = eye / 4
    right = np.cross([0, 0, 1], backward)
    right /= np.linalg.norm(right)
    matrix = np.eye(4)
    matrix[:3, :4] = np.stack([right, np.cross(backward, right), backward, eye], 1)
    return matrix


def balls(time: float) -> Any:
    """A red ball that rests at (-0.4, 0, 0), a blue one that rises from z = -0.6 to 0.6 at x = 0.5."""
    return torch.tensor([[-0.4, 0.0, 0.0], [0.5, 0.0, 1.2 * time - 0.6]])


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scene")
    focal = SIDE / 2 / math.tan(ANGLE / 2)
    k = torch.tensor([[[focal, 0, (SIDE - 1) / 2], [0, focal, (SIDE - 1) / 2], [0, 0, 1]]])
    for split, count in (("train", TRAIN_TIMES), ("test", TEST_TIMES)):
        (folder / split).mkdir()
        frames = []
        for i in range(count):
            time = i / (count - 1)
            matrix = camera_to_world(2.4 * i + (0.7 if split == "test" else 0), 0.4)
            flipped = matrix.copy()
            flipped[:, 1:3] *= -1
            pose = torch.tensor(np.linalg.inv(flipped), dtype=torch.float32)[None]
            quats, scales = torch.tensor([[1.0, 0, 0, 0]]).repeat(2, 1), torch.full((2, 3), 0.16)
            rgb, alpha = rasterize(
                balls(time), quats, scales, torch.full((2,), 0.99), torch.tensor([RED, BLUE]), pose, k, SIDE, SIDE
            )
            straight = rgb[0] / alpha[0, ..., None].clamp_min(1e-6)
            rgba = (torch.cat([straight, alpha[0, ..., None]], -1) * 255).round().to(torch.uint8).numpy()
            cv2.imwrite(str(folder / split / f"r_{i:03d}.png"), rgba[..., [2, 1, 0, 3]])
            frames.append({"file_path": f"./{split}/r_{i:03d}", "time": time, "transform_matrix": matrix.tolist()})
        text = json.dumps({"camera_angle_x": ANGLE, "frames": frames})
        (folder / f"transforms_{split}.json").write_text(text)
    return folder


def config(folder: Path, **dynamic: Any) -> dict[str, Any]:
    return {
        "data": {"directory": str(folder)},
        "ingest": {"source": "dnerf"},
        "train": {"method": "dynamic", "device": "cpu"},
        "dynamic": {"multires": [1], "resolution": 12, "time_resolution": 6, "time_range": "full", **dynamic},
        "evaluate": {"gallery_frames": 1},
        "render": {"orbit_frames": 2, "camera": 1},
    }


def test_scene_is_read(scene: Path) -> None:
    found = dnerf.read_scene(str(scene))
    # 7 times of training, 4 of testing, of which 0 and 1 are shared, and 1/3 and 2/3 are 2/6 and 4/6.
    assert found.times.tolist() == pytest.approx([i / 6 for i in range(7)])
    assert [row[1] is not None for row in found.pictures] == [True, False, True, False, True, False, True]
    assert all(row[0] is not None for row in found.pictures)
    assert (found.width, found.height) == (SIDE, SIDE)
    # The red ball lies where its colour is.
    for t, row in enumerate(found.pictures):
        for c, url in enumerate(row):
            if url is None:
                continue
            rgba = dnerf.read_picture(url, 1)
            x, y, depth = found.intrinsics(1) @ (found.world_to_camera[t, c] @ [-0.4, 0, 0, 1])[:3]
            place = round(float(y / depth)), round(float(x / depth))
            if found.world_to_camera[t, c][2] @ [0.9, 0, 0, 0] > 0:  # the blue one is not in front
                assert rgba[place][0] > rgba[place][2] + 0.2
    assert np.allclose(dnerf.read_picture(str(scene / "train/r_000.png"), 2)[0, 0], [1, 1, 1, 0])
    # At downsample 2 the first pixel covers pixels 0 and 1, whose middle is 0.5.
    assert found.intrinsics(2)[0, 2] == pytest.approx((found.intrinsics(1)[0, 2] - 0.5) / 2)


def test_all_stages(scene: Path, tmp_path: Path) -> None:
    path = tmp_path / "dnerf.yaml"
    path.write_text(json.dumps(config(scene, coarse_iterations=40, fine_iterations=40, initial_points=800)))
    experiment = read_config(str(path))
    assert experiment.holdout_views == (1,)
    project = Project.at(str(tmp_path / "project"))
    stages = (INGEST, CENTER_ROTATION, CROP, PACK, TRAIN, EVALUATE, RENDER)
    with begin_run(project, experiment, [stage.name for stage in stages], []) as run:
        assert run.experiment == experiment
        for stage in stages:
            run_stage(stage, run)
    reader = open_reader(open_run(project), torch.device("cpu"))
    assert reader.moving
    assert reader.split("train") == list(range(7))
    assert reader.split("test") == [0, 2, 4, 6]
    truth = dnerf.read_scene(str(scene))
    assert np.allclose(reader.frame(4).world_to_camera, truth.world_to_camera[4], atol=1e-6)
    assert reader.pose(3)[0].tolist() == [0, 0, 0]
    assert reader.pose(3)[1] == 0
    assert SceneUnits.from_reader(reader).unit_m == pytest.approx(1.0)
    training = DynamicScene.from_reader(reader)
    assert training.shown == [[0]] * 7
    assert training.times.tolist() == pytest.approx(truth.times.tolist())
    # On white, soft edges included.
    whole = dnerf.read_picture(str(scene / "train/r_003.png"), 1)
    shown = training.pictures[3, 0]
    x, y = schema.read(open_run(project).open_input("pack"), "origin")[3, 0].tolist()
    assert np.abs(shown.numpy() / 255 - whole[y : y + len(shown), x : x + shown.shape[1], :3]).max() < 0.005

    mark = open_run(project).read_mark("evaluate")
    assert mark is not None
    assert mark["frames"] == 4
    assert mark["figures"]["held_out"]["psnr"] > 15
    rows = (tmp_path / "project/latest/evaluation/metrics_test.csv").read_text().splitlines()
    assert [row.split(",")[:2] for row in rows[1:3]] == [["train", "0"], ["test", "1"]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw["train"].pop("method"), "only train.method = dynamic can use it"),
        (lambda raw: raw.update(holdout_views=[0, 1]), "leaves 0 of 2 cameras"),
        (lambda raw: raw["ingest"].update(source="nerf"), "ingest.source"),
    ],
)
def test_configurations_that_cannot_work(change: Any, message: str, scene: Path, tmp_path: Path) -> None:
    raw = config(scene)
    change(raw)
    if raw["ingest"]["source"] == "nerf":
        raw["data"] |= {"videos": ["a", "b"], "masks": ["a", "b"], "calibration": "c"}
        raw |= {"center_rotation": {"ell": 1}, "crop": {"ell": 1}}
    with pytest.raises(UserError, match=message):
        Experiment.from_yaml(json.dumps(raw))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw["frames"][1].pop("time"), "no 'time'"),
        (lambda raw: raw.update(camera_angle_x=4.0), "must be between 0 and pi"),
        (lambda raw: raw.update(frames=[]), "holds no frames"),
        (lambda raw: raw["frames"][0].update(file_path="../../secret"), "leads out of the scene"),
        (lambda raw: raw["frames"][0].update(transform_matrix=[[1, 2], [3, 4]]), "not a 4 x 4 matrix"),
        (lambda raw: raw["frames"][0].update(transform_matrix=np.diag([2, 1, 1, 1]).tolist()), "not a rotation"),
        (lambda raw: raw["frames"][0].update(file_path="train/none"), "no such picture"),
    ],
)
def test_scenes_that_cannot_be_read(change: Any, message: str, scene: Path, tmp_path: Path) -> None:
    folder = tmp_path / "scene"
    folder.mkdir()
    (folder / "test").symlink_to(scene / "test")
    (folder / "train").symlink_to(scene / "train")
    (folder / "transforms_test.json").write_text((scene / "transforms_test.json").read_text())
    raw = json.loads((scene / "transforms_train.json").read_text())
    change(raw)
    (folder / "transforms_train.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match=message) as error:
        dnerf.read_scene(str(folder))
    assert len(str(error.value).splitlines()) == 1


def test_no_scene_at_all(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"transforms_train\.json: no such file"):
        dnerf.read_scene(str(tmp_path))
    (tmp_path / "transforms_train.json").write_text("[1")
    with pytest.raises(UserError, match="not transforms"):
        dnerf.read_scene(str(tmp_path))
