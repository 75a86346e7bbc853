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


def outputs(notebook: Any, tag: str, kind: str) -> list[str]:
    """What the cells of a tag show, of one media type."""
    cells = [cell for cell in notebook.cells if tag in cell.metadata.get("tags", [])]
    shown = [output.data for cell in cells for output in cell.outputs if "data" in output]
    return [data[kind] for data in shown if kind in data]


def check_notebook(url: str, evaluation: Path, folder: Path) -> None:
    """Run it on the project at a URL, in an empty folder: it shows pictures, the IoU is that of the evaluation."""
    notebook = jupytext.read(NOTEBOOK)
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    parameters.source = f"project = {url!r}"
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": folder}}).execute()
    for tag in PICTURES:
        (png,) = outputs(notebook, tag, "image/png")
        picture = cv2.imdecode(np.frombuffer(base64.b64decode(png), np.uint8), cv2.IMREAD_COLOR)
        assert picture is not None
        assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 30, tag
    (iou,) = outputs(notebook, "iou", "text/plain")
    with (evaluation / "frames_test.csv").open() as file:
        expected = next(row["iou"] for row in csv.DictReader(file) if row["camera"] == HELD_OUT)
    assert float(iou) == pytest.approx(float(expected), abs=1e-5)
    assert list(folder.iterdir()) == []


def test_on_a_folder(whole_project: Path, tmp_path: Path) -> None:
    check_notebook(str(whole_project), whole_project / "latest" / "evaluation", tmp_path)


def test_on_s3(s3_here: S3, whole_project: Path, tmp_path: Path) -> None:
    bucket = s3_here.bucket()
    s3_here.put_folder(whole_project, bucket, "lab/mouse7")
    check_notebook(f"s3://{bucket}/lab/mouse7", whole_project / "latest" / "evaluation", tmp_path)
