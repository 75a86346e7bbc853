"""The report page of small projects made by hand."""

from __future__ import annotations

import base64
import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import pytest
from pipelines import FILES_PIPELINE

from zoosplat.config.experiment import Experiment
from zoosplat.errors import UserError
from zoosplat.formats import media
from zoosplat.stages.lookup import open_run
from zoosplat.stages.projects import Project
from zoosplat.stages.results import DONE, MANIFEST
from zoosplat.stages.runs import Run
from zoosplat.storage import groups, listing, objects, schema, urls
from zoosplat_flows.execution.recorder import RunRecorder, StageEvent, keep_record
from zoosplat_flows.report import plots
from zoosplat_flows.report.page import build_report
from zoosplat_flows.report.pictures import draw_outline
from zoosplat_flows.report.refresh import ensure_report

if TYPE_CHECKING:
    from tests.conftest import ByHand

T, C, H, W, N = 8, 3, 24, 32, 48
CONFIG = """
name: "<b>mouse & co</b>"
data:
  directory: recording
  videos: [left.mp4, right.mp4, top.mp4]
  masks: [lm.mp4, rm.mp4, tm.mp4]
  camera_names: [left, right, top]
  calibration: cameras.h5
holdout_views: [1]
center_rotation: {ell: 0.3}
crop: {ell: 0.235, grid_size: 48}
"""


class Page(HTMLParser):
    """What a page loads, shows as pictures and says."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.pictures: list[str] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self.feed(html)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = dict(attrs)
        self.links += [v for k in ("src", "href", "xlink:href", "poster", "data") if (v := values.get(k))]
        if tag == "img":
            self.pictures.append(values["alt"] or "")

    def handle_data(self, data: str) -> None:
        self.words.append(data)


Mark = Callable[..., None]


@pytest.fixture
def mark(run: Run, by_hand: ByHand) -> Mark:
    """Marks a stage as done, 12.5 s after its begin, with the manifest of what the test has written."""

    def done(stage: str, **changes: Any) -> None:
        result = run.result(stage)
        files = {name: size for name, size in listing.manifest(result.folder).items() if "/" in name}
        objects.write_json(result.file(MANIFEST), files)
        times = {"finished": 1_000_012.5, "cpu_seconds": 20.0, "peak_memory_bytes": 300 << 20, "files": len(files)}
        by_hand.mark(run, stage, **times, **changes)

    return done


def _groups(run: Run, mark: Mark) -> None:
    attributes = {
        "camera_names": ["left", "right", "top"],
        "fps": 20.0,
        "frame_jump": 2,
        "n_video_frames": 16,
        "image_downsample": 2,
    }
    sizes = {"T": T, "C": C, "h": H, "w": W, "S": 1, "n": N}
    masks = schema.create(run.output_url("ingest"), "masks.zarr", sizes, 64, attributes)
    silhouette = np.zeros((T, C, H, W), bool)
    silhouette[:, :, 8:16, 10:20] = True
    box = np.tile(np.array([10, 8, 20, 16], np.int32), (T, C, 1))
    silhouette[:2, 1], box[:2, 1] = False, 0  # camera right sees nothing in two of eight frames
    schema.write_block(masks, "mask", 0, silhouette)
    schema.write_block(masks, "box", 0, box)
    tracking = schema.create(run.output_url("center_rotation"), "tracking.zarr", sizes, 64, {})
    # Three steps of 3-4-5 triangles of 5 cm each, then still: 15 cm.
    centers = np.zeros((T, 3))
    centers[:, :2] = np.minimum(np.arange(T), 3)[:, None] * [0.03, 0.04]
    schema.array(tracking, "centers")[...] = centers
    schema.array(tracking, "angles")[...] = np.full(T, 0.9)
    schema.array(tracking, "valid")[...] = np.arange(T) != 5
    schema.write_block(tracking, "n_voxels", 0, np.full(T, 700))
    crop = schema.create(run.output_url("crop"), "crop.zarr", sizes, 1, {"ell_m": 0.235})
    schema.array(crop, "marginals")[...] = np.arange(3 * N).reshape(3, N)
    schema.array(crop, "volume_idx")[...] = [[0, 32], [16, 48], [3, 19]]
    images = schema.create(run.output_url("pack"), "images.zarr", sizes, 64, attributes)
    schema.write_block(images, "rgb", 0, np.full((T, C, H, W, 3), 120, np.uint8))
    schema.write_block(images, "mask", 0, silhouette)
    for stage in ("ingest", "center_rotation", "crop", "pack"):
        mark(stage)


def _model(run: Run, mark: Mark) -> None:
    picture = np.full((16, 48, 3), 200, np.uint8)
    history = "epoch,step,train_loss,valid_loss,train_ssim_loss\n1,10,0.9,0.95,0\n2,20,0.5,,0\n"
    metrics = (
        "camera,held_out,frames,l1,iou,psnr,ssim\nleft,0,3,0.5,0.91,30.25,0.98\nright,1,3,0.6,0.8125,,0.9\n"
        "mean_observed,0,3,0.5,0.91,30.25,0.98\nmean_held_out,1,3,0.6,0.8125,28.5,0.9\n"
    )
    shared = {"t": 6, "kind": "best", "iou": 0.9, "psnr": 30.0}
    pictures = [
        {"file": "gallery/a.png", "camera": "left", "held_out": False, **shared},
        {"file": "gallery/b.png", "camera": "right", "held_out": True, **shared},
    ]
    files = {
        "model/history.csv": history.encode(),
        "model/preview.png": media.encode_png(picture),
        "evaluation/metrics_test.csv": metrics.encode(),
        "evaluation/frames_test.csv": b"frame,camera,held_out,iou,psnr,ssim\n12,left,0,0.9,30,\n12,right,1,0.8,28,\n",
        "evaluation/gallery.json": json.dumps({"split": "test", "pictures": pictures}).encode(),
        "evaluation/gallery/a.png": media.encode_png(picture),
        "evaluation/gallery/b.png": media.encode_png(picture),
        "renders/orbit.mp4": b"orbit film",
        "renders/sequence.mp4": b"sequence film",
        "renders/still_camera.png": media.encode_png(picture),
    }
    stage_of = {"model": "train", "evaluation": "evaluate", "renders": "render"}
    for name, data in files.items():
        folder, _, rest = name.partition("/")
        objects.write_bytes(urls.join(run.output_url(stage_of[folder]), rest), data)
    mark("train", figures={"seconds": 75.0, "peak_gpu_bytes": 2 << 30, "device": "cpu"})
    means = {"held_out": {"iou": 0.8125, "psnr": 28.5, "ssim": None}, "observed": {"iou": 0.91, "psnr": 30.25}}
    mark("evaluate", figures=means, warnings=["3 frames <skipped>"])
    mark("render")


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    return Experiment.from_yaml(CONFIG.replace("directory: ", f"directory: {tmp_path}/"))


@pytest.fixture
def run(tmp_path: Path, experiment: Experiment, by_hand: ByHand) -> Run:
    begun: Run = by_hand.begin(tmp_path / "project", experiment)
    return begun


def _build(run: Run) -> tuple[str, Page]:
    url = build_report(open_run(Project.at(run.project.url)))
    assert url == run.path("report", "index.html")
    html = Path(url).read_text()
    return html, Page(html)


def test_a_finished_project_is_shown_in_one_self_contained_page(run: Run, mark: Mark) -> None:
    _groups(run, mark)
    _model(run, mark)
    _embedding(run, mark)
    html, page = _build(run)
    assert all(link.startswith(("data:", "#")) for link in page.links)
    assert not re.findall(r"url\((?!#)", html)
    assert "<script" not in html
    assert "@import" not in html
    ids = set(re.findall(r'id="([^"]+)"', html))
    assert {link[1:] for link in page.links if link.startswith("#")} <= ids
    # Two of tracking, crop, training, evaluation over time; map, states and variance of the behaviour.
    assert page.tags.count("svg") == 8
    assert "has not finished" not in page.text
    # Names and warnings are text, not markup.
    assert "<b>mouse & co</b>" in page.text
    assert "3 frames <skipped>" in page.text
    assert run.experiment == Experiment.from_yaml(page.words[page.words.index("Configuration") + 1])


def test_the_figures_are_those_of_the_groups(run: Run, mark: Mark) -> None:
    _groups(run, mark)
    _, page = _build(run)
    for text in (
        "3, 1 of them held out",
        "8 kept of 16, 1 in 2",
        "20 frames per second: 0.8 s of behaviour",
        "animal in 100.0 % of frames, 9 px across",  # sqrt(10 * 8) = 8.9
        "animal in 75.0 % of frames",
        "1 of 8, interpolated",
        "0.15 m",
        "48 points an axis, 5.00 mm apart",  # 0.235 m / 47
        "32 x 32 x 16 points",
        "16.0 x 16.0 x 8.0 cm",
        "12.5 s",  # begin to end, although 20 s of work
        "300 MiB",
        run.result("crop").id,
        "numpy 2.1.0",
    ):
        assert text in page.text, text


def test_absent_views_are_counted(run: Run, mark: Mark) -> None:
    """Of a camera that is absent from two of eight frames, the masks there do not count as animal."""
    _groups(run, mark)
    _model(run, mark)
    assert "view absent from" not in _build(run)[1].text
    seen = np.ones((T, C), bool)
    seen[5:7, 0] = False
    schema.add_seen(groups.open_group(run.output_url("ingest"), write=True), seen)
    url = urls.join(run.output_url("evaluate"), "metrics_test.csv")
    table = "camera,held_out,frames,absent,iou\nleft,0,3,2,0.91\nright,1,3,0,0.8125\nmean_observed,0,3,2,0.91\n"
    objects.write_bytes(url, table.encode())
    mark("ingest")
    mark("evaluate")
    _, page = _build(run)
    assert page.text.count("view absent from") == 1
    assert "view absent from 2 of 8 frames" in page.text
    assert page.text.count("animal in 75.0 % of frames") == 2
    assert "absent views" in page.text
    objects.write_bytes(url, table.replace(",3,2,", ",3,0,").encode())
    mark("evaluate")
    assert "absent views" not in _build(run)[1].text


def _embedding(run: Run, mark: Mark) -> None:
    attributes = {
        "encoder": "gaussians",
        "descriptor": 1020,
        "training_frames": 2,
        "explained_variance": [0.6, 0.3, 0.0],
        "heading_removal": 10.0,
        "heading_r2": [0.41, 0.01],
    }
    sizes = {"T": T, "E": 3, "k": 2}
    group = schema.create(run.output_url("embedding"), "embedding.zarr", sizes, T, attributes)
    valid = np.arange(T) != 5
    values: dict[str, Any] = {
        "embedding": np.where(valid[:, None], np.ones((T, 3)), np.nan),
        "map": np.where(valid[:, None], np.arange(2 * T).reshape(T, 2), np.nan),
        "neighbours": np.where(valid[:, None], [[7, -1]], -1),
        "state": np.array([0, 0, 0, 1, 1, -1, 0, 0]),
        "valid": valid,
        "time": np.arange(T) / 10,
        "speed": np.full(T, 0.1),
        "height": np.linspace(0.03, 0.1, T),
    }
    for key, array in values.items():
        schema.array(group, key)[...] = array
    mark("embedding")


def test_behaviour(run: Run, mark: Mark) -> None:
    _groups(run, mark)
    _embedding(run, mark)
    _, page = _build(run)
    for text in (
        "gaussians, 1020 numbers a frame",
        "90.0 % of their variance",
        "0.41 before, 0.01 after its removal (weight 10)",
        "state 0 : 71 % of the time, 2 bouts, median 0.25 s; here 0.00 to 0.20 s",
        "state 1 : 29 % of the time, 1 bout, median 0.20 s; here 0.30 to 0.40 s",
        "0.00 s , then 0.70 s",
    ):
        assert text in page.text, page.text[page.text.index("Behaviour") :]
    assert "frame at 0.10 s and those most like it" in page.pictures
    assert "frame at 0.50 s and those most like it" not in page.pictures


def test_held_out_views_come_first(run: Run, mark: Mark) -> None:
    _groups(run, mark)
    _model(run, mark)
    _, page = _build(run)
    gallery = [alt for alt in page.pictures if "render and error" in alt]
    assert gallery == [
        "truth, render and error of camera right in frame 6",
        "truth, render and error of camera left in frame 6",
    ]
    table = page.text[page.text.index("test frames") :]
    order = [table.index(name) for name in ("mean held out", "mean observed", "right", "left")]
    assert order == sorted(order)
    assert "0.812 IoU, held-out views 28.5 dB PSNR, held-out views 0.910 IoU, observed views 30.2 dB" in page.text
    assert "1 min 15 s" in page.text
    assert "300 MiB, GPU 2.00 GiB" in page.text
    films = [link for link in page.links if link.startswith("data:video/mp4")]
    assert [base64.b64decode(film.partition(",")[2]) for film in films] == [b"orbit film", b"sequence film"]


def test_raw_metrics_are_shown_where_there_are_some(run: Run, mark: Mark) -> None:
    _groups(run, mark)
    _model(run, mark)
    _, page = _build(run)
    assert "raw PSNR" not in page.text
    assert "Raw metrics" not in page.text
    url = urls.join(run.output_url("evaluate"), "metrics_test.csv")
    table = "camera,held_out,frames,iou,raw_l1,raw_psnr,raw_ssim,raw_lpips,foreground_psnr\n"
    objects.write_bytes(url, f"{table}right,1,3,0.8,0.05,21.5,0.7,0.2,17.25\n".encode())
    objects.write_bytes(
        urls.join(run.output_url("evaluate"), "frames_test.csv"),
        b"frame,camera,held_out,iou,psnr,ssim,raw_psnr\n12,right,1,0.8,28,,21.5\n",
    )
    url = urls.join(run.output_url("evaluate"), "gallery.json")
    gallery = json.loads(objects.read_bytes(url))
    gallery["pictures"][0]["raw_file"] = "gallery/b.png"
    objects.write_json(url, gallery)
    mark("evaluate", figures={"held_out": {"iou": 0.8, "raw_psnr": 21.5}})
    _, page = _build(run)
    assert "21.5 dB raw PSNR, held-out views" in page.text
    labels = ("raw L1", "raw PSNR (dB)", "raw SSIM", "raw LPIPS", "foreground PSNR (dB)")
    text = page.text[page.text.index("Raw metrics lay the rendering over the camera's plate") :]
    assert all(label in text for label in labels)
    assert "21.500" in text
    over = [alt for alt in page.pictures if alt.startswith("the same over the background")]
    assert over == ["the same over the background, of camera left in frame 6"]


def test_a_project_without_results_says_what_is_missing(run: Run) -> None:
    _, page = _build(run)
    for spec in FILES_PIPELINE:
        if spec.name not in ("pack", "features"):  # shown by what is made of them
            assert f"Stage {spec.name} has not finished." in page.text
    assert "No stage has finished." in page.text


def test_without_images_the_silhouettes_are_shown(run: Run, mark: Mark) -> None:
    _groups(run, mark)
    Path(run.result("pack").file(DONE)).unlink()
    shutil.rmtree(run.output_url("pack"))
    _, page = _build(run)
    assert "not packed yet" in page.text
    assert sum("outline of its mask" in alt for alt in page.pictures) == C


# What is lost of each stage's result, and the part of the page that it costs.
LOST = {
    "ingest": ("masks.zarr/mask/c/0/0/0/0", "recording"),
    "center_rotation": ("tracking.zarr/centers/c/0/0", "tracking"),
    "crop": ("crop.zarr/marginals/zarr.json", "crop"),
    "train": ("model/history.csv", "training"),
    "evaluate": ("evaluation/gallery/b.png", "evaluation"),
    "render": ("renders/orbit.mp4", "renders"),
    "embedding": ("embedding.zarr/map/c/0/0", "behaviour"),
}


@pytest.mark.parametrize("how", ["absent", "truncated"])
@pytest.mark.parametrize("stage", LOST)
def test_a_file_that_is_lost_costs_only_its_own_part(run: Run, mark: Mark, stage: str, how: str) -> None:
    _groups(run, mark)
    _model(run, mark)
    _embedding(run, mark)
    name, part = LOST[stage]
    path = Path(run.result(stage).file(name))
    if how == "absent":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-3])
    html, page = _build(run)
    assert f"Stage {stage} is marked as done, but its output cannot be read" in page.text
    assert name in page.text
    assert html.count('<p class="missing">Stage') == 1
    assert f'<section id="{part}">' in html


def test_without_a_manifest_whatever_a_damaged_group_leads_to_costs_only_its_part(run: Run, mark: Mark) -> None:
    """As after `zoosplat upgrade`; a map with fewer rows than the recording has frames."""
    _groups(run, mark)
    _embedding(run, mark)
    for stage in ("embedding", "ingest"):
        Path(run.result(stage).file(MANIFEST)).unlink()
    schema.array(groups.open_group(run.output_url("embedding"), write=True), "map").resize((3, 2))
    _, page = _build(run)
    assert "Stage embedding is marked as done, but its output cannot be read: IndexError" in page.text
    assert "1 of 8, interpolated" in page.text
    data = run.experiment.data
    fewer = {key: getattr(data, key)[:2] for key in ("videos", "masks", "camera_names")}
    short = run.experiment.model_copy(update={"data": data.model_copy(update=fewer), "holdout_views": ()})
    Path(run.path("config.yaml")).write_text(short.to_yaml())
    _, page = _build(run)
    assert "Stage ingest is marked as done, but its output cannot be read" in page.text
    assert "1 of 8, interpolated" in page.text


def test_a_damaged_mark_costs_only_its_part(run: Run, mark: Mark) -> None:
    _groups(run, mark)
    Path(run.result("crop").file(DONE)).write_text('{"id": ')
    _, page = _build(run)
    assert f"What stage crop has made cannot be read: {run.result('crop').file(DONE)}: is damaged" in page.text
    assert "1 of 8, interpolated" in page.text


def test_damaged_images_leave_the_silhouettes_and_say_so(run: Run, mark: Mark) -> None:
    _groups(run, mark)
    Path(run.result("pack").file("images.zarr/rgb/c/0/0/0/0/0")).unlink()
    _, page = _build(run)
    assert "images.zarr/rgb/c/0/0/0/0/0 is missing" in page.text
    assert sum("outline of its mask" in alt for alt in page.pictures) == C


def test_the_first_screen_says_how_the_run_ended(run: Run, mark: Mark) -> None:
    _groups(run, mark)
    mark("crop", warnings=["the animal is <large>"])
    recorder = RunRecorder(run)
    recorder.start(["crop", "train"])
    recorder(StageEvent("crop", "done"))
    recorder(StageEvent("train", "failed", message="train.lr: <too much>"))
    recorder.end("failed")
    _, page = _build(run)
    first = page.text[: page.text.index("3, 1 of them held out")]
    assert f"run {run.id} · failed (crop to train)" in first
    assert "Failed train train.lr: <too much>" in first
    assert "Warnings crop the animal is <large>" in first
    mark("train")  # made since, by another run
    assert "too much" not in _build(run)[1].text


def test_a_report_is_built_again_when_there_is_more_to_show_or_it_is_gone(run: Run, mark: Mark) -> None:
    _groups(run, mark)
    page = Path(run.path("report", "index.html"))

    def made() -> list[str]:
        events: list[StageEvent] = []
        with keep_record(run, ["crop"]) as recorder:
            ensure_report(open_run(Project.at(run.project.url)), recorder, events.append)
        return [event.state for event in events]

    assert made() == ["started", "done"]
    written = page.stat().st_mtime_ns
    assert "· done (crop)" in Page(page.read_text()).text
    assert made() == ["started", "skipped"]
    assert page.stat().st_mtime_ns == written
    page.unlink()
    assert made() == ["started", "done"]
    _embedding(run, mark)
    assert made() == ["started", "done"]


def test_no_project_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no run"):
        build_report(open_run(Project.at(str(tmp_path))))


def test_the_outline_surrounds_the_mask() -> None:
    mask = np.zeros((240, 480), bool)
    mask[100:140, 200:300] = True
    picture = draw_outline(np.full((240, 480, 3), 200, np.uint8), mask)
    painted = (picture != 200).any(axis=2)
    edge = mask & (cv2.erode(mask.astype(np.uint8), np.ones((3, 3), np.uint8)) == 0)
    assert painted[edge].all()
    near = cv2.dilate(edge.astype(np.uint8), np.ones((5, 5), np.uint8)) > 0
    assert not painted[~near].any()


def test_long_recordings_stay_small_plots() -> None:
    n = 100_000
    time_s = np.arange(n) / 100
    centers = np.stack([np.cos(time_s), np.sin(time_s), 0 * time_s], 1)
    valid = np.ones(n, bool)
    svg = plots.plot_tracking(time_s, centers, time_s, np.full(n, 500.0), valid)
    assert len(svg) < 500_000
    assert "currentColor" in svg
    assert plots.INK not in svg
