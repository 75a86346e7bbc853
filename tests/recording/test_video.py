"""Frames are the right ones, whatever the container says, and their colours are those of swscale."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest
from av.video.reformatter import ColorRange, Colorspace, Interpolation

from zoosplat.errors import UserError
from zoosplat.recording import video

WIDTH, HEIGHT, BITS = 96, 32, 12


def numbered(index: int) -> Any:
    """A grey picture [HEIGHT, WIDTH] uint8 with the index in 12 blocks of 8 x 32 pixels, black or white."""
    bits = np.array([(index >> b) & 1 for b in range(BITS)], np.uint8) * 255
    return np.repeat(np.repeat(bits[None], WIDTH // BITS, axis=1), HEIGHT, axis=0)


def number_of(frame: av.VideoFrame) -> int:
    luma = video.planes(frame).y
    return int(sum(int(luma[HEIGHT // 2, 8 * b + 4] > 128) << b for b in range(BITS)))


def write_numbered(
    path: Path,
    n: int,
    options: dict[str, str] | None = None,
    times: Callable[[int], int] = lambda i: 40 * i,
    codec: str = "libx264",
    faststart: bool = False,
) -> Path:
    """A film of numbered frames, at 25 frames/s or at the milliseconds that `times` gives."""
    with av.open(str(path), "w", options={"movflags": "faststart"} if faststart else {}) as file:
        stream: Any = file.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        stream.options = {"crf": "20", "threads": "1", **(options or {})}
        for i in range(n):
            frame = av.VideoFrame.from_ndarray(numbered(i), format="gray").reformat(format="yuv420p")
            frame.pts, frame.time_base = times(i), Fraction(1, 1000)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def numbers(info: video.VideoInfo, start: int, stop: int, jump: int = 1) -> list[int]:
    return [number_of(frame) for frame in video.read_frames(info, start, stop, jump)]


# -- the right frames ---------------------------------------------------------------------------------------------
GOPS = {
    "b_frames": {"g": "12", "bf": "3", "b_strategy": "0", "sc_threshold": "0"},
    "one_gop": {"g": "1000", "bf": "2", "b_strategy": "0", "sc_threshold": "0"},
    "pyramid": {"g": "30", "bf": "8", "b_strategy": "0", "x264-params": "b-pyramid=normal:scenecut=0"},
    "open_gop": {"g": "12", "bf": "3", "b_strategy": "0", "x264-params": "open-gop=1:scenecut=0"},
    "intra": {"g": "1"},
    "no_b_frames": {"g": "7", "bf": "0"},
}


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "mov"])
@pytest.mark.parametrize("gop", GOPS)
def test_every_start_gives_that_frame(gop: str, suffix: str, tmp_path: Path) -> None:
    info = video.probe(str(write_numbered(tmp_path / f"v.{suffix}", 75, GOPS[gop])), "v")
    assert (info.n_frames, info.n_declared, info.width, info.height) == (75, 75, WIDTH, HEIGHT)
    assert info.step is not None
    assert info.fps == pytest.approx(25)
    for start in range(75):
        stop = min(start + 3, 75)
        assert numbers(info, start, stop) == list(range(start, stop))
    assert numbers(info, 0, 75) == list(range(75))


@pytest.mark.parametrize(("start", "stop", "jump"), [(0, 75, 1), (0, 75, 7), (14, 71, 7), (10, 11, 5), (60, 75, 3)])
def test_jumps(start: int, stop: int, jump: int, tmp_path: Path) -> None:
    info = video.probe(str(write_numbered(tmp_path / "v.mp4", 75, GOPS["b_frames"])), "v")
    assert numbers(info, start, stop, jump) == list(range(start, stop, jump))


def test_film_that_does_not_start_at_zero(tmp_path: Path) -> None:
    path = write_numbered(tmp_path / "v.mkv", 60, GOPS["b_frames"], lambda i: 40 * i + 3600)
    info = video.probe(str(path), "v")
    assert info.step is not None
    for start in (0, 1, 11, 12, 13, 40, 59):
        assert numbers(info, start, 60) == list(range(start, 60))


def test_variable_frame_rate_is_counted(tmp_path: Path) -> None:
    """Where frames are unevenly far apart, their times do not tell their numbers."""
    ticks = list(itertools.accumulate(np.random.default_rng(0).choice([20, 40, 60, 400], 75).tolist()))
    path = write_numbered(tmp_path / "v.mp4", 75, GOPS["b_frames"], lambda i: int(ticks[i]))
    info = video.probe(str(path), "v")
    assert info.step is None
    assert info.n_frames == 75
    for start in (0, 1, 30, 74):
        assert numbers(info, start, 75) == list(range(start, 75))


def test_a_dropped_frame_in_the_file_is_counted(tmp_path: Path) -> None:
    """A camera that skipped once: frame k is still the k-th picture of the file."""
    path = write_numbered(tmp_path / "v.mp4", 60, GOPS["b_frames"], lambda i: 40 * (i + (i >= 30)))
    info = video.probe(str(path), "v")
    assert info.n_frames == 60
    for start in (0, 29, 30, 31, 50):
        assert numbers(info, start, 60) == list(range(start, 60))


def test_avi_with_b_frames_is_counted(tmp_path: Path) -> None:
    """AVI stores no times of display: those that decoders make up are late by the reordering."""
    path = write_numbered(tmp_path / "v.avi", 60, {"bf": "2", "g": "12", "qmax": "3"}, codec="mpeg4")
    info = video.probe(str(path), "v")
    assert info.n_frames == 60
    for start in (0, 1, 2, 30, 57):
        assert numbers(info, start, 60) == list(range(start, 60))


def test_beyond_the_end(tmp_path: Path) -> None:
    info = video.probe(str(write_numbered(tmp_path / "v.mp4", 20)), "clip")
    with pytest.raises(UserError, match="clip: ends at frame 20"):
        numbers(info, 10, 25)


@pytest.mark.parametrize("gop", GOPS)
def test_frames_counted_in_a_truncated_file_are_the_first_ones(gop: str, tmp_path: Path) -> None:
    """B-frames lie behind later frames in the file: what is cut off is not simply the end of the film."""
    path = write_numbered(tmp_path / "whole.mp4", 75, GOPS[gop], faststart=True)
    whole = path.read_bytes()
    with av.open(str(path)) as file:
        ends = [e.pos + e.size for e in file.streams.video[0].index_entries]
    seen = set()
    for n in range(20, 75, 3):
        cut = tmp_path / "cut.mp4"
        cut.write_bytes(whole[: ends[n] - 1])
        info = video.probe(str(cut), "cut")
        assert info.n_declared == 75
        assert info.n_frames < 75
        seen.add(info.n_frames)
        assert numbers(info, 0, info.n_frames) == list(range(info.n_frames))
        assert numbers(info, info.n_frames - 1, info.n_frames) == [info.n_frames - 1]
    assert max(seen) >= 60


def test_index_at_the_end_is_cut_off(tmp_path: Path) -> None:
    path = write_numbered(tmp_path / "v.mp4", 20)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(UserError, match=r"clip: not a readable video"):
        video.probe(str(path), "clip")


def test_a_folder_is_no_video(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"clip: no such file, but a folder: .*; check the names"):
        video.probe(str(tmp_path), "clip")


def test_titles_in_any_encoding(tmp_path: Path) -> None:
    """Cameras write their maker's notes as they like."""
    path = tmp_path / "v.avi"
    with av.open(str(path), "w") as file:
        file.metadata["title"] = "Muenchen"
        stream: Any = file.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for i in range(5):
            picture = av.VideoFrame.from_ndarray(numbered(i), format="gray").reformat(format="yuv420p")
            file.mux(stream.encode(picture))
        file.mux(stream.encode())
    path.write_bytes(path.read_bytes().replace(b"Muenchen", "München ".encode("latin-1")))
    info = video.probe(str(path), "v")
    assert info.n_frames == 5
    assert numbers(info, 0, 5) == list(range(5))


def test_corrupt_bytes_are_never_shown_as_a_picture(tmp_path: Path) -> None:
    """Zeros over the middle of the film: an error with the frame's number, or, before it, the right pictures."""
    path = write_numbered(tmp_path / "v.mp4", 75, GOPS["b_frames"])
    with av.open(str(path)) as file:
        entries = [(e.pos, e.size) for e in file.streams.video[0].index_entries]
    data = bytearray(path.read_bytes())
    position, size = entries[36]
    data[position + 5 : position + size] = bytes(size - 5)
    path.write_bytes(data)
    info = video.probe(str(path), "clip")
    with pytest.raises(UserError, match=r"clip: frame \d+ (is corrupt|cannot be decoded|is missing)"):
        numbers(info, 0, 75)
    assert numbers(info, 0, 20) == list(range(20))


# -- the right colours --------------------------------------------------------------------------------------------
def coloured(
    pix_fmt: str, space: Colorspace, color_range: ColorRange, size: tuple[int, int] = (64, 48)
) -> av.VideoFrame:
    """A smooth colour picture, as a decoder would hand it out in that format."""
    w, h = size
    y, x = np.mgrid[:h, :w]
    rgb = np.stack([x * 255 // w, y * 255 // h, 128 + 100 * np.sin(x / 9.0) * np.cos(y / 7.0)], -1).astype(np.uint8)
    frame = av.VideoFrame.from_ndarray(rgb, format="rgb24").reformat(
        format=pix_fmt, dst_colorspace=space, src_color_range=ColorRange.JPEG, dst_color_range=color_range
    )
    frame.colorspace, frame.color_range = space, color_range
    return frame


def swscale(frame: av.VideoFrame) -> Any:
    """RGB [H, W, 3] int by swscale with accurate rounding and full chroma interpolation."""
    accurate = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
    rgb = frame.reformat(
        format="rgb24",
        src_colorspace=Colorspace(int(frame.colorspace)),
        src_color_range=ColorRange(int(frame.color_range)),
        interpolation=accurate,
    )
    return rgb.to_ndarray().astype(int)


SPACES = (Colorspace.ITU601, Colorspace.ITU709)
RANGES = (ColorRange.MPEG, ColorRange.JPEG)


@pytest.mark.parametrize("color_range", RANGES)
@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv444p", "yuv422p", "yuv420p10le"])
def test_colours_are_those_of_swscale(pix_fmt: str, space: Colorspace, color_range: ColorRange) -> None:
    frame = coloured(pix_fmt, space, color_range)
    ours = video.window_rgb(video.planes(frame), (0, 0), (64, 48), 1).astype(int)
    difference = np.abs(ours - swscale(frame))
    # swscale interpolates 4:2:0 chroma along rows only, and from samples placed a quarter of a pixel elsewhere.
    assert np.median(difference) <= 1
    assert difference.max() <= {"yuv444p": 2, "yuv422p": 12}.get(pix_fmt, 12)


@pytest.mark.parametrize("color_range", RANGES)
@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("grey", [0, 16, 77, 128, 200, 235, 255])
def test_flat_colours_by_hand(grey: int, space: Colorspace, color_range: ColorRange) -> None:
    """ITU-R BT.601 and 709: R = Y + 2 (1 - Kr) Cr, B = Y + 2 (1 - Kb) Cb, G from Y = Kr R + Kg G + Kb B."""
    frame = av.VideoFrame(32, 32, "yuv420p")
    frame.colorspace, frame.color_range = space, color_range
    for plane, value in zip(frame.planes, (grey, 100, 150), strict=True):
        plane.update(bytes([value]) * plane.buffer_size)
    kr, kb = {Colorspace.ITU601: (0.299, 0.114), Colorspace.ITU709: (0.2126, 0.0722)}[space]
    low, luma_range, chroma_range = (0, 255, 255) if color_range == ColorRange.JPEG else (16, 219, 224)
    y, cb, cr = (grey - low) / luma_range, (100 - 128) / chroma_range, (150 - 128) / chroma_range
    r, b = y + 2 * (1 - kr) * cr, y + 2 * (1 - kb) * cb
    expected = np.clip(255 * np.array([r, (y - kr * r - kb * b) / (1 - kr - kb), b]), 0, 255)
    for d in (1, 2):
        ours = video.window_rgb(video.planes(frame), (0, 0), (32 // d, 32 // d), d)
        assert np.abs(ours - expected).max() <= 0.55


@pytest.mark.parametrize(("pix_fmt", "color_range"), [("gray", ColorRange.JPEG), ("yuv420p", ColorRange.MPEG)])
def test_grey_stays_grey(pix_fmt: str, color_range: ColorRange) -> None:
    ramp = np.tile(np.arange(0, 256, 2, dtype=np.uint8), (64, 1))
    frame = av.VideoFrame.from_ndarray(ramp, format="gray")
    if pix_fmt != "gray":
        frame = frame.reformat(format=pix_fmt, src_color_range=ColorRange.JPEG, dst_color_range=color_range)
        frame.color_range = color_range
    ours = video.window_rgb(video.planes(frame), (0, 0), (128, 64), 1)
    assert np.abs(ours.astype(int) - ramp[..., None]).max() <= 1


@pytest.mark.parametrize("downsample", [1, 2, 3, 4])
@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv444p"])
def test_downsampling_commutes_with_conversion(pix_fmt: str, downsample: int) -> None:
    """Area averages of the planes, then RGB: as area averages of the RGB picture (swscale), within rounding."""
    frame = coloured(pix_fmt, Colorspace.ITU709, ColorRange.MPEG, (96, 48))
    w, h = 96 // downsample, 48 // downsample
    ours = video.window_rgb(video.planes(frame), (0, 0), (w, h), downsample).astype(int)
    whole = swscale(frame).reshape(h, downsample, w, downsample, 3).mean(axis=(1, 3))
    assert np.median(np.abs(ours - whole)) <= 1
    assert np.abs(ours - whole).max() <= (2.5 if pix_fmt == "yuv444p" else 12 / downsample + 1)


@pytest.mark.parametrize("downsample", [1, 2, 3, 4])
@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv444p", "gray"])
def test_a_window_is_that_part_of_the_whole(pix_fmt: str, downsample: int) -> None:
    frame = coloured("yuv420p", Colorspace.ITU709, ColorRange.MPEG, (96, 96)).reformat(format=pix_fmt)
    d = downsample
    whole = video.window_rgb(video.planes(frame), (0, 0), (96 // d, 96 // d), d)
    for x, y, w, h in ((0, 0, 5, 7), (3, 1, 9, 8), (5, 4, 96 // d - 5, 96 // d - 4)):
        part = video.window_rgb(video.planes(frame), (x, y), (w, h), d)
        # Chroma between half-size samples is rounded before it is averaged.
        assert np.abs(part.astype(int) - whole[y : y + h, x : x + w]).max() <= 1


# -- lenses -------------------------------------------------------------------------------------------------------
def distortion_maps(w: int, h: int) -> tuple[Any, Any]:
    k = np.array([[80.0, 0, w / 2 - 0.5], [0, 80.0, h / 2 - 0.5], [0, 0, 1]])
    d = np.array([-0.15, 0.03, 0.002, -0.001, 0.0])
    x, y = cv2.initUndistortRectifyMap(k, d, np.eye(3), k, (w, h), cv2.CV_32FC1)
    return x, y


@pytest.mark.parametrize("downsample", [1, 2, 4])
def test_undistorted_picture_is_the_remapped_one(downsample: int) -> None:
    frame = coloured("yuv444p", Colorspace.ITU709, ColorRange.MPEG, (96, 64))
    maps, d = distortion_maps(96, 64), downsample
    straight = cv2.remap(swscale(frame).astype(np.float32), *maps, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    expected = straight.reshape(64 // d, d, 96 // d, d, 3).mean(axis=(1, 3))
    x, y, w, h = 4 // d, 8 // d, 80 // d, 48 // d
    ours = video.window_rgb(video.planes(frame), (x, y), (w, h), d, maps)
    assert np.abs(ours - expected[y : y + h, x : x + w]).max() <= 3


def test_undistorted_half_size_chroma_is_in_place() -> None:
    """4:2:0 through the maps against 4:4:4 through the same maps: no shift of the colours by half a pixel."""
    maps = distortion_maps(96, 64)
    full, half = (coloured(name, Colorspace.ITU709, ColorRange.MPEG, (96, 64)) for name in ("yuv444p", "yuv420p"))
    a, b = (video.window_rgb(video.planes(f), (8, 8), (80, 48), 1, maps).astype(float) for f in (full, half))
    assert np.abs(a - b).mean() < 1.5


def test_undistorted_mask() -> None:
    h, w = 64, 96
    disk = ((np.mgrid[:h, :w] - np.array([30, 50])[:, None, None]) ** 2).sum(axis=0) < 15**2
    frame = av.VideoFrame.from_ndarray(disk.astype(np.uint8) * 255, format="gray")
    maps = distortion_maps(w, h)
    for d in (1, 2):
        remapped = cv2.remap(disk.astype(np.float32), *maps, cv2.INTER_LINEAR)
        share = remapped.reshape(h // d, d, w // d, d).mean(axis=(1, 3))
        ours = video.luma_mask(video.planes(frame), d, maps)
        clear = np.abs(share - 0.5) > 0.01
        assert (ours == (share >= 0.5))[clear].all()
        assert clear.mean() > 0.98


@pytest.mark.parametrize("d", [1, 2, 3, 4])
@pytest.mark.parametrize("full", [True, False])
def test_a_mask_pixel_needs_half_of_its_area(full: bool, d: int) -> None:
    """Columns of white from the left, one more in each row of blocks: set where at least half are white."""
    low, high = (0, 255) if full else (16, 235)
    blocks = [np.repeat(np.where(np.arange(d) < n, high, low)[None], d, axis=0) for n in range(d + 1)]
    luma = np.vstack(blocks).astype(np.uint8)
    mask = video.luma_mask(video.Planes(luma, None, None, full, 601), d)
    assert mask[:, 0].tolist() == [2 * n >= d and n > 0 for n in range(d + 1)]
