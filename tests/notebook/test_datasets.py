"""Datasets and cameras of a project against the arrays, the CSV file and the synthetic truth; lazy arrays."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import zarr
from made_masks import HELD_OUT, made_segments

import zoosplat
from zoosplat.errors import UserError
from zoosplat.geometry.cameras import Cameras, WorldTransform
from zoosplat.geometry.projection import project as to_pixels
from zoosplat.notebook.project import ProjectReader
from zoosplat.storage import schema
from zoosplat.storage.group_store import GroupStore

if TYPE_CHECKING:
    from tests.conftest import Recording

FPS = 50.0  # of the synthetic recording
FRAMES = 36


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


DATASETS = {"masks": "masks.zarr", "images": "images.zarr", "tracking": "tracking.zarr", "features": "features.zarr"}
DATASETS["embedding"] = "embedding.zarr"
AS_COORDINATES = {"time", "t", "frame", "intrinsics", "world_to_camera"}  # time in embedding.zarr; the rest: cameras


@pytest.mark.parametrize("name", DATASETS)
def test_datasets_hold_the_arrays_with_units_and_coordinates(name: str, p: ProjectReader, whole_project: Path) -> None:
    dataset = getattr(p, name)
    group = zarr.open_group(whole_project / "latest" / DATASETS[name], mode="r")
    assert set(dataset.data_vars) == set(group.array_keys()) - AS_COORDINATES
    for key, variable in dataset.data_vars.items():
        array: Any = group[key]
        np.testing.assert_array_equal(variable.values, array[...], err_msg=key)
        assert variable.dtype == array.dtype
        assert variable.dims[0] == "time"
        assert variable.attrs.get("units", "") == array.attrs["unit"]
        assert variable.attrs["long_name"] == array.attrs["meaning"]
    np.testing.assert_array_equal(dataset["frame"], np.arange(FRAMES))
    np.testing.assert_array_equal(dataset["t"], np.arange(FRAMES))
    np.testing.assert_allclose(dataset["time"], np.arange(FRAMES) / FPS)
    assert dataset["time"].attrs["units"] == "s"
    if "camera" in dataset.dims:
        assert dataset["camera"].values.tolist() == ["0", "1", "2", "3"]
    if "axis" in dataset.dims:
        assert dataset["axis"].values.tolist() == ["x", "y", "z"]


SEEN = [[True, False], [True, True], [False, False], [False, True]]


def masks_of_moving_cameras(url: str) -> zarr.Group:
    """Four kept frames, every fifth of a recording of 60 frames a second, of two cameras."""
    sizes = {"T": 4, "C": 2, "h": 8, "w": 8}
    attributes = {"fps": 60.0, "frame_jump": 5, "camera_names": ["left", "right"]}
    masks = schema.create(url, "masks.zarr", sizes, 64, attributes)
    schema.array(masks, "frame")[...] = [0, 5, 10, 15]
    poses = np.arange(128.0).reshape(4, 2, 4, 4)
    schema.add_moving(masks, {"time": [0, 0.1, 0.4, 1], "pose": poses})
    schema.add_seen(masks, SEEN)
    return masks


def test_frames_that_were_left_out_and_cameras_that_move(tmp_path: Path) -> None:
    from zoosplat.notebook.datasets import Axes, read_dataset

    masks = masks_of_moving_cameras(str(tmp_path / "masks.zarr"))
    dataset = read_dataset(masks, "masks.zarr", "here", Axes.of(masks), lazy=True)
    np.testing.assert_allclose(dataset["time"], [0, 1 / 12, 1 / 6, 1 / 4])
    assert dataset["frame"].values.tolist() == [0, 5, 10, 15]
    assert dataset["t"].values.tolist() == [0, 1, 2, 3]
    pose = dataset["pose"].sel(camera="right").swap_dims(time="frame").sel(frame=10)
    np.testing.assert_array_equal(pose, np.arange(128.0).reshape(4, 2, 4, 4)[2, 1])
    assert dataset["seen"].dims == ("time", "camera")
    np.testing.assert_array_equal(dataset["seen"], SEEN)


def test_plates_and_their_light(tmp_path: Path) -> None:
    from zoosplat.notebook.datasets import Axes, read_dataset

    axes = Axes.of(masks_of_moving_cameras(str(tmp_path / "masks.zarr")))
    sizes = {"T": 4, "C": 2, "h": 8, "w": 8}
    images = schema.create(str(tmp_path / "images.zarr"), "images.zarr", sizes, 64, {})
    plate = np.arange(2 * 20 * 30 * 3).reshape(2, 20, 30, 3).astype(np.uint8)
    light = np.arange(4 * 2 * 3 * 4).reshape(4, 2, 3, 4).astype(np.float32)
    schema.add_background(images, plate, light)
    dataset = read_dataset(images, "images.zarr", "here", axes, lazy=True)
    assert dataset["plate"].dims == ("camera", "frame_y", "frame_x", "channel")
    np.testing.assert_array_equal(dataset["plate"].sel(camera="right", channel="G"), plate[1, ..., 1])
    chosen = dataset["light"].sel(camera="left", channel="B", term="offset")
    np.testing.assert_array_equal(chosen, light[:, 0, 2, 3])


def test_masks_of_stage_segment(project_of_made_masks: Path, p: ProjectReader) -> None:
    opened, arrays = zoosplat.open(str(project_of_made_masks)), made_segments()
    segments = opened.segments
    assert set(segments.data_vars) == set(arrays) - AS_COORDINATES
    for key, variable in segments.data_vars.items():
        np.testing.assert_array_equal(variable.values, arrays[str(key)], err_msg=str(key))
    assert segments["frame"].values.tolist() == arrays["frame"].tolist()
    chosen = segments.swap_dims(time="frame")
    mask = chosen["probability"].sel(frame=9, camera="2") >= 128
    np.testing.assert_array_equal(mask, arrays["probability"][3, 2] >= 128)
    assert segments["held_out_camera"].values.tolist() == [str(c) for c in HELD_OUT]
    helped = chosen["all_views"].sel(frame=9, held_out_camera="3")
    np.testing.assert_array_equal(helped, arrays["all_views"][3, 1])
    assert segments["seen"].values.sum() == segments["seen"].size - 1
    with pytest.raises(UserError, match=r"has no stage segment, because data\.masks names files"):
        _ = p.segments


def test_tracking_is_where_the_mouse_was(p: ProjectReader, recording: Recording) -> None:
    """The centre of the coarse hull is within 6 mm of the true centroid (the animal is 80 mm long)."""
    truth = np.load(recording.folder / "truth.npz")
    world = WorldTransform.from_json(p.masks.attrs["world"])
    centroids = world.to_oriented(truth["centroid"][:FRAMES])
    errors = np.linalg.norm(p.tracking["centers"].values - centroids, axis=1)
    assert errors.max() < 0.006
    by_frame = p.tracking["centers"].swap_dims(time="frame").sel(frame=20)
    assert np.linalg.norm(by_frame - centroids[20]) < 0.006


def test_cameras_see_the_mouse_where_its_masks_are(p: ProjectReader, recording: Recording) -> None:
    """Points of the oriented world fall on the pixels where the calibration file's cameras have them."""
    truth = np.load(recording.folder / "truth.npz")
    points = truth["keypoints"][:FRAMES].reshape(-1, 3)
    calibrated = Cameras.from_json(p.masks.attrs["cameras"])
    expected, _ = to_pixels(points, calibrated.intrinsics, calibrated.world_to_camera)
    world = WorldTransform.from_json(p.masks.attrs["world"])
    found, depth = to_pixels(world.to_oriented(points), p.cameras.intrinsics, p.cameras.world_to_camera)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert (depth > 0).all()
    assert p.cameras.names == ("0", "1", "2", "3")
    assert not p.cameras.distortion.any()
    centers, _ = to_pixels(p.tracking["centers"].values, p.cameras.intrinsics, p.cameras.world_to_camera)
    box = p.masks["box"].values.transpose(1, 0, 2)
    assert (centers >= box[..., :2]).all()
    assert (centers < box[..., 2:]).all()


def test_embedding_is_that_of_the_csv(p: ProjectReader, whole_project: Path) -> None:
    table = rows(whole_project / "latest" / "embedding.csv")
    for key in ("t", "frame", "time", "heading", "speed", "height", "state"):
        expected = [float(row[key] or "nan") for row in table]
        np.testing.assert_allclose(p.embedding[key], expected, rtol=1e-5, atol=1e-6)
    for i, axis in enumerate("xy"):
        expected = [float(row[f"map_{axis}"] or "nan") for row in table]
        np.testing.assert_allclose(p.embedding["map"].sel(map_axis=axis), expected, rtol=1e-5)
        np.testing.assert_allclose(p.embedding["map"][:, i], expected, rtol=1e-5)
    first = [float(row["e00"] or "nan") for row in table]
    np.testing.assert_allclose(p.embedding["embedding"].isel(dimension=0), first, rtol=1e-5, atol=1e-6)


# -- lazy arrays --------------------------------------------------------------------------------------------------
@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Object and number of bytes of each read of a chunk, or part of one, of a group."""
    found: list[tuple[str, int]] = []
    get = GroupStore.get

    async def counted(self: GroupStore, key: str, *args: Any, **options: Any) -> Any:
        data = await get(self, key, *args, **options)
        if "/c/" in key and data is not None:
            found.append((key, len(data)))
        return data

    monkeypatch.setattr(GroupStore, "get", counted)
    return found


def test_one_frame_reads_the_blocks_of_one_frame(whole_project: Path, reads: list[tuple[str, int]]) -> None:
    opened = zoosplat.open(str(whole_project))
    images = opened.images
    reads.clear()
    chosen = images["rgb"].isel(time=7).sel(camera="1")[2:20, ::2]
    assert reads == []
    pixels = chosen.values
    assert {key for key, _ in reads} == {"rgb/c/0/0/0/0/0"}
    (whole,) = (whole_project / "latest" / "images.zarr").glob("rgb/c/0/0/0/0/0")
    assert sum(n for _, n in reads) < whole.stat().st_size / 10
    group = zarr.open_group(whole_project / "latest" / "images.zarr", mode="r")
    array: Any = group["rgb"]
    np.testing.assert_array_equal(pixels, array[7, 1, 2:20, ::2])


INDICES: dict[str, Any] = {
    "a frame": 5,
    "the last one": -1,
    "backwards": slice(None, None, -2),
    "a list": [9, 2, 2],
    "of some cameras": (slice(3, 6), [3, 0]),
    "by a mask": (np.arange(FRAMES) % 7 == 0, 1),
    "every dimension": (slice(4), [1], slice(3, 5), [0, 7], 2),
}


@pytest.mark.parametrize("index", INDICES.values(), ids=INDICES.keys())
def test_lazy_arrays_are_indexed_as_others_are(index: Any, p: ProjectReader) -> None:
    loaded = p.images["rgb"].copy(deep=False).load()
    np.testing.assert_array_equal(p.images["rgb"][index].values, loaded[index].values)


def test_a_damaged_block_is_named(whole_project: Path, tmp_path: Path) -> None:
    shutil.copytree(whole_project, tmp_path / "project", symlinks=True)
    shard = tmp_path / "project" / "latest" / "masks.zarr" / "mask" / "c" / "0" / "0" / "0" / "0"
    shard.unlink()
    masks = zoosplat.open(str(tmp_path / "project")).masks
    with pytest.raises(UserError, match=r"masks.zarr/mask/c/0/0/0/0 is missing; run stage ingest with --force"):
        masks["mask"].isel(time=3).load()
