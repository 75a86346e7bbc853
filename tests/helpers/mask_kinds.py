"""Masks of many kinds as files, written by the formats' specifications or by FFmpeg, and how tests read them."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest
from tests.recording.test_sources import configured, film, ring

from zoosplat.errors import UserError
from zoosplat.recording.calibration.hdf5 import write_hdf5
from zoosplat.recording.facts import kept_frames
from zoosplat.recording.sources import open_source

CAMERAS, FRAMES, WIDTH, HEIGHT = "abc", 12, 64, 48
GREY, RGB, PALETTE, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6  # color types of PNG
Write = Callable[[Path], None]


def true_masks() -> Any:
    """[T, H, W] bool: a disc of radius 9 that moves; in the last frame none."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    masks = np.stack([(x - 14 - 3 * t) ** 2 + (y - 16 - t) ** 2 <= 81 for t in range(FRAMES)])
    masks[-1] = False
    return masks


TRUTH = true_masks()
# Each disc in two halves, labelled 1 and 2.
HALVES = TRUTH * (1 + (np.mgrid[:HEIGHT, :WIDTH][0] > 16 + np.arange(FRAMES)[:, None, None]))
PHOTO = np.random.default_rng(0).integers(60, 200, (FRAMES, HEIGHT, WIDTH, 3))

WHITE = TRUTH * 255
OPAQUE = np.concatenate([PHOTO, WHITE[..., None]], axis=3)  # a photograph, transparent but for the animal


def write_png(
    path: Path, samples: Any, kind: int = GREY, depth: int = 8, extra: tuple[tuple[bytes, Any], ...] = ()
) -> None:
    """A PNG file as its specification says, without a library: [H, W] or [H, W, channels] of `depth` bits."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    samples = np.asarray(samples)
    height, width = samples.shape[:2]
    bits = (samples.reshape(height, -1)[..., None] >> np.arange(depth - 1, -1, -1)) & 1
    rows = np.packbits(bits.reshape(height, -1).astype(np.uint8), axis=1)
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    chunks = [(b"IHDR", header), *((name, np.asarray(data, np.uint8).tobytes()) for name, data in extra)]
    chunks += [(b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))), (b"IEND", b"")]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(name, data) for name, data in chunks))


def pngs(values: Any, kind: int = GREY, depth: int = 8, *extra: tuple[bytes, Any], name: str = "{:05d}.png") -> Write:
    """Writes frames [T, H, W, ...] as PNG files into a folder."""

    def write(folder: Path) -> None:
        for t, frame in enumerate(values):
            write_png(folder / name.format(t), frame, kind, depth, extra)

    return write


def jpegs(values: Any) -> Write:
    """Writes frames [T, H, W] as JPEG files into a folder."""

    def write(folder: Path) -> None:
        folder.mkdir(parents=True)
        for t, frame in enumerate(values):
            cv2.imwrite(str(folder / f"{t}.jpg"), frame.astype(np.uint8))

    return write


def encoded(values: Any, codec: str, pixels: str, full: bool = False, **options: str) -> Write:
    """Writes frames [T, H, W] grey or [T, H, W, 4] RGBA as a video."""

    def write(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(path), "w") as file:
            stream: Any = file.add_stream(codec, rate=25)
            stream.height, stream.width = values.shape[1:3]
            stream.pix_fmt = pixels
            stream.options = {"threads": "1", **{key.replace("_", "-"): value for key, value in options.items()}}
            if full:
                stream.codec_context.color_range = 2
            for frame in np.asarray(values, np.uint8):
                picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), "gray" if frame.ndim == 2 else "rgba")
                if picture.format.name != pixels:
                    picture = picture.reformat(format=pixels, dst_color_range="JPEG" if full else "MPEG")
                file.mux(stream.encode(picture))
            file.mux(stream.encode())

    return write


def make_recording(folder: Path) -> Path:
    """A recording of three cameras without masks."""
    for camera in CAMERAS:
        film(folder / "videos" / f"{camera}.mp4", FRAMES, (WIDTH, HEIGHT))
    write_hdf5(ring(), folder / "cameras.h5")
    np.savez(folder / "up.npz", up=[0.0, 0.0, -1.0])
    return folder


def read(folder: Path, entries: list[str], **keys: Any) -> Any:
    """The masks [T, C, h, w] of a recording with these entries of `data.masks`, in blocks of five frames."""
    source = open_source(configured(folder, data__masks=entries, **keys))
    facts = source.check()
    kept = kept_frames(source.experiment, facts.n_frames)
    return np.concatenate(list(source.read_masks(facts.masks, facts.cameras, 0, kept, 5)))


def write_all(folder: Path, write: Write, suffix: str = "") -> list[str]:
    """Write the same masks for every camera, and return the entries of `data.masks`."""
    entries = [f"masks/{camera}{suffix}" for camera in CAMERAS]
    for entry in entries:
        write(folder / entry)
    return entries


def refused(folder: Path, entries: list[str], **keys: Any) -> str:
    """The message with which these entries are refused."""
    with pytest.raises(UserError) as error:
        read(folder, entries, **keys)
    return str(error.value)


def iou(found: Any, truth: Any) -> Any:
    """Intersection over union of each frame that has an animal, [T, C]."""
    both, any_ = ((op(found, truth[:, None])).sum((2, 3)) for op in (np.logical_and, np.logical_or))
    return (both / np.maximum(any_, 1))[truth.any((1, 2))]


def replaced(write: Write, name: str, frame: Any) -> Write:
    """Writes frames, and then one picture in place of another."""

    def both(place: Path) -> None:
        write(place)
        write_png(place / name, frame)

    return both


def without(write: Write, *names: str) -> Write:
    """Writes frames, and removes pictures of these names."""

    def some(place: Path) -> None:
        write(place)
        for name in names:
            (place / name).unlink()

    return some


def text(place: Path) -> None:
    """Writes a file that is no mask."""
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text("not a mask")
