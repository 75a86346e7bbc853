"""What a run refuses before it writes anything: outside files, frames, and the place of the project."""

from __future__ import annotations

import json
import struct
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from zoosplat.config.experiment import Experiment
from zoosplat.errors import UserError
from zoosplat.formats import ply
from zoosplat.stages.outside_file_checks import check_outside_files
from zoosplat.stages.prechecks import check_before_run, check_kept_frames, check_project_place
from zoosplat.stages.registry import STAGES

if TYPE_CHECKING:
    from tests.conftest import Recording

ROOT = Path(__file__).resolve().parents[2]
ANIMALS = ROOT / "services" / "train" / "zoosplat_train" / "animals.safetensors"
ANIMALS_NETWORK = {"num_unets": 3, "base_filters": 16, "poolings": 3}


def configured(directory: str | Path = "/recording", **sections: Any) -> Experiment:
    data = {"videos": ["videos/a.mp4", "videos/b.mp4"], "masks": ["masks/a.mp4", "masks/b.mp4"]}
    raw = {"data": {"directory": str(directory), "calibration": "c.h5", **data}, "center_rotation": {"ell": 0.2}}
    raw |= {"crop": {"ell": 0.2}}
    for name, values in sections.items():
        raw[name] = {**raw[name], **values} if isinstance(raw.get(name), dict) else values  # type: ignore[dict-item]
    return Experiment.model_validate(raw)


def problems(experiment: Experiment, *stages: str) -> list[str]:
    with pytest.raises(UserError) as refused:
        check_outside_files(experiment, stages or STAGES)
    return str(refused.value).splitlines()


# -- outside files ------------------------------------------------------------------------------------------------
def test_weights_to_begin_with_that_are_not_there(tmp_path: Path) -> None:
    for value, what in (
        (str(tmp_path / "nope.safetensors"), "no such file; check train.start_from"),
        (str(tmp_path / "nowhere"), "no project with a finished training"),
        (str(tmp_path), "no project with a finished training"),
    ):
        (line,) = problems(configured(train={"start_from": value}))
        assert line.startswith(f"train.start_from = {value}: ")
        assert what in line
    # A stage that does not run reads nothing, nor does the other trainer.
    check_outside_files(configured(train={"start_from": str(tmp_path)}), ["ingest", "render"])
    check_outside_files(configured(train={"start_from": str(tmp_path), "method": "dynamic"}), ["train"])
    for word in ("random", "animals"):
        check_outside_files(configured(train={"start_from": word}, model=ANIMALS_NETWORK), STAGES)


def test_a_training_to_begin_with(tmp_path: Path) -> None:
    folder = tmp_path / "results" / "train" / "0123456789abcdef"
    folder.mkdir(parents=True)
    experiment = configured(train={"start_from": str(folder)})
    assert "no project with a finished training" in problems(experiment, "train")[0]
    (folder / "done.json").write_text(json.dumps({"id": folder.name}))
    check_outside_files(experiment, ["train"])


def test_weights_of_another_architecture(tmp_path: Path) -> None:
    check_outside_files(configured(train={"start_from": str(ANIMALS)}, model=ANIMALS_NETWORK), STAGES)
    found = problems(configured(train={"start_from": str(ANIMALS)}, model={"network": "published", "poolings": 3}))
    assert [line.split(": ")[0] for line in found] == [
        "model.network = published",
        "model.base_filters = 8",
        "model.bottleneck = 512",
    ]
    assert all(str(ANIMALS) in line for line in found)
    assert "network with 16; set it so" in found[1]


def test_damaged_weights(tmp_path: Path) -> None:
    path, whole = tmp_path / "weights.safetensors", ANIMALS.read_bytes()
    header = json.dumps({"conv1.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    other = struct.pack("<Q", len(header)) + header + bytes(4)
    for data, what in (
        (b"", "is empty"),
        (b"no weights", "not a .safetensors file"),
        (whole[:100], "not a .safetensors file"),
        (whole[:-1], f"cut off: {len(whole) - 1} of {len(whole)} bytes"),
        (b"\xff" * 8 + whole, "not a .safetensors file"),
        (other, "not the weights of a network of zoosplat"),
    ):
        path.write_bytes(data)
        (line,) = problems(configured(train={"start_from": str(path)}, model=ANIMALS_NETWORK))
        assert what in line
        assert str(path) in line
    path.unlink()
    path.mkdir()
    assert "a folder" in problems(configured(train={"start_from": str(path)}))[0]


def test_files_of_the_dynamic_trainer_and_of_features(tmp_path: Path) -> None:
    points = tmp_path / "points.ply"
    columns = {name: np.zeros(5) for name in ("x", "y", "z")}
    whole = ply.encode(columns)
    checkpoint, weights = tmp_path / "chkpnt_fine_20.pth", tmp_path / "resnet.pth"
    for path in (checkpoint, weights):
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("archive/data.pkl", b"\x80")
    points.write_bytes(whole)
    experiment = configured(
        train={"method": "dynamic"},
        dynamic={"initial_ply": str(points), "start_checkpoint": str(checkpoint)},
        features={"encoder": "images", "weights": str(weights)},
    )
    check_outside_files(experiment, STAGES)
    for path in (checkpoint, weights):
        path.write_bytes(path.read_bytes()[:-10])
    for data, what in (
        (whole[:-1], "cut off"),
        (ply.encode({"x": np.zeros(5), "y": np.zeros(5)}), "no property z"),
        (ply.encode({name: np.zeros(0) for name in "xyz"}), "no points"),
        (b"ply\nformat ascii 1.0\nend_header\n", "not a binary little-endian PLY file"),
        (whole.replace(b"vertex 5", b"vertex -5"), "not a number of vertices"),
    ):
        points.write_bytes(data)
        first, second, third = problems(experiment)
        assert first.startswith(f"dynamic.initial_ply = {points}: ")
        assert what in first
        assert second.startswith(f"dynamic.start_checkpoint = {checkpoint}: cut off")
        assert third.startswith(f"features.weights = {weights}: cut off")
    for path in (points, checkpoint, weights):
        path.unlink()
    assert ["no such file" in line for line in problems(experiment)] == [True] * 3
    assert len(problems(experiment, "train")) == 2
    lpips = configured(evaluate={"lpips_weights": str(tmp_path / "lpips.pth")})
    assert problems(lpips)[0].startswith(f"evaluate.lpips_weights = {tmp_path}/lpips.pth: no such file")
    check_outside_files(lpips, ["train"])
    named = configured(train={"method": "dynamic"}, dynamic={"start_checkpoint": str(tmp_path / "model.pth")})
    assert "is called chkpnt_coarse_N.pth" in problems(named)[0]


# -- frames -------------------------------------------------------------------------------------------------------
def test_frames_that_are_not_kept() -> None:
    with pytest.raises(UserError, match=r"render\.frame = 24: there are 24 kept frames; nearest: 23, or null"):
        check_kept_frames(configured(render={"frame": 24}), STAGES, 24)
    check_kept_frames(configured(render={"frame": 23}), STAGES, 24)
    check_kept_frames(configured(render={"frame": 24}), ["train"], 24)


def test_too_few_frames() -> None:
    check_kept_frames(configured(), STAGES, 6)
    with pytest.raises(UserError, match=r"^5 frames are kept: stage embedding needs 2 frames in the first third"):
        check_kept_frames(configured(), STAGES, 5)
    check_kept_frames(configured(embedding={"fit_to": "all"}), STAGES, 5)
    with pytest.raises(UserError, match=r"stage train needs 1 frame in the first third"):
        check_kept_frames(configured(), ["train"], 2)
    check_kept_frames(configured(train={"fit_to": "all"}), ["train"], 2)
    with pytest.raises(UserError, match="stage center_rotation needs 2 frames"):
        check_kept_frames(configured(), ["center_rotation"], 1)


# -- all of it ----------------------------------------------------------------------------------------------------
def test_all_checks_before_a_run(recording: Recording, finished: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"render__frame": 144, "train__start_from": str(tmp_path / "w.safetensors")}
    wrong = Experiment.model_validate(recording.config(**changes))
    right = Experiment.model_validate(recording.config(render__frame=143))
    assert check_before_run(right, list(STAGES), None) == ()
    masks = str(finished / "latest" / "masks.zarr")
    for stages, url in ((list(STAGES), None), (["pack", "train", "render"], masks), (["train", "render"], masks)):
        with pytest.raises(UserError) as refused:
            check_before_run(wrong, stages, url)
        frame, weights = str(refused.value).splitlines()
        assert frame.startswith("render.frame = 144: there are 144 kept frames")
        assert weights.startswith("train.start_from = ")
    # Of what does not run nothing is asked.
    assert check_before_run(wrong, ["evaluate"], masks) == ()
    assert check_before_run(wrong, [], masks) == ()


def test_what_has_changed_since_the_masks_were_made(recording: Recording, finished: Path, tmp_path: Path) -> None:
    masks, data = str(finished / "latest" / "masks.zarr"), recording.copy(tmp_path / "recording")
    wide = Experiment.model_validate(recording.config(data, evaluate__image_downsample=7))
    with pytest.raises(UserError, match=r"evaluate\.image_downsample = 7: does not divide images of 96 x 80"):
        check_before_run(wide, ["evaluate"], masks)
    (data / "videos/3.mp4").unlink()
    (data / "masks/3.mp4").unlink()
    experiment = Experiment.model_validate(recording.config(data))
    assert check_before_run(experiment, ["train"], masks) == ()
    with pytest.raises(UserError, match=r"videos/3\.mp4 \(video of camera 3\): no such file") as refused:
        check_before_run(experiment, ["pack"], masks)
    assert "masks/3.mp4" not in str(refused.value)


# -- where results go ---------------------------------------------------------------------------------------------
S3 = "s3://lab/mouse"


@pytest.mark.parametrize(
    ("project", "directory", "data", "words"),
    [
        (S3, S3, {}, (f"{S3}: the project would be the folder of the recording", f"data.directory = {S3}")),
        (S3 + "/", S3, {}, ("would be the folder of the recording",)),
        (S3, f"{S3}/results", {}, ("lies in its results, where results go",)),
        (S3, f"{S3}/model/films", {}, ("lies in its model, where results go",)),
        (
            f"{S3}/videos",
            S3,
            {},
            ("a folder of the recording that holds its files", "data.videos", f"{S3}/videos/a.mp4"),
        ),
        (f"{S3}/masks/b.mp4", S3, {}, ("is a file of the recording", "data.masks")),
        (f"{S3}/masks/b.mp4/p", S3, {}, ("is a file of the recording", "data.masks")),
        (S3, "s3://lab/rat", {"calibration": f"{S3}/runs/c.h5"}, ("runs is where results go", "data.calibration")),
        (S3, "s3://lab/rat", {"up": f"{S3}/results/up.npz"}, ("results is where results go", "data.up")),
    ],
)
def test_results_among_what_was_recorded(
    project: str, directory: str, data: dict[str, Any], words: tuple[str, ...]
) -> None:
    with pytest.raises(UserError) as refused:
        check_project_place(project, configured(directory, data=data))
    assert all(word in str(refused.value) for word in words), refused.value


@pytest.mark.parametrize(
    ("project", "directory", "data"),
    [
        (S3, f"{S3}/recording", {}),  # as the demo has it
        (S3, f"{S3}_6cam", {}),
        (f"{S3}/zoosplat", S3, {}),
        ("s3://lab", S3, {}),
        (S3, "s3://lab/rat", {"calibration": f"{S3}/c.h5"}),  # as the published tool has it
        ("s3://rat/mouse", S3, {}),
    ],
)
def test_places_that_are_fine(project: str, directory: str, data: dict[str, Any]) -> None:
    check_project_place(project, configured(directory, data=data))


def test_places_are_compared_without_symbolic_links(tmp_path: Path) -> None:
    (tmp_path / "mouse").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "mouse")
    for project in (tmp_path / "link", tmp_path / "x" / ".." / "mouse"):
        with pytest.raises(UserError, match="would be the folder of the recording"):
            check_project_place(str(project), configured(tmp_path / "mouse"))
    check_project_place(str(tmp_path / "link" / "project"), configured(tmp_path / "mouse"))
