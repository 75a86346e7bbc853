"""Result ids: what determines a result and what does not."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from pipelines import FILES_PIPELINE, FILES_STAGES

from zoosplat.config.experiment import Experiment
from zoosplat.stages.drafts import draft_run
from zoosplat.stages.lookup import open_run
from zoosplat.stages.projects import Project
from zoosplat.stages.registry import STAGES, downstream
from zoosplat.stages.results import Request, Result, Source, parse_attempt
from zoosplat.storage import listing, objects

if TYPE_CHECKING:
    from tests.conftest import Recording

ALL = [spec.name for spec in FILES_PIPELINE]


def ids(recording: Recording, directory: Path | None = None, **changes: Any) -> dict[str, str]:
    """Stage -> id of its result under the recording's configuration; no project has to be there for that."""
    experiment = Experiment.model_validate(recording.config(directory, **changes))
    draft = draft_run(Project.at("/nonexistent/project"), experiment)
    assert not draft.missing
    return {stage: result.id for stage, result in draft.results.items()}


def differing(one: dict[str, str], other: dict[str, str]) -> list[str]:
    return [stage for stage in ALL if one[stage] != other[stage]]


@pytest.mark.parametrize(
    ("changes", "own"),
    [
        ({"name": "another"}, set()),
        ({"scheduling__frames_per_shard": 7}, set()),
        ({"train__keep_last": 5, "train__plot_every": 3, "train__save_every": 2}, set()),
        ({"train__device": "cpu", "train__gpus": 1, "evaluate__device": "cpu", "render__device": "cpu"}, set()),
        ({"features__device": "cpu"}, set()),
        ({"train__lr": 0.5, "train__seed": 3}, {"train"}),
        ({"model__num_unets": 1}, {"train"}),
        ({"render__orbit_frames": 3}, {"render"}),
        ({"pack__window": "full"}, {"pack"}),
        ({"crop__min_voxels": 2}, {"crop"}),
        ({"center_rotation__grid_size": 40}, {"center_rotation"}),
        ({"holdout_views": [1]}, {"center_rotation", "crop", "train"}),
        ({"ingest__max_frames": 9}, {"ingest"}),
        ({"evaluate__gallery_frames": 1}, {"evaluate"}),
    ],
    ids=lambda value: str(sorted(value)) if isinstance(value, set) else str(value),
)
def test_a_setting_changes_its_stages_and_all_after_them(
    changes: dict[str, Any], own: set[str], recording: Recording
) -> None:
    assert set(differing(ids(recording), ids(recording, **changes))) == downstream(own)


def test_content_counts_and_place_does_not(recording: Recording, tmp_path: Path) -> None:
    here, data = ids(recording), recording.copy(tmp_path / "elsewhere")
    assert differing(here, ids(recording, data)) == []
    (data / "masks/2.mp4").rename(data / "masks/two.mp4")
    masks = ["masks/0.mp4", "masks/1.mp4", "masks/two.mp4", "masks/3.mp4"]
    assert differing(here, ids(recording, data, data__masks=masks)) == []
    # Trailing bytes that a reader passes over are content all the same. Ingest has lengths from the RGB videos too.
    with (data / "videos/2.mp4").open("ab") as file:
        file.write(b"\x00\x00\x00\x08free")
    longer = ids(recording, data, data__masks=masks)
    assert differing(here, longer) == ALL
    # One byte in the middle of a file of the same size.
    mask = data / "masks/two.mp4"
    content = bytearray(mask.read_bytes())
    content[len(content) // 2] ^= 1
    mask.write_bytes(content)
    flipped = ids(recording, data, data__masks=masks)
    assert differing(here, flipped) == ALL
    assert differing(longer, flipped) == ALL


def test_the_order_of_masks_counts(recording: Recording, tmp_path: Path) -> None:
    masks = ["masks/1.mp4", "masks/0.mp4", "masks/2.mp4", "masks/3.mp4"]
    assert differing(ids(recording), ids(recording, data__masks=masks)) == ALL
    data = recording.copy(tmp_path / "elsewhere")
    (data / "masks/0.mp4").rename(data / "masks/x.mp4")
    (data / "masks/1.mp4").rename(data / "masks/0.mp4")
    (data / "masks/x.mp4").rename(data / "masks/1.mp4")
    assert ids(recording, data) == ids(recording, data__masks=masks)


def test_ids_of_attempts() -> None:
    request = Request("crop", 1, {"crop.ell": 0.2}, {"ingest": "a"}, {"data.up": Source("/up.npz", "f", "state")})
    assert len(request.id) == 16
    assert request.id == request.base
    assert [replace(request, attempt=n).id for n in (1, 9)] == [f"{request.base}-2", f"{request.base}-10"]
    for attempt in (0, 1, 9):
        assert parse_attempt(replace(request, attempt=attempt).id, request.base) == attempt
    for name in ("", f"{request.base}-", f"{request.base}-0", f"{request.base}-2x", f"{request.base}2", "other"):
        assert parse_attempt(name, request.base) is None
    # Neither the place of a file nor when it was written.
    moved = replace(request, sources={"data.up": Source("s3://lab/up.npz", "f", "")})
    assert moved.id == request.id
    for changed in (
        replace(request, stage="pack"),
        replace(request, version=2),
        replace(request, settings={"crop.ell": 0.3}),
        replace(request, inputs={"ingest": "b"}),
        replace(request, sources={"data.up": Source("/up.npz", "g", "state")}),
        replace(request, sources={"data.calibration": Source("/up.npz", "f", "state")}),
    ):
        assert changed.id != request.id


def test_marks_hold_provenance(finished: Path) -> None:
    run = open_run(Project.at(str(finished)))
    for name in ("ingest", "center_rotation", "crop", "pack"):
        mark, result = run.read_mark(name), run.result(name)
        assert mark is not None
        assert (mark["stage"], mark["id"], mark["run"], mark["attempt"]) == (name, result.id, run.id, 0)
        assert {"python", "numpy", "zarr", "zoosplat"} <= set(mark["versions"])
        assert mark["inputs"] == {i: run.result(i).id for i in FILES_STAGES[name].reads}
        assert mark["started"] < mark["finished"]
        assert mark["frames"] == 144
        assert mark["shards"] == 3
        assert mark["peak_memory_bytes"] < 1 << 30
        assert objects.read_json(result.file("request.json")) == {
            key: mark[key] for key in ("stage", "id", "version", "settings", "inputs", "sources", "attempt")
        }
        manifest = result.manifest()
        assert manifest is not None
        listing.check_manifest(result.data_folder, manifest)
        assert {file for file in listing.manifest(result.data_url)} == {
            file.removeprefix(f"{STAGES[name].writes}/") for file in manifest
        }
        assert result.shards_done() == (3, 3)
    settings = (run.read_mark("ingest") or {})["settings"]
    assert settings["ingest.frame_jump"] == 1
    assert "scheduling.frames_per_shard" not in settings


def test_the_same_id_is_the_same_result_in_every_project(finished: Path, recording: Recording, tmp_path: Path) -> None:
    """A result that is copied with its folder is taken for what it is."""
    theirs = open_run(Project.at(str(finished))).result("ingest")
    project = Project.at(str(tmp_path))
    ours = Result.at(project.url, "ingest", theirs.id)
    assert not ours.is_done()
    shutil.copytree(theirs.folder, ours.folder)
    draft = draft_run(project, Experiment.model_validate(recording.config()))
    assert draft.todo(["ingest", "pack"]) == ["pack"]
    assert draft.results["ingest"] == ours
