"""What another program has in a folder is known from what zoosplat has made there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from zoosplat.stages.ownership import foreign_names
from zoosplat.storage import listing

if TYPE_CHECKING:
    from tests.conftest import S3


def write(folder: Path, *files: str) -> None:
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(file)


OTHERS = ("model/deep/weights.pt", "renders/b.png", "renders/a.png", "report/index.html", "embedding.csv", "notes.txt")
NAMED = ["model/deep/weights.pt", "renders/a.png", "embedding.csv", "report/index.html"]
# What makes a folder a project: a run, or the marks of the layout before.
OURS = {"a_run": ("runs/1/config.yaml", "runs/1/run.json"), "before": ("experiment.yaml", "_marks/ingest.json")}


def test_files_of_others_are_named(tmp_path: Path) -> None:
    write(tmp_path / "project", *OTHERS)
    (tmp_path / "project" / "evaluation" / "empty").mkdir(parents=True)
    assert foreign_names(str(tmp_path / "project")) == NAMED
    (tmp_path / "link").symlink_to(tmp_path / "project")
    assert foreign_names(str(tmp_path / "link")) == NAMED


@pytest.mark.parametrize("kind", OURS)
def test_a_project_is_its_own(kind: str, tmp_path: Path) -> None:
    write(tmp_path, *OTHERS, *OURS[kind])
    (tmp_path / "runs" / "begun").mkdir(parents=True)
    assert foreign_names(str(tmp_path)) == []


def test_folders_that_only_look_like_a_project(tmp_path: Path) -> None:
    write(tmp_path, "runs/exp1/events.out", "runs/exp2/run.json", "experiment.yaml")
    assert foreign_names(str(tmp_path)) == ["runs/exp1/events.out"]


def test_nothing_there(tmp_path: Path) -> None:
    assert foreign_names(str(tmp_path / "nowhere")) == []
    write(tmp_path, "videos/0.mp4", "models/a.pt", "config.yaml")
    assert foreign_names(str(tmp_path)) == []


def test_links_are_files_of_others_too(tmp_path: Path) -> None:
    write(tmp_path / "data", "weights.pt")
    project = tmp_path / "project"
    (project / "results").mkdir(parents=True)
    (project / "model").symlink_to(tmp_path / "data")
    (project / "report").symlink_to(tmp_path / "gone")
    (project / "results" / "mine").symlink_to(tmp_path / "data")
    assert foreign_names(str(project)) == ["results/mine", "model/weights.pt", "report"]


def test_s3_prefixes(s3_here: S3, tmp_path: Path) -> None:
    bucket = s3_here.bucket()
    write(tmp_path / "theirs", *OTHERS)
    for kind, files in OURS.items():
        write(tmp_path / kind, *OTHERS, *files)
    for name in ("theirs", *OURS):
        s3_here.put_folder(tmp_path / name, bucket, f"lab/{name}")
    # As consoles make a folder, and a neighbour whose name begins alike.
    s3_here.client.put_object(Bucket=bucket, Key="lab/empty/model/", Body=b"")
    s3_here.client.put_object(Bucket=bucket, Key="lab/empty2/model/a", Body=b"")
    assert foreign_names(f"s3://{bucket}/lab/theirs") == NAMED
    assert [foreign_names(f"s3://{bucket}/lab/{name}") for name in (*OURS, "empty", "nowhere")] == [[]] * 4
    assert foreign_names(f"s3://{bucket}") == []
    s3_here.put_folder(tmp_path / "theirs" / "model", bucket, "model")
    assert foreign_names(f"s3://{bucket}") == ["model/deep/weights.pt"]


def test_names_of_many_objects(s3_here: S3) -> None:
    """S3 lists a thousand at a time."""
    bucket = s3_here.bucket()
    for i in range(1003):
        s3_here.client.put_object(Bucket=bucket, Key=f"p/{i:04d}", Body=b"")
    assert listing.list_names(f"s3://{bucket}/p") == [f"{i:04d}" for i in range(1003)]
    assert listing.first_file(f"s3://{bucket}/p") == "0000"


def test_a_project_whose_first_run_was_killed_as_it_began(tmp_path: Path) -> None:
    """Its record is written in two files; there may be the half of one only."""
    write(tmp_path, "runs/20261130-195840-d47b/config.yaml.0123.partial")
    assert foreign_names(str(tmp_path)) == []
