"""Groups of arrays: read whole and a frame at a time, from disks and from S3; what is lost is named, never made up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import zarr

from zoosplat.errors import UserError
from zoosplat.storage import groups, listing, objects, schema, urls
from zoosplat.storage.errors import damaged_result_error

if TYPE_CHECKING:
    from tests.conftest import S3

SIZES = {"T": 11, "C": 2, "h": 6, "w": 5}
BLOCK = 4
SHARD = "rgb/c/1/0/0/0/0"  # frames 4 to 7


@pytest.fixture(params=["disk", "s3"])
def url(request: pytest.FixtureRequest, s3_here: S3, tmp_path: Path) -> str:
    """Where a group may be written."""
    folder = str(tmp_path) if request.param == "disk" else f"s3://{s3_here.bucket()}/project"
    return f"{folder}/results/pack/1f2e/images.zarr"


def pictures() -> dict[str, Any]:
    """The arrays of a recording, of which frame 5 and frames 8 to 10, a whole block, are empty."""
    rng = np.random.default_rng(0)
    values: dict[str, Any] = {
        "rgb": rng.integers(0, 256, (11, 2, 6, 5, 3)).astype(np.uint8),
        "mask": rng.random((11, 2, 6, 5)) < 0.5,
        "origin": rng.integers(0, 9, (11, 2, 2)).astype(np.int32),
        "intrinsics": np.zeros((2, 3, 3)),
        "world_to_camera": rng.random((2, 4, 4)),
    }
    for key in ("rgb", "mask", "origin"):
        values[key][5] = values[key][8:] = 0
    return values


def write(url: str) -> dict[str, Any]:
    values = pictures()
    schema.create(url, "images.zarr", SIZES, BLOCK, {})
    group = groups.open_group(url, write=True)
    for key in ("rgb", "mask", "origin"):
        for start in (8, 0, 4):
            schema.write_block(group, key, start, values[key][start : start + BLOCK])
    for key in ("intrinsics", "world_to_camera"):
        schema.array(group, key)[...] = values[key]
    return values


def test_what_is_written_is_read(url: str) -> None:
    values = write(url)
    for complete in (True, False):
        group = groups.open_group(url, complete=complete)
        schema.validate(group, "images.zarr", url)
        for key, expected in values.items():
            np.testing.assert_array_equal(schema.read(group, key), expected)
            np.testing.assert_array_equal(schema.array(group, key)[1:2], expected[1:2])
        np.testing.assert_array_equal(schema.read(group, "rgb", 3, 9), values["rgb"][3:9])
        for key in ("rgb", "mask"):
            frames = schema.FrameArray(group, key)
            assert frames.shape == values[key].shape
            for t in (7, 0, 5, 3, 4, 10):
                assert frames[t].dtype == values[key].dtype
                np.testing.assert_array_equal(frames[t], values[key][t])


def test_arrays_of_cameras_that_move_are_checked_too(url: str) -> None:
    write(url)
    moving = {"time": np.linspace(0, 1, 11), "pose": np.zeros((11, 2, 4, 4))}
    schema.add_moving(groups.open_group(url, write=True), moving)
    group = groups.open_group(url, complete=True)
    assert not schema.read(group, "pose").any()
    damage(url, "pose/c/0/0/0/0", lambda data: data[:-1])
    with pytest.raises(UserError, match=r"images.zarr/pose/c/0/0/0/0 is damaged; run stage pack with --force"):
        schema.read(group, "pose")


def test_which_views_are_there(url: str) -> None:
    """All are, unless the group has the array; groups of D-NeRF scenes have long had it under another name."""
    write(url)
    group = groups.open_group(url, write=True)
    assert not schema.has_seen(group)
    assert schema.read_seen(group).shape == (11, 2)
    assert schema.read_seen(group).all()
    seen = np.arange(22).reshape(11, 2) % 3 > 0
    group.create_array("pictured", data=seen)
    stored = groups.open_group(url)
    assert schema.has_seen(stored)
    np.testing.assert_array_equal(schema.read_seen(stored), seen)
    schema.add_seen(group, ~seen)
    np.testing.assert_array_equal(schema.read_seen(groups.open_group(url, complete=True)), ~seen)


def test_every_block_is_written_also_where_all_is_empty(url: str) -> None:
    write(url)
    expected = schema.expected_files(groups.open_group(url))
    assert set(listing.list_files(url)) == expected
    assert {"zarr.json", "mask/zarr.json", SHARD, "mask/c/2/0/0/0", "origin/c/2/0/0", "intrinsics/c/0/0/0"} < expected
    assert len(expected) == 1 + 5 + 3 * 3 + 2


# -- what is lost -------------------------------------------------------------------------------------------------
def damage(url: str, name: str, change: Callable[[bytes], bytes]) -> None:
    path = urls.join(url, name)
    objects.write_bytes(path, change(objects.read_bytes(path)))


def flip(at: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :] if at >= 0 else flip(len(data) + at)(data)


READERS: dict[str, Callable[[zarr.Group], Any]] = {
    "read": lambda group: schema.read(group, "rgb"),
    "read a range": lambda group: schema.read(group, "rgb", 4, 8),
    "read a frame": lambda group: schema.read(group, "rgb", 6, 7),
    "slice": lambda group: schema.array(group, "rgb")[6, 1],
    "slice of zarr's own": lambda group: group["rgb"][5:7],  # type: ignore[index]
    "frames": lambda group: [schema.FrameArray(group, "rgb")[t] for t in range(11)],
}


def test_a_missing_object_is_named(url: str) -> None:
    write(url)
    objects.delete(urls.join(url, SHARD))
    for reader in READERS.values():
        with pytest.raises(UserError, match=rf"{url}/{SHARD} is missing; run stage pack with --force"):
            reader(groups.open_group(url, complete=True))
        # Of a group of which nobody knows whether it was written whole it means nothing.
        reader(groups.open_group(url))


CHANGES: dict[str, Callable[[bytes], bytes]] = {
    "chunk": flip(5),
    "table": flip(-5),
    "a byte short": lambda data: data[:-1],
    "cut": lambda data: data[:200],
    "empty": lambda data: b"",
    "longer": lambda data: data + b"x",
}
OF_FRAME_4 = ("read", "read a range", "frames")  # the readers that come across the chunk that is damaged


def test_a_damaged_object_is_named(url: str) -> None:
    """Whichever frames are read: all of a shard, or some."""
    write(url)
    whole = objects.read_bytes(urls.join(url, SHARD))
    for change in CHANGES:
        objects.write_bytes(urls.join(url, SHARD), CHANGES[change](whole))
        for how, reader in READERS.items():
            if change == "chunk" and how not in OF_FRAME_4:
                reader(groups.open_group(url))
                continue
            with pytest.raises(UserError, match=rf"{url}/{SHARD} is (damaged|cut short); run stage pack with --force"):
                reader(groups.open_group(url))
        # The rest can be read.
        assert schema.read(groups.open_group(url), "rgb", 0, 4).any()


def test_small_arrays_are_checked_too(url: str) -> None:
    write(url)
    for name in ("intrinsics/c/0/0/0", "origin/c/2/0/0"):
        key, path = name.partition("/")[0], urls.join(url, name)
        whole = objects.read_bytes(path)
        for change in (flip(0), lambda data: data[:-5], lambda data: b""):
            objects.write_bytes(path, change(whole))
            with pytest.raises(UserError, match=rf"{url}/{name} is damaged; run stage pack with --force"):
                schema.read(groups.open_group(url), key)
        objects.delete(path)
        with pytest.raises(UserError, match=rf"{url}/{name} is missing; run stage pack with --force"):
            schema.read(groups.open_group(url, complete=True), key)


@pytest.mark.parametrize("name", ["zarr.json", "rgb/zarr.json"])
def test_descriptions_are_checked_too(name: str, url: str) -> None:
    write(url)
    damage(url, name, lambda data: data[:-20])
    with pytest.raises(UserError, match=rf"{url}/{name} is damaged; run stage pack with --force"):
        schema.read(groups.open_group(url), "rgb")
    objects.delete(urls.join(url, name))
    expected: type[Exception] = FileNotFoundError if name == "zarr.json" else UserError
    with pytest.raises(expected, match=rf"{name} is missing; run stage pack with --force" if "/" in name else None):
        schema.read(groups.open_group(url), "rgb")


def test_a_frame_that_was_never_written_is_named(url: str) -> None:
    schema.create(url, "images.zarr", SIZES, BLOCK, {})
    schema.array(groups.open_group(url, write=True), "rgb")[4:6] = 1
    assert schema.FrameArray(groups.open_group(url, complete=True), "rgb")[5].all()
    assert not schema.FrameArray(groups.open_group(url), "rgb")[6].any()
    with pytest.raises(UserError, match=rf"{url}/{SHARD} has no frame 6; run stage pack with --force"):
        schema.FrameArray(groups.open_group(url, complete=True), "rgb")[6]


def test_a_group_without_its_empty_blocks(url: str) -> None:
    """As versions before this one wrote them: read as they did."""
    with zarr.config.set({"array.write_empty_chunks": False}):
        values = write(url)
    assert len(set(listing.list_files(url))) == len(schema.expected_files(groups.open_group(url))) - 3
    group = groups.open_group(url)
    for key, expected in values.items():
        np.testing.assert_array_equal(schema.read(group, key), expected)
    np.testing.assert_array_equal(schema.FrameArray(group, "mask")[5], values["mask"][5])
    np.testing.assert_array_equal(schema.FrameArray(group, "mask")[9], values["mask"][9])


# -- manifests ----------------------------------------------------------------------------------------------------
def test_manifests(url: str) -> None:
    write(url)
    whole = listing.manifest(url)
    assert set(whole) == schema.expected_files(groups.open_group(url))
    objects.write_bytes(urls.join(url, "notes.txt"), b"files besides are of no concern")
    listing.check_manifest(url, whole)
    n = whole[SHARD]
    for size in (n - 1, 0, n + 1):
        objects.write_bytes(urls.join(url, SHARD), bytes(size))
        with pytest.raises(UserError, match=rf"{url}/{SHARD} is damaged: {size} bytes instead of {n}; run stage pack"):
            listing.check_manifest(url, whole)
    objects.delete(urls.join(url, SHARD))
    with pytest.raises(UserError, match=rf"{url}/{SHARD} is missing; run stage pack with --force"):
        listing.check_manifest(url, whole)
    objects.delete(url)
    with pytest.raises(UserError, match=rf"{url}/intrinsics/c/0/0/0 is missing; run stage pack with --force"):
        listing.check_manifest(url, whole)
    listing.check_manifest(url, {})


def test_the_stage_that_is_named() -> None:
    for url, stage in (
        ("/home/results/2026/mouse/results/pack/1f/images.zarr/rgb/c/0", "stage pack"),
        ("s3://lab/p/results/train/1f/model/history.csv", "stage train"),
        ("/data/mouse/images.zarr/rgb/c/0", "the stage that wrote it"),
    ):
        assert str(damaged_result_error(url, "is missing")) == f"{url} is missing; run {stage} with --force"


def test_blocks_are_written_whole(tmp_path: Path) -> None:
    """A write that is not whole storage blocks would read and rewrite a neighbour's: refused."""
    sizes = {"T": 150, "C": 2, "h": 4, "w": 6}
    group = schema.create(str(tmp_path / "masks.zarr"), "masks.zarr", sizes, 64, {})
    masks = np.random.default_rng(0).random((150, 2, 4, 6)) < 0.5
    for start, stop in ((0, 63), (1, 64), (64, 100), (128, 149)):
        with pytest.raises(ValueError, match="whole blocks"):
            schema.write_block(group, "mask", start, masks[start:stop])
    for start, stop in ((128, 150), (0, 128)):
        schema.write_block(group, "mask", start, masks[start:stop])
    assert (schema.read(group, "mask") == masks).all()
    assert (schema.read(group, "mask", 60, 70) == masks[60:70]).all()
    schema.validate(group, "masks.zarr", "here")
    del group["box"]
    with pytest.raises(UserError, match="here: array box is missing"):
        schema.validate(group, "masks.zarr", "here")


@pytest.mark.parametrize(("n_bytes", "frames"), [(1, 64), (48 << 20, 1), (1 << 20, 32), (3 << 18, 64), (10**9, 1)])
def test_block_sizes(n_bytes: int, frames: int) -> None:
    assert schema.block_frames(n_bytes) == frames
