"""Dynamic Gaussians through the stages and the report, on a tiny scene."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from zoosplat.errors import UserError
from zoosplat.stages.drafts import draft_run
from zoosplat.stages.lookup import open_run
from zoosplat.stages.projects import Project
from zoosplat.stages.run_records import record_run
from zoosplat.stages.runner import run_stage
from zoosplat.stages.runs import Run
from zoosplat.storage import listing, objects, schema, urls
from zoosplat_evaluate.stage import STAGE as EVALUATE
from zoosplat_features.stage import STAGE as FEATURES
from zoosplat_flows.report.page import build_report
from zoosplat_model.dynamic.predictor import DynamicPredictor, ShadedGaussians
from zoosplat_model.dynamic.scene import DynamicScene, SceneUnits, initial_points
from zoosplat_model.frames import open_reader
from zoosplat_model.registry import open_predictor
from zoosplat_model.rotations import rotation_about_z
from zoosplat_render.stage import STAGE as RENDER
from zoosplat_train import dynamic_loop
from zoosplat_train.stage import STAGE

SMALL = {
    "coarse_iterations": 20,
    "fine_iterations": 20,
    "initial_points": 200,
    "multires": (1,),
    "resolution": 8,
    "time_resolution": 4,
}
HELD_OUT = 4


def configure(project: Project, force: bool = False, **changes: Any) -> Run:
    """A run of dynamic Gaussians with these settings; with `force` one that trains again."""
    old = open_run(project).experiment
    updates = {
        "train": old.train.model_copy(update={"method": "dynamic"}),
        "dynamic": old.dynamic.model_copy(update=SMALL | changes),
        "evaluate": old.evaluate.model_copy(update={"gallery_frames": 0}),
        "render": old.render.model_copy(update={"orbit_frames": 2, "sequence_frames": 2, "device": "cpu"}),
    }
    return record_run(draft_run(project, old.model_copy(update=updates), ["train"] if force else []), ["train"])


def history(project: Project) -> list[dict[str, str]]:
    data = objects.read_bytes(urls.join(open_run(project).output_url("train"), "history.csv"))
    return list(csv.DictReader(io.StringIO(data.decode())))


def gaussians_of(project: Project, iteration: int = 20) -> Any:
    """The numbers of the result's PLY."""
    name = f"point_cloud/iteration_{iteration}/point_cloud.ply"
    data = objects.read_bytes(urls.join(open_run(project).output_url("train"), name))
    return np.frombuffer(data.partition(b"end_header\n")[2], "<f4")


def figures(project: Project, stage: str) -> dict[str, Any]:
    mark = open_run(project).read_mark(stage)
    assert mark is not None
    found: dict[str, Any] = mark["figures"]
    return found


def test_the_same_stages_and_report(tiny: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dynamic_loop, "ROW_ITERATIONS", 10)
    monkeypatch.setattr(dynamic_loop, "REPORT_ITERATIONS", 10)
    configure(tiny, render_process=True, checkpoint_iterations=(15,))
    for stage in (STAGE, EVALUATE, RENDER, FEATURES):
        assert run_stage(stage, open_run(tiny))
        assert not run_stage(stage, open_run(tiny))
    train = figures(tiny, "train")
    assert (train["steps"], train["gaussians"]) == (40, 200)
    held_out = figures(tiny, "evaluate")["held_out"]
    assert held_out["iou"] > 0.7
    assert held_out["psnr"] > 15
    assert [float(row["step"]) for row in history(tiny)] == [10, 20, 30, 40]
    there = set(listing.list_files(open_run(tiny).output_url("train")))
    results = ("point_cloud/coarse_iteration_20/point_cloud.ply", "point_cloud/iteration_20/deformation.pth")
    shown = [f"render_process/{stage}/{i:05d}.png" for stage in ("coarse", "fine") for i in (10, 20)]
    kept = ("chkpnt_coarse_15.pth", "chkpnt_fine_15.pth", "cfg_args", "preview.png")
    assert there >= {*results, *shown, *kept}
    assert len([name for name in there if name.startswith("chkpnt")]) == 2

    folder = Path(open_run(tiny).output_url("render"))
    tracks = cv2.imread(str(folder / "trajectories.png"))
    assert tracks is not None
    colourful = np.ptp(tracks.astype(int), axis=2) > 100
    assert 50 < colourful.sum() < 0.3 * colourful.size
    page = Path(build_report(open_run(tiny))).read_text()
    for text in ("trajectories", "orbit", "step"):
        assert text in page

    # Another trainer's keys make no other result; its own do.
    run = open_run(tiny)
    for changes in ({"num_unets": 9}, {"gaussian_mode": "2d"}):
        model = run.experiment.model.model_copy(update=changes)
        other = draft_run(tiny, run.experiment.model_copy(update={"model": model}))
        assert other.results["features"] == run.result("features")
    configure(tiny, sh_degree=1)
    with pytest.raises(UserError, match="is not complete; run stage train first"):
        open_predictor(open_run(tiny), "cpu")


def test_dynamic_gaussians_are_described_with_all_three_scales(tiny: Project) -> None:
    """Whatever `model.gaussian_mode` says, which is another trainer's."""
    described = []
    for mode in ("3d", "2d"):
        configure(tiny, coarse_iterations=2, fine_iterations=0)
        old = open_run(tiny).experiment
        new = old.model_copy(update={"model": old.model.model_copy(update={"gaussian_mode": mode})})
        run = record_run(draft_run(tiny, new, ["features"]), ["features"])
        run_stage(STAGE, run)
        assert run_stage(FEATURES, run)
        described.append(schema.read(run.open_input("features"), "features"))
    np.testing.assert_array_equal(*described)


def test_a_stopped_training_goes_on(tiny: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dynamic_loop, "ROW_ITERATIONS", 5)
    monkeypatch.setattr(dynamic_loop, "REPORT_ITERATIONS", 5)
    configure(tiny)
    run_stage(STAGE, open_run(tiny))
    whole = gaussians_of(tiny)
    monkeypatch.setattr(dynamic_loop, "SAVE_SECONDS", 0.0)  # after each iteration

    def stop(done: int, total: int, message: str) -> None:
        at = " ".join(message.split()[:2])
        if at in ("coarse 10", "fine 15") and at not in stopped:
            stopped.append(at)
            raise KeyboardInterrupt

    stopped: list[str] = []
    configure(tiny, force=True)
    for first in (True, False):
        with pytest.raises(KeyboardInterrupt):
            run_stage(STAGE, open_run(tiny), progress=stop)
        names = [n for n in listing.list_files(open_run(tiny).output_url("train")) if n.startswith("chkpnt")]
        assert names == ["chkpnt_coarse_9.pth" if first else "chkpnt_fine_14.pth"]
        so_far = open_predictor(open_run(tiny), "cpu", finished=False)
        assert so_far.step == (9 if first else 34)
        so_far.gaussians(0)
    run_stage(STAGE, open_run(tiny), progress=stop)
    np.testing.assert_allclose(gaussians_of(tiny), whole, atol=1e-4)
    assert [float(row["step"]) for row in history(tiny)] == [5, 10, 15, 20, 25, 30, 35, 40]


def test_the_last_checkpoint_is_the_result(tiny: Project) -> None:
    configure(tiny)
    with pytest.raises(UserError, match="no checkpoint yet"):
        open_predictor(open_run(tiny), "cpu", finished=False)
    configure(tiny, checkpoint_iterations=(20,))
    run_stage(STAGE, open_run(tiny))
    result, newest = (open_predictor(open_run(tiny), "cpu", finished=f) for f in (True, False))
    assert result.step == newest.step == 40
    frame = result.reader.frame(3)
    size = result.reader.width, result.reader.height
    pictures = [p.render(p.gaussians(3), frame.world_to_camera, frame.intrinsics, *size).rgb for p in (result, newest)]
    torch.testing.assert_close(*pictures)


def test_a_given_start(tiny: Project, tmp_path: Path) -> None:
    configure(tiny, checkpoint_iterations=(15,))
    run_stage(STAGE, open_run(tiny))
    model = open_run(tiny).output_url("train")
    start, points = tmp_path / "chkpnt_fine_15.pth", tmp_path / "points.ply"
    start.write_bytes(objects.read_bytes(urls.join(model, "chkpnt_fine_15.pth")))
    points.write_bytes(objects.read_bytes(urls.join(model, "point_cloud/iteration_20/point_cloud.ply")))
    expected = gaussians_of(tiny)
    configure(tiny, start_checkpoint=str(start))
    run_stage(STAGE, open_run(tiny))
    np.testing.assert_allclose(gaussians_of(tiny), expected, atol=1e-4)
    configure(tiny, start_checkpoint=str(start), resolution=9)
    with pytest.raises(UserError, match="of another configuration"):
        run_stage(STAGE, open_run(tiny))
    configure(tiny, start_checkpoint=None, initial_ply=str(points), coarse_iterations=1, fine_iterations=0)
    run_stage(STAGE, open_run(tiny))
    assert figures(tiny, "train")["gaussians"] == 200
    predictor = open_predictor(open_run(tiny), "cpu")
    assert len(predictor.gaussians(3).means) == 200


def test_scene_is_the_world_seen_from_the_animal(tiny: Project) -> None:
    configure(tiny)
    reader = open_reader(open_run(tiny), torch.device("cpu"))
    scene, scale = DynamicScene.from_reader(reader), SceneUnits.from_reader(reader)
    assert scene.pictures.shape == (8, 4, 32, 32, 3)  # frame 1 is not valid, view 4 held out
    assert scene.times.tolist() == pytest.approx([t / 8 for t in (0, 2, 3, 4, 5, 6, 7, 8)])
    # 16 of 24 grid points are kept: half of 15 spacings becomes 1.3.
    assert scale.unit_m == pytest.approx(0.16 / 23 * 15 / 2 / 1.3)
    frame = reader.frame(5)
    point = torch.tensor([0.3, -0.7, 0.2])
    world = rotation_about_z(frame.angle) @ (scale.unit_m * point + scale.middle) + frame.center
    for v, c in enumerate(reader.observed):
        there = frame.world_to_camera[c, :3, :3] @ world + frame.world_to_camera[c, :3, 3]
        own = scene.poses[4, v, :3, :3] @ point + scene.poses[4, v, :3, 3]
        assert torch.allclose(own * scale.unit_m, there, atol=1e-5)
    # The cameras stand round the animal at 0.4 m and higher.
    eyes = -(reader.world_to_camera[:, :3, :3].mT @ reader.world_to_camera[:, :3, 3:])[reader.observed, :, 0]
    assert scene.extent * scale.unit_m == pytest.approx(1.1 * float((eyes - eyes.mean(0)).norm(dim=1).max()), rel=0.1)
    points, colors = initial_points(reader, 400, 0)
    metres = points * scale.unit_m + scale.middle
    assert ((metres / torch.tensor([0.045, 0.028, 0.024])).norm(dim=1) < 1.7).double().mean() > 0.9
    front, back = colors[metres[:, 0] > 0.02].mean(0), colors[metres[:, 0] < -0.02].mean(0)
    assert front[0] > front[2] + 0.3
    assert back[2] > back[0] + 0.3


def test_turned_gaussians_look_the_same_to_a_turned_camera(tiny: Project) -> None:
    """The harmonics of colour turn with the animal."""
    configure(tiny, fine_iterations=2, coarse_iterations=2)
    run_stage(STAGE, open_run(tiny))
    predictor = open_predictor(open_run(tiny), "cpu")
    assert isinstance(predictor, DynamicPredictor)
    torch.manual_seed(0)
    here = predictor.gaussians(4)
    assert isinstance(here, ShadedGaussians)
    here.harmonics = torch.randn_like(here.harmonics) * 0.3
    frame = predictor.reader.frame(4)
    angle, center = torch.tensor(0.8), torch.tensor([0.02, -0.01, 0.03])
    turned = here.to_world(center, angle).with_low_pass(0.0)
    assert isinstance(turned, ShadedGaussians)
    back = torch.eye(4)
    turn = rotation_about_z(angle)
    back[:3, :3], back[:3, 3] = turn.T, -turn.T @ center
    poses, k = frame.world_to_camera, frame.intrinsics
    truth = predictor.render(here, poses, k, 32, 32)
    found = predictor.render(turned, poses @ back, k, 32, 32)
    assert torch.allclose(found.rgb, truth.rgb, atol=1e-4)
    placed = dict(predictor.map_frames([3, 4], lambda own: own.to_world(*predictor.reader.pose(4)).means))
    assert torch.equal(placed[4], predictor.gaussians(4).means)
    plain = super(DynamicPredictor, predictor).tracks([3, 4], 5)
    assert plain is None
    paths = predictor.tracks([3, 4], 5)
    assert paths.shape == (2, 5, 3)
