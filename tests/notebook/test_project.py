"""`zoosplat.open`: runs, metrics, what is missing, other layouts and storage, on a small finished project."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import zarr

import zoosplat
from zoosplat.config.experiment import Experiment
from zoosplat.errors import UserError
from zoosplat.notebook.project import ProjectReader
from zoosplat.stages.lookup import open_run
from zoosplat.stages.projects import Project

if TYPE_CHECKING:
    from tests.conftest import S3

MADE_BEFORE = Path(__file__).parents[1] / "data" / "project-0.1.0" / "project"
CAMERAS = 4


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


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
    means = {row["camera"]: row for row in rows(whole_project / "latest" / "evaluation" / "metrics_test.csv")}
    for group in ("held_out", "observed"):
        for metric in ("iou", "psnr"):
            expected = float(means[f"mean_{group}"][metric])
            assert table[f"{group}_{metric}"].iloc[0] == pytest.approx(expected, rel=1e-5)


def test_metrics_have_a_row_a_frame_and_view(p: ProjectReader, whole_project: Path) -> None:
    table, expected = p.metrics(), rows(whole_project / "latest" / "evaluation" / "frames_test.csv")
    assert len(table) == len(expected) == CAMERAS * table["t"].nunique()
    assert table.columns.tolist() == list(expected[0])
    assert table["camera"].tolist() == [row["camera"] for row in expected]
    assert table["held_out"].tolist() == [row["held_out"] == "1" for row in expected]
    for key in expected[0].keys() - {"camera", "held_out"}:
        np.testing.assert_array_equal(table[key], [float(row[key] or "nan") for row in expected])


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
