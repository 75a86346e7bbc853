"""Masks of stage segment, taken out and read back: the same to the bit."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from command_line import call

from zoosplat.config.experiment import Experiment
from zoosplat.recording.background import read_empty_scene
from zoosplat.recording.facts import kept_frames
from zoosplat.recording.sources import open_source
from zoosplat.stages.projects import Project
from zoosplat.stages.runs import Run
from zoosplat.storage import objects, schema, urls

if TYPE_CHECKING:
    from tests.conftest import Recording

Finish = Callable[..., Run]
CAMERAS, HEIGHT, WIDTH, FRAMES = 4, 80, 96, 144
PLATES = np.random.default_rng(1).integers(0, 256, (CAMERAS, HEIGHT, WIDTH, 3), np.uint8)


def probabilities(kept: int) -> Any:
    """[T, C, H, W] uint8: noise of all values about a block that moves, so that masks have pixels of every kind."""
    values = np.random.default_rng(0).integers(0, 140, (kept, CAMERAS, HEIGHT, WIDTH), np.uint8)
    for t in range(kept):
        values[t, :, 20:50, 10 + t % 40 : 40 + t % 40] += 110
    return values


@pytest.fixture
def begin(recording: Recording, tmp_path: Path, finish: Finish) -> Callable[..., tuple[Run, Any]]:
    """Begin a run whose stage segment is finished; returns the run and its probabilities."""

    def begin_run(absent: bool = False, **ingest: int) -> tuple[Run, Any]:
        folder = recording.copy(tmp_path / "recording")
        experiment = Experiment.model_validate(recording.config(folder, data__masks="auto", ingest=ingest))
        kept = kept_frames(experiment, FRAMES)
        values = probabilities(kept)

        def write(url: str) -> None:
            sizes = {"T": kept, "C": CAMERAS, "H": HEIGHT, "W": WIDTH}
            names = ["left", "right", "top/1", "4"]
            attributes: dict[str, Any] = {
                "camera_names": names,
                "n_video_frames": FRAMES,
                "frame_jump": ingest.get("frame_jump", 1),
            }
            group = schema.create(url, "segments.zarr", sizes, 64, attributes)
            seen = np.ones((kept, CAMERAS), bool)
            seen[5:8, 1] = not absent
            frames = np.arange(kept) * attributes["frame_jump"]
            filled = {"probability": values, "seen": seen, "frame": frames, "plate": PLATES}
            for key, found in group.arrays():
                schema.write_block(group, key, 0, filled.get(key, np.zeros(found.shape, found.dtype)))
            objects.write_bytes(urls.join(url.rpartition("/")[0], "weights.safetensors"), b"0")

        project = Project.at(str(tmp_path / "project"))
        return finish(project, experiment, {"segment": write}), values

    return begin_run


def masks(experiment: Experiment, segments: Any = None) -> Any:
    """What stage ingest reads, of cameras with distorting lenses: [T, C, h, w]."""
    source = open_source(experiment, segments)
    facts = source.check()
    lenses = replace(facts.cameras, distortion=np.tile([-0.2, 0.05, 0.001, -0.002, 0.0], (CAMERAS, 1)))
    kept = kept_frames(experiment, facts.n_frames)
    return np.concatenate(list(source.read_masks(facts.masks, lenses, 0, kept, 32)))


def entries_of(output: str, key: str = "masks") -> list[str]:
    found = re.search(rf'data\.{key}: \["(.*?)"\]', " ".join(output.split()))
    assert found is not None
    return found[1].split('", "')


@pytest.mark.parametrize(
    ("ingest", "format", "kind"),
    [
        ({}, None, "video"),
        ({"image_downsample": 2}, "video", "video"),
        ({}, "png", "png"),
        ({"frame_jump": 3, "image_downsample": 2}, None, "png"),
        ({"max_frames": 20}, None, "png"),
        ({"frame_jump": 2, "max_frames": 20}, "png", "png"),
    ],
)
def test_exported_masks_are_read_back_to_the_bit(
    ingest: dict[str, int], format: str | None, kind: str, begin: Callable[..., tuple[Run, Any]]
) -> None:
    run, values = begin(**ingest)
    out = Path(run.experiment.data.directory) / "corrected"
    options = [] if format is None else ["--format", format]
    status, output, errors = call("masks", "export", run.project.url, str(out), *options)
    assert (status, errors) == (0, "")
    entries = entries_of(output)
    suffix = ".mkv" if kind == "video" else ""
    assert entries == [f"corrected/{name}{suffix}" for name in ("0_left", "1_right", "2_top_1", "3_4")]
    if kind == "png":
        jump = ingest.get("frame_jump", 1)
        names = [f"{t * jump:06d}.png" for t in range(len(values))]
        assert sorted(path.name for path in (out / "0_left").iterdir()) == names
    plates = entries_of(output, "backgrounds")
    assert plates == [f"corrected/{name}.plate.png" for name in ("0_left", "1_right", "2_top_1", "3_4")]
    for file, plate in zip(plates, PLATES, strict=True):
        picture = read_empty_scene(run.experiment.data.url(file), file, (WIDTH, HEIGHT))
        assert (picture == plate).all()
    data = run.experiment.data.model_copy(update={"masks": tuple(entries)})
    back = masks(run.experiment.model_copy(update={"data": data}))
    assert (back == masks(run.experiment, run.open_input("segment"))).all()
    if ingest == {}:
        plain = open_source(run.experiment.model_copy(update={"data": data}))
        facts = plain.check()
        (block,) = plain.read_masks(facts.masks, facts.cameras, 7, 8, 1)
        assert (block[0] == (values[7] >= 128)).all()


def test_views_that_are_left_out_are_told(begin: Callable[..., tuple[Run, Any]], tmp_path: Path) -> None:
    run, _ = begin(absent=True)
    status, output, errors = call("masks", "export", run.project.url, str(tmp_path / "out"), columns=1000)
    assert status == 0
    assert "note: camera right is left out in 3 of 144 frames, first in frame 5" in errors
    assert "camera left is left out" not in errors
    assert f"copy the folder into that of the recording, {run.experiment.data.directory}" in output
    assert entries_of(output)[0] == "out/0_left.mkv"


def test_what_cannot_be_exported_is_refused(
    begin: Callable[..., tuple[Run, Any]], recording: Recording, tmp_path: Path, finish: Finish
) -> None:
    run, _ = begin(frame_jump=2)
    url, out = run.project.url, tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    refused = [
        (call("masks", "export", url, str(out)), "is not empty (it holds notes.txt)"),
        (call("masks", "export", url, str(out / "notes.txt")), "notes.txt: is a file"),
        (call("masks", "export", url, "s3://lab/masks"), "exported to this machine"),
        (call("masks", "export", url, str(tmp_path / "new"), "--format", "video"), "use --format png"),
        (call("masks", "export", url, str(tmp_path / "new"), "--format", "tiff"), "choose one of video, png"),
    ]
    of_files = Project.at(str(tmp_path / "of files"))
    finish(of_files, Experiment.model_validate(recording.config()), {})
    refused.append((call("masks", "export", of_files.url, str(tmp_path / "new")), "read its masks from files"))
    for (status, _, errors), words in refused:
        assert status == 2
        assert words in errors
        assert len(errors.splitlines()) == 1
    assert [path.name for path in out.iterdir()] == ["notes.txt"]
    assert not (tmp_path / "new").exists()
