"""Keypoints of SLEAP, DeepLabCut and Lightning Pose, from files that these programs' own writers made."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pytest

from zoosplat.config.experiment import Experiment
from zoosplat.errors import UserError
from zoosplat.recording.keypoints import read_all_keypoints, read_keypoints
from zoosplat.recording.sources import open_source
from zoosplat.recording.video import VideoInfo

FRAMES, PARTS = 6, ("nose", "tail base", "tail tip")
LEVELS = ["scorer", "bodyparts", "coords"]


def truth(seed: int = 0) -> Any:
    """[FRAMES, K, 3] x, y and confidence; one keypoint is not told, and another frame has none."""
    values = np.random.default_rng(seed).uniform(0, 90, (FRAMES, len(PARTS), 3))
    values[..., 2] = np.linspace(0.3, 1, FRAMES * len(PARTS)).reshape(FRAMES, -1)
    values[1, 2], values[4] = np.nan, np.nan
    return values


def frame_of(values: Any, coords: tuple[str, ...] = ("x", "y", "likelihood")) -> pd.DataFrame:
    """The table of predictions that DeepLabCut writes."""
    columns = pd.MultiIndex.from_product([["DLC_resnet50_shuffle1"], PARTS, coords], names=LEVELS)
    return pd.DataFrame(values[..., : len(coords)].reshape(len(values), -1), columns=columns, index=range(len(values)))


def read(path: Path, n_frames: int = FRAMES, n_declared: int | None = None) -> Any:
    return read_keypoints(str(path), f"data.keypoints[0] = {path.name}", n_frames, n_declared or n_frames)


def refused(path: Path, n_frames: int = FRAMES) -> str:
    with pytest.raises(UserError) as caught:
        read(path, n_frames)
    (line,) = str(caught.value).splitlines()
    return line.removeprefix(f"data.keypoints[0] = {path.name}: ")


# -- DeepLabCut and Lightning Pose --------------------------------------------------------------------------------
def test_predictions_in_csv(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    frame_of(truth()).to_csv(path)
    np.testing.assert_allclose(read(path), truth(), rtol=1e-6)
    # Of a video that is read up to its fifth frame.
    np.testing.assert_allclose(read(path, 5, FRAMES), truth()[:5], rtol=1e-6)


def test_further_columns_of_lightning_pose_do_not_matter(tmp_path: Path) -> None:
    columns = pd.MultiIndex.from_product([["heatmap_tracker"], PARTS, ["x_var", "x", "y", "likelihood"]], names=LEVELS)
    values = np.concatenate([np.full((FRAMES, len(PARTS), 1), 7.0), truth()], 2).reshape(FRAMES, -1)
    pd.DataFrame(values, columns=columns).to_csv(tmp_path / "a.csv")
    np.testing.assert_allclose(read(tmp_path / "a.csv"), truth(), rtol=1e-6)


def test_the_surest_of_several_animals(tmp_path: Path) -> None:
    both = np.stack([truth(0), truth(1)], 1)
    both[2, 0, :, 2], both[2, 1, :, 2] = 0.2, 0.9
    both[3, 0, :, 2], both[3, 1, :, 2] = 0.8, 0.1
    levels = ["scorer", "individuals", "bodyparts", "coords"]
    columns = pd.MultiIndex.from_product([["s"], ["one", "other"], PARTS, ["x", "y", "likelihood"]], names=levels)
    pd.DataFrame(both.reshape(FRAMES, -1), columns=columns).to_csv(tmp_path / "a.csv")
    found = read(tmp_path / "a.csv")
    np.testing.assert_allclose(found[2], both[2, 1], rtol=1e-6)
    np.testing.assert_allclose(found[3], both[3, 0], rtol=1e-6)


@pytest.mark.parametrize("in_one_column", [False, True])
def test_labels_of_a_person_belong_to_the_frames_that_their_pictures_name(tmp_path: Path, in_one_column: bool) -> None:
    labelled = truth()[[5, 0]]
    table = frame_of(labelled, ("x", "y"))
    names = [("labeled-data", "mouse2", f"img0000{i}.png") for i in (5, 0)]
    table.index = pd.Index(["/".join(name) for name in names]) if in_one_column else pd.MultiIndex.from_tuples(names)
    table.to_csv(tmp_path / "CollectedData.csv")
    found = read(tmp_path / "CollectedData.csv")
    np.testing.assert_allclose(found[[5, 0], :, :2], labelled[..., :2], rtol=1e-6)
    assert (found[[5, 0], :, 2] == 1).all()
    assert np.isnan(found[1:5]).all()


def test_predictions_in_hdf5(tmp_path: Path) -> None:
    pytest.importorskip("tables")
    frame_of(truth()).to_hdf(tmp_path / "a.h5", key="df_with_missing", format="table", mode="w")
    np.testing.assert_allclose(read(tmp_path / "a.h5"), truth(), rtol=1e-6)


class Harmful:
    """An object whose unpickling writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_a_header_that_would_run_code_is_refused(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        rows = np.zeros(FRAMES, [("index", "<i8"), ("values_block_0", "<f8", (9,))])
        table = file.create_dataset("df_with_missing/table", data=rows)
        table.attrs["values_block_0_kind"] = np.bytes_(pickle.dumps(Harmful(tmp_path / "harm"), protocol=0))
    assert "cannot be read as keypoints (its header names" in refused(tmp_path / "a.h5")
    assert not (tmp_path / "harm").exists()


# -- SLEAP --------------------------------------------------------------------------------------------------------
def sleap_labels(values: Any, video: str = "mouse.mp4", by_person: tuple[int, ...] = ()) -> Any:
    """Labels of SLEAP with two predicted animals in each frame, and one that a person labelled in some."""
    sio = pytest.importorskip("sleap_io")
    skeleton, of = sio.Skeleton(list(PARTS)), sio.Video(filename=video, open_backend=False)
    frames = []
    for i, points in enumerate(values):
        if np.isnan(points).all():
            continue
        scores = np.nan_to_num(points[:, 2])
        predicted = [
            sio.PredictedInstance.from_numpy(points[:, :2] + 5, skeleton, point_scores=scores / 2, score=0.2),
            sio.PredictedInstance.from_numpy(points[:, :2], skeleton, point_scores=scores, score=0.4),
        ]
        drawn = [sio.Instance.from_numpy(points[:, :2] - 3, skeleton)] if i in by_person else []
        frames.append(sio.LabeledFrame(video=of, frame_idx=i, instances=[*predicted, *drawn]))
    return sio.Labels(labeled_frames=frames, videos=[of], skeletons=[skeleton])


def test_sleap(tmp_path: Path) -> None:
    path = tmp_path / "a.slp"
    sleap_labels(truth(), by_person=(2,)).save(str(path), embed=False)
    expected = truth()
    expected[2] = np.concatenate([expected[2, :, :2] - 3, np.ones((3, 1))], 1)
    np.testing.assert_allclose(read(path), expected, rtol=1e-5)


@pytest.mark.parametrize("preset", ["matlab", "standard"])
def test_sleap_analysis(tmp_path: Path, preset: str) -> None:
    sio = pytest.importorskip("sleap_io")
    labels = sleap_labels(truth())
    for frame in labels:
        frame.instances = frame.instances[1:]
    labels.update()
    sio.save_analysis_h5(labels, str(tmp_path / "a.h5"), preset=preset)
    np.testing.assert_allclose(read(tmp_path / "a.h5"), truth(), rtol=1e-5)


def test_sleap_of_several_videos_is_refused(tmp_path: Path) -> None:
    sio = pytest.importorskip("sleap_io")
    one, other = sleap_labels(truth()), sleap_labels(truth(1), "other.mp4")
    labels = sio.Labels(labeled_frames=[*one, *other])
    labels.save(str(tmp_path / "a.slp"), embed=False)
    assert "it is about 2 videos, and must be about this camera's alone" in refused(tmp_path / "a.slp")


def test_sleap_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sleap_io", None)
    with h5py.File(tmp_path / "a.slp", "w") as file:
        file.create_group("metadata")
    assert refused(tmp_path / "a.slp").startswith("needs sleap_io; install zoosplat[keypoints]")


# -- what does not fit --------------------------------------------------------------------------------------------
def test_keypoints_of_another_video_are_refused(tmp_path: Path) -> None:
    frame_of(truth()).to_csv(tmp_path / "a.csv")
    assert refused(tmp_path / "a.csv", 7).startswith("has 6 rows, but the video has 7 frames; export")
    assert refused(tmp_path / "a.csv", 5).startswith("has 6 rows, but the video has 5 frames; export")
    table = frame_of(truth()[:1], ("x", "y"))
    table.index = pd.Index(["labeled-data/mouse/img0012.png"])
    table.to_csv(tmp_path / "b.csv")
    assert refused(tmp_path / "b.csv", 12).startswith("has keypoints of frame 12, but the video has 12 frames, from 0")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "cannot be read as keypoints (it has no header"),
        ("frame,x,y\n0,1,2\n", "cannot be read as keypoints (it has no header"),
        ("scorer,a,a\nbodyparts,n,n\ncoords,u,v\n0,1,2\n", "cannot be read as keypoints (it has no columns x and y)"),
        ("scorer,a,a\nbodyparts,n,n\ncoords,x,y\n3,1,2\n", "cannot be read as keypoints (its rows are not numbered"),
        ("scorer,a,a\nbodyparts,n,n\ncoords,x,y\n0,1\n1,2,3\n", "cannot be read as keypoints ("),
        ("scorer,a,a\nbodyparts,n,n\ncoords,x,y\n", "cannot be read as keypoints ("),
        ("scorer,a,a\nbodyparts,n,n\ncoords,x,y\n0,,\n", "holds no keypoints"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, text: str, line: str) -> None:
    (tmp_path / "a.csv").write_text(text)
    assert refused(tmp_path / "a.csv", 1).startswith(line)


def test_a_recording_is_refused_with_a_line_for_each_file(recording: Any, tmp_path: Path) -> None:
    folder = recording.copy(tmp_path / "recording")
    frame_of(np.zeros((144, 3, 3)) + 0.5).to_csv(folder / "0.csv")
    frame_of(np.zeros((143, 3, 3)) + 0.5).to_csv(folder / "1.csv")
    frame_of(np.zeros((144, 3, 3)) + 0.5).to_csv(folder / "3.csv")
    names = ["0.csv", "1.csv", "2.csv", "3.csv"]
    with pytest.raises(UserError) as caught:
        open_source(
            Experiment.model_validate(recording.config(folder, data__masks="auto", data__keypoints=names))
        ).check()
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("data.keypoints[1] = 1.csv: has 143 rows, but the video has 144 frames")
    assert lines[1].startswith("data.keypoints[2] = 2.csv: no such file; check data.keypoints and data.directory")
    assert len(lines) == 2
    with pytest.raises(ValueError, match=r"data\.keypoints: help to make masks, but data.masks names files"):
        Experiment.model_validate(recording.config(folder, data__keypoints=names))


def test_all_cameras_together(tmp_path: Path) -> None:
    """A camera with fewer keypoints has none in the last places; frames that are not kept are left out."""
    frame_of(truth(0)).to_csv(tmp_path / "0.csv")
    few = frame_of(truth(1)).drop(columns="tail tip", level="bodyparts")
    few.to_csv(tmp_path / "1.csv")
    info = VideoInfo("", "", 90, 90, FRAMES, FRAMES, 30.0, None)
    names = [str(tmp_path / f"{c}.csv") for c in range(2)]
    found = read_all_keypoints(names, names, [info, info], np.array([0, 2, 4]))
    assert found.shape == (3, 2, 3, 3)
    np.testing.assert_allclose(found[:, 0], truth(0)[::2], rtol=1e-6)
    np.testing.assert_allclose(found[:, 1, :2], truth(1)[::2, :2], rtol=1e-6)
    assert np.isnan(found[:, 1, 2]).all()
