"""Masks that could mean several things are refused with a line that says how to read them, and then read so."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from mask_kinds import (
    FRAMES,
    GREY,
    HALVES,
    HEIGHT,
    PALETTE,
    PHOTO,
    RGB,
    RGBA,
    TRUTH,
    WHITE,
    WIDTH,
    Write,
    encoded,
    iou,
    jpegs,
    make_recording,
    pngs,
    read,
    refused,
    replaced,
    text,
    without,
    write_all,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_recording(tmp_path)


# -- what the key reads -------------------------------------------------------------------------------------------
SOFT = np.stack([cv2.GaussianBlur(frame.astype(np.float32), (0, 0), 5) for frame in WHITE]).astype(np.uint8)
COLORED = np.stack([TRUTH * 128, (HALVES == 2) * 128, TRUTH * 0], -1)
WITH_KEY: dict[str, tuple[Write, str, Any, Any, str]] = {
    # name: files, suffix, value of the key, truth, words of the line without the key
    "labels, all": (pngs(HALVES), "", "nonzero", TRUTH, "frame 0 has the values 0, 1, 2"),
    "labels, one": (pngs(HALVES), "", [2], HALVES == 2, "such as [1, 2]"),
    "labels, both": (pngs(HALVES), "", [2, 1], TRUTH, "nonzero"),
    "labels of 16 bits": (pngs(HALVES * 300, GREY, 16), "", [300], HALVES == 1, "0, 300, 600"),
    "labels of a palette": (
        pngs(HALVES, PALETTE, 8, (b"PLTE", [0, 0, 0, 128, 0, 0, 0, 128, 0])),
        "",
        [1],
        HALVES == 1,
        "0, 1, 2",
    ),
    "labels and white": (
        encoded(HALVES * 85 + 85 * (HALVES == 2), "ffv1", "gray"),
        ".mkv",
        "nonzero",
        TRUTH,
        "85, 255",
    ),
    "a small part labelled 1, the rest white": (
        pngs(WHITE - 254 * (TRUTH & (np.mgrid[:HEIGHT, :WIDTH][0] < 11 + np.arange(FRAMES)[:, None, None]))),
        "",
        "nonzero",
        TRUTH,
        "0, 1, 255",
    ),
    "one label": (pngs(TRUTH * 7), "", [7], TRUTH, "0, 7"),
    "coloured labels": (pngs(COLORED, RGB), "", "nonzero", TRUTH, "is coloured"),
    "labels of a video in full range": (encoded(HALVES, "ffv1", "yuv420p", full=True), ".mkv", "nonzero", TRUTH, ""),
    "inverted": (pngs(255 - WHITE), "", "inverted", TRUTH, "set data.mask_values to inverted"),
    "inverted 0 and 1": (pngs(1 - TRUTH), "", "inverted", TRUTH, "set data.mask_values to inverted"),
    "inverted 16 bits": (pngs(65535 - 257 * WHITE, GREY, 16), "", "inverted", TRUTH, "inverted"),
    "inverted 1 bit": (pngs(1 - TRUTH, GREY, 1), "", "inverted", TRUTH, "inverted"),
    "inverted in full range": (
        encoded(255 - WHITE, "ffv1", "yuv420p", full=True),
        ".mkv",
        "inverted",
        TRUTH,
        "inverted",
    ),
    "inverted in limited range": (encoded(255 - WHITE, "ffv1", "yuv420p"), ".mkv", "inverted", TRUTH, "inverted"),
    "probabilities": (pngs(SOFT), "", "white", SOFT >= 128, "set data.mask_values to white"),
    "half transparent": (
        pngs(np.concatenate([PHOTO, TRUTH[..., None] * 150], 3), RGBA),
        "",
        "alpha",
        TRUTH,
        "has the values 0, 150 as opacity",
    ),
    "white with an opacity that is not meant": (
        pngs(np.concatenate([np.stack([WHITE] * 3, -1), 255 - WHITE[..., None] // 2], 3), RGBA),
        "",
        "white",
        TRUTH,
        "has the values 128, 255 as opacity",
    ),
}


@pytest.mark.parametrize("kind", WITH_KEY)
def test_the_key_reads_what_is_refused_without_it(kind: str, folder: Path) -> None:
    write, suffix, value, truth, words = WITH_KEY[kind]
    entries = write_all(folder, write, suffix)
    line = refused(folder, entries).splitlines()[0]
    assert line.startswith(f"masks/a{suffix} (mask of camera a): frame ")
    assert words in line
    assert "data.mask_values" in line
    assert (read(folder, entries, data__mask_values=value) == truth[:, None]).all()


def test_inverted_videos_are_read_with_the_key(folder: Path) -> None:
    entries = write_all(folder, encoded(255 - WHITE, "libx264", "yuv420p", crf="18"), ".mp4")
    assert "inverted" in refused(folder, entries)
    assert iou(read(folder, entries, data__mask_values="inverted"), TRUTH).min() > 0.95
    upright = write_all(folder, encoded(WHITE, "libx264", "yuv420p", crf="18"), ".mkv")
    assert "it is not inverted" in refused(folder, upright, data__mask_values="inverted")
    assert (read(folder, upright, data__mask_values="white")[-1] == 0).all()


# -- what is refused ----------------------------------------------------------------------------------------------
# -- what is refused ----------------------------------------------------------------------------------------------
REFUSED: dict[str, tuple[Write, str, dict[str, Any], str]] = {
    "compressed labels": (encoded(HALVES * 85, "libx264", "yuv420p", crf="18"), ".mp4", {}, "areas of grey"),
    "dim labels, compressed": (
        encoded(WHITE - 225 * (HALVES == 2), "libx264", "yuv420p", crf="18"),
        ".mp4",
        {},
        "areas of grey",
    ),
    "label in a later frame": (
        replaced(pngs(TRUTH * 1), "00003.png", HALVES[3]),
        "",
        {},
        "frame 3 has the values 0, 1, 2, but others have 0 and 1",
    ),
    "void border, as VOC has it": (
        pngs(TRUTH * 1 + 254 * (TRUTH & ~np.roll(TRUTH, 1, 2))),
        "",
        {},
        "frame 0 has the values 0, 1, 255",
    ),
    "nonzero of a compressed video": (
        encoded(WHITE, "libx264", "yuv420p"),
        ".mp4",
        {"data__mask_values": "nonzero"},
        "is compressed.*FFV1",
    ),
    "labels of jpeg": (jpegs(WHITE), "", {"data__mask_values": [1]}, r"is compressed.*\[1\]"),
    "labels of luma": (encoded(WHITE, "ffv1", "yuv420p"), ".mkv", {"data__mask_values": [255]}, "no exact values"),
    "alpha without one": (pngs(WHITE), "", {"data__mask_values": "alpha"}, "has no opacity"),
    "a photograph": (pngs(PHOTO, RGB), "", {}, "is coloured.*is it the RGB video"),
    "transparent from a later frame on": (
        pngs(
            np.concatenate(
                [
                    np.stack([WHITE] * 3, -1),
                    np.where(np.arange(FRAMES) == 3, 254, 255)[:, None, None, None] + 0 * WHITE[..., None],
                ],
                3,
            ),
            RGBA,
        ),
        "",
        {},
        "frame 3 has transparent pixels",
    ),
    "a gap": (
        without(pngs(WHITE), "00004.png"),
        "",
        {},
        r"number 4 is missing: .* masks/a/00004\.png|number 4 is missing",
    ),
    "numbers from 2 on": (without(pngs(WHITE), "00000.png", "00001.png"), "", {}, "the numbers begin with 2"),
    "two series": (replaced(pngs(WHITE), "x00000.png", WHITE[0]), "", {}, r"several series.*%05d\.png"),
    "another picture": (replaced(pngs(WHITE), "preview.png", WHITE[0]), "", {}, r"several series.*such as %05d\.png"),
    "two numbers": (
        replaced(pngs(WHITE[:1], name="1_{:02d}.png"), "2_01.png", WHITE[0]),
        "",
        {},
        "2 numbers that differ",
    ),
    "zeros unlike others": (
        replaced(pngs(WHITE, name="{:02d}.png"), "012.png", WHITE[0]),
        "",
        {},
        "zeros before its number",
    ),
    "no number": (replaced(pngs(WHITE[:0]), "mask.png", WHITE[0]), "", {}, "no number"),
    "another size": (replaced(pngs(WHITE), "00003.png", WHITE[3, ::2, ::2]), "", {}, "frame 3 has 32 x 24 pixels"),
    "too few": (pngs(WHITE[:11]), "", {}, "has 11 frames"),
    "no pictures": (lambda place: place.mkdir(parents=True), "", {}, "a folder without PNG or JPEG pictures"),
    "tiff": (text, ".tif", {}, "is a .tif file.*PNG"),
    "arrays": (text, ".npz", {}, "is a .npz file.*PNG"),
    "run lengths": (text, ".json", {}, r"is a .json file.*COCO.*PNG"),
    "a picture": (text, "/00000.png", {}, r"is a single picture, not a video; name the folder .*masks/a"),
    "no picture": (lambda place: text(place / "0.png"), "", {}, "neither PNG nor JPEG"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_clear_is_refused(kind: str, folder: Path) -> None:
    write, suffix, keys, words = REFUSED[kind]
    line = refused(folder, write_all(folder, write, suffix), **keys).splitlines()[0]
    assert line.startswith(f"masks/a{suffix} (mask of camera a)")
    assert re.search(words, line), line
