"""`zoosplat runs` and `zoosplat compare`, on runs whose results are made by hand."""

from __future__ import annotations

import base64
import functools
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import command_line
import cv2
import numpy as np
import pytest

from zoosplat.config.experiment import Experiment
from zoosplat.config.serialization import parse_yaml
from zoosplat.errors import UserError
from zoosplat.formats import media
from zoosplat.stages.history import find_setting_changes, flatten_settings, read_history
from zoosplat.stages.projects import Project
from zoosplat.stages.runs import Run
from zoosplat.storage import leases, objects, urls
from zoosplat_flows.commands.compare import compare_runs
from zoosplat_flows.report.comparison import compare_metrics, picture_pairs, remarks

if TYPE_CHECKING:
    from tests.conftest import ByHand

CONFIG = """
name: mouse
data:
  directory: recording
  videos: [a.mp4, b.mp4, c.mp4]
  masks: [am.mp4, bm.mp4, cm.mp4]
  calibration: cameras.h5
holdout_views: [1]
center_rotation: {ell: 0.3}
crop: {ell: 0.2}
"""
SIDE = 32
COLOURS = (90, 90, 90), (220, 30, 30), (30, 30, 220)
TRUTH, RED, BLUE = (np.full((SIDE, SIDE, 3), colour, np.uint8) for colour in COLOURS)


call = functools.partial(command_line.call, columns=160)


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    return Experiment.from_yaml(CONFIG.replace("directory: ", f"directory: {tmp_path}/"))


def changed(experiment: Experiment, **changes: Any) -> Experiment:
    """With other values of keys, `__` for the dot."""
    for key, value in changes.items():
        section, _, leaf = key.partition("__")
        inner = getattr(experiment, section).model_copy(update={leaf: value}) if leaf else value
        experiment = experiment.model_copy(update={section: inner})
    return experiment


def evaluated(
    run: Run, by_hand: ByHand, render: media.Picture, frames: tuple[int, ...], iou: float, truth: media.Picture = TRUTH
) -> None:
    """An evaluation whose gallery shows cameras a (observed) and b (held out) in these kept frames."""
    for stage in ("ingest", "pack", "center_rotation", "crop", "train"):
        by_hand.mark(run, stage)
    url = run.output_url("evaluate")
    pictures = []
    for t in frames:
        for camera, held_out in (("b", True), ("a", False)):
            file = f"gallery/t{t}{camera}.png"
            shown = media.side_by_side([truth, render, np.zeros_like(truth)])
            objects.write_bytes(urls.join(url, file), media.encode_png(shown))
            entry = {"file": file, "t": t, "camera": camera, "held_out": held_out, "kind": "even"}
            pictures.append({**entry, "iou": iou, "psnr": 20.0})
    objects.write_json(urls.join(url, "gallery.json"), {"split": "test", "pictures": pictures})
    means: dict[str, dict[str, float | None]]
    means = {"held_out": {"iou": iou, "psnr": 20.5, "ssim": None}, "observed": {"iou": iou + 0.1, "psnr": 25.0}}
    if run.experiment.data.backgrounds is not None:
        means["held_out"]["raw_psnr"] = 30 * iou
    by_hand.mark(run, "evaluate", figures=means)


# -- runs -----------------------------------------------------------------------------------------------------------
def test_differences_name_what_changed() -> None:
    before = flatten_settings({"a": {"b": 1, "c": [1, 2]}, "d": "x", "gone": {"e": None}})
    now = flatten_settings({"a": {"b": 2, "c": [1, 3]}, "d": "", "new": [1]})
    assert find_setting_changes(before, before) == []
    assert find_setting_changes(before, now) == [
        ("a.b", "1", "2"),
        ("a.c[1]", "2", "3"),
        ("d", "x", '""'),
        ("new", "null", "[1]"),
    ]


def test_keys_that_are_newer_than_a_run_are_no_changes(tmp_path: Path, experiment: Experiment, by_hand: ByHand) -> None:
    folder = tmp_path / "project"
    first = by_hand.begin(folder, experiment)
    config = Path(first.path("config.yaml"))
    older = parse_yaml(config.read_text())
    del older["segment"], older["data"]["backgrounds"], older["train"]["plate_lambda"]
    config.write_text(json.dumps(older))
    by_hand.begin(folder, changed(experiment, segment__rounds=3, train__epochs=7))
    changes = [f"train.epochs {experiment.train.epochs} -> 7", "segment.rounds 2 -> 3"]
    assert sorted(read_history(Project.at(str(folder)))[1].changes or ()) == sorted(changes)


def test_the_runs_of_a_project_in_order(tmp_path: Path, experiment: Experiment, by_hand: ByHand) -> None:
    folder = tmp_path / "project"
    other = changed(experiment, train__epochs=7, name="three")
    first = by_hand.begin(folder, experiment)
    evaluated(first, by_hand, RED, (4,), 0.5)
    second = by_hand.begin(folder, other)
    by_hand.begin(folder, other, state="done")
    by_hand.mark(second, "ingest")
    (tmp_path / "recording" / "bm.mp4").write_text("mended")
    by_hand.begin(folder, other, "ingest", state="failed", until="crop")
    project = Project.at(str(folder))
    mended = f"data.masks[1]: other contents of {tmp_path}/recording/bm.mp4"
    assert [entry.changes for entry in read_history(project)] == [
        None,
        ["name mouse -> three", f"train.epochs {experiment.train.epochs} -> 7"],
        [],
        ["ingest: made again", mended],
    ]
    status, out, _ = call("runs", project.url)
    assert status == 0
    for text in ("0.500", "20.50 dB", "0.600", "25.00 dB", "the same", "three", mended.split()[0]):
        assert text in out, out
    assert out.index("mouse -> three") < out.index("the same") < out.index("other contents")
    with leases.locked(second.path("lease"), lambda: None):
        assert [entry.state for entry in read_history(project)] == [
            "begun",
            "running",
            "done",
            "failed (ingest to crop)",
        ]
    # In a narrow terminal the columns are lines of a word or two, and none is lost.
    narrow = call("runs", project.url, columns=70)[1]
    assert all(run_id in narrow for run_id in project.run_ids())
    assert "-> 7" in " ".join(narrow.split())


def test_a_damaged_record_does_not_hide_the_others(tmp_path: Path, experiment: Experiment, by_hand: ByHand) -> None:
    project = Project.at(str(tmp_path / "project"))
    damaged = by_hand.begin(Path(project.url), experiment)
    by_hand.begin(Path(project.url), experiment)
    Path(damaged.path("run.json")).write_text("{")
    Path(project.path("runs", "notes")).mkdir()
    states = {entry.id: entry.state for entry in read_history(project)}
    assert len(states) == 2
    assert "run.json: is damaged" in states[damaged.id]


# -- compare --------------------------------------------------------------------------------------------------------
def test_compare_shows_truth_and_both_renders(tmp_path: Path, experiment: Experiment, by_hand: ByHand) -> None:
    folder = tmp_path / "project"
    first = by_hand.begin(folder, experiment)
    evaluated(first, by_hand, RED, (4, 5, 9), 0.5)
    second = by_hand.begin(folder, changed(experiment, train__epochs=7))
    evaluated(second, by_hand, BLUE, (2, 4, 9), 0.625)
    status, out, err = call("compare", first.project.url, first.id, second.id)
    assert (status, err) == (0, "")
    assert re.search(rf"train\.epochs +{experiment.train.epochs} +7", out)
    assert re.search(r"held-out views, IoU +0\.5000 +0\.6250 +\+0\.1250", out)
    assert out.index("held-out views") < out.index("observed views")
    page = Path(second.path(f"compare-{first.id}.html"))
    assert out.splitlines()[-1] == str(page)
    html = page.read_text()
    links = re.findall(r'(?:src|href)="([^"]*)"', html)
    assert all(link.startswith("data:image/jpeg") for link in links)
    assert "url(" not in html
    titles = re.findall(r"<h3>(.*?)</h3>", html)
    assert [title[:30] for title in titles] == [f"camera {c}, frame {t} of the video" for c in "ba" for t in (4, 9)]
    assert ["held out" in title for title in titles] == [True, True, False, False]
    colours = []
    for link in links[:3]:
        data = np.frombuffer(base64.b64decode(link.partition(",")[2]), np.uint8)
        picture = cv2.imdecode(data, cv2.IMREAD_COLOR_RGB)
        assert picture is not None
        assert picture.shape == (SIDE, SIDE, 3)
        colours.append(picture.reshape(-1, 3).mean(axis=0))
    np.testing.assert_allclose(colours, [TRUTH[0, 0], RED[0, 0], BLUE[0, 0]], atol=4)
    assert len(links) == 12


def test_frames_of_different_jumps_meet_by_the_video_and_other_cuts_are_shown(
    tmp_path: Path, experiment: Experiment, by_hand: ByHand
) -> None:
    folder = tmp_path / "project"
    first = by_hand.begin(folder, experiment)
    evaluated(first, by_hand, RED, (4, 5), 0.5)
    second = by_hand.begin(folder, changed(experiment, ingest__frame_jump=2))
    evaluated(second, by_hand, BLUE, (2, 4), 0.5, truth=TRUTH + 9)
    found = picture_pairs(first, second)
    assert [(pair.camera, pair.frame) for pair in found] == [("b", 4), ("a", 4)]
    names = [name for name, _ in found[0].panels]
    assert names == ["truth", f"run {first.id}", f"truth, as run {second.id} shows it", f"run {second.id}"]
    _, _, err = call("compare", first.project.url, first.id, second.id)
    assert "the two are of different frames or masks" in err


def test_raw_metrics_of_runs_with_other_masks(tmp_path: Path, experiment: Experiment, by_hand: ByHand) -> None:
    folder = tmp_path / "project"
    with_plates = changed(experiment, data__backgrounds=("a.png", "b.png", "c.png"))
    runs = [by_hand.begin(folder, e) for e in (with_plates, experiment, changed(with_plates, ingest__frame_jump=2))]
    for run, iou in zip(runs, (0.5, 0.6, 0.7), strict=True):
        evaluated(run, by_hand, RED, (4,), iou)
    title = "held-out views, raw PSNR (dB)"
    assert (title, 15.0, None) in compare_metrics(*runs[:2])
    assert ("held-out views, IoU", 0.5, 0.6) in compare_metrics(*runs[:2])
    assert (title, 15.0, 21.0) in compare_metrics(runs[0], runs[2])
    note = "raw metrics judge both by the same pictures; the others take the masks of each for the truth"
    assert note in remarks(runs[0], runs[2])
    assert note not in remarks(runs[1], runs[2])
    assert "raw PSNR" not in str(compare_metrics(runs[1], runs[1]))


def test_what_cannot_be_compared_is_said(tmp_path: Path, experiment: Experiment, by_hand: ByHand) -> None:
    folder = tmp_path / "project"
    first = by_hand.begin(folder, experiment)
    evaluated(first, by_hand, RED, (4,), 0.5)
    second = by_hand.begin(folder, changed(experiment, evaluate__split="valid", train__epochs=2))
    status, out, err = call("compare", first.project.url, first.id, second.id)
    assert status == 0
    assert f"note: run {second.id} has no evaluation; run stage evaluate" in err
    assert "note: the first is evaluated on its test frames, the second on its valid frames" in err
    assert "no picture of the same frame and camera" in Path(out.splitlines()[-1]).read_text()
    with pytest.raises(UserError, match="compared with itself"):
        compare_runs(first, first)
    assert call("compare", first.project.url, first.id, "1999")[0] == 2
    evaluated(second, by_hand, BLUE, (4,), 0.5)
    Path(second.output_url("evaluate"), "gallery", "t4a.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"t4a\.png: is damaged; run stage evaluate with --force"):
        picture_pairs(first, second)
    (Path(second.output_url("evaluate")) / "gallery.json").write_text(json.dumps({"pictures": []}))
    assert picture_pairs(first, second) == []
