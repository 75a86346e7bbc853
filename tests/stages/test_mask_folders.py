"""Masks in folders of pictures determine results by the pictures' numbers and contents, and by nothing else."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import pytest

from zoosplat.config.experiment import Experiment
from zoosplat.stages.begin import begin_run
from zoosplat.stages.drafts import draft_run
from zoosplat.stages.projects import Project
from zoosplat.stages.sources import FingerprintCache, refresh
from zoosplat.storage import fingerprints

if TYPE_CHECKING:
    from tests.conftest import S3, Recording

FRAMES = 144
FOLDERS = tuple(f"masks/{c}" for c in range(4))


@pytest.fixture
def folder(recording: Recording, tmp_path: Path) -> Path:
    """A recording whose masks are folders of pictures: a square that moves."""
    place = recording.copy(tmp_path / "recording")
    for entry in FOLDERS:
        (place / entry).mkdir()
        for t in range(FRAMES):
            mask = np.zeros((80, 96), np.uint8)
            mask[20:40, t % 60 : t % 60 + 20] = 255
            cv2.imwrite(str(place / entry / f"{t:05d}.png"), mask)
    return place


def ingest_id(recording: Recording, directory: Path | str, project: Path, masks: tuple[str, ...] = FOLDERS) -> str:
    """Id of the result of stage ingest."""
    experiment = Experiment.model_validate(recording.config(directory, data__masks=list(masks)))
    draft = draft_run(Project.at(str(project)), experiment)
    assert not draft.missing
    return draft.results["ingest"].id


def rename(folder: Path, name: str) -> None:
    for path in sorted(folder.iterdir()):
        path.rename(folder / name.format(int(path.stem)))


def test_the_id_follows_the_pictures(recording: Recording, folder: Path, tmp_path: Path) -> None:
    def now(*masks: str) -> str:
        return ingest_id(recording, folder, tmp_path / "project", masks or FOLDERS)

    before = now()
    (folder / "masks/1/notes.txt").write_text("not a picture")
    os.utime(folder / "masks/1/00003.png")
    rename(folder / "masks/2", "frame_{}.png")
    (folder / "masks/3").rename(folder / "masks/d")
    assert now("masks/0", "masks/1/%05d.png", "masks/2", "masks/d") == before
    (folder / "masks/d").rename(folder / "masks/3")
    picture = folder / "masks/1/00003.png"
    data = picture.read_bytes()
    picture.write_bytes((folder / "masks/1/00004.png").read_bytes())
    assert now() != before
    picture.write_bytes(data)
    assert now() == before
    last = folder / f"masks/1/{FRAMES - 1:05d}.png"
    last.rename(folder / f"masks/1/{FRAMES:05d}.png")
    assert now() != before
    (folder / f"masks/1/{FRAMES:05d}.png").rename(last)
    assert now() == before


def test_videos_and_pictures_are_different_masks(recording: Recording, folder: Path, tmp_path: Path) -> None:
    videos = tuple(f"masks/{c}.mp4" for c in range(4))
    ids = {ingest_id(recording, folder, tmp_path / "project", masks) for masks in (FOLDERS, videos)}
    assert len(ids) == 2


def test_on_s3_the_id_is_the_same(recording: Recording, folder: Path, tmp_path: Path, s3_here: S3) -> None:
    bucket = s3_here.bucket()
    s3_here.put_folder(folder, bucket, "lab/mouse")
    url = f"s3://{bucket}/lab/mouse"
    before = ingest_id(recording, folder, tmp_path / "project")
    assert ingest_id(recording, url, tmp_path / "project") == before
    s3_here.client.put_object(Bucket=bucket, Key="lab/mouse/masks/1/00003.png", Body=b"another")
    assert ingest_id(recording, url, tmp_path / "project") != before


def test_pictures_are_hashed_once(
    recording: Recording, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprints, "SETTLED_NS", 0)
    project = Project.at(str(tmp_path / "project"))
    hashed: list[str] = []
    source = FingerprintCache(project, hashed.append).source(str(folder / "masks/0"))
    assert source is not None
    assert hashed == [str(folder / "masks/0")]
    assert refresh(source, hashed.append) == source
    experiment = Experiment.model_validate(recording.config(folder, data__masks=list(FOLDERS)))
    with begin_run(project, experiment, ["ingest"], []):
        pass
    hashed.clear()
    FingerprintCache(project, hashed.append).source(str(folder / "masks/0"))
    assert hashed == []
    (folder / "masks/0/00007.png").write_bytes(b"written again")
    changed: Any = FingerprintCache(project, hashed.append).source(str(folder / "masks/0"))
    assert hashed == [str(folder / "masks/0")]
    assert changed.fingerprint != source.fingerprint


def test_what_holds_no_masks_is_no_source(folder: Path, tmp_path: Path) -> None:
    """A folder without pictures, or with pictures of several series, is named by the check of the recording."""
    cache = FingerprintCache(Project.at(str(tmp_path / "project")))
    assert cache.source(str(folder / "videos")) is None
    assert cache.source(str(folder / "masks/9")) is None
    assert cache.source(str(folder / "masks/0/x%05d.png")) is None
    (folder / "masks/0/other.png").write_bytes(b"")
    assert cache.source(str(folder / "masks/0")) is None
