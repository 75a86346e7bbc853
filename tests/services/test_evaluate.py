from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from zoosplat.config.experiment import Experiment
from zoosplat.errors import UserError
from zoosplat.formats.comparison import draw_comparison, split_comparison, square_around
from zoosplat.recording.background import lit_plate
from zoosplat.stages.drafts import draft_run
from zoosplat.stages.lookup import open_run
from zoosplat.stages.projects import Project
from zoosplat.stages.run_records import record_run
from zoosplat.stages.runner import run_stage
from zoosplat.stages.runs import Run
from zoosplat.storage import groups, listing, objects, schema, urls
from zoosplat_evaluate import ops, stage
from zoosplat_evaluate.stage import STAGE
from zoosplat_model.frames import Frame, open_reader
from zoosplat_model.gaussians import Gaussians
from zoosplat_model.lpips import ALEXNET, Lpips
from zoosplat_model.metrics import METRICS
from zoosplat_model.network.predictor import SplatterPredictor
from zoosplat_model.predictor import Predictor
from zoosplat_model.rasterize import Rendering, rasterize

T, C, SIDE, WIDTH, HEIGHT = 12, 3, 32, 64, 48
HELD_OUT, SPOILT = 2, 9  # the camera; the frame whose photograph in that camera shows half an animal
DISTANCE_M, FOCAL_PX = 1.0, 150.0


def make_ball() -> Gaussians:
    g = torch.Generator().manual_seed(0)
    means = nn.functional.normalize(torch.randn(300, 3, generator=g), dim=1) * 0.05
    quats = torch.tensor([1.0, 0, 0, 0]).expand(300, 4)
    return Gaussians(means, quats, torch.full((300, 3), 0.01), torch.full((300,), 0.9), torch.rand(300, 3, generator=g))


class Ball(nn.Module):
    """A stand-in for a trained network: always the same ball of Gaussians round the animal's centre."""

    def forward(self, frames: Sequence[Frame]) -> list[Gaussians]:
        return [make_ball() for _ in frames]

    def render(
        self, gaussians: Gaussians, pose: Tensor, k: Tensor, width: int, height: int, cameras: Any = None
    ) -> Rendering:
        return rasterize(*gaussians, pose, k, width, height, background=torch.ones(3))


def cameras() -> tuple[Any, Any]:
    """Level cameras round the origin, 1 m away: K of the whole frame [C, 3, 3], world to camera [C, 4, 4]."""
    poses = np.zeros((C, 4, 4))
    for c, angle in enumerate(2 * np.pi * np.arange(C) / C):
        forward = -np.array([math.cos(angle), math.sin(angle), 0])
        rotation = np.stack([np.cross(forward, [0, 0, 1]), [0, 0, -1], forward])
        poses[c, :3, :3], poses[c, :3, 3], poses[c, 3, 3] = rotation, [0, 0, DISTANCE_M], 1
    k = np.array([[FOCAL_PX, 0, (WIDTH - 1) / 2], [0, FOCAL_PX, (HEIGHT - 1) / 2], [0, 0, 1]])
    return np.tile(k, (C, 1, 1)), poses


def experiment(folder: Path, **sections: Any) -> Experiment:
    data = {
        "directory": str(folder / "recording"),
        "videos": ["a", "b", "c"],
        "masks": ["d", "e", "f"],
        "calibration": "c.h5",
    }
    data |= {"camera_names": ["left", "right", "top"]}
    cube = {"ell": 0.3, "grid_size": 16}
    values = {"data": data, "holdout_views": [HELD_OUT], "center_rotation": cube, "crop": cube, **sections}
    return Experiment.model_validate({"ingest": {"frame_jump": 5}, **values})


@pytest.fixture
def make_project(finish: Callable[..., Any], write_group: Callable[..., None]) -> Callable[[Path, Experiment], Project]:
    """Makes a project as the earlier stages leave it: its photographs are renderings of the ball, cut at alpha 0.5."""

    def made(folder: Path, settings: Experiment) -> Project:
        k, poses = cameras()
        sizes = {"T": T, "C": C, "h": SIDE, "w": SIDE, "S": 1, "n": 16}
        named = {"camera_names": ["left", "right", "top"], "fps": 20.0, "image_downsample": 1}
        whole = {"full_width": WIDTH, "full_height": HEIGHT, "frame_jump": 5, "unit_m": DISTANCE_M}
        origin = np.array([(WIDTH - SIDE) // 2, (HEIGHT - SIDE) // 2])
        window = k.copy()
        window[:, :2, 2] -= origin
        views = torch.tensor(poses).float(), torch.tensor(window).float(), SIDE, SIDE
        rgb, alpha = Ball().render(make_ball().to_world(torch.zeros(3), torch.tensor(0.3)), *views)
        mask = np.tile(alpha.numpy() > 0.5, (T, 1, 1, 1))
        mask[SPOILT, HELD_OUT, :, : SIDE // 2] = False
        images = {
            "rgb": np.rint(rgb.numpy() * 255),
            "mask": mask,
            "origin": origin,
            "intrinsics": k,
            "world_to_camera": poses,
        }
        tracking = {"principal_shift": 0, "centers": 0, "angles": 0.3, "valid": np.arange(T) != T - 1}
        written: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
            "center_rotation": ({}, tracking),
            "crop": ({"ell_m": 0.3, "grid_size": 16}, {"volume_idx": [[0, 16]] * 3}),
            "pack": (named | whole, images),
        }
        writers = {
            stage: partial(write_group, sizes=sizes, attributes=attributes, values=values)
            for stage, (attributes, values) in written.items()
        }
        project = Project.at(str(folder / "project"))
        finish(project, settings, {**writers, "train": lambda url: objects.write_json(urls.join(url, "best.json"), {})})
        return project

    return made


@pytest.fixture
def with_ball(monkeypatch: pytest.MonkeyPatch) -> None:
    def open_ball(run: Run, device: str) -> Predictor:
        return SplatterPredictor(open_reader(run, torch.device("cpu")), Ball(), 0)  # type: ignore[arg-type]

    monkeypatch.setattr("zoosplat_evaluate.stage.open_predictor", open_ball)


def rows_of(project: Project, name: str) -> list[dict[str, str]]:
    text = objects.read_bytes(urls.join(open_run(project).output_url("evaluate"), name)).decode()
    return list(csv.DictReader(io.StringIO(text)))


@pytest.mark.usefixtures("with_ball")
def test_evaluation_of_a_model_that_is_right_but_for_one_photograph(
    make_project: Callable[[Path, Experiment], Project], tmp_path: Path
) -> None:
    settings = experiment(tmp_path, evaluate={"gallery_frames": 2})
    project = make_project(tmp_path, settings)
    assert run_stage(STAGE, open_run(project))
    assert not run_stage(STAGE, open_run(project))

    masks = schema.array(groups.open_group(open_run(project).output_url("pack")), "mask")
    half = float(np.asarray(masks[SPOILT, HELD_OUT]).sum() / np.asarray(masks[0, HELD_OUT]).sum())
    assert 0.4 < half < 0.6
    # The test third is t = 8 .. 11, of which 11 is not valid.
    each = {(int(r["t"]), r["camera"]): r for r in rows_of(project, "frames_test.csv")}
    assert sorted(each) == [(t, name) for t in (8, 9, 10) for name in ("left", "right", "top")]
    for (t, name), row in each.items():
        spoilt = (t, name) == (SPOILT, "top")
        assert int(row["frame"]) == 5 * t
        assert float(row["iou"]) == pytest.approx(half if spoilt else 1, abs=1e-6)
        # The rendering goes on beyond the cut at alpha 0.5, so it is close, not equal.
        assert (float(row["ssim"]) > 0.96) != spoilt
    means = {r["camera"]: r for r in rows_of(project, "metrics_test.csv")}
    assert list(means) == ["left", "right", "top", "mean_observed", "mean_held_out"]
    assert [r["held_out"] for r in means.values()] == ["0", "0", "1", "0", "1"]
    assert {r["frames"] for r in means.values()} == {"3"}
    assert float(means["mean_held_out"]["iou"]) == pytest.approx((2 + half) / 3, abs=1e-5)
    for metric in METRICS:
        by_hand = np.mean([float(each[t, name][metric]) for t in (8, 9, 10) for name in ("left", "right")])
        assert float(means["mean_observed"][metric]) == pytest.approx(by_hand, rel=1e-4)

    mark = open_run(project).read_mark("evaluate")
    assert mark is not None
    assert mark["frames"] == 3
    assert mark["figures"]["held_out"]["iou"] == pytest.approx((2 + half) / 3, abs=1e-5)
    assert mark["figures"]["observed"]["iou"] == 1

    # The model's colours are right: correcting them changes little, but never for the worse over the split.
    for row in means.values():
        assert float(row["l1_corrected"]) <= float(row["l1"]) + 0.02
    assert mark["figures"]["held_out"]["psnr_corrected"] == pytest.approx(
        float(means["mean_held_out"]["psnr_corrected"]), abs=1e-3
    )

    url = open_run(project).output_url("evaluate")
    gallery = json.loads(objects.read_bytes(urls.join(url, "gallery.json")))["pictures"]
    assert [(p["camera"], p["t"], p["kind"]) for p in gallery[:3]] == [
        ("top", 9, "worst"),
        ("top", 8, "best"),
        ("top", 10, "even"),
    ]
    assert [p["held_out"] for p in gallery] == [True] * 3 + [False] * 6
    assert gallery[0]["iou"] == pytest.approx(half, abs=1e-6)
    for name in [*(p["file"] for p in gallery), "per_frame.png"]:
        picture = cv2.imdecode(np.frombuffer(objects.read_bytes(urls.join(url, name)), np.uint8), 1)
        assert picture is not None
        assert picture.shape == (500, 900, 3) if name == "per_frame.png" else (320, 968, 3)


@pytest.mark.usefixtures("with_ball")
def test_coarser_metrics_without_held_out_views(
    make_project: Callable[[Path, Experiment], Project], tmp_path: Path
) -> None:
    project = make_project(
        tmp_path, experiment(tmp_path, holdout_views=[], evaluate={"image_downsample": 2, "split": "valid"})
    )
    run_stage(STAGE, open_run(project))
    rows = rows_of(project, "metrics_valid.csv")
    assert [r["camera"] for r in rows] == ["left", "right", "top", "mean_observed"]
    assert all(r["frames"] == "4" and float(r["iou"]) > 0.9 for r in rows)
    mark = open_run(project).read_mark("evaluate")
    assert mark is not None
    assert set(mark["figures"]) == {"observed"}


@pytest.mark.usefixtures("with_ball")
def test_another_gallery_takes_the_metrics_that_were_measured(
    make_project: Callable[[Path, Experiment], Project], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = experiment(tmp_path, evaluate={"gallery_frames": 0})
    project = make_project(tmp_path, settings)
    first = open_run(project)
    run_stage(STAGE, first)
    measured = []
    monkeypatch.setattr(type(STAGE), "_measure", lambda *of: measured.append(of))
    larger = settings.model_copy(update={"evaluate": settings.evaluate.model_copy(update={"gallery_frames": 3})})
    second = record_run(draft_run(project, larger), ["evaluate"])
    assert run_stage(STAGE, second)
    assert not measured
    one, other = (
        [
            objects.read_bytes(urls.join(run.output_url("evaluate"), f"{name}_test.csv"))
            for name in ("frames", "metrics")
        ]
        for run in (first, second)
    )
    assert one == other
    galleries = [len(list(listing.list_files(urls.join(r.output_url("evaluate"), "gallery")))) for r in (first, second)]
    assert galleries[0] < galleries[1]


@pytest.mark.usefixtures("with_ball")
@pytest.mark.parametrize("most", [1, 2, 8])
def test_cameras_that_differ_in_colour(
    make_project: Callable[[Path, Experiment], Project], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    # The photographs of one camera are darker by a known map: the plain figures suffer, the corrected ones do not; also
    # where not all frames may be kept for the fit.
    monkeypatch.setattr(stage, "FIT_BYTES", 0)
    monkeypatch.setattr(stage, "MIN_FIT_FRAMES", most)
    rendered: list[int] = []
    gaussians = Predictor.gaussians
    monkeypatch.setattr(Predictor, "gaussians", lambda self, t: rendered.append(t) or gaussians(self, t))  # type: ignore[func-returns-value]
    project = make_project(tmp_path, experiment(tmp_path, evaluate={"gallery_frames": 0}))
    images = groups.open_group(open_run(project).output_url("pack"), write=True)
    rgb = schema.array(images, "rgb")
    values = np.asarray(rgb[...])
    values[:, 0] = np.rint(0.5 * values[:, 0])
    rgb[...] = values
    run_stage(STAGE, open_run(project))
    assert sorted(rendered[:3]) == [8, 9, 10]  # each frame once, then the gallery's
    rows = rows_of(project, "metrics_test.csv")
    means = {r["camera"]: {k: float(v) for k, v in r.items() if k != "camera"} for r in rows}
    assert means["left"]["l1"] > 3 * means["right"]["l1"]
    assert means["left"]["l1_corrected"] < 0.5 * means["left"]["l1"]  # the rest: white that was darkened too, at edges
    assert means["left"]["psnr_corrected"] > means["left"]["psnr"] + 3
    assert means["right"]["l1_corrected"] == pytest.approx(means["right"]["l1"], rel=0.1)


@pytest.mark.usefixtures("with_ball")
@pytest.mark.parametrize("held_out_seen", [True, False])
def test_absent_views_are_not_measured(
    make_project: Callable[[Path, Experiment], Project], tmp_path: Path, held_out_seen: bool
) -> None:
    """Of the frames 8, 9 and 10 of the test split, camera left has two, and the held-out camera top two or none."""
    project = make_project(tmp_path, experiment(tmp_path, evaluate={"gallery_frames": 1}))
    images = groups.open_group(open_run(project).output_url("pack"), write=True)
    seen = np.ones((T, C), bool)
    seen[10, 0] = seen[SPOILT, HELD_OUT] = False
    if not held_out_seen:
        seen[:, HELD_OUT] = False
    rgb, mask = schema.read(images, "rgb"), schema.read(images, "mask")
    rgb[~seen], mask[~seen] = 0, True
    schema.write_block(images, "rgb", 0, rgb)
    schema.write_block(images, "mask", 0, mask)
    schema.add_seen(images, seen)
    run_stage(STAGE, open_run(project))

    means = {r["camera"]: r for r in rows_of(project, "metrics_test.csv")}
    n = 1 if held_out_seen else 3
    assert {name: int(r["absent"]) for name, r in means.items()} == {
        "left": 1, "right": 0, "top": n, "mean_observed": 1, "mean_held_out": n,
    }  # fmt: skip
    assert {r["frames"] for r in means.values()} == {"3"}
    # The photographs that are there are renderings, so all that is measured is good, also with fitted colours.
    for name in ("left", "right", "mean_observed", *(("top", "mean_held_out") if held_out_seen else ())):
        assert float(means[name]["iou"]) == 1
        assert float(means[name]["psnr"]) > 30
        assert float(means[name]["psnr_corrected"]) > 30
    for row in rows_of(project, "frames_test.csv"):
        c = ["left", "right", "top"].index(row["camera"])
        assert all((row[metric] != "") == seen[int(row["t"]), c] for metric in METRICS)
    mark = open_run(project).read_mark("evaluate")
    assert mark is not None
    assert (mark["figures"]["held_out"]["iou"] == 1) if held_out_seen else (mark["figures"]["held_out"]["iou"] is None)
    url = urls.join(open_run(project).output_url("evaluate"), "gallery.json")
    shown = {(p["t"], p["camera"]) for p in json.loads(objects.read_bytes(url))["pictures"]}
    assert shown
    assert all(seen[t, ["left", "right", "top"].index(name)] for t, name in shown)


@pytest.mark.parametrize(
    ("settings", "valid", "message"),
    [
        ({"split": "test"}, False, r"evaluate.split = test: no frame"),
        ({"image_downsample": 9}, True, r"evaluate.image_downsample = 9: images of 64 x 48 px"),
    ],
)
def test_what_cannot_be_evaluated(
    make_project: Callable[[Path, Experiment], Project],
    tmp_path: Path,
    settings: dict[str, Any],
    valid: bool,
    message: str,
) -> None:
    project = make_project(tmp_path, experiment(tmp_path, evaluate=settings))
    tracking = groups.open_group(open_run(project).output_url("center_rotation"), write=True)
    schema.array(tracking, "valid")[...] = valid
    with pytest.raises(UserError, match=message):
        run_stage(STAGE, open_run(project))


def test_means_leave_out_what_is_not_defined() -> None:
    nan = math.nan
    values = np.array([[[1.0, 2], [3, nan]], [[nan, 4], [5, nan]]])  # 2 frames, 2 cameras, 2 metrics
    means = ops.camera_means(values)
    np.testing.assert_array_equal(means, [[1, 3], [4, nan]])
    np.testing.assert_array_equal(ops.group_means(means, [0, 1]), [2.5, 3])
    np.testing.assert_array_equal(ops.group_means(means, [1]), [4, nan])
    np.testing.assert_array_equal(ops.frame_means(values[..., 0], [0, 1]), [2, 5])
    np.testing.assert_array_equal(ops.frame_means(values[..., 1], [1]), [nan, nan])


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (0, [(3, "worst"), (1, "best")]),
        (1, [(3, "worst"), (1, "best"), (2, "even")]),
        (3, [(3, "worst"), (1, "best"), (0, "even"), (2, "even"), (4, "even")]),
        (9, [(3, "worst"), (1, "best"), (0, "even"), (2, "even"), (4, "even")]),
    ],
)
def test_choice_of_frames(count: int, expected: list[tuple[int, str]]) -> None:
    assert ops.choose_frames(np.array([0.5, 0.9, 0.6, 0.1, 0.5]), count) == expected


def test_frames_without_a_judged_view_are_not_chosen_as_best_or_worst() -> None:
    assert ops.choose_frames(np.array([math.nan, 0.5, 0.4, math.nan]), 0) == [(2, "worst"), (1, "best")]


def test_one_frame_is_shown_once() -> None:
    assert ops.choose_frames(np.array([0.5]), 4) == [(0, "worst")]


def test_comparison_shows_the_animal_large_and_the_error_dark() -> None:
    # An animal of 10 x 10 px, so the square is 12 px wide: 320 / 12 px a pixel. Truth red, rendering with 0.5 in green.
    mask = np.zeros((40, 50), dtype=bool)
    mask[20:30, 5:15] = True
    truth = np.where(mask[..., None], [1.0, 0.0, 0.0], 1.0)
    rgb = np.where(mask[..., None], [1.0, 0.5, 0.0], 1.0)
    assert square_around(mask) == (4, 19, 16, 31)
    picture = draw_comparison(rgb, mask * 1.0, truth, mask)
    left, middle, right = picture[160, 160], picture[160, 324 + 160], picture[160, 648 + 160]
    assert left.tolist() == [255, 0, 0]
    assert middle.tolist() == [255, 128, 0]
    # The mean error is 1/6, a third of the way from white to black: orange. Outside the animal: white.
    assert right[0] == 255
    assert 128 < right[1] < 255
    assert right[2] == 0
    for x in (5, 324 + 5, 648 + 5):
        assert picture[5, x].tolist() == [255, 255, 255]
    inside = np.flatnonzero((picture[160, :320] == [255, 0, 0]).all(-1))
    assert abs(len(inside) - 320 * 10 / 12) < 320 / 12 + 2


def test_nothing_seen_shows_the_window() -> None:
    assert square_around(np.zeros((40, 50), dtype=bool)) == (0, 0, 50, 40)


# -- metrics on raw pictures --------------------------------------------------------------------------------------
@pytest.mark.usefixtures("with_ball")
def test_raw_metrics_do_not_know_the_masks(make_project: Callable[[Path, Experiment], Project], tmp_path: Path) -> None:
    """Photographs are the renderings over lit plates, so nothing is wrong with any of them, though a mask is."""
    project = make_project(tmp_path, experiment(tmp_path, evaluate={"gallery_frames": 1}))
    images = groups.open_group(open_run(project).output_url("pack"), write=True)
    rng = np.random.default_rng(0)
    plate = rng.integers(40, 200, (C, HEIGHT, WIDTH, 3)).astype(np.uint8)
    light = np.array([1, 0, 0, 0], np.float32) + rng.uniform(-0.1, 0.1, (T, C, 3, 4)).astype(np.float32)
    schema.add_background(images, plate, light)
    k, poses = cameras()
    origin = schema.read(images, "origin")[0]
    k[:, :2, 2] -= origin
    views = torch.tensor(poses).float(), torch.tensor(k).float(), SIDE, SIDE
    rgb, alpha = Ball().render(make_ball().to_world(torch.zeros(3), torch.tensor(0.3)), *views)
    photos = np.empty((T, C, SIDE, SIDE, 3), np.uint8)
    for t, c in np.ndindex(T, C):
        x, y = origin[c]
        behind = lit_plate(plate[c, y : y + SIDE, x : x + SIDE], light[t, c], origin[c], (WIDTH, HEIGHT)) / 255
        photos[t, c] = np.rint(255 * (rgb[c].numpy() - (1 - alpha[c, ..., None].numpy()) * (1 - behind)))
    # One photograph is darker than the rendering by 0.2. The judged window of 0.3 m is 44 px wide and high.
    photos[8, 0] = np.maximum(photos[8, 0], 51) - 51
    schema.array(images, "rgb")[...] = photos
    run_stage(STAGE, open_run(project))
    each = {(int(r["t"]), r["camera"]): r for r in rows_of(project, "frames_test.csv")}
    assert list(each[8, "top"])[-4:] == ["foreground_psnr", "raw_l1", "raw_psnr", "raw_ssim"]
    for place, row in each.items():
        if place == (8, "left"):
            error = 0.2**2 * SIDE**2 / 44**2
            assert float(row["raw_psnr"]) == pytest.approx(-10 * math.log10(error), abs=0.1)
            continue
        assert float(row["raw_psnr"]) > 50  # but for rounding to 1 / 255
        assert float(row["raw_l1"]) < 1 / 255
        assert float(row["raw_ssim"]) > 0.999
    assert float(each[SPOILT, "top"]["iou"]) < 0.6
    assert float(each[SPOILT, "top"]["psnr"]) < 20
    means = {r["camera"]: r for r in rows_of(project, "metrics_test.csv")}
    mark = open_run(project).read_mark("evaluate")
    assert mark is not None
    assert mark["figures"]["held_out"]["raw_psnr"] == pytest.approx(float(means["mean_held_out"]["raw_psnr"]), abs=1e-3)
    assert mark["figures"]["held_out"]["raw_psnr"] > 50
    url = open_run(project).output_url("evaluate")
    for shown in json.loads(objects.read_bytes(urls.join(url, "gallery.json")))["pictures"]:
        data = np.frombuffer(objects.read_bytes(urls.join(url, shown["raw_file"])), np.uint8)
        truth, rendered = split_comparison(np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR_RGB)))
        assert truth.shape == (320, 320, 3)
        difference = np.abs(truth.astype(int) - rendered).max()
        assert difference > 40 if (shown["t"], shown["camera"]) == (8, "left") else difference <= 2


@pytest.mark.usefixtures("with_ball")
def test_lpips_of_the_judged_window(make_project: Callable[[Path, Experiment], Project], tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights = str(tmp_path / "alex.pth")
    torch.save(Lpips(ALEXNET).state_dict(), weights)
    project = make_project(tmp_path, experiment(tmp_path, evaluate={"gallery_frames": 0, "lpips_weights": weights}))
    run_stage(STAGE, open_run(project))
    rows = rows_of(project, "frames_test.csv")
    assert "raw_lpips" not in rows[0]
    each = {(int(r["t"]), r["camera"]): abs(float(r["lpips"])) for r in rows}
    assert each[SPOILT, "top"] > 2 * max(value for place, value in each.items() if place != (SPOILT, "top"))


@pytest.mark.usefixtures("with_ball")
def test_without_plates_there_are_no_raw_metrics(
    make_project: Callable[[Path, Experiment], Project], tmp_path: Path
) -> None:
    project = make_project(tmp_path, experiment(tmp_path, evaluate={"gallery_frames": 0}))
    run_stage(STAGE, open_run(project))
    mark = open_run(project).read_mark("evaluate")
    assert mark is not None
    columns = [*rows_of(project, "frames_test.csv")[0], *mark["figures"]["observed"]]
    assert "psnr" in columns
    assert not [name for name in columns if name.startswith(("raw", "lpips"))]
