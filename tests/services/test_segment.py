"""Stage segment, and ingest that reads its masks: what they write, by whom it is read, and what is told."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import pytest

from zoosplat.config.experiment import Experiment
from zoosplat.errors import UserError
from zoosplat.recording import video
from zoosplat.stages import steps
from zoosplat.stages.begin import begin_run
from zoosplat.stages.contract import Context
from zoosplat.stages.projects import Project
from zoosplat.stages.runner import run_stage
from zoosplat.stages.runs import Run
from zoosplat.storage import groups, schema
from zoosplat_flows.report.page import build_report
from zoosplat_segment import stage as segment
from zoosplat_segment.reading import SEEK_FRAMES, InstantReader

if TYPE_CHECKING:
    from tests.conftest import Recording

STAGES = ("segment", "ingest", "center_rotation", "crop", "pack")
HELD_OUT = 3


def no_progress(done: int, total: int, message: str) -> None:
    return None


def configured(recording: Recording, **changes: Any) -> Experiment:
    settings = {"background_frames": 8, "adapt_minutes": 0, "device": "cpu"}
    raw = recording.config(data__masks="auto", segment=settings, holdout_views=[HELD_OUT], **changes)
    return Experiment.model_validate(raw)


@pytest.fixture(scope="module")
def run(recording: Recording, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The stages before the model on raw videos alone; every second frame is kept, and read at half the size."""
    experiment = configured(recording, ingest={"frame_jump": 2, "image_downsample": 2, "max_frames": 70})
    project = Project.at(str(tmp_path_factory.mktemp("segment")))
    with begin_run(project, experiment, list(STAGES), []) as begun:
        for name in STAGES:
            run_stage(importlib.import_module(f"zoosplat_{name}.stage").STAGE, begun, workers=2)
    return begun


def true_masks(recording: Recording, frames: list[int]) -> Any:
    """The recording's own mask videos, [n, C, H, W] bool."""
    cameras = []
    for c in range(4):
        info = video.probe(str(recording.folder / f"masks/{c}.mp4"), f"{c}")
        planes = [video.planes(f) for f in video.read_frames(info, 0, info.n_frames)]
        cameras.append([video.luma_mask(planes[i], 1) for i in frames])
    return np.array(cameras).swapaxes(0, 1)


def test_the_group_and_its_masks(run: Run, recording: Recording) -> None:
    group = run.open_input("segment")
    schema.validate(group, "segments.zarr", "")
    assert schema.array(group, "probability").shape == (70, 4, 80, 96)
    assert schema.array(group, "all_views").shape == (70, 1, 80, 96)
    assert schema.array(group, "plate").shape == (4, 80, 96, 3)
    frames = schema.read(group, "frame").tolist()
    assert frames == list(range(0, 140, 2))
    masks, truth = schema.read(group, "probability") >= 128, true_masks(recording, frames)
    iou = (masks & truth).sum(axis=(0, 2, 3)) / (masks | truth).sum(axis=(0, 2, 3))
    assert iou.min() > 0.5, iou
    assert schema.read(group, "seen").all()


def test_ingest_reads_the_masks_as_it_reads_mask_videos(run: Run) -> None:
    """Without distortion a working pixel is animal where half of its four are; OpenCV rounds halves up."""
    probability = schema.read(run.open_input("segment"), "probability")
    masks = run.open_input("ingest")
    shares = (probability >= 128).reshape(70, 4, 40, 2, 48, 2).mean(axis=(3, 5))
    np.testing.assert_array_equal(schema.read(masks, "mask"), shares >= 0.5)
    np.testing.assert_array_equal(schema.read_seen(masks), schema.read(run.open_input("segment"), "seen"))
    assert schema.read(run.open_input("center_rotation"), "valid").all()


def test_pack_has_the_background_of_stage_segment(run: Run) -> None:
    segments, images = run.open_input("segment"), run.open_input("pack")
    plates = schema.read(segments, "plate").reshape(4, 40, 2, 48, 2, 3).mean(axis=(2, 4))
    assert np.abs(schema.read(images, "plate") - plates).max() <= 0.5
    np.testing.assert_array_equal(schema.read(images, "light"), schema.read(segments, "light"))


def test_the_mark_tells_how_views_agree(run: Run) -> None:
    mark = run.read_mark("segment")
    assert mark is not None
    figures = mark["figures"]
    assert [len(quantiles) for quantiles in figures["agreement_quantiles"]] == [5] * 4
    assert figures["absent_share"] == [0.0] * 4
    assert figures["disagreeing_frames"] == 0
    assert mark["shards"] == 2
    weights = Path(run.result("segment").folder, "weights.safetensors")
    assert (run.result("segment").manifest() or {})["weights.safetensors"] == weights.stat().st_size


def test_the_report_shows_where_views_agree_least(run: Run) -> None:
    page = Path(build_report(run)).read_text()
    part = page[page.index('<section id="masks">') : page.index('<section id="tracking">')]
    assert part.count("all observed views together") == 3
    assert part.count("this camera alone") == 1
    assert "0 of 70" in part
    # Three views of each camera, in the order of the cameras.
    captions = re.findall(r"<figcaption><b>camera (\d), frame (\d+)</b>.*?agreement ([\d.]+)", part)
    agreement = schema.read(run.open_input("segment"), "agreement")
    known = [c for c in range(4) for _ in range(min(3, np.isfinite(agreement[:, c]).sum()))]
    assert [int(camera) for camera, _, _ in captions] == known
    assert part.count("data:image/jpeg;base64,") == len(known)
    for camera, frame, shown in captions:
        assert float(shown) == pytest.approx(agreement[int(frame) // 2, int(camera)], abs=5e-4)


def test_a_shard_made_again_has_the_same_bytes(run: Run) -> None:
    stage, ctx = segment.STAGE, Context(run, no_progress)
    folder = Path(run.output_url("segment"))
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    plan = steps.read_plan(stage, ctx)
    assert plan.bounds == (0, 64, 70)
    stage.run_shard(ctx, plan.shard(1), plan)
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_killed_after_a_shard_and_run_again(recording: Recording, tmp_path: Path) -> None:
    groups_made = {}
    for name in ("undisturbed", "killed"):
        with begin_run(Project.at(str(tmp_path / name)), configured(recording), ["segment"], []) as run:
            pass
        if name == "killed":
            command = [sys.executable, "-m", "zoosplat_segment", "--project", run.project.url]
            with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
                first = Path(run.result("segment").shard_mark_url(0, 3))
                deadline = time.monotonic() + 120
                while not first.exists() and time.monotonic() < deadline:
                    time.sleep(0.002)
                process.kill()
            kept = first.read_bytes()
        run_stage(segment.STAGE, run)
        folder = Path(run.result("segment").folder)
        groups_made[name] = {p.relative_to(folder): p.read_bytes() for p in folder.glob("*s.zarr/**/*") if p.is_file()}
    assert first.read_bytes() == kept
    assert groups_made["killed"] == groups_made["undisturbed"] != {}


def test_figures_and_warnings() -> None:
    nan = np.nan
    agreement = np.array([[0.9, 0.2, nan], [0.8, 0.5, nan], [0.7, 0.6, nan], [0.9, 0.1, nan]], np.float32)
    seen = np.array([[True, False, True], [True, True, True], [True, True, False], [True, False, True]])
    figures = segment._figures(agreement, seen, 0.3)
    assert figures["agreement_quantiles"][0] == pytest.approx([0.715, 0.775, 0.85, 0.9, 0.9], abs=1e-3)
    assert figures["agreement_quantiles"][2] is None
    assert figures["absent_share"] == [0, 0.5, 0.25]
    assert figures["disagreeing_frames"] == 2
    assert figures["least_agreeing"][:3] == [[3, 1], [0, 1], [1, 1]]
    assert len(figures["least_agreeing"]) == 8
    lines = list(segment._warnings(["a", "b", "c"], agreement, seen, 0.3))
    assert [line.partition(":")[0] for line in lines] == [
        "camera b",
        "camera b",
        "camera c",
        "views disagree in 2 of 4 frames, first at kept frame 0",
    ]
    assert "median IoU 0.35" in lines[0]
    assert "left out of 2 of 4 frames, first of kept frame 0" in lines[1]


def test_an_absent_view_is_no_empty_mask(recording: Recording, tmp_path: Path) -> None:
    """A view without the animal in all its frames is no fault of the masks where it is absent from them."""
    experiment = configured(recording, ingest={"max_frames": 4})
    with begin_run(Project.at(str(tmp_path)), experiment, ["segment", "ingest"], []) as run:
        run_stage(segment.STAGE, run)
        group = groups.open_group(run.output_url("segment"), write=True)
        probability, seen = schema.read(group, "probability"), schema.read(group, "seen")
        probability[:, 1], seen[:, 1], probability[2, 0] = 0, False, 0
        schema.write_block(group, "probability", 0, probability)
        schema.write_block(group, "seen", 0, seen)
        run_stage(importlib.import_module("zoosplat_ingest.stage").STAGE, run)
    mark = run.read_mark("ingest")
    assert mark is not None
    assert mark["warnings"] == ["camera 0: the mask is empty in 1 of 4 frames, first at kept frame 2"]
    assert mark["figures"]["absent_views"] == [0, 4, 0, 0]
    assert not schema.read_seen(run.open_input("ingest"))[:, 1].any()


# -- reading ------------------------------------------------------------------------------------------------------
def test_instants_are_those_asked_for(recording: Recording, tmp_path: Path, loop: Any) -> None:
    """Close ones in one pass and far ones by seeking; all cameras together."""
    source = recording.folder / "videos/0.mp4"
    loop(source, tmp_path / "long.mp4", 4)
    infos = [video.probe(str(tmp_path / "long.mp4"), "long"), video.probe(str(source), "short")]
    assert infos[0].n_frames == 4 * 144
    every = [video.planes(f).y.copy() for f in video.read_frames(infos[0], 0, infos[0].n_frames)]
    wanted = [0, 1, 7, 8 + SEEK_FRAMES, 500]
    read = [instant[0].y.copy() for instant in InstantReader(infos[:1], 1).read(wanted)]
    for y, frame in zip(read, wanted, strict=True):
        np.testing.assert_array_equal(y, every[frame])
    instants = list(InstantReader([infos[1]] * 2, 3).read(range(5, 8)))
    assert [len(instant) for instant in instants] == [2, 2, 2]
    for i, instant in enumerate(instants):
        np.testing.assert_array_equal(instant[1].y, every[15 + 3 * i])


# -- empty scenes -------------------------------------------------------------------------------------------------
def test_pictures_and_videos_of_the_empty_scene(recording: Recording, tmp_path: Path) -> None:
    folder = recording.copy(tmp_path / "recording")
    grey = np.full((80, 96, 3), 90, np.uint8)
    for c in range(3):
        assert cv2.imwrite(str(folder / f"{c}.png"), grey + c)
    names = ["0.png", "1.png", "2.png", "masks/3.mp4"]
    raw = recording.config(folder, data__masks="auto", data__backgrounds=names, ingest={"max_frames": 3})
    experiment = Experiment.model_validate({**raw, "segment": {"adapt_minutes": 0, "device": "cpu"}})
    with begin_run(Project.at(str(tmp_path / "project")), experiment, ["segment"], []) as run:
        run_stage(segment.STAGE, run)
    plate = schema.read(run.open_input("segment"), "plate").astype(int)
    for c in range(3):
        assert (plate[c] == 90 + c).all()
    sources = run.sources["segment"]
    read = {key for key in sources if key.startswith("data.backgrounds")}
    assert read == {f"data.backgrounds[{c}]" for c in range(4)}

    (folder / "1.png").unlink()
    assert cv2.imwrite(str(folder / "2.png"), grey[::2, ::2])
    with (
        pytest.raises(UserError) as caught,
        begin_run(Project.at(str(tmp_path / "other")), experiment, ["segment"], []),
    ):
        pass
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("data.backgrounds[1] = 1.png: no such file")
    assert lines[1].startswith("data.backgrounds[2] = 2.png: 48 x 40 pixels, but the videos have 96 x 80")


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"data__masks": "auto", "ingest__source": "dnerf", "train__method": "dynamic"},
            "data.masks = auto: the pict",
        ),
        ({"data__masks": "auto", "data__backgrounds": ["a.png"]}, "data.backgrounds: 1 entries for 4 videos"),
        ({"data__masks": "all"}, "data.masks = 'all': must be auto, or a list of files, one a camera"),
    ],
)
def test_contradictions_are_refused(recording: Recording, changes: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as caught:
        Experiment.from_raw(recording.config(**changes))
    assert str(caught.value).startswith(line)
