"""Plates and the light on them, against the formula worked out pixel by pixel, and pictures of an empty scene."""

from __future__ import annotations

from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from zoosplat.errors import UserError
from zoosplat.geometry.cameras import Cameras
from zoosplat.recording.background import SAME_LIGHT, fit_gain, lit_plate, read_empty_scene, undistort_plate

FULL = (40, 20)  # width, height
RNG = np.random.default_rng(0)


def test_background_of_windows_by_hand() -> None:
    plate = RNG.integers(0, 256, (2, 20, 40, 3)).astype(np.uint8)
    light = np.array([[[1, 0.2, -0.1, 3], [0.9, 0, 0, 0], [1, 0, 0.5, -4]], [list(SAME_LIGHT)] * 3])
    origin = np.array([[7, 3], [0, 11]])
    h, w = 6, 9
    windows = np.stack([p[y : y + h, x : x + w] for p, (x, y) in zip(plate, origin, strict=True)])
    lit = lit_plate(windows, light, origin, FULL)
    assert lit.shape == (2, h, w, 3)
    assert lit.dtype == np.float32
    for row in range(h):
        for column in range(w):
            x, y = (7 + column) / 40 - 0.5, (3 + row) / 20 - 0.5
            red, green, blue = plate[0, 3 + row, 7 + column].astype(float)
            expected = [red * (1 + 0.2 * x - 0.1 * y) + 3, 0.9 * green, blue * (1 + 0.5 * y) - 4]
            np.testing.assert_allclose(lit[0, row, column], np.clip(expected, 0, 255), atol=1e-3)
    np.testing.assert_array_equal(lit[1], plate[1, 11:17, :9])  # under the same light it is the plate
    # A window is a part of the whole.
    whole = lit_plate(plate[0], light[0], (0, 0), FULL)
    np.testing.assert_allclose(lit[0], whole[3:9, 7:16], atol=1e-3)


def test_gain_is_found_though_a_mask_lacks_a_part() -> None:
    plate = RNG.integers(20, 200, (40, 50, 3)).astype(np.uint8)
    gain = np.array([0.8, 1.1, 0.95])
    picture = np.rint(np.minimum(plate * gain, 255)).astype(np.uint8)
    picture[5:20, 5:25] = 0  # an animal of 300 pixels, of which the mask has a half
    background = np.ones((40, 50), bool)
    background[5:20, 5:15] = False
    light = fit_gain(plate, picture, background)
    np.testing.assert_allclose(light[:, 0], gain, atol=2e-3)
    assert not light[:, 1:].any()
    # A window that is all animal tells nothing, nor does an overexposed one.
    for seen, is_background in ((picture, ~background), (np.full_like(picture, 255), background)):
        assert fit_gain(plate, seen, is_background).tolist() == [list(SAME_LIGHT)] * 3


def test_plate_is_undistorted_and_averaged() -> None:
    plate = RNG.integers(0, 256, (20, 40, 3)).astype(np.uint8)
    small = plate.reshape(10, 2, 20, 2, 3).mean((1, 3))
    np.testing.assert_allclose(undistort_plate(plate, 2, None), small, atol=0.5)
    np.testing.assert_array_equal(undistort_plate(plate, 1, None), plate)
    # A dot lies, without distortion, where the pinhole camera has its ray.
    k = np.array([[30.0, 0, 19.5], [0, 30, 9.5], [0, 0, 1]])
    camera = Cameras(("a",), k[None], np.eye(3)[None], np.zeros((1, 3)), np.array([[-0.3, 0, 0, 0, 0]]))
    dot = np.zeros((20, 40, 3), np.uint8)
    dot[13:16, 33:36] = 255
    ray = cv2.undistortPoints(np.array([[[34.0, 14.0]]]), k, camera.distortion[0])[0, 0]
    seen = undistort_plate(dot, 1, camera.undistort_maps(0, 40, 20))[..., 0].astype(float)
    rows, columns = np.mgrid[:20, :40]
    place = np.array([(seen * columns).sum(), (seen * rows).sum()]) / seen.sum()
    np.testing.assert_allclose(place, k[:2, :2] @ ray + k[:2, 2], atol=0.3)


def test_pictures_of_the_empty_scene(tmp_path: Path) -> None:
    picture = cv2.resize(RNG.integers(0, 256, (5, 10, 3)).astype(np.uint8), FULL, interpolation=cv2.INTER_CUBIC)
    cv2.imwrite(str(tmp_path / "a.png"), picture[..., ::-1])
    np.testing.assert_array_equal(read_empty_scene(str(tmp_path / "a.png"), "a", FULL), picture)
    # A grey picture, and a video that a fly crosses: its median shows no fly.
    cv2.imwrite(str(tmp_path / "grey.png"), picture[..., 0])
    np.testing.assert_array_equal(read_empty_scene(str(tmp_path / "grey.png"), "grey", FULL)[..., 2], picture[..., 0])
    with av.open(str(tmp_path / "film.mp4"), "w") as file:
        stream = file.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = *FULL, "yuv420p"
        stream.options = {"qp": "0"}
        for i in range(60):
            frame = np.full((20, 40, 3), 90, np.uint8)
            frame[8:12, i % 40 : i % 40 + 3] = 250
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())
    assert np.abs(read_empty_scene(str(tmp_path / "film.mp4"), "film", FULL).astype(int) - 90).max() <= 2
    with pytest.raises(UserError, match=r"data.backgrounds\[0\] = a.png: 40 x 20 pixels, but the videos have 80 x 40"):
        read_empty_scene(str(tmp_path / "a.png"), "data.backgrounds[0] = a.png", (80, 40))
    with pytest.raises(UserError, match="no such file"):
        read_empty_scene(str(tmp_path / "b.png"), "b", FULL)
