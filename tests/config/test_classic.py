"""The configuration of the published tool: what it maps to, and its own words in refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from zoosplat.config.classic import classic_project_directory, parse_classic
from zoosplat.config.load import load_config, read_config
from zoosplat.errors import UserError

CONFIGS = Path(__file__).parents[2] / "configs"


CLASSIC = CONFIGS / "classic" / "markerless_mouse_nerf.json"


def classic_keys(**changes: Any) -> dict[str, Any]:
    return {**json.loads(CLASSIC.read_text()), **changes}


def test_classic_files_have_no_dotted_keys() -> None:
    with pytest.raises(UserError, match=r"^unknown key crop\.grid_size"):
        parse_classic(classic_keys(**{"crop.grid_size": 64}), "/configs")


def test_classic_file_maps_to_the_same_experiment() -> None:
    loaded = load_config(str(CLASSIC))
    e, folder = loaded.experiment, CLASSIC.parent
    project = str(folder / "output/markerless_mouse_nerf")
    assert loaded.project == project
    assert e.name == "markerless_mouse_nerf"
    assert (e.unit, e.pack.window, e.reuse) == ("normalized", "full", None)
    assert e.data.directory == str(folder / "data/markerless_mouse_1_nerf")
    assert e.data.videos == tuple(f"videos/{i}.mp4" for i in range(6))
    assert e.data.masks == tuple(f"masks/{i}.mp4" for i in range(6))
    assert (e.data.calibration, e.data.up) == (f"{project}/camera_params.h5", f"{project}/vertical_lines.npz")
    assert (e.data.fps, e.data.image_width, e.data.image_height) == (100, 1152, 1024)
    assert (e.ingest.frame_jump, e.ingest.max_frames, e.ingest.image_downsample) == (5, 3600, 4)
    assert (e.center_rotation.ell, e.center_rotation.grid_size) == (0.25, 112)
    assert (e.crop.ell, e.crop.grid_size, e.crop.volume_idx) == (0.22, 112, ((0, 96), (16, 96), (24, 88)))
    assert (e.model.volume_fill_color, e.model.gaussian_mode) == (0.38, "3d")
    assert (e.train.lr, e.train.img_lambda, e.train.ssim_lambda) == (1e-4, 0.5, 0.0)
    assert (e.train.valid_every, e.train.plot_every, e.train.save_every, e.train.epochs) == (5, 1, 1, 50)
    e.check(6, 1152, 1024)


def test_classic_keys_without_effect_are_named() -> None:
    gaussians = {"sigma_cutoff": 3.0, "kernel_size": 5, "batch_size": 5}
    raw = classic_keys(gaussian_mode="2d", gaussian_config=gaussians, train_time=3600, valid_time=60)
    e, notes = parse_classic(raw, "/configs")
    assert e.model.gaussian_mode == "2d"
    named = {note.split(" has no effect: ")[0] for note in notes if " has no effect: " in note}
    assert named == {
        *("volume_directory", "image_directory", "render_directory", "image_compression_level"),
        *("volume_compression_level", "center_rotation_fn", "volume_sum_fn", "model_fn", "feature_fn"),
        *("embedding_fn", "gaussian_config", "train_time", "valid_time"),
    }
    # Every key that has an effect changes the experiment, and no other does.
    for key, other in {"volume_sum_fn": "x.npy", "model_fn": "x.pt", "train_time": 1, "render_directory": "x"}.items():
        assert parse_classic({**raw, key: other}, "/configs")[0] == e
    for key, other in {
        "ell": 0.2,
        "ell_tracking": 0.3,
        "grid_size": 128,
        "lr": 1e-3,
        "fps": 50,
        "frame_jump": 1,
    }.items():
        assert parse_classic({**raw, key: other}, "/configs")[0] != e


def test_classic_optional_keys_may_be_absent_or_null() -> None:
    needed = ("data_directory", "project_directory", "video_fns", "mask_video_fns")
    raw = {key: value for key, value in classic_keys().items() if key in needed}
    e, notes = parse_classic(raw, "/configs")
    assert (e.crop.ell, e.center_rotation.ell, e.crop.volume_idx, e.holdout_views) == (0.22, 0.22, None, ())
    assert (e.data.up, e.data.fps, e.data.image_width, e.ingest.image_downsample) == ("auto", None, None, 1)
    assert e.data.calibration == "/configs/output/markerless_mouse_nerf/camera_params.h5"
    assert any(note.startswith("ell is absent: 0.22") for note in notes)
    assert parse_classic({**dict.fromkeys(classic_keys()), **raw}, "/configs") == (e, notes)
    for key in needed:
        with pytest.raises(UserError, match=f"^{key} is missing"):
            parse_classic({k: v for k, v in raw.items() if k != key}, "/configs")


@pytest.mark.parametrize(
    ("project", "images", "reuse"),
    [
        ("/out/mouse_4", "../mouse_6_cameras/images", "/out/mouse_6_cameras"),
        ("s3://b/out/mouse_4/", "../mouse_6_cameras/images/", "s3://b/out/mouse_6_cameras"),
        ("/out/mouse_4", "/big/mouse_6_cameras/images", "/big/mouse_6_cameras"),
        ("out/mouse_4/", "images", None),
        ("/out/mouse_4", "../mouse_4/images", None),
        ("/out/mouse_4", ".", None),
    ],
)
def test_classic_images_of_another_project_are_reused(project: str, images: str, reuse: str | None) -> None:
    raw = classic_keys(project_directory=project, image_directory=images, holdout_views=[5, 1])
    e, notes = parse_classic(raw, "/configs")
    assert (e.reuse, e.holdout_views) == (reuse, (1, 5))
    assert any(note.startswith("image_directory") and (reuse or "no effect") in note for note in notes)


def test_classic_shared_calibration_is_found_beside_the_project() -> None:
    e, _ = parse_classic(classic_keys(project_directory="/out/a", camera_fn="../b/c.h5"), "/configs")
    assert e.data.calibration == "/out/b/c.h5"


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"holdout_view": []}, "unknown key holdout_view (did you mean holdout_views?)"),
        ({"gaussian_config": {"sigma": 3.0}}, "unknown key gaussian_config.sigma (did you mean gaussian_config.sigma_"),
        ({"lr": "fast"}, "lr = 'fast': must be a number"),
        ({"lr": -1}, "lr = -1"),
        ({"adaptive_camera": 0}, "adaptive_camera = 0: must be true or false"),
        (
            {"volume_idx": [[0, 96], [16, 96], [25, 90]]},
            "volume_idx[2] = (25, 90): length 65 is not a multiple of 16; ",
        ),
        ({"image_downsample": 3}, "image_downsample = 3: does not divide images of 1152 x 1024; nearest: 2 or 4"),
        ({"video_fns": ["0.mp4"]}, "video_fns = ['0.mp4']: must have at least 2 entries"),
        (
            {"vertical_lines_fn": "up.txt"},
            "vertical_lines_fn = '/configs/output/markerless_mouse_nerf/up.txt': must be ",
        ),
    ],
)
def test_classic_refusals_use_the_classic_names(changes: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_classic(classic_keys(**changes), "/configs")
    assert str(caught.value).startswith(line)


def test_classic_overrides_use_native_names_and_mend(write: Callable[..., str], tmp_path: Path) -> None:
    path = write(tmp_path, json.dumps(classic_keys(volume_idx=[[0, 100], [0, 96], [0, 96]])), "c.json")
    with pytest.raises(UserError, match=r"c\.json: volume_idx\[0\] = \(0, 100\)"):
        read_config(path)
    e = read_config(path, ["crop.volume_idx=null", "train.epochs=3"])
    assert (e.crop.volume_idx, e.train.epochs, e.unit) == (None, 3, "normalized")


def test_classic_files_are_told_by_content(
    native: Callable[..., dict[str, Any]], write: Callable[..., str], tmp_path: Path
) -> None:
    assert read_config(write(tmp_path, yaml.safe_dump(classic_keys()), "a.yaml")).unit == "normalized"
    assert read_config(write(tmp_path, json.dumps(native()), "b.json")).unit == "m"


def test_classic_project_directory() -> None:
    assert classic_project_directory({"project_directory": "out/a/"}, "/configs") == "/configs/out/a"
    assert classic_project_directory({"project_directory": "s3://b/a/"}) == "s3://b/a"
    with pytest.raises(UserError, match="project_directory is missing"):
        classic_project_directory({})


@pytest.mark.parametrize("key", ["video_fns", "mask_video_fns"])
@pytest.mark.parametrize(
    "name",
    ["../other/0.mp4", "a/../../b.mp4", "/etc/passwd", "~/x.mp4", "..\\x", "C:/x", "s3://b/x", "x::s3://b", "a::b"],
)
def test_classic_videos_stay_inside_the_recording(key: str, name: str) -> None:
    names = classic_keys()[key]
    with pytest.raises(UserError, match=rf"^{key}\[2\] = .*inside data_directory"):
        parse_classic(classic_keys(**{key: [*names[:2], name, *names[3:]]}), "/configs")
