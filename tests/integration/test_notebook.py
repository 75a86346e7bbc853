"""The notebook of the documentation, executed in a kernel of its own on a finished project in a folder and on S3."""

from __future__ import annotations

import base64
import csv
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import jupytext
import numpy as np
import pytest
from nbclient import NotebookClient

if TYPE_CHECKING:
    from tests.conftest import S3

NOTEBOOK = Path(__file__).parents[2] / "docs" / "notebook.md"
PICTURES = ("tracking", "gaussians", "render", "embedding")
HELD_OUT = "2"  # name of the camera


@pytest.fixture(params=["folder", "s3"])
def url(request: pytest.FixtureRequest, whole_project: Path) -> str:
    """Of a finished project."""
    if request.param == "folder":
        return str(whole_project)
    s3: S3 = request.getfixturevalue("s3_here")
    bucket = s3.bucket()
    s3.put_folder(whole_project, bucket, "lab/mouse7")
    return f"s3://{bucket}/lab/mouse7"


def outputs(notebook: Any, tag: str, kind: str) -> list[str]:
    """What the cells of a tag show, of one media type."""
    cells = [cell for cell in notebook.cells if tag in cell.metadata.get("tags", [])]
    shown = [output.data for cell in cells for output in cell.outputs if "data" in output]
    return [data[kind] for data in shown if kind in data]


def test_the_notebook_shows_the_project(url: str, whole_project: Path, tmp_path: Path) -> None:
    notebook = jupytext.read(NOTEBOOK)
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    parameters.source = f"project = {url!r}"
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    for tag in PICTURES:
        (png,) = outputs(notebook, tag, "image/png")
        picture = cv2.imdecode(np.frombuffer(base64.b64decode(png), np.uint8), cv2.IMREAD_COLOR)
        assert picture is not None
        assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 30, tag
    (iou,) = outputs(notebook, "iou", "text/plain")
    with (whole_project / "latest" / "evaluation" / "frames_test.csv").open() as file:
        expected = next(row["iou"] for row in csv.DictReader(file) if row["camera"] == HELD_OUT)
    assert float(iou) == pytest.approx(float(expected), abs=1e-5)
    assert list(tmp_path.iterdir()) == []
