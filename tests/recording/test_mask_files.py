"""Masks of every kind are read right to the pixel, or refused with a line that says how to read them."""

from __future__ import annotations

import re
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


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A recording of three cameras without masks."""
    for camera in CAMERAS:
        film(tmp_path / "videos" / f"{camera}.mp4", FRAMES, (WIDTH, HEIGHT))
    write_hdf5(ring(), tmp_path / "cameras.h5")
    np.savez(tmp_path / "up.npz", up=[0.0, 0.0, -1.0])
    return tmp_path


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
    with pytest.raises(UserError) as error:
        read(folder, entries, **keys)
    return str(error.value)


def iou(found: Any, truth: Any) -> Any:
    """Intersection over union of each frame that has an animal, [T, C]."""
    both, any_ = ((op(found, truth[:, None])).sum((2, 3)) for op in (np.logical_and, np.logical_or))
    return (both / np.maximum(any_, 1))[truth.any((1, 2))]


# -- what is read without a key -----------------------------------------------------------------------------------
WHITE = TRUTH * 255
OPAQUE = np.concatenate([PHOTO, WHITE[..., None]], axis=3)  # a photograph, transparent but for the animal
LOSSLESS: dict[str, tuple[Write, str]] = {
    "png of 0 and 255": (pngs(WHITE), ""),
    "png of 0 and 1": (pngs(TRUTH * 1), ""),
    "png of 1 bit": (pngs(TRUTH * 1, GREY, 1), ""),
    "png of 2 bits": (pngs(TRUTH * 3, GREY, 2), ""),
    "png of 4 bits": (pngs(TRUTH * 15, GREY, 4), ""),
    "png of 16 bits": (pngs(TRUTH * 65535, GREY, 16), ""),
    "png of 16 bits, 0 and 255": (pngs(WHITE, GREY, 16), ""),
    "png of 16 bits, 0 and 1": (pngs(TRUTH * 1, GREY, 16), ""),
    "grey palette": (pngs(TRUTH * 1, PALETTE, 8, (b"PLTE", [0, 0, 0, 255, 255, 255])), ""),
    "grey palette that begins with white": (pngs(1 - TRUTH, PALETTE, 1, (b"PLTE", [255, 255, 255, 0, 0, 0])), ""),
    "coloured palette, as DAVIS has it": (pngs(TRUTH * 1, PALETTE, 8, (b"PLTE", [0, 0, 0, 128, 0, 0, 0, 128, 0])), ""),
    "transparent palette": (pngs(TRUTH * 1, PALETTE, 4, (b"PLTE", [9, 9, 9, 7, 7, 7]), (b"tRNS", [0, 255])), ""),
    "colours that are grey": (pngs(np.stack([WHITE] * 3, -1), RGB), ""),
    "opacity": (pngs(OPAQUE, RGBA), ""),
    "opacity of 16 bits": (pngs(OPAQUE * 257, RGBA, 16), ""),
    "opacity that says nothing": (pngs(np.stack([WHITE] * 3 + [WHITE | 255], -1), RGBA), ""),
    "grey with opacity": (pngs(np.stack([PHOTO[..., 0], WHITE], -1), GREY_ALPHA), ""),
    "grey with opacity that says nothing": (pngs(np.stack([WHITE, WHITE | 255], -1) * 257, GREY_ALPHA, 16), ""),
    "ffv1": (encoded(WHITE, "ffv1", "gray"), ".mkv"),
    "ffv1 of 0 and 1": (encoded(TRUTH, "ffv1", "gray"), ".mkv"),
    "ffv1 in limited range": (encoded(WHITE, "ffv1", "yuv420p"), ".mkv"),
    "ffv1 in full range": (encoded(WHITE, "ffv1", "yuv420p", full=True), ".mkv"),
    "ffv1 of 0 and 1 in full range": (encoded(TRUTH, "ffv1", "yuv420p", full=True), ".mkv"),
    "ffv1 with opacity": (encoded(OPAQUE, "ffv1", "bgra"), ".mkv"),
    "ffv1 with opacity of yuv": (encoded(OPAQUE, "ffv1", "yuva420p"), ".mkv"),
    "png in mov with opacity": (encoded(OPAQUE, "png", "rgba"), ".mov"),
    "huffyuv": (encoded(WHITE, "ffvhuff", "yuv444p"), ".avi"),
}
LOSSY: dict[str, tuple[Write, str]] = {
    "jpeg": (jpegs(WHITE), ""),
    "h264 in limited range": (encoded(WHITE, "libx264", "yuv420p", crf="18"), ".mp4"),
    "h264 in full range": (encoded(WHITE, "libx264", "yuvj420p", crf="18"), ".mp4"),
    "vp9 with opacity": (encoded(OPAQUE, "libvpx-vp9", "yuva420p", crf="10"), ".webm"),
    "vp8 with opacity": (encoded(OPAQUE, "libvpx", "yuva420p", crf="4", auto_alt_ref="0"), ".webm"),
    "prores with opacity": (encoded(OPAQUE, "prores_ks", "yuva444p10le"), ".mov"),
}


@pytest.mark.parametrize("kind", LOSSLESS)
def test_masks_without_loss_are_read_to_the_pixel(kind: str, folder: Path) -> None:
    found = read(folder, write_all(folder, *LOSSLESS[kind]))
    assert (found == TRUTH[:, None]).all()


@pytest.mark.parametrize("kind", LOSSY)
def test_compressed_masks_are_read(kind: str, folder: Path) -> None:
    found = read(folder, write_all(folder, *LOSSY[kind]))
    assert iou(found, TRUTH).min() > 0.95
    assert not found[-1].any()


def test_noise_of_a_video_in_pictures_is_no_label(folder: Path) -> None:
    """Pictures that were extracted from a compressed video have values such as 1, 2 and 253 round the animal."""
    encoded(WHITE, "libx264", "yuv420p", crf="30")(folder / "masks.mp4")
    with av.open(str(folder / "masks.mp4")) as film_of_masks:
        frames: Any = np.stack([frame.to_ndarray(format="gray") for frame in film_of_masks.decode(video=0)])
    assert len(np.unique(frames)) > 20
    found = read(folder, write_all(folder, pngs(frames)))
    assert (found == (frames >= 128)[:, None]).all()


def test_cameras_may_differ(folder: Path) -> None:
    entries = ["masks/a.mkv", "masks/b", "masks/c/%05d.png"]
    encoded(WHITE, "ffv1", "gray")(folder / entries[0])
    pngs(TRUTH * 1)(folder / entries[1])
    pngs(OPAQUE, RGBA)(folder / "masks/c")
    assert (read(folder, entries) == TRUTH[:, None]).all()


def test_videos_seek_to_every_frame(folder: Path) -> None:
    """Shards begin anywhere; the decoder of opacity is another than FFmpeg's own."""
    entries = write_all(folder, *LOSSY["vp9 with opacity"])
    source = open_source(configured(folder, data__masks=entries))
    facts = source.check()
    for start in range(FRAMES - 1):
        (found,) = source.read_masks(facts.masks, facts.cameras, start, start + 1, 1)
        assert iou(found, TRUTH[start : start + 1]).min() > 0.95


# -- numbers ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("{}.png", ""),
        ("{:02d}.png", "/%02d.png"),
        ("cam7_frame{:04d}_mask.png", ""),
        ("cam7_frame{:04d}_mask.png", "/cam7_frame%04d_mask.png"),
        ("{:05d}.PNG", ""),
    ],
)
@pytest.mark.parametrize("first", [0, 1])
def test_numbers_are_those_of_frames(name: str, entry: str, first: int, folder: Path) -> None:
    def write(place: Path) -> None:
        for t, mask in enumerate(TRUTH):
            write_png(place / name.format(t + first), mask * 255)
        (place / "Thumbs.db").write_text("of another program")
        (place / "._00000.png").write_text("of macOS")

    entries = [e + entry for e in write_all(folder, write)]
    assert (read(folder, entries) == TRUTH[:, None]).all()


def test_pictures_of_kept_frames_are_numbered_by_the_video(folder: Path) -> None:
    unkept = [f"{t:05d}.png" for t in range(FRAMES) if t % 5]
    entries = write_all(folder, without(pngs(WHITE), *unkept))
    assert (read(folder, entries, ingest__frame_jump=5) == TRUTH[::5, None]).all()
    assert "number 1 is missing" in refused(folder, entries)
    for t, new in ((5, 1), (10, 2)):
        for entry in entries:
            (folder / entry / f"{t:05d}.png").rename(folder / entry / f"{new:05d}.png")
    assert "masks/a (mask of camera a): has as many pictures as frames are kept" in refused(
        folder, entries, ingest__frame_jump=5
    )


def test_pictures_up_to_the_last_kept_frame_are_enough(folder: Path) -> None:
    entries = write_all(folder, pngs(WHITE[:7]))
    assert (read(folder, entries, ingest__max_frames=7) == TRUTH[:7, None]).all()
    assert "masks/a (mask of camera a) has 7 frames, videos/a.mp4 (video of camera a) has 12" in refused(
        folder, entries
    )


# -- sizes --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [(32, 24), (48, 36), (50, 37), (50, 38)])
def test_smaller_masks_of_the_same_shape_are_enlarged(size: tuple[int, int], folder: Path) -> None:
    small = [cv2.resize(frame.astype(np.uint8), size, interpolation=cv2.INTER_AREA) for frame in WHITE]
    found = read(folder, write_all(folder, pngs(small)))
    assert found.shape == (FRAMES, 3, HEIGHT, WIDTH)
    assert iou(found, TRUTH).min() > 0.94
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    for t in range(FRAMES - 1):  # They are not shifted by part of a pixel.
        center = [(axis * found[t, 0]).sum() / found[t, 0].sum() for axis in (x, y)]
        assert np.abs(np.array(center) - (14 + 3 * t, 16 + t)).max() < 0.5


@pytest.mark.parametrize("size", [(64, 24), (32, 32), (128, 96), (63, 48), (64, 47)])
def test_masks_of_another_shape_are_refused(size: tuple[int, int], folder: Path) -> None:
    entries = write_all(folder, pngs(WHITE))
    pngs([cv2.resize(frame.astype(np.uint8), size) for frame in WHITE])(folder / "masks/b")
    line = refused(folder, entries)
    assert f"masks/b (mask of camera b): {size[0]} x {size[1]} pixels" in line
    assert "64 x 48" in line


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
def replaced(write: Write, name: str, frame: Any) -> Write:
    """Writes frames, and then one picture in place of another."""

    def both(place: Path) -> None:
        write(place)
        write_png(place / name, frame)

    return both


def without(write: Write, *names: str) -> Write:
    def some(place: Path) -> None:
        write(place)
        for name in names:
            (place / name).unlink()

    return some


def text(place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text("not a mask")


REFUSED: dict[str, tuple[Write, str, dict[str, Any], str]] = {
    "compressed labels": (encoded(HALVES * 85, "libx264", "yuv420p", crf="18"), ".mp4", {}, "areas of grey"),
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


def test_damaged_pictures_are_named(folder: Path) -> None:
    entries = write_all(folder, pngs(WHITE))
    path = folder / "masks/b/00003.png"
    path.write_bytes(path.read_bytes()[:-30])
    assert refused(folder, entries).startswith(f"masks/b (mask of camera b): frame 3: damaged or cut off: {path}")
    path.unlink()
    assert f"number 3 is missing: there are numbers from 0 to 11, but not {path}" in refused(folder, entries)
