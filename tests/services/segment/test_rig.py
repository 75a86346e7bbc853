"""Projection with distortion, against OpenCV."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from rigs import make_cameras

from zoosplat_segment.rig import Rig

SIZE = 320, 240
CPU = torch.device("cpu")
LENSES = np.array([[-0.25, 0.08, 0.002, -0.001, 0.01], [0.1, -0.05, -0.002, 0.003, 0.0], [0, 0, 0, 0, 0.0]])


@pytest.fixture(scope="module")
def rig() -> Rig:
    return Rig(make_cameras(3, SIZE, LENSES), SIZE, CPU)


def test_points_are_projected_as_opencv_does(rig: Rig) -> None:
    cameras = make_cameras(3, SIZE, LENSES)
    points = np.random.default_rng(0).uniform(-0.15, 0.15, (200, 3))
    pixels, depth = rig.project(torch.tensor(points, dtype=torch.float32))
    for c in range(3):
        turn, shift = cameras.rotation[c], cameras.translation_m[c]
        expected, _ = cv2.projectPoints(points, cv2.Rodrigues(turn)[0], shift, cameras.intrinsics[c], LENSES[c])
        inside = rig.inside(torch.tensor(expected[:, 0])).numpy()
        assert inside.sum() > 100
        np.testing.assert_allclose(pixels[c].numpy()[inside], expected[inside, 0], atol=2e-2)
        np.testing.assert_allclose(depth[c], (points @ turn.T + shift)[:, 2], atol=1e-5)


def test_points_that_no_lens_sees(rig: Rig) -> None:
    """Behind the camera, and so far from the axis that the polynomial of the lens comes back into the picture."""
    camera = make_cameras(3, SIZE, LENSES)
    aside = camera.rotation[0].T @ (np.array([9.0, 0, 1]) - camera.translation_m[0])
    behind = camera.rotation[0].T @ (np.array([0.0, 0, -1]) - camera.translation_m[0])
    pixels, _ = rig.project(torch.tensor(np.stack([aside, behind]), dtype=torch.float32))
    assert pixels[0].isnan().all()
    assert not rig.inside(pixels)[0].any()


def test_rays_are_the_inverse_of_the_projection(rig: Rig) -> None:
    y, x = torch.meshgrid(torch.arange(0.0, 240, 9.7), torch.arange(0.0, 320, 9.7), indexing="ij")
    pixels = torch.stack([x, y], -1)
    for c in range(3):
        rays = rig.rays_at(c, pixels)
        np.testing.assert_allclose(rays.norm(dim=-1), 1, atol=1e-6)
        again, _ = rig.project((rig.centers[c] + 0.7 * rays).view(-1, 3))
        np.testing.assert_allclose(again[c], pixels.view(-1, 2), atol=0.1)


def test_pixels_of_a_metre(rig: Rig) -> None:
    step = torch.tensor([0.0, 0, 0.001])  # short, and across the axis of cameras that look level
    pixels, _ = rig.project(torch.stack([-step, step]))
    length = (pixels[:, 1] - pixels[:, 0]).norm(dim=-1) / 0.002
    np.testing.assert_allclose(rig.pixels_per_metre(torch.zeros(3)), length, rtol=0.15)


def test_the_border_of_a_picture(rig: Rig) -> None:
    places = torch.tensor([[-0.4, 0.0], [-0.6, 0], [319.4, 239.4], [319.6, 239], [5, 240], [torch.nan, 3]])
    assert rig.inside(places).tolist() == [True, False, True, False, False, False]
