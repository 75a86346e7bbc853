"""`zoosplat.open`: each property against what is read without it, on a small finished project."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import pytest
import zarr

import zoosplat
from zoosplat.config.experiment import Experiment
from zoosplat.errors import UserError
from zoosplat.formats import ply
from zoosplat.geometry.cameras import Cameras, WorldTransform
from zoosplat.geometry.projection import project as to_pixels
from zoosplat.notebook import PinholeCamera
from zoosplat.notebook.project import ProjectReader
from zoosplat.stages.lookup import open_run
from zoosplat.stages.projects import Project
from zoosplat.storage import schema
from zoosplat.storage.group_store import GroupStore

if TYPE_CHECKING:
    from tests.conftest import S3, Recording

MADE_BEFORE = Path(__file__).parents[1] / "data" / "project-0.1.0" / "project"
FPS = 50.0  # of the synthetic recording
FRAMES, CAMERAS = 36, 4


@pytest.fixture(scope="module")
def p(whole_project: Path) -> ProjectReader:
    return zoosplat.open(str(whole_project))


def output(project: Path, name: str) -> Path:
    return (project / "latest" / name).resolve()


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


# -- what is read without torch -----------------------------------------------------------------------------------
def test_which_project_and_run(p: ProjectReader, whole_project: Path) -> None:
    latest = json.loads((whole_project / "latest.json").read_text())["run"]
    assert (p.url, p.run_id) == (str(whole_project), latest)
    assert zoosplat.open(str(whole_project), run=latest[:10]).run_id == latest
    assert repr(p) == f"ProjectReader({str(whole_project)!r}, run={latest!r})"
    with pytest.raises(UserError, match="there is no run 1999"):
        zoosplat.open(str(whole_project), run="1999")
    with pytest.raises(UserError, match="holds no run"):
        zoosplat.open(str(whole_project / "runs"))


def test_config_is_that_of_the_run(p: ProjectReader, whole_project: Path) -> None:
    assert p.config == Experiment.from_yaml((whole_project / "latest" / "config.yaml").read_text())
    assert p.config.holdout_views == (2,)


def test_runs_are_those_of_the_records(p: ProjectReader, whole_project: Path) -> None:
    table = p.runs
    (record,) = (json.loads(path.read_text()) for path in whole_project.glob("runs/*/run.json"))
    assert table["id"].tolist() == [record["id"]]
    assert table["created"].iloc[0].isoformat() == record["created"]
    assert (table["state"].tolist(), table["latest"].tolist(), table["changes"].tolist()) == (["done"], [True], [()])
    means = {row["camera"]: row for row in rows(output(whole_project, "evaluation") / "metrics_test.csv")}
    for group in ("held_out", "observed"):
        for metric in ("iou", "psnr"):
            expected = float(means[f"mean_{group}"][metric])
            assert table[f"{group}_{metric}"].iloc[0] == pytest.approx(expected, rel=1e-5)


DATASETS = {"masks": "masks.zarr", "images": "images.zarr", "tracking": "tracking.zarr", "features": "features.zarr"}
DATASETS["embedding"] = "embedding.zarr"
AS_COORDINATES = {"time", "t", "frame", "intrinsics", "world_to_camera"}  # time in embedding.zarr; the rest: cameras


@pytest.mark.parametrize("name", DATASETS)
def test_datasets_hold_the_arrays_with_units_and_coordinates(name: str, p: ProjectReader, whole_project: Path) -> None:
    dataset = getattr(p, name)
    group = zarr.open_group(output(whole_project, DATASETS[name]), mode="r")
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


def masks_of_moving_cameras(url: str) -> zarr.Group:
    """Four kept frames, every fifth of a recording of 60 frames a second, of two cameras."""
    sizes = {"T": 4, "C": 2, "h": 8, "w": 8}
    attributes = {"fps": 60.0, "frame_jump": 5, "camera_names": ["left", "right"]}
    masks = schema.create(url, "masks.zarr", sizes, 64, attributes)
    schema.array(masks, "frame")[...] = [0, 5, 10, 15]
    poses = np.arange(128.0).reshape(4, 2, 4, 4)
    schema.add_moving(masks, {"time": [0, 0.1, 0.4, 1], "pose": poses, "pictured": np.ones((4, 2), bool)})
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
    assert dataset["pictured"].dims == ("time", "camera")


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
    table = rows(output(whole_project, "embedding.csv"))
    for key in ("t", "frame", "time", "heading", "speed", "height", "state"):
        expected = [float(row[key] or "nan") for row in table]
        np.testing.assert_allclose(p.embedding[key], expected, rtol=1e-5, atol=1e-6)
    for i, axis in enumerate("xy"):
        expected = [float(row[f"map_{axis}"] or "nan") for row in table]
        np.testing.assert_allclose(p.embedding["map"].sel(map_axis=axis), expected, rtol=1e-5)
        np.testing.assert_allclose(p.embedding["map"][:, i], expected, rtol=1e-5)
    first = [float(row["e00"] or "nan") for row in table]
    np.testing.assert_allclose(p.embedding["embedding"].isel(dimension=0), first, rtol=1e-5, atol=1e-6)


def test_metrics_have_a_row_a_frame_and_view(p: ProjectReader, whole_project: Path) -> None:
    table, expected = p.metrics(), rows(output(whole_project, "evaluation") / "frames_test.csv")
    assert len(table) == len(expected) == CAMERAS * table["t"].nunique()
    assert table.columns.tolist() == list(expected[0])
    assert table["camera"].tolist() == [row["camera"] for row in expected]
    assert table["held_out"].tolist() == [row["held_out"] == "1" for row in expected]
    for key in expected[0].keys() - {"camera", "held_out"}:
        np.testing.assert_array_equal(table[key], [float(row[key] or "nan") for row in expected])


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
    (whole,) = output(whole_project, "images.zarr").glob("rgb/c/0/0/0/0/0")
    assert sum(n for _, n in reads) < whole.stat().st_size / 10
    group = zarr.open_group(output(whole_project, "images.zarr"), mode="r")
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
    shard = output(tmp_path / "project", "masks.zarr") / "mask" / "c" / "0" / "0" / "0" / "0"
    shard.unlink()
    masks = zoosplat.open(str(tmp_path / "project")).masks
    with pytest.raises(UserError, match=r"masks.zarr/mask/c/0/0/0/0 is missing; run stage ingest with --force"):
        masks["mask"].isel(time=3).load()


# -- the model ----------------------------------------------------------------------------------------------------
def test_gaussians_are_those_of_the_ply_file(p: ProjectReader, whole_project: Path) -> None:
    (path,) = output(whole_project, "renders").glob("frame_*.ply")
    table = ply.decode(path.read_bytes())
    found = p.gaussians(int(path.stem.removeprefix("frame_")))
    assert len(found) == len(table["x"]) > 20
    columns = {
        "centers_m": np.stack([table[key] for key in "xyz"], 1),
        "scales_m": np.exp(np.stack([table[f"scale_{i}"] for i in range(3)], 1)),
        "opacities": 1 / (1 + np.exp(-table["opacity"])),
        "colors": 0.5 + 0.28209479 * np.stack([table[f"f_dc_{i}"] for i in range(3)], 1),
        "quaternions": np.stack([table[f"rot_{i}"] for i in range(4)], 1),
    }
    for name, expected in columns.items():
        values = getattr(found, name)
        assert values.dtype == np.float32
        np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-5, err_msg=name)
        with pytest.raises(ValueError, match="read-only"):
            values[0] = 0


def test_gaussians_lie_where_the_mouse_is(p: ProjectReader) -> None:
    found = p.gaussians(8)
    middle = np.average(found.centers_m, axis=0, weights=found.opacities)
    assert np.linalg.norm(middle - p.tracking["centers"][8].values) < 0.02


def test_rendering_of_a_camera_is_the_one_that_was_evaluated(p: ProjectReader) -> None:
    """Its IoU with the mask and its PSNR are those of the evaluation; outside the window all is white."""
    table = p.metrics().set_index(["t", "camera"])
    n_pixels = p.images.attrs["full_width"] * p.images.attrs["full_height"]
    t = int(p.metrics()["t"].iloc[0])
    for camera, name in enumerate(p.cameras.names):
        image, opacity = p.render(t, name)
        mask = p.images["mask"].isel(time=t, camera=camera).values
        rgb = p.images["rgb"].isel(time=t, camera=camera).values / 255
        assert image.shape == rgb.shape
        assert image.dtype == np.uint8
        assert opacity.dtype == np.float32
        iou = ((opacity > 0.5) & mask).sum() / ((opacity > 0.5) | mask).sum()
        assert iou == pytest.approx(table.loc[(t, name), "iou"], abs=1e-5)
        truth = np.where(mask[..., None], rgb, 1)
        psnr = -10 * np.log10(((image / 255 - truth) ** 2).sum() / (3 * n_pixels))
        assert psnr == pytest.approx(table.loc[(t, name), "psnr"], abs=0.05)
        np.testing.assert_array_equal(p.render(t, camera).image, image)


def test_rendering_from_a_pose_is_that_of_stage_render(p: ProjectReader, whole_project: Path) -> None:
    folder = output(whole_project, "renders")
    index = json.loads((folder / "index.json").read_text())
    view = {key: np.array(value) for key, value in index["view"].items()}
    (still,) = (entry for entry in index["files"] if entry["file"] == "still_free.png")
    image, _ = p.render(still["t"], PinholeCamera(**view, width=index["width"], height=index["height"]))
    expected = cv2.imread(str(folder / "still_free.png"))
    assert expected is not None
    assert np.abs(image.astype(int) - expected[..., ::-1]).mean() < 0.05


def test_camera_that_looks_at_the_animal_has_it_in_the_middle(p: ProjectReader) -> None:
    center = p.tracking["centers"][8].values
    camera = PinholeCamera.looking_at(center + np.array([0.2, -0.15, 0.15]), center, width=60, height=40)
    _, opacity = p.render(8, camera)
    ys, xs = np.nonzero(opacity > 0.5)
    assert opacity.shape == (40, 60)
    assert abs(xs.mean() - 29.5) < 6
    assert abs(ys.mean() - 19.5) < 6


def test_frames_and_cameras_that_are_not_there(p: ProjectReader) -> None:
    with pytest.raises(UserError, match="frame t = 36: there are 36 kept frames, 0 to 35"):
        p.gaussians(36)
    with pytest.raises(UserError, match="frame t = -1"):
        p.render(-1, 0)
    for camera in ("top", 4):
        with pytest.raises(UserError, match=f"no camera {camera!r}; there are 4: 0, 1, 2, 3"):
            p.render(3, camera)


# -- what has not run, other layouts, other storage -----------------------------------------------------------------
READS: dict[str, tuple[Callable[[ProjectReader], object], str]] = {
    "masks": (lambda p: p.masks, "ingest"),
    "cameras": (lambda p: p.cameras, "ingest"),
    "tracking": (lambda p: p.tracking, "center_rotation"),
    "images": (lambda p: p.images, "pack"),
    "features": (lambda p: p.features, "features"),
    "embedding": (lambda p: p.embedding, "embedding"),
    "metrics": (lambda p: p.metrics(), "evaluate"),
    "gaussians": (lambda p: p.gaussians(3), "train"),
    "render": (lambda p: p.render(3, 0), "train"),
}


@pytest.mark.parametrize("name", READS)
def test_a_stage_that_has_not_run_is_named(name: str, whole_project: Path, tmp_path: Path) -> None:
    """It is there as soon as it has."""
    read, stage = READS[name]
    copy = tmp_path / "project"
    shutil.copytree(whole_project, copy, symlinks=True)
    mark = Path(open_run(Project.at(str(copy))).result(stage).folder) / "done.json"
    away = mark.rename(tmp_path / "done.json")
    opened = zoosplat.open(str(copy))
    command = f"zoosplat run {copy}/runs/{opened.run_id}/config.yaml --project {copy} --until {stage}"
    with pytest.raises(UserError, match=f"stage {stage} of run .* has not finished") as caught:
        read(opened)
    assert f"`{command}` makes it" in str(caught.value)
    assert "\n" not in str(caught.value)
    away.rename(mark)
    read(opened)


def test_a_project_of_the_earlier_layout() -> None:
    opened = zoosplat.open(str(MADE_BEFORE))
    assert opened.runs["id"].tolist() == ["before-runs"]
    assert "earlier layout" in opened.runs["state"].iloc[0]
    expected: Any = zarr.open_group(MADE_BEFORE / "tracking.zarr", mode="r")["centers"]
    np.testing.assert_array_equal(opened.tracking["centers"], expected[...])
    assert opened.images["rgb"].isel(time=11).values.std() > 1
    assert opened.embedding["map"].shape == (12, 2)
    assert len(opened.metrics()) == 16
    assert len(opened.gaussians(5)) > 20


def test_the_same_from_s3(s3_here: S3, p: ProjectReader, whole_project: Path) -> None:
    bucket = s3_here.bucket()
    s3_here.put_folder(whole_project, bucket, "lab/mouse7")
    before = s3_here.objects(bucket)
    there = zoosplat.open(f"s3://{bucket}/lab/mouse7")
    for name in ("tracking", "embedding"):
        assert getattr(there, name).equals(getattr(p, name))
    frame = there.images["rgb"].isel(time=7)
    np.testing.assert_array_equal(frame.values, p.images["rgb"].isel(time=7).values)
    assert there.metrics().equals(p.metrics())
    assert there.runs.equals(p.runs)
    np.testing.assert_array_equal(there.gaussians(8).centers_m, p.gaussians(8).centers_m)
    np.testing.assert_array_equal(there.render(8, "2").image, p.render(8, "2").image)
    assert s3_here.objects(bucket) == before


def test_nothing_is_written(whole_project: Path, tmp_path: Path) -> None:
    from zoosplat.storage import listing

    before = listing.manifest(str(whole_project))
    opened = zoosplat.open(str(whole_project))
    for read, _ in READS.values():
        read(opened)
    assert opened.runs is not None
    assert listing.manifest(str(whole_project)) == before
    with pytest.raises(ValueError, match="read-only"):
        opened.tracking["centers"][0] = 0


# -- packages -----------------------------------------------------------------------------------------------------
def run_python(program: str, *arguments: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], check=True, capture_output=True, text=True
    ).stdout


def test_import_is_quick_and_torch_is_for_the_model_alone(whole_project: Path) -> None:
    program = (
        "import sys, zoosplat\n"
        "assert not {'numpy', 'zarr', 'pydantic', 'xarray'} & sys.modules.keys()\n"
        "p = zoosplat.open(sys.argv[1])\n"
        "p.tracking, p.embedding, p.features, p.masks, p.runs, p.config, p.cameras, p.metrics()\n"
        "p.images['rgb'].isel(time=3).values\n"
        "assert 'torch' not in sys.modules\n"
        "p.gaussians(3)\n"
        "print('torch' in sys.modules)\n"
    )
    assert run_python(program, str(whole_project)).strip() == "True"


@pytest.mark.parametrize(
    ("package", "reader", "names", "extra"),
    [
        ("xarray", "zoosplat.notebook.datasets", ["tracking", "images"], "notebook"),
        ("pandas", "zoosplat.notebook.tables", ["metrics"], "notebook"),
        ("torch", "zoosplat_model.notebook", ["gaussians", "render"], "model,gpu"),
    ],
)
def test_a_package_that_is_not_installed_is_named(
    package: str,
    reader: str,
    names: list[str],
    extra: str,
    whole_project: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, reader, raising=False)
    opened = zoosplat.open(str(whole_project))
    for name in names:
        with pytest.raises(UserError) as caught:
            READS[name][0](opened)
        assert str(caught.value) == f"{package} is not installed; pip install 'zoosplat[{extra}]'"
