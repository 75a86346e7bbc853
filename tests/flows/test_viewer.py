"""`zoosplat view`: what it reads of a project at each stage, and the page in a real browser."""

from __future__ import annotations

import base64
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import pytest
from pipelines import FILES_PIPELINE
from scipy.spatial.transform import Rotation
from typer.testing import CliRunner

from zoosplat.stages.drafts import draft_run
from zoosplat.stages.lookup import open_run
from zoosplat.stages.projects import Project
from zoosplat.stages.run_records import record_run
from zoosplat.stages.runner import run_stage
from zoosplat.storage import groups, schema
from zoosplat_flows.cli.app import app as cli
from zoosplat_train import dynamic_loop
from zoosplat_train.stage import STAGE as TRAIN

viewer = pytest.importorskip("zoosplat_flows.viewer.app", reason="viser is not installed; pip install zoosplat[view]")
from zoosplat_flows.viewer import embedding_map  # noqa: E402
from zoosplat_flows.viewer.camera_frustum import CameraFrustum  # noqa: E402
from zoosplat_flows.viewer.newest_task_thread import NewestTaskThread  # noqa: E402
from zoosplat_flows.viewer.project_data import ProjectData, project_state  # noqa: E402
from zoosplat_flows.viewer.result_cache import ResultCache  # noqa: E402

if TYPE_CHECKING:
    from playwright.sync_api import Page
    from tests.conftest import S3, ByHand, Recording, Stages

HELD_OUT = 2
COMPARISON_HEIGHT = 320
SIZE: Any = {"width": 1400, "height": 900}
SMALL: dict[str, Any] = {
    "holdout_views": [HELD_OUT],
    "ingest__max_frames": 36,
    "center_rotation__grid_size": 32,
    "crop__grid_size": 32,
    "model": {"num_unets": 1, "base_filters": 2, "bottleneck": 16, "min_gaussians": 64, "max_gaussians": 1500},
    "train": {"epochs": 1, "lr": 1e-3, "device": "cpu"},
    "evaluate": {"gallery_frames": 3, "device": "cpu"},
}


def output(project: Path, stage: str) -> Path:
    """What a stage has written, or is to write, in the project's latest run."""
    return Path(open_run(Project.at(str(project))).output_url(stage))


def embed(project: Path, by_hand: ByHand) -> None:
    """An embedding made by hand, a spiral in which frame 5 has no place."""
    turns = np.linspace(0.2, 1, 36)
    place = np.stack([3 * turns * np.cos(9 * turns), turns * np.sin(9 * turns)], -1).astype(np.float32)
    valid = np.arange(36) != 5
    group = groups.create_group(str(output(project, "embedding")), {})
    for key, values in {"map": np.where(valid[:, None], place, np.nan), "valid": valid}.items():
        group.create_array(key, shape=values.shape, dtype=values.dtype)[...] = values
    by_hand.mark(open_run(Project.at(str(project))), "embedding")


@pytest.fixture(scope="module")
def trained(recording: Recording, stages: Stages, by_hand: ByHand, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project done up to the evaluation. Not to be written to."""
    project = tmp_path_factory.mktemp("viewer") / "project"
    recording.write_project(project, **SMALL)
    for stage in ("ingest", "center_rotation", "crop", "pack"):
        assert stages(stage, str(project)).status == 0
    for stage in ("train", "evaluate"):
        command = [sys.executable, "-m", f"zoosplat_{stage}", "--project", str(project)]
        subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, capture_output=True)
    embed(project, by_hand)
    return project


def begun(trained: Path, folder: Path) -> Path:
    """The same run in a project of its own, before any stage has begun."""
    shutil.copytree(trained / "runs", folder / "runs")
    shutil.copy(trained / "latest.json", folder)
    return folder


def add(trained: Path, folder: Path, *stages: str, done: bool = True) -> None:
    """Results of stages, or what such a stage has written before it has ended."""
    run = open_run(Project.at(str(trained)))
    for stage in stages:
        source = Path(run.result(stage).folder)
        target = folder / source.relative_to(trained)
        shutil.copytree(
            source, target, dirs_exist_ok=True, ignore=None if done else shutil.ignore_patterns("done.json")
        )


@pytest.fixture(scope="module")
def scene(trained: Path) -> ProjectData:
    opened = ProjectData(str(trained))
    opened.load_model("cpu")
    return opened


# -- what is read ---------------------------------------------------------------------------------------------------
def test_shows_what_is_done(trained: Path, tmp_path: Path) -> None:
    """A run as it goes on: each stage adds something, and `state` says so."""
    copy = begun(trained, tmp_path / "project")
    seen = {project_state(str(copy))}

    def after(*stages: str, done: bool = True) -> ProjectData:
        add(trained, copy, *stages, done=done)
        seen.add(project_state(str(copy)))
        opened = ProjectData(str(copy))
        opened.load_model("cpu")
        assert opened.notes == []
        return opened

    assert ProjectData(str(copy)).n_frames == 0
    scene = after("ingest")
    assert (scene.n_frames, len(scene.cameras), scene.centers) == (36, 4, None)
    assert [set(np.unique(picture)) >= {90, 255} for picture in scene.pictures(7)] == [True] * 4
    scene = after("center_rotation")
    assert scene.centers is not None
    assert not scene.has_hull(7)
    scene = after("crop")
    assert scene.has_hull(7)
    assert len(scene.hull(7).points) > 20
    scene = after("pack")
    assert any(len(np.unique(picture.reshape(-1, 3), axis=0)) > 50 for picture in scene.pictures(7))
    assert (scene.has_model, scene.has_gaussians(7)) == (False, False)
    scene = after("train", done=False)
    assert (scene.training, scene.has_gaussians(7), scene.embedding) == (True, True, None)
    best = output(copy, "train") / "best.json"
    text = best.read_text()
    best.write_text(text.replace('"valid_loss": ', '"valid_loss": 1'))
    assert project_state(str(copy)) not in seen
    best.write_text(text)
    scene = after("train", "embedding")
    assert scene.training is False
    assert scene.embedding is not None
    assert len(seen) == 7


def test_hulls_are_those_of_the_views_that_are_there(trained: Path, tmp_path: Path) -> None:
    copy = begun(trained, tmp_path / "project")
    add(trained, copy, "ingest", "center_rotation", "crop")
    whole = ProjectData(str(copy)).hull(7).points
    masks = groups.open_group(str(output(copy, "ingest")), write=True)
    schema.add_seen(masks, [[t != 7 or c > 0 for c in range(4)] for t in range(36)])
    mask, hulls = schema.read(masks, "mask"), []
    for anywhere in (False, True):
        mask[7, 0] = anywhere
        schema.write_block(masks, "mask", 0, mask)
        opened = ProjectData(str(copy))
        assert [opened.is_seen(7, c) for c in range(4)] == [False, True, True, True]
        hulls.append(opened.hull(7).points)
    np.testing.assert_array_equal(hulls[0], hulls[1])
    # The hull of all but one of three views holds that of two of them.
    assert len(hulls[0]) > 20
    assert (hulls[0].min(0) >= whole.min(0)).all()
    assert (hulls[0].max(0) <= whole.max(0)).all()


def test_any_run_of_a_project_is_shown(trained: Path, tmp_path: Path) -> None:
    copy = tmp_path / "project"
    shutil.copytree(trained, copy, symlinks=True)
    project = Project.at(str(copy))
    first = open_run(project)
    more = first.experiment.train.model_copy(update={"epochs": 2})
    record_run(draft_run(project, first.experiment.model_copy(update={"train": more})), ["train"])
    assert ProjectData(str(copy)).has_model is False
    assert ProjectData(str(copy), first.id).has_model is True
    assert project_state(str(copy)) != project_state(str(copy), first.id)


def test_shows_what_dynamic_gaussians_have_come_to(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "project"
    shutil.copytree(trained, copy, symlinks=True)
    project = Project.at(str(copy))
    old = open_run(project).experiment
    few: dict[str, Any] = {"coarse_iterations": 6, "fine_iterations": 6, "initial_points": 200}
    few |= {"multires": (1,), "resolution": 8, "time_resolution": 4}
    train, changed = old.train.model_copy(update={"method": "dynamic"}), old.dynamic.model_copy(update=few)
    run = record_run(draft_run(project, old.model_copy(update={"train": train, "dynamic": changed})), ["train"])
    before = project_state(str(copy))
    assert not ProjectData(str(copy)).has_model
    monkeypatch.setattr(dynamic_loop, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(dynamic_loop, "REPORT_ITERATIONS", 1)

    def stop(done: int, total: int, message: str) -> None:
        if message.startswith("fine 4"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_stage(TRAIN, run, progress=stop)
    opened = ProjectData(str(copy))
    opened.load_model("cpu")
    assert (opened.notes, opened.training, opened.has_gaussians(7)) == ([], True, True)
    assert opened.predictor is not None
    assert opened.predictor.step == 9
    now = project_state(str(copy))
    assert now != before
    (output(copy, "train") / "chkpnt_fine_10.pth").touch()  # while the one of iteration 3 is kept
    assert project_state(str(copy)) != now


def test_what_cannot_be_shown_is_said(trained: Path, tmp_path: Path) -> None:
    """A configuration that was edited by hand, damaged files: the page shows the rest."""
    copy = begun(trained, tmp_path / "project")
    add(trained, copy, *(spec.name for spec in FILES_PIPELINE if spec.name not in ("render", "features")))

    def notes() -> list[str]:
        opened = ProjectData(str(copy))
        opened.load_model("cpu")
        assert (opened.n_frames, len(opened.cameras)) == (36, 4)
        return opened.notes

    place = next(path for path in (output(copy, "embedding") / "map").rglob("c/*/*") if path.is_file())
    place.write_bytes(place.read_bytes()[:7])
    assert [str(output(copy, "embedding")) in note for note in notes()] == [True]
    config = copy / "runs" / open_run(Project.at(str(copy))).id / "config.yaml"
    config.write_text(config.read_text().replace("base_filters: 2", "base_filters: 4"))
    assert "does not fit the configuration" in notes()[1]
    shutil.rmtree(output(copy, "crop"))
    assert "crop.zarr: gone, though its mark is there" in notes()[0]


def test_bad_urls_are_one_line(trained: Path, tmp_path: Path) -> None:
    for arguments, words in (
        ([str(tmp_path)], "holds no run"),
        ([str(trained), "--run", "1999"], "there is no run 1999"),
        (["ftp://somewhere"], "unknown kind of URL"),
        ([str(trained), "--device", "cuda:99"], "no such CUDA GPU"),
    ):
        result = CliRunner().invoke(cli, ["view", *arguments])
        assert result.exit_code == 2
        assert words in result.stderr
        assert result.stderr.count("\n") == 1


def test_picture_is_symmetric_about_the_axis() -> None:
    """A pixel's ray is the same by the frustum's angle and aspect as by the calibration."""
    intrinsics = np.array([[700.0, 0, 301.3], [0, 650.0, 111.8], [0, 0, 1]])
    camera = CameraFrustum.from_calibration("a", False, np.eye(4), intrinsics, 640, 480)
    assert camera.width >= 640
    assert camera.height >= 480
    for x, y in ((0, 0), (639, 479), (20, 300)):
        ray = np.linalg.solve(intrinsics, [x, y, 1])
        assert 0 <= x + camera.offset[0] < camera.width
        assert 0 <= y + camera.offset[1] < camera.height
        up = np.tan(camera.fov_rad / 2)
        across = (
            2 * (x + camera.offset[0] + 0.5) / camera.width - 1,
            2 * (y + camera.offset[1] + 0.5) / camera.height - 1,
        )
        # Whole pixels: the picture is off by half a pixel at most.
        np.testing.assert_allclose([across[0] * up * camera.aspect, across[1] * up], ray[:2], atol=0.51 / 650)


def test_hull_is_the_outside_of_all_voxels_in_enough_masks(scene: ProjectData, trained: Path) -> None:
    t = 30
    run = open_run(Project.at(str(trained)))
    masks, tracking, crop = (run.open_input(stage) for stage in ("ingest", "center_rotation", "crop"))
    assert scene.centers is not None
    assert scene.angles is not None
    axis = np.linspace(-0.11, 0.11, 32)
    kept = [axis[a:b] for a, b in schema.read(crop, "volume_idx")]
    points = np.stack(np.meshgrid(*kept, indexing="ij"), -1)
    c, s = np.cos(scene.angles[t]), np.sin(scene.angles[t])
    world = points @ np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]).T + schema.read(tracking, "centers")[t]
    votes = np.zeros(points.shape[:3], int)
    for v in (0, 1, 3):
        in_camera = world @ schema.read(masks, "world_to_camera")[v, :3, :3].T
        pixel = (in_camera + schema.read(masks, "world_to_camera")[v, :3, 3]) @ schema.read(masks, "intrinsics")[v].T
        x, y = (np.floor(pixel[..., k] / pixel[..., 2] + 0.5).astype(int) for k in (0, 1))
        inside = (x >= 0) & (x < 96) & (y >= 0) & (y < 80)
        votes += inside & schema.read(masks, "mask", t, t + 1)[0, v][np.clip(y, 0, 79), np.clip(x, 0, 95)]
    filled = {tuple(cell) for cell in np.argwhere(votes >= 2).tolist()}
    steps = [(1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1)]
    outer = {n for n in filled if any((n[0] + i, n[1] + j, n[2] + k) not in filled for i, j, k in steps)}
    expected = np.array([points[cell] for cell in sorted(outer)], np.float32)
    found = scene.hull(t).points
    assert len(found) == len(expected)
    np.testing.assert_allclose(found[np.lexsort(found.T[::-1])], expected[np.lexsort(expected.T[::-1])], atol=1e-7)


def test_splats_are_the_gaussians_in_voxels(scene: ProjectData) -> None:
    assert scene.predictor is not None
    drawn = scene.predictor.gaussians(20)
    gaussians = type(drawn)(*(value[drawn.opacities >= 1 / 255] for value in drawn))
    splats = scene.splats(20)
    np.testing.assert_allclose(splats.means * splats.voxel_m + splats.origin, gaussians.means, atol=1e-6)
    w, x, y, z = gaussians.quats.numpy().T
    axes = Rotation.from_quat(np.stack([x, y, z, w], -1)).as_matrix()
    # What is added to all of a Gaussian's axes is the low pass: the same for all Gaussians, small, positive.
    turned = np.einsum("nji,njk,nkl->nil", axes, splats.covariances * splats.voxel_m**2, axes)
    added = turned - np.stack([np.diag(s**2) for s in gaussians.scales.numpy()])
    assert np.abs(added - added[0, 0, 0] * np.eye(3)).max() < 1e-4 * turned.max()
    assert 0 < added[0, 0, 0] < scene.splats(20).voxel_m ** 2
    assert np.float16(splats.covariances).min(axis=0).diagonal().min() > 6e-5  # normal half floats


def test_picture_from_a_camera_shows_what_it_saw(scene: ProjectData, trained: Path) -> None:
    t = 30
    camera = scene.cameras[HELD_OUT]
    size = camera.width, camera.height
    picture = scene.render_from(t, camera.position, camera.to_world, camera.fov_rad, *size)
    mask = schema.read(groups.open_group(str(output(trained, "ingest"))), "mask", t, t + 1)[0, HELD_OUT]
    seen = np.zeros(size[::-1], bool)
    x, y = camera.offset
    seen[y : y + 80, x : x + 96] = mask
    drawn = picture.min(axis=2) < 200
    assert (seen & drawn).sum() / (seen | drawn).sum() > 0.5


def test_memory_is_bounded() -> None:
    cache, made = ResultCache(max_bytes=100), []

    def make(i: int) -> int:
        made.append(i)
        return i

    for i in (0, 1, 2, 0, 3, 0, 1):
        assert cache.get(i, lambda i=i: make(i), lambda _: 30) == i  # type: ignore[misc]
    assert made == [0, 1, 2, 3, 1]  # 1 was asked for longest ago when 3 came
    assert cache.get("large", lambda: 7, lambda _: 1000) == 7
    assert cache.get("large", lambda: 8, lambda _: 1000) == 7


def test_only_the_newest_request_is_worked_on() -> None:
    failures: list[Exception] = []
    worker = NewestTaskThread(failures.append)
    entered, go = threading.Event(), threading.Event()
    done: list[int] = []

    def first() -> None:
        entered.set()
        go.wait()
        assert worker.is_requested("frame")
        assert not worker.is_requested("other")

    def fail() -> None:
        raise ZeroDivisionError

    worker.request("frame", first)
    entered.wait()
    for i in range(100):
        worker.request("frame", partial(done.append, i))
    worker.request("fails", fail)
    assert not worker.wait(0)
    go.set()
    assert worker.wait(30)
    worker.stop()
    assert done == [99]
    assert [type(error) for error in failures] == [ZeroDivisionError]


def test_page_follows_a_run(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page opened before there is anything, and left open until there is a model."""
    monkeypatch.setattr(viewer, "WATCH_EVERY_S", 0.05)
    copy = begun(trained, tmp_path / "project")
    page = viewer.Viewer(str(copy), "localhost", 8201, "cpu")
    try:

        def wait_for(words: str, absent: str = "\n\n") -> None:
            assert any(
                (words in page._about.content and absent not in page._about.content) or page._stopping.wait(0.05)
                for _ in range(1200)
            )

        wait_for("stage ingest has not finished")
        add(trained, copy, *("ingest", "center_rotation", "crop", "pack", "embedding"))
        wait_for("no model yet")
        assert page._frame.max == 35
        add(trained, copy, "train", done=False)
        wait_for("still training")
        add(trained, copy, "train")
        wait_for("model after", absent="still training")
        (copy / "runs" / open_run(Project.at(str(copy))).id / "config.yaml").write_text("nonsense")
        wait_for("config.yaml")
    finally:
        page.stop()


def test_the_same_on_s3(scene: ProjectData, trained: Path, s3_here: S3) -> None:
    bucket = s3_here.bucket()
    s3_here.put_folder(trained, bucket, "project")
    there = ProjectData(f"s3://{bucket}/project")
    there.load_model("cpu")
    assert there.notes == []
    assert there.embedding is not None
    np.testing.assert_array_equal(there.pictures(30), scene.pictures(30))
    np.testing.assert_array_equal(there.comparison(30, HELD_OUT), scene.comparison(30, HELD_OUT))
    assert project_state(f"s3://{bucket}/project") == project_state(str(trained))


# -- in a browser -----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def page(trained: Path) -> Iterator[Page]:
    """The page of `zoosplat view`, in a browser that notes what it asks for; its process as `page.viewer`."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed; pip install zoosplat[dev]")
    browser_path = shutil.which("chromium") or shutil.which("google-chrome")
    if browser_path is None:
        pytest.skip("no chromium on this machine")
    command = [str(Path(sys.executable).with_name("zoosplat")), "view", str(trained), "--port", "8301"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    # Ctrl-C ends it also where these tests run in the background, where shells have it ignored.
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True, preexec_fn=heard)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().split()[0]
        assert re.fullmatch(r"http://localhost:\d+", url)
        with api.sync_playwright() as playwright:
            flags = ["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
            browser = playwright.chromium.launch(executable_path=browser_path, args=flags)
            opened = browser.new_page(viewport=SIZE)
            opened.set_default_timeout(120_000)
            opened.asked = asked = []
            opened.viewer = process.pid
            opened.on("request", lambda request: asked.append(request.url))
            opened.on("websocket", lambda socket: asked.append(socket.url))
            opened.goto(url)
            opened.get_by_text("model after").wait_for()
            yield opened
            browser.close()
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0


def timeline(page: Page) -> Any:
    """The number beside the slider."""
    return page.locator("input[type=text]").first


def shown(page: Page, height: int) -> np.ndarray[Any, Any]:
    """Pixels [h, w, 3] of the picture in the page that is so high; the page is waited for."""
    image = page.wait_for_function(
        "height => [...document.querySelectorAll('img')].find(i => i.naturalHeight === height)", arg=height
    )
    url = image.evaluate(
        """image => {
            const canvas = document.createElement('canvas');
            [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
            canvas.getContext('2d').drawImage(image, 0, 0);
            return canvas.toDataURL('image/png').split(',')[1];
        }"""
    )
    picture = cv2.imdecode(np.frombuffer(base64.b64decode(url), np.uint8), cv2.IMREAD_COLOR_RGB)
    assert picture is not None
    return np.asarray(picture)


def wait_for_picture(page: Page, expected: np.ndarray[Any, Any]) -> None:
    """Until the page shows it as the comparison, to a level of brightness in a few pixels (threads sum differently)."""
    for _ in range(240):
        found = shown(page, COMPARISON_HEIGHT).astype(int)
        if found.shape == expected.shape and np.abs(found - expected).max() <= 2:
            return
        page.wait_for_timeout(250)
    raise AssertionError("the page never showed the picture")


def gallery(project: Path, camera: int) -> dict[int, np.ndarray[Any, Any]]:
    """Pictures of stage evaluate, by frame."""
    folder = output(project, "evaluate")
    entries = json.loads((folder / "gallery.json").read_text())["pictures"]
    files = {e["t"]: e["file"] for e in entries if e["file"].endswith(f"camera{camera}.png")}
    assert len(files) >= 3
    return {t: np.asarray(cv2.imread(str(folder / name), cv2.IMREAD_COLOR_RGB)) for t, name in files.items()}


def test_timeline_shows_what_the_stage_rendered(page: Page, trained: Path) -> None:
    for t, picture in gallery(trained, HELD_OUT).items():
        timeline(page).fill(str(t))
        wait_for_picture(page, picture)
        page.get_by_text(f"frame {t} of the video").wait_for()


def test_another_camera(page: Page, trained: Path) -> None:
    t, picture = next(iter(gallery(trained, 0).items()))
    timeline(page).fill(str(t))
    camera = page.get_by_role("combobox", name="camera")
    camera.click()
    page.get_by_role("option", name="0", exact=True).click()
    wait_for_picture(page, picture)
    camera.click()
    page.get_by_role("option", name=f"{HELD_OUT} (held out)").click()
    wait_for_picture(page, gallery(trained, HELD_OUT)[t])


def test_click_in_the_map_goes_to_the_frame(page: Page, trained: Path, scene: ProjectData) -> None:
    assert scene.embedding is not None
    unit = embedding_map.unit_places(scene.embedding)
    t, picture = max(gallery(trained, HELD_OUT).items())
    timeline(page).fill("3")
    page.get_by_text("frame 3 of the video").wait_for()
    image = page.get_by_alt_text("Map of the embedding")
    box = image.bounding_box()
    assert box is not None
    image.click(position={"x": float(unit[t, 0]) * box["width"], "y": float(unit[t, 1]) * box["height"]}, force=True)
    page.get_by_text(f"frame {t} of the video").wait_for()
    assert timeline(page).input_value() == str(t)
    wait_for_picture(page, picture)
    ring = page.locator("svg circle[stroke='#e03131']").bounding_box()
    assert ring is not None
    found = ring["x"] + ring["width"] / 2 - box["x"], ring["y"] + ring["height"] / 2 - box["y"]
    np.testing.assert_allclose(found, unit[t] * box["width"], atol=2)


def test_scene_is_the_models_picture(page: Page) -> None:
    """What the browser draws of the Gaussians covers what the model renders from the browser's camera."""
    for layer in ("trail", "cameras"):
        page.get_by_role("checkbox", name=layer).uncheck()
    page.get_by_text("Render from here").click()
    model = shown(page, viewer.SNAPSHOT_HEIGHT)
    page.wait_for_timeout(2000)  # nothing says when the browser has drawn
    canvas = page.locator("canvas").first.bounding_box()
    assert canvas is not None
    screen = cv2.imdecode(np.frombuffer(page.screenshot(), np.uint8), cv2.IMREAD_COLOR_RGB)
    assert screen is not None
    height, width = model.shape[:2]
    x, y = round(canvas["x"]), round(canvas["y"])
    drawn = screen[y : y + round(canvas["height"]), x : x + round(canvas["width"])]
    drawn = cv2.resize(drawn, (width, height), interpolation=cv2.INTER_AREA)
    # Panels cover the edges; the first view has the animal in its middle.
    middle = np.s_[height // 3 : -height // 3, width // 3 : -width // 3]
    here, there = (picture[middle].min(axis=2) < 170 for picture in (drawn, model))
    assert there.sum() > 100
    assert (here & there).sum() / (here | there).sum() > 0.7
    for layer in ("trail", "cameras"):
        page.get_by_role("checkbox", name=layer).check()


def memory(page: Page) -> tuple[float, float]:
    """MB: resident memory of the viewer's process, and the page's JavaScript heap after a collection."""
    session = page.context.new_cdp_session(page)
    session.send("HeapProfiler.collectGarbage")
    metrics = {m["name"]: m["value"] for m in session.send("Performance.getMetrics")["metrics"]}
    if not metrics:
        session.send("Performance.enable")
        metrics = {m["name"]: m["value"] for m in session.send("Performance.getMetrics")["metrics"]}
    session.detach()
    status = Path(f"/proc/{page.viewer}/status").read_text()  # type: ignore[attr-defined]
    resident = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert resident is not None
    return int(resident[1]) / 1024, metrics["JSHeapUsedSize"] / 2**20


def test_playing_leaks_no_memory(page: Page) -> None:
    page.set_viewport_size({"width": 500, "height": 350})  # a browser without a GPU draws a large scene slowly
    timeline(page).fill("0")
    page.locator("input[type=text]").nth(1).fill("60")
    page.get_by_role("button", name="Play").click()
    seen = set()

    def play(frames: int) -> tuple[float, float]:
        """Until so many different values have been on the timeline."""
        before = None
        count = 0
        while count < frames:
            value = timeline(page).input_value()
            count += value != before
            before = value
            seen.add(value)
            page.wait_for_timeout(20)
        return memory(page)

    resident, heap = play(40)  # more than all frames: the cache holds them
    later_resident, later_heap = play(40)
    page.get_by_role("button", name="Pause").click()
    page.set_viewport_size(SIZE)
    assert len(seen) > 18  # not stuck
    assert later_resident < resident + 60
    assert later_heap < heap + 10


def test_needs_no_internet(page: Page) -> None:
    """After all of the above."""
    asked = page.asked  # type: ignore[attr-defined]
    assert asked
    assert all(re.match(r"(http|ws|blob:http)://localhost:\d+/|data:", url) for url in asked), asked
