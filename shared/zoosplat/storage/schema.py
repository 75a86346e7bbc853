"""Schemas of the zarr groups: arrays, dimensions, types, units, and how time is cut into storage blocks.

Dimensions: T kept frames, C cameras, H x W pixels of the videos, h x w working pixels (images: window pixels), n grid
points an axis, S shards of work. Arrays with a T axis that shards write are cut there every `block` frames; image
arrays are zarr shards of `block` frames with one chunk a frame. All chunks are compressed with zstd and end with a
CRC32C.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import zarr
from numcodecs.zstd import Zstd
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.core.sync import sync

from zoosplat.errors import UserError
from zoosplat.storage import groups
from zoosplat.storage.errors import damaged_result_error
from zoosplat.storage.group_store import ABSENT, GroupStore

# Largest number of bytes of an array that a writer holds at once. It is also a good size of an object on S3.
BLOCK_BYTES = 48 << 20
# Largest number of frames in a storage block.
SMALL_BLOCK = 64
COMPRESSORS = (ZstdCodec(level=3), Crc32cCodec())

Layout = Literal["sharded", "blocks", "per_shard", "whole"]


@dataclass(frozen=True)
class ArraySpec:
    """One array: its dimensions by name, dtype, unit, meaning and layout.

    Layouts: `sharded` (zarr shards of `block` frames, a chunk a frame), `blocks` (chunks of `block` frames),
    `per_shard` (a chunk for each shard of work, first axis S), `whole` (one chunk, written when the stage finishes).
    """

    dims: tuple[str | int, ...]
    dtype: str
    unit: str
    meaning: str
    layout: Layout


GROUPS: dict[str, dict[str, ArraySpec]] = {
    # All pictures in it are as the cameras saw them, with the distortion of their lenses.
    "segments.zarr": {
        "probability": ArraySpec(("T", "C", "H", "W"), "uint8", "1/255", "of animal; its mask: >= 128", "sharded"),
        "plate": ArraySpec(("C", "H", "W", 3), "uint8", "", "RGB of the background", "whole"),
        "noise": ArraySpec(("C",), "float32", "grey levels", "standard deviation of a pixel from the plate", "whole"),
        "light": ArraySpec(("T", "C", 3, 4), "float32", "", "g0, gx, gy, o of a colour: see its README", "blocks"),
        "agreement": ArraySpec(("T", "C"), "float32", "", "soft IoU with what other views tell; or NaN", "blocks"),
        "seen": ArraySpec(("T", "C"), "bool", "", "whether the view is there; else its mask means nothing", "blocks"),
        "frame": ArraySpec(("T",), "int64", "frames", "index in the video", "whole"),
    },
    "masks.zarr": {
        "mask": ArraySpec(("T", "C", "h", "w"), "bool", "", "animal, undistorted, working resolution", "sharded"),
        "box": ArraySpec(("T", "C", 4), "int32", "px", "x0, y0, x1, y1 (exclusive) of the mask; 0 if empty", "blocks"),
        "frame": ArraySpec(("T",), "int64", "frames", "index in the video", "whole"),
        "intrinsics": ArraySpec(("C", 3, 3), "float64", "px", "working resolution, whole frame, undistorted", "whole"),
        "world_to_camera": ArraySpec(("C", 4, 4), "float64", "m", "+z up, origin at the mean camera", "whole"),
    },
    "tracking.zarr": {
        "hull_mean": ArraySpec(("T", 3), "float64", "m", "mean of the hull voxels; NaN without a hull", "blocks"),
        "hull_cov": ArraySpec(("T", 3, 3), "float64", "m^2", "covariance of the hull voxels; NaN without", "blocks"),
        "n_voxels": ArraySpec(("T",), "int64", "", "hull voxels", "blocks"),
        "principal_shift": ArraySpec(("T", "C", 2), "float64", "px", "added to (cx, cy); 0 unless adaptive", "blocks"),
        "centers": ArraySpec(("T", 3), "float64", "m", "animal centre, interpolated where not valid", "whole"),
        "covs": ArraySpec(("T", 3, 3), "float64", "m^2", "covariance, interpolated where not valid", "whole"),
        "angles": ArraySpec(("T",), "float64", "rad", "heading about +z, continuous over time", "whole"),
        "valid": ArraySpec(("T",), "bool", "", "whether the frame has a hull", "whole"),
    },
    "crop.zarr": {
        "counts": ArraySpec(("S", 3, "n"), "int64", "", "hull voxels per grid index and axis, by shard", "per_shard"),
        "marginals": ArraySpec((3, "n"), "int64", "", "the counts summed over shards", "whole"),
        "volume_idx": ArraySpec((3, 2), "int64", "", "index range kept along x, y, z", "whole"),
    },
    "images.zarr": {
        "rgb": ArraySpec(("T", "C", "h", "w", 3), "uint8", "", "window, white away from the animal", "sharded"),
        "mask": ArraySpec(("T", "C", "h", "w"), "bool", "", "window", "sharded"),
        "origin": ArraySpec(("T", "C", 2), "int32", "px", "x, y of the window's corner in the whole frame", "blocks"),
        "intrinsics": ArraySpec(("C", 3, 3), "float64", "px", "whole frame, as in masks.zarr", "whole"),
        "world_to_camera": ArraySpec(("C", 4, 4), "float64", "m", "as in masks.zarr", "whole"),
    },
    "features.zarr": {
        "features": ArraySpec(("T", "D"), "float32", "", "descriptor of the animal; NaN without a hull", "blocks"),
    },
    "embedding.zarr": {
        "embedding": ArraySpec(("T", "E"), "float32", "", "coordinates; NaN where not valid", "whole"),
        "map": ArraySpec(("T", 2), "float32", "", "place in the plane; NaN where not valid", "whole"),
        "neighbours": ArraySpec(
            ("T", "k"), "int32", "frames", "most alike at other times, nearest first; or -1", "whole"
        ),
        "state": ArraySpec(("T",), "int32", "", "cluster, 0 the most frequent; -1 where not valid", "whole"),
        "valid": ArraySpec(("T",), "bool", "", "whether the frame has a descriptor", "whole"),
        "recording": ArraySpec(("T",), "int32", "", "which of the recordings embedded together", "whole"),
        "t": ArraySpec(("T",), "int32", "frames", "index among the recording's kept frames", "whole"),
        "frame": ArraySpec(("T",), "int64", "frames", "index in the video", "whole"),
        "time": ArraySpec(("T",), "float64", "s", "since the recording's first frame", "whole"),
        "center": ArraySpec(("T", 3), "float64", "m", "as in tracking.zarr", "whole"),
        "heading": ArraySpec(("T",), "float64", "rad", "about +z, as in tracking.zarr", "whole"),
        "speed": ArraySpec(("T",), "float64", "m/s", "of the centre, horizontally", "whole"),
        "height": ArraySpec(("T",), "float64", "m", "of the animal's top above the floor", "whole"),
    },
}


def block_frames(bytes_per_frame: int) -> int:
    """Frames in a storage block: a power of two, at most 64, of at most `BLOCK_BYTES`."""
    block = SMALL_BLOCK
    while block > 1 and block * bytes_per_frame > BLOCK_BYTES:
        block //= 2
    return block


def create(url: str, name: str, sizes: dict[str, int], block: int, attributes: dict[str, Any]) -> zarr.Group:
    """Create an empty group of a known kind in place of whatever is at `url`.

    Args:
        url: folder or prefix of the group.
        name: key of `GROUPS`.
        sizes: length of every named dimension.
        block: frames in a storage block.
        attributes: JSON values. They hold no times, so that groups of equal input are equal byte for byte.
    """
    group = groups.create_group(url, {**attributes, "block": block})
    for key, spec in GROUPS[name].items():
        _create_array(group, key, spec, sizes, block)
    return group


def _create_array(group: zarr.Group, key: str, spec: ArraySpec, sizes: dict[str, int], block: int) -> None:
    shape = tuple(d if isinstance(d, int) else sizes[d] for d in spec.dims)
    chunks = [max(1, n) for n in shape]
    shards: tuple[int, ...] | None = None
    if spec.layout == "sharded":
        chunks[0] = 1
        shards = (block, *chunks[1:])
    elif spec.layout == "blocks":
        chunks[0] = block
    elif spec.layout == "per_shard":
        chunks[0] = 1
    fill: Any = float("nan") if np.dtype(spec.dtype).kind == "f" else 0
    group.create_array(
        key,
        shape=shape,
        dtype=spec.dtype,
        chunks=tuple(chunks),
        shards=shards,
        fill_value=fill,
        compressors=COMPRESSORS,
        filters=None,
        dimension_names=[d if isinstance(d, str) else None for d in spec.dims],
        attributes={"unit": spec.unit, "meaning": spec.meaning},
    )


# A further array of segments.zarr where cameras are held out; Ch is their number.
ALL_VIEWS = ArraySpec(
    ("T", "Ch", "H", "W"), "uint8", "1/255", "probability in held-out cameras with the help of the others", "sharded"
)


def add_all_views(group: zarr.Group, sizes: dict[str, int], block: int) -> None:
    """Add the empty array `all_views` to segments.zarr, for recordings with held-out cameras; arguments as `create`."""
    _create_array(group, "all_views", ALL_VIEWS, sizes, block)


# A further array of segments.zarr where `data.keypoints` are given; K is the largest number of a camera.
KEYPOINTS = ArraySpec(("T", "C", "K", 3), "float32", "px", "x, y and confidence 0 to 1, as given; NaN: none", "whole")


def add_keypoints(group: zarr.Group, values: Any) -> None:
    """Add the array `keypoints` [T, C, K, 3] to segments.zarr: x and y as the camera saw them, and confidence."""
    _add(group, "keypoints", KEYPOINTS, values)


# Further arrays of masks.zarr and images.zarr for cameras that move.
MOVING: dict[str, ArraySpec] = {
    "time": ArraySpec(("T",), "float64", "", "0 to 1", "whole"),
    "pose": ArraySpec(("T", "C", 4, 4), "float64", "m", "world to camera in each frame", "whole"),
}

# A further array of masks.zarr and images.zarr where views are absent from some frames.
SEEN = ArraySpec(("T", "C"), "bool", "", "whether the view is there; where it is not, its mask means nothing", "whole")
# The name of `seen` in the groups of D-NeRF scenes that were stored before other recordings had absent views.
PICTURED = "pictured"

# Further arrays of images.zarr where the background of the cameras is known: see `zoosplat.recording.background`. With
# them, the windows of `rgb` are not white away from the animal, but raw pictures.
BACKGROUND: dict[str, ArraySpec] = {
    "plate": ArraySpec(("C", "H", "W", 3), "uint8", "", "whole frame without the animal, undistorted", "whole"),
    "light": ArraySpec(("T", "C", 3, 4), "float32", "", "gain, slopes along x and y, offset on the plate", "blocks"),
}


def _add(group: zarr.Group, key: str, spec: ArraySpec, values: Any) -> None:
    value = np.asarray(values, spec.dtype)
    block: Any = group.attrs["block"] if spec.layout == "blocks" else len(value)
    meaning: Any = {"unit": spec.unit, "meaning": spec.meaning}
    group.create_array(
        key,
        shape=value.shape,
        dtype=spec.dtype,
        chunks=(block, *value.shape[1:]),
        compressors=COMPRESSORS,
        attributes=meaning,
    )
    array(group, key)[...] = value


def add_moving(group: zarr.Group, values: dict[str, Any]) -> None:
    """Add the arrays of `MOVING` to masks.zarr or images.zarr, for cameras that move."""
    for key, spec in MOVING.items():
        _add(group, key, spec, values[key])


def add_background(group: zarr.Group, plate: Any, light: Any) -> None:
    """Add the arrays of `BACKGROUND` to images.zarr: plates [C, H, W, 3] and their light [T, C, 3, 4]."""
    for (key, spec), values in zip(BACKGROUND.items(), (plate, light), strict=True):
        _add(group, key, spec, values)


def add_seen(group: zarr.Group, seen: Any) -> None:
    """Add the array `seen` [T, C] bool to masks.zarr or images.zarr: False where a view is absent from a frame.

    An absent view tells nothing about the animal. The empty mask of a view that is there tells that no animal is there.
    """
    _add(group, "seen", SEEN, seen)


def has_seen(group: zarr.Group) -> bool:
    """Whether a group tells which views are there; all are where it does not."""
    return "seen" in group or PICTURED in group


def read_seen(group: zarr.Group) -> npt.NDArray[np.bool_]:
    """Which views of masks.zarr or images.zarr are there, [T, C] bool.

    Raises:
        UserError: as `read`.
    """
    if not has_seen(group):
        return np.ones(array(group, "mask").shape[:2], bool)
    return np.asarray(read(group, "seen" if "seen" in group else PICTURED), bool)


def array(group: zarr.Group, key: str) -> zarr.Array[Any]:
    """An array of a group. Raises UserError where the group has none of this name."""
    try:
        found = group[key]
    except KeyError:
        raise damaged_result_error(f"{_url(group)}/{key}/zarr.json", "is missing") from None
    if not isinstance(found, zarr.Array):
        raise UserError(f"{_url(group)}: {key} is not an array")
    return found


def _url(group: zarr.Group) -> str:
    assert isinstance(group.store, GroupStore)
    return group.store.url


def read(group: zarr.Group, key: str, start: int | None = None, stop: int | None = None) -> Any:
    """An array as numpy, or a range of its first axis.

    Raises:
        UserError: naming the object that is damaged, or missing from a group that was opened as complete.
    """
    return np.asarray(array(group, key)[start:stop])


def expected_files(group: zarr.Group) -> set[str]:
    """Paths, relative to the group, of all files of a complete group with these arrays."""
    names = {"zarr.json"}
    for key, found in group.arrays():
        names.add(f"{key}/zarr.json")
        grid = [range(-(-n // m)) for n, m in zip(found.shape, found.shards or found.chunks, strict=True)]
        names |= {f"{key}/{found.metadata.encode_chunk_key(place)}" for place in itertools.product(*grid)}
    return names


class FrameArray:
    """A `sharded` array that is read a frame at a time, from any thread.

    It does not read through zarr, which takes milliseconds of Python a frame, but follows its specification (v3, codec
    sharding_indexed): a shard ends with its index, which holds offset and length of each chunk as uint64 and a CRC32C.
    A chunk ends with a CRC32C of its own.
    """

    def __init__(self, group: zarr.Group, key: str) -> None:
        self._array, self._key = array(group, key), key
        assert self._array.shards is not None
        assert isinstance(self._array.store, GroupStore)
        self._store = self._array.store
        self.shape, self._per_shard = self._array.shape, self._array.shards[0]
        self._indexes: dict[str, Any] = {}  # The index [frames, 2] of every shard that was read from.

    def __getitem__(self, t: int) -> Any:
        """Frame t as a new numpy array. Raises UserError as `read`."""
        frame = np.empty(self.shape[1:], self._array.dtype)
        number, within = divmod(t, self._per_shard)
        key = self._array.metadata.encode_chunk_key((number,) + (0,) * frame.ndim)
        key = f"{self._array.path}/{key}"
        if key not in self._indexes:
            size = 16 * self._per_shard + 4
            try:
                index = np.frombuffer(groups.read_part(self._store, key, -size, size)[:-4], "<u8")
            except FileNotFoundError:
                index = np.full(2 * self._per_shard, ABSENT)
            self._indexes[key] = index.reshape(-1, 2)
        offset, length = self._indexes[key][within]
        if offset == ABSENT:
            if self._store.complete:
                raise damaged_result_error(f"{self._store.url}/{key}", f"has no frame {t}")
            frame[...] = self._array.fill_value
        else:
            data = groups.read_part(self._store, key, int(offset), int(length))
            Zstd().decode(data[:-4], frame.reshape(-1).view(np.uint8))
        return frame


def write_block(group: zarr.Group, key: str, start: int, values: Any) -> None:
    """Write whole storage blocks, one put each.

    Args:
        group: open for writing.
        key: array name.
        start: first index along axis 0, a multiple of the array's block.
        values: numpy array that ends on a block boundary or at the end of the array.
    """
    target = array(group, key)
    step = (target.shards or target.chunks)[0]
    stop = start + len(values)
    if start % step or (stop % step and stop != target.shape[0]):
        raise ValueError(f"{key}[{start}:{stop}] is not whole blocks of {step}")
    for i in range(start, stop, step):
        if target.shards is not None:
            # zarr merges a write into a shard that exists, so a damaged shard would fail every later write.
            key_of_shard = target.metadata.encode_chunk_key((i // step,) + (0,) * (target.ndim - 1))
            sync((target.store_path / key_of_shard).delete())
        target[i : min(i + step, stop)] = values[i - start : min(i + step, stop) - start]


def validate(group: zarr.Group, name: str, where: str) -> None:
    """Raise UserError unless a group has the arrays, types and ranks of its kind."""
    for key, spec in GROUPS[name].items():
        if key not in group:
            raise UserError(f"{where}: array {key} is missing; remove the group and run its stage again")
        found = array(group, key)
        if found.dtype != np.dtype(spec.dtype) or found.ndim != len(spec.dims):
            raise UserError(f"{where}: array {key} is {found.dtype} {found.shape}, expected {spec.dtype} {spec.dims}")
