"""Gaussians and renderings of a project against the files and numbers of stages render and evaluate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
import pytest

from zoosplat.errors import UserError
from zoosplat.formats import ply
from zoosplat.notebook import PinholeCamera
from zoosplat.notebook.project import ProjectReader

if TYPE_CHECKING:
    pass


def test_gaussians_are_those_of_the_ply_file(p: ProjectReader, whole_project: Path) -> None:
    (path,) = (whole_project / "latest" / "renders").glob("frame_*.ply")
    table = ply.decode(path.read_bytes())
    found = p.gaussians(int(path.stem.removeprefix("frame_")))
    assert len(found) == len(table["x"]) > 20
    columns = {
        "centers_m": np.stack([table[key] for key in "xyz"], 1),
        "scales_m": np.exp(np.stack([table[f"scale_{i}"] for i in range(3)], 1)),
        "opacities": 1 / (1 + np.exp(-table["opacity"])),
        "colors": 0.5 + 0.28209479 * np.stack([table[f"f_dc_{i}"] for i in range(3)], 1),
        "quaternions": np.stack([table[f"rot_{i}"] for i in range(4)], 1),
    }
    for name, expected in columns.items():
        values = getattr(found, name)
        assert values.dtype == np.float32
        np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-5, err_msg=name)
        with pytest.raises(ValueError, match="read-only"):
            values[0] = 0


def test_gaussians_lie_where_the_mouse_is(p: ProjectReader) -> None:
    found = p.gaussians(8)
    middle = np.average(found.centers_m, axis=0, weights=found.opacities)
    assert np.linalg.norm(middle - p.tracking["centers"][8].values) < 0.02


def test_rendering_of_a_camera_is_the_one_that_was_evaluated(p: ProjectReader) -> None:
    """Its IoU with the mask and its PSNR are those of the evaluation; outside the window all is white."""
    table = p.metrics().set_index(["t", "camera"])
    n_pixels = p.images.attrs["full_width"] * p.images.attrs["full_height"]
    t = int(p.metrics()["t"].iloc[0])
    for camera, name in enumerate(p.cameras.names):
        image, opacity = p.render(t, name)
        mask = p.images["mask"].isel(time=t, camera=camera).values
        rgb = p.images["rgb"].isel(time=t, camera=camera).values / 255
        assert image.shape == rgb.shape
        assert image.dtype == np.uint8
        assert opacity.dtype == np.float32
        iou = ((opacity > 0.5) & mask).sum() / ((opacity > 0.5) | mask).sum()
        assert iou == pytest.approx(table.loc[(t, name), "iou"], abs=1e-5)
        truth = np.where(mask[..., None], rgb, 1)
        psnr = -10 * np.log10(((image / 255 - truth) ** 2).sum() / (3 * n_pixels))
        assert psnr == pytest.approx(table.loc[(t, name), "psnr"], abs=0.05)
        np.testing.assert_array_equal(p.render(t, camera).image, image)


def test_rendering_from_a_pose_is_that_of_stage_render(p: ProjectReader, whole_project: Path) -> None:
    folder = whole_project / "latest" / "renders"
    index = json.loads((folder / "index.json").read_text())
    view = {key: np.array(value) for key, value in index["view"].items()}
    (still,) = (entry for entry in index["files"] if entry["file"] == "still_free.png")
    image, _ = p.render(still["t"], PinholeCamera(**view, width=index["width"], height=index["height"]))
    expected = cv2.imread(str(folder / "still_free.png"))
    assert expected is not None
    assert np.abs(image.astype(int) - expected[..., ::-1]).mean() < 0.05


def test_camera_that_looks_at_the_animal_has_it_in_the_middle(p: ProjectReader) -> None:
    center = p.tracking["centers"][8].values
    camera = PinholeCamera.looking_at(center + np.array([0.2, -0.15, 0.15]), center, width=60, height=40)
    _, opacity = p.render(8, camera)
    ys, xs = np.nonzero(opacity > 0.5)
    assert opacity.shape == (40, 60)
    assert abs(xs.mean() - 29.5) < 6
    assert abs(ys.mean() - 19.5) < 6


def test_frames_and_cameras_that_are_not_there(p: ProjectReader) -> None:
    with pytest.raises(UserError, match="frame t = 36: there are 36 kept frames, 0 to 35"):
        p.gaussians(36)
    with pytest.raises(UserError, match="frame t = -1"):
        p.render(-1, 0)
    for camera in ("top", 4):
        with pytest.raises(UserError, match=f"no camera {camera!r}; there are 4: 0, 1, 2, 3"):
            p.render(3, camera)
