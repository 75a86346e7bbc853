"""Frames of an array, read without zarr: what zarr reads, from a folder and from S3, and damage is noticed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from zoosplat import schema, stores
from zoosplat.errors import UserError

SIZES = {"T": 11, "C": 2, "h": 6, "w": 5}


def written(url: str) -> tuple[Any, Any]:
    """Two arrays; one frame of the mask is empty, the last shard of neither is there."""
    group = schema.create(url, "images.zarr", SIZES, 4, {})
    rng = np.random.default_rng(0)
    rgb, mask = rng.integers(0, 256, (8, 2, 6, 5, 3)).astype(np.uint8), rng.random((8, 2, 6, 5)) < 0.5
    mask[5] = False
    schema.array(group, "rgb")[:8] = rgb
    schema.array(group, "mask")[:8] = mask
    return rgb, mask


def check(url: str) -> None:
    for key, values in zip(("rgb", "mask"), written(url), strict=True):
        frames = schema.FrameArray(stores.open_group(url), key)
        assert frames.shape[0] == 11
        for t in (7, 0, 5, 3, 4):
            assert frames[t].dtype == values.dtype
            np.testing.assert_array_equal(frames[t], values[t])
        assert not frames[10].any()


def test_frames_of_a_folder(tmp_path: Path) -> None:
    check(str(tmp_path / "images.zarr"))


def test_frames_on_s3(s3_here: Any) -> None:
    check(f"s3://{s3_here.bucket()}/project/images.zarr")


@pytest.mark.parametrize("where", [5, -5])
def test_damage_is_noticed(tmp_path: Path, where: int) -> None:
    written(str(tmp_path))
    path = tmp_path / "rgb" / "c" / "1" / "0" / "0" / "0" / "0"
    data = bytearray(path.read_bytes())
    data[where] ^= 1
    path.write_bytes(data)
    frames = schema.FrameArray(stores.open_group(str(tmp_path)), "rgb")
    with pytest.raises(UserError, match=r"array rgb is damaged; run the stage that wrote it with --force"):
        [frames[t] for t in range(4, 8)]
    assert frames[3].any()
