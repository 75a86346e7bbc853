"""Stage segment with keypoints, and with SAM in the place of the network's second look."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import tiny_sam
import torch

from zoosplat.config.experiment import Experiment
from zoosplat.errors import UserError
from zoosplat.geometry.cameras import Cameras
from zoosplat.recording import video
from zoosplat.stages.begin import begin_run
from zoosplat.stages.contract import Context
from zoosplat.stages.projects import Project
from zoosplat.stages.runner import run_stage
from zoosplat.stages.runs import Run
from zoosplat.storage import schema
from zoosplat_segment import stage as segment
from zoosplat_segment.reading import InstantReader
from zoosplat_segment.results import InstantMasks
from zoosplat_segment.sam import Embedding, Prompt, Sam
from zoosplat_segment.segmenter import Segmenter

if TYPE_CHECKING:
    from tests.conftest import Recording

HELD_OUT, FRAMES, K, CPU = 3, 3, 20, torch.device("cpu")


def configured(
    recording: Recording, folder: Path, settings: dict[str, Any] | None = None, **changes: Any
) -> Experiment:
    chosen = {"background_frames": 24, "adapt_minutes": 0, "device": "cpu", **(settings or {})}
    frames = {"frame_jump": 2, "max_frames": FRAMES}
    changes |= {"data__masks": "auto", "holdout_views": [HELD_OUT], "segment": chosen, "ingest": frames}
    return Experiment.model_validate(recording.config(folder, **changes))


def run_segment(project: Path, experiment: Experiment) -> Run:
    with begin_run(Project.at(str(project)), experiment, ["segment"], []) as run:
        run_stage(segment.STAGE, run)
    return run


def write_keypoints(folder: Path) -> list[str]:
    """Points all over the animal in each frame, by each camera's own masks, in DeepLabCut's layout."""
    names = []
    for c in range(4):
        info = video.probe(str(folder / f"masks/{c}.mp4"), f"{c}")
        header = [
            ("scorer", "bodyparts", "coords"),
            *(("s", str(k), n) for k in range(K) for n in ("x", "y", "likelihood")),
        ]
        rows = [",".join(level) for level in zip(*header, strict=True)]
        for t, frame in enumerate(video.read_frames(info, 0, info.n_frames)):
            places = np.argwhere(video.luma_mask(video.planes(frame), 1))
            chosen = places[np.linspace(0, len(places) - 1, K).astype(int)]
            rows.append(",".join([str(t), *(f"{x},{y},0.9" for y, x in chosen)]))
        (folder / f"{c}.csv").write_text("\n".join(rows))
        names.append(f"{c}.csv")
    return names


@pytest.fixture(scope="module")
def folder(recording: Recording, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recording.copy(tmp_path_factory.mktemp("prompts") / "recording")


@pytest.fixture(scope="module")
def run(recording: Recording, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    experiment = configured(recording, folder, data__keypoints=write_keypoints(folder))
    return run_segment(tmp_path_factory.mktemp("project"), experiment)


def segmenter_of(run: Run, sam: Sam | None = None) -> Segmenter:
    group = run.open_input("segment")
    attributes: Any = dict(group.attrs)
    size = attributes["width"], attributes["height"]
    preparation = segment._read_preparation(Context(run, lambda *_: None), group)
    return Segmenter(preparation, run.experiment, Cameras.from_json(attributes["cameras"]), size, CPU, sam)


def read_instant(folder: Path, frame: int = 0) -> list[video.Planes]:
    infos = [video.probe(str(folder / f"videos/{c}.mp4"), f"{c}") for c in range(4)]
    return next(InstantReader(infos, 1).read([frame]))


def alike(one: InstantMasks, other: InstantMasks, cameras: Sequence[int]) -> bool:
    return all(np.array_equal(one.probability[c], other.probability[c]) for c in cameras)


# -- keypoints ----------------------------------------------------------------------------------------------------
def test_the_group_holds_the_keypoints_of_the_kept_frames(run: Run, folder: Path) -> None:
    found = schema.read(run.open_input("segment"), "keypoints")
    assert found.shape == (FRAMES, 4, K, 3)
    for c in range(4):
        given = np.loadtxt(folder / f"{c}.csv", delimiter=",", skiprows=3)
        np.testing.assert_allclose(found[:, c].reshape(FRAMES, -1), given[[0, 2, 4], 1:], rtol=1e-6)
    assert {key for key in run.sources["segment"] if "keypoints" in key} == {f"data.keypoints[{c}]" for c in range(4)}


def test_keypoints_find_an_animal_that_the_pictures_do_not_show(run: Run) -> None:
    """The pictures are the empty scene; keypoints of all observed views mark one place."""
    segmenter = segmenter_of(run)
    plates = schema.read(run.open_input("segment"), "plate")
    empty = [grey(plate) for plate in plates]
    keypoints = schema.read(run.open_input("segment"), "keypoints")[0]
    assert np.isnan(segmenter.segment(empty).agreement).all()
    assert np.isfinite(segmenter.segment(empty, keypoints).agreement[:HELD_OUT]).all()


def grey(plate: Any) -> video.Planes:
    return video.Planes(np.ascontiguousarray(plate.mean(-1).round().astype(np.uint8)), None, None, True, 601)


def test_keypoints_of_a_held_out_camera_stay_there_and_it_gets_no_others(run: Run, folder: Path) -> None:
    segmenter, frames = segmenter_of(run), read_instant(folder)
    keypoints = schema.read(run.open_input("segment"), "keypoints")[0]
    elsewhere = keypoints.copy()
    elsewhere[..., :2] = 10, 10
    plain = segmenter.segment(frames, keypoints)
    held_out, others = keypoints.copy(), keypoints.copy()
    held_out[HELD_OUT], others[:HELD_OUT] = elsewhere[HELD_OUT], elsewhere[:HELD_OUT]
    changed = segmenter.segment(frames, held_out)
    assert alike(plain, changed, range(HELD_OUT))
    assert not alike(plain, changed, [HELD_OUT])
    changed = segmenter.segment(frames, others)
    assert alike(plain, changed, [HELD_OUT])
    assert not alike(plain, changed, range(HELD_OUT))


# -- SAM ----------------------------------------------------------------------------------------------------------
class Echo(Sam):
    """Answers with the hint itself, and notes what it was asked."""

    def __init__(self) -> None:
        self.looked, self.asked = 0, 0

    def embed(self, picture: Any) -> Embedding:
        self.looked += 1
        assert picture.dtype == np.uint8
        return Embedding(None, *picture.shape[:2])

    def _answer(self, embedding: Embedding, prompt: Prompt, hint: torch.Tensor) -> torch.Tensor:
        self.asked += 1
        assert hint.shape == (embedding.height, embedding.width)
        return torch.logit(hint.clamp(0.001, 0.999))


def test_sam_is_asked_where_the_animal_is_and_looks_once_at_each_window(
    run: Run, folder: Path, recording: Recording
) -> None:
    """With answers that are the hints, the masks are hulls of hulls, wide, but where the true masks are."""
    echo = Echo()
    masks = segmenter_of(run, echo).segment(read_instant(folder))
    # The observed cameras in all rounds, and the held-out one with their help and alone.
    assert echo.looked == 3 + 2
    assert echo.asked == 3 * run.experiment.segment.rounds + 2
    for c in range(4):
        info = video.probe(str(folder / f"masks/{c}.mp4"), f"{c}")
        truth = video.luma_mask(video.planes(next(iter(video.read_frames(info, 0, 1)))), 1)
        found = masks.probability[c] >= 128
        assert (found & truth).sum() > 0.4 * (found | truth).sum(), c


def test_with_sam_a_held_out_camera_lends_nothing_and_borrows_nothing(run: Run, folder: Path) -> None:
    segmenter, frames = segmenter_of(run, Echo()), read_instant(folder)
    plain, later = segmenter.segment(frames), read_instant(folder, 40)
    assert alike(plain, segmenter.segment([*frames[:HELD_OUT], later[HELD_OUT]]), range(HELD_OUT))
    changed = segmenter.segment([*later[:HELD_OUT], frames[HELD_OUT]])
    assert alike(plain, changed, [HELD_OUT])
    assert not np.array_equal(plain.all_views, changed.all_views)


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
def test_the_whole_stage_with_random_weights(recording: Recording, folder: Path, tmp_path: Path) -> None:
    """Their bytes are part of the result's id, and the folder's place is not."""
    runs = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        weights = tiny_sam.make_sam2(tmp_path / name, seed)
        settings = {"method": "sam", "sam_weights": str(weights)}
        runs.append(run_segment(tmp_path / f"project-{name}", configured(recording, folder, settings)))
    one, same, other = (run.result("segment").id for run in runs)
    assert one == same != other
    group = runs[0].open_input("segment")
    schema.validate(group, "segments.zarr", "")
    assert schema.read(group, "probability").shape == (FRAMES, 4, 80, 96)
    assert schema.array(group, "all_views").shape == (FRAMES, 1, 80, 96)
    np.testing.assert_array_equal(
        schema.read(group, "probability"), schema.read(runs[1].open_input("segment"), "probability")
    )
    assert {key for key in runs[0].sources["segment"] if key.startswith("segment.")} == {
        f"segment.sam_weights/{name}" for name in ("config.json", "model.safetensors", "processor_config.json")
    }


def test_sam_without_its_package_or_weights(
    recording: Recording, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = configured(recording, folder, {"method": "sam", "sam_weights": str(tmp_path / "none")})
    with pytest.raises(UserError, match=r"segment.sam_weights = .*none: no folder with weights"):
        run_segment(tmp_path / "project", missing)
    assert not (tmp_path / "project").exists()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"the package transformers is not installed; install zoosplat\[sam\]"):
        run_segment(tmp_path / "project", configured(recording, folder, {"method": "sam"}))
