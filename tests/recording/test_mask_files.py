"""Masks of every kind are read right to the pixel, whatever files they are in."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import cv2
import numpy as np
import pytest
from mask_kinds import (
    CAMERAS,
    FRAMES,
    GREY,
    GREY_ALPHA,
    HEIGHT,
    OPAQUE,
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
    without,
    write_all,
    write_png,
)
from tests.recording.test_sources import configured, film

from zoosplat.errors import UserError
from zoosplat.recording.sources import open_source

if TYPE_CHECKING:
    from tests.conftest import S3


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_recording(tmp_path)


# -- what is read without a key -----------------------------------------------------------------------------------
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


@pytest.mark.parametrize("blur", [0, 1, 2])
@pytest.mark.parametrize("crf", [10, 30, 42])
def test_compression_and_soft_outlines_are_no_labels(crf: int, blur: int, folder: Path) -> None:
    large = [cv2.resize(frame.astype(np.uint8), None, fx=4, fy=4, interpolation=cv2.INTER_LINEAR) for frame in WHITE]
    soft = np.stack([cv2.GaussianBlur(frame, (0, 0), blur) if blur else frame for frame in large])
    for camera in CAMERAS:
        film(folder / "videos" / f"{camera}.mp4", FRAMES, (4 * WIDTH, 4 * HEIGHT))
    found = read(folder, write_all(folder, encoded(soft, "libx264", "yuv420p", crf=str(crf)), ".mp4"))
    assert iou(found, soft >= 128).min() > (0.95 if crf > 40 else 0.98)


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


def test_pictures_on_s3(folder: Path, s3_here: S3) -> None:
    entries = write_all(folder, pngs(TRUTH * 1))
    encoded(OPAQUE, "ffv1", "bgra")(folder / "masks/d.mkv")
    bucket = s3_here.bucket()
    s3_here.put_folder(folder, bucket, "lab/mouse")
    for masks in (entries, [entries[0], "masks/b/%05d.png", "masks/d.mkv"]):
        source = open_source(configured(f"s3://{bucket}/lab/mouse", data__masks=masks))
        facts = source.check()
        (found,) = source.read_masks(facts.masks, facts.cameras, 3, 8, 5)
        assert (found == TRUTH[3:8, None]).all()
    s3_here.client.delete_object(Bucket=bucket, Key="lab/mouse/masks/c/00004.png")
    with pytest.raises(UserError, match=r"masks/c \(mask of camera c\): number 4 is missing"):
        open_source(configured(f"s3://{bucket}/lab/mouse", data__masks=entries)).check()


def test_without_its_decoder_an_opacity_is_not_ignored(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = write_all(folder, *LOSSY["vp9 with opacity"])
    monkeypatch.setattr(av, "codecs_available", {"vp9"})
    assert "opacity can be decoded by libvpx-vp9 alone" in refused(folder, entries)


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


def test_damaged_pictures_are_named(folder: Path) -> None:
    entries = write_all(folder, pngs(WHITE))
    path = folder / "masks/b/00003.png"
    path.write_bytes(path.read_bytes()[:-30])
    assert refused(folder, entries).startswith(f"masks/b (mask of camera b): frame 3: damaged or cut off: {path}")
    path.unlink()
    assert f"number 3 is missing: there are numbers from 0 to 11, but not {path}" in refused(folder, entries)
