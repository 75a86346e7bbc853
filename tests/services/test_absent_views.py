"""Views that are absent from some frames, from ingest to pack: nothing of their masks counts, whatever is in them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from zoosplat.config.experiment import Experiment
from zoosplat.geometry import visual_hull
from zoosplat.recording.video_source import VideoSource
from zoosplat.stages.drafts import draft_run
from zoosplat.stages.projects import Project
from zoosplat.stages.run_records import record_run
from zoosplat.stages.runner import run_stage
from zoosplat.stages.runs import Run
from zoosplat.storage import groups, schema
from zoosplat.synthetic.recording import SyntheticRecording, render_views
from zoosplat_center_rotation import ops
from zoosplat_center_rotation.stage import STAGE as CENTER_ROTATION
from zoosplat_crop.stage import STAGE as CROP
from zoosplat_ingest.ops import boxes
from zoosplat_ingest.stage import STAGE as INGEST
from zoosplat_pack.ops import window_size
from zoosplat_pack.stage import STAGE as PACK

if TYPE_CHECKING:
    from tests.conftest import Recording

FRAMES, CAMERAS = 24, 4
WRONG = 1  # the camera whose masks are wrong in frames 8 to 13
LONELY = 20  # the frame of which a single view is there


# -- one frame ------------------------------------------------------------------------------------------------------
def views(n: int) -> tuple[Any, Any, Any, Any]:
    """Masks of n views, their intrinsics and poses, and the grid's axis."""
    scene = SyntheticRecording(n_frames=1, n_cameras=n, width=128, height=128)
    k, r, t = scene.cameras
    pose = np.tile(np.eye(4), (n, 1, 1))
    pose[:, :3, :3], pose[:, :3, 3] = r, t
    return render_views(scene, 0)[1].copy(), k, pose, visual_hull.grid_axis(0.2, 48)


@pytest.mark.parametrize("adaptive", [False, True])
def test_an_absent_view_is_as_one_that_does_not_exist(adaptive: bool) -> None:
    masks, k, pose, axis = views(5)
    seen = np.arange(5) != 2
    expected = ops.frame_hull(masks[seen], np.ones(4, bool), [0, 1, 2, 3], k[seen], pose[seen], axis, adaptive)
    right = ops.frame_hull(masks, np.ones(5, bool), [0, 1, 2, 3, 4], k, pose, axis, adaptive)
    masks[2] = np.random.default_rng(0).random(masks[2].shape) > 0.5
    found = ops.frame_hull(masks, seen, [0, 1, 2, 3, 4], k, pose, axis, adaptive)
    np.testing.assert_array_equal(found.mean, expected.mean)
    np.testing.assert_array_equal(found.cov, expected.cov)
    np.testing.assert_array_equal(found.shift[seen], expected.shift)
    assert found.n_voxels == expected.n_voxels
    assert not found.shift[2].any()
    assert np.linalg.norm(found.mean - right.mean) < 0.003


def test_absent_is_not_empty() -> None:
    """Two views without animal leave no hull, while two absent views leave that of the other two."""
    masks, k, pose, axis = views(4)
    masks[2:] = False
    empty = ops.frame_hull(masks, np.ones(4, bool), [0, 1, 2, 3], k, pose, axis, False)
    assert empty.n_voxels == 0
    assert np.isnan(empty.mean).all()
    absent = ops.frame_hull(masks, np.arange(4) < 2, [0, 1, 2, 3], k, pose, axis, False)
    both = ops.frame_hull(masks[:2], np.ones(2, bool), [0, 1], k[:2], pose[:2], axis, False)
    assert absent.n_voxels == both.n_voxels > 100
    np.testing.assert_array_equal(absent.mean, both.mean)


def test_a_single_view_has_no_hull() -> None:
    masks, k, pose, axis = views(4)
    hull = ops.frame_hull(masks, np.array([True, False, False, True]), [0, 1, 2], k, pose, axis, False)
    assert hull.n_voxels == 0
    assert np.isnan(hull.mean).all()


def test_windows_are_those_of_the_views_that_are_there() -> None:
    found = np.array([[[100, 50, 130, 60], [0, 0, 300, 200]]], np.int32)
    assert window_size(found[np.array([[True, False]])], (320, 240)) == (48, 32)
    assert window_size(found[np.zeros((1, 2), bool)], (320, 240)) == (16, 16)


# -- the stages -----------------------------------------------------------------------------------------------------
def seen_views() -> Any:
    seen = np.ones((FRAMES, CAMERAS), bool)
    seen[8:14, WRONG] = False
    seen[LONELY, 1:] = False
    return seen


def run_stages(recording: Recording, folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Ingest to pack; `kind` is `right`, `wrong` (some masks are noise) or `absent` (and the views are said so)."""
    geometry = VideoSource.mask_geometry

    def with_seen(self: VideoSource, *arguments: Any) -> Any:
        return dataclasses.replace(geometry(self, *arguments), seen=seen_views())

    sizes: dict[str, Any] = {"ingest__max_frames": FRAMES, "center_rotation__grid_size": 40, "crop__grid_size": 40}
    experiment = Experiment.model_validate(recording.config(**sizes))
    run = record_run(draft_run(Project.at(str(folder)), experiment), ["pack"])
    with monkeypatch.context() as patch:
        if kind == "absent":
            patch.setattr(VideoSource, "mask_geometry", with_seen)
        assert run_stage(INGEST, run)
    if kind != "right":
        masks = groups.open_group(run.output_url("ingest"), write=True)
        values = schema.read(masks, "mask")
        noise = np.random.default_rng(0).random(values.shape) > 0.5
        values = np.where(seen_views()[..., None, None], values, noise)
        schema.write_block(masks, "mask", 0, values)
        schema.write_block(masks, "box", 0, boxes(values))
    for stage in (CENTER_ROTATION, CROP, PACK):
        assert run_stage(stage, run)
    return run


def test_wrong_masks_of_absent_views_do_no_harm(
    recording: Recording, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = {kind: run_stages(recording, tmp_path / kind, kind, monkeypatch) for kind in ("right", "wrong", "absent")}
    tracked = {kind: run.open_input("center_rotation") for kind, run in runs.items()}
    centers, angles = ({kind: schema.read(t, key) for kind, t in tracked.items()} for key in ("centers", "angles"))
    # Frame 20 has one view, so it is interpolated; all others are tracked as with masks that are right.
    valid = schema.read(tracked["absent"], "valid")
    assert np.flatnonzero(~valid).tolist() == [LONELY]
    np.testing.assert_allclose(centers["absent"][LONELY], centers["absent"][[LONELY - 1, LONELY + 1]].mean(0))
    off = np.linalg.norm(centers["absent"] - centers["right"], axis=1)
    np.testing.assert_array_equal(off[seen_views().all(1)], 0)
    assert off.max() < 0.004
    assert np.abs(angles["absent"] - angles["right"]).max() < 0.15
    # The crop holds the same animal, and the windows are as small as with masks that are right.
    crops = {kind: schema.read(run.open_input("crop"), "volume_idx") for kind, run in runs.items()}
    np.testing.assert_array_equal(crops["absent"], crops["right"])
    images = {kind: run.open_input("pack") for kind, run in runs.items()}
    shapes = {kind: schema.array(group, "rgb").shape for kind, group in images.items()}
    assert shapes["absent"] == shapes["right"]
    assert shapes["wrong"][2] > shapes["right"][2]
    for key in ("rgb", "mask", "origin"):
        absent, right = (schema.read(images[kind], key)[seen_views()] for kind in ("absent", "right"))
        np.testing.assert_array_equal(absent, right)
    # The groups say which views are there; where all are, they say nothing.
    for stage in ("ingest", "pack"):
        np.testing.assert_array_equal(schema.read_seen(runs["absent"].open_input(stage)), seen_views())
        assert not schema.has_seen(runs["right"].open_input(stage))
        assert schema.read_seen(runs["right"].open_input(stage)).all()
    origin = schema.read(images["absent"], "origin")
    size = np.array(shapes["absent"][3:1:-1])
    attributes: Any = images["absent"].attrs
    assert (origin >= 0).all()
    assert (origin + size <= [attributes["full_width"], attributes["full_height"]]).all()
    # They are counted.
    mark, other = (runs[kind].read_mark("ingest") for kind in ("absent", "right"))
    assert mark is not None
    assert mark["figures"]["absent_views"] == [0, 7, 1, 1]
    assert mark["figures"]["empty_masks"] == [0, 0, 0, 0]
    assert other is not None
    assert "absent_views" not in other["figures"]
