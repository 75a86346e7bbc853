"""Reading videos frame by frame with PyAV, so that every frame has its right number.

Colours are converted after cropping and area averaging. Both commute with the linear map from YUV to RGB, so a frame
costs little more than its decoding.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import av
import cv2
import numpy as np
import numpy.typing as npt
from av.container import InputContainer

from zoosplat.errors import UserError
from zoosplat.storage import objects

U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]

# Factors from chroma in -0.5 .. 0.5 to colours: V to R, U to G, V to G, U to B (ITU-R BT.601 and BT.709).
_MATRIX = {601: (1.402, -0.344136, -0.714136, 1.772), 709: (1.5748, -0.187324, -0.468124, 1.8556)}
# Playlists (HLS, concat, SDP) name further files, of this machine or another. With this option none is opened.
ALONE = {"protocol_whitelist": "none"}
# FFmpeg's AVCOL_SPC_BT709.
_BT709 = 1


def _open(file: Any) -> InputContainer:
    """A container for reading. Titles and comments may be in any encoding, since cameras write them so."""
    container: InputContainer = av.open(file, "r", options=ALONE, metadata_errors="replace")
    return container


@dataclass(frozen=True)
class VideoInfo:
    """Facts from the header and the index of a video.

    Attributes:
        url: path or URL of the file.
        label: name of the video in messages, such as `videos/3.mp4 (camera 3)`.
        width, height: pixels.
        n_frames: number of frames whose bytes are all there.
        n_declared: number of frames that the container declares; more than `n_frames` in a truncated file.
        fps: mean frame rate, 1/s.
        step: ticks between frames where all are equally far apart (then seeking is exact), else None.
    """

    url: str
    label: str
    width: int
    height: int
    n_frames: int
    n_declared: int
    fps: float
    step: float | None


def probe(url: str, label: str) -> VideoInfo:
    """Read a video's header and index, decoding nothing.

    Raises:
        UserError: missing, empty or unreadable file, a folder, no video stream, or no frames.
    """
    try:
        n_bytes = objects.size(url)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{label}: no such file: {url}; check data.directory and the names in data") from None
    if n_bytes == 0:
        raise UserError(f"{label}: the file is empty: {url}; copy or export it again")
    try:
        with objects.open_read(url) as file, _open(file) as container:
            if not container.streams.video:
                raise UserError(f"{label}: no video stream in {url}")
            stream = container.streams.video[0]
            if stream.codec_context is None or not stream.width:
                raise UserError(f"{label}: not a readable video (its index is cut off): {url}; export it again")
            index = [(e.timestamp, e.pos + e.size) for e in stream.index_entries if not e.is_discard]
            if stream.frames and len(stream.index_entries) == stream.frames:
                ticks = np.array([t for t, _ in index], dtype=np.float64)
                missing = [t for t, end in index if end > n_bytes]
                first_pts, before = _first_packets(container, stream, min(missing, default=None))
                there = before if missing else len(index)
            else:
                # Without a complete index in the container, one pass over the packets is needed. It decodes nothing.
                times = [(p.pts, p.dts) for p in container.demux(stream) if p.size]
                first_pts = times[0][0] if times and all(pts is not None for pts, _ in times) else None
                ticks = np.array(sorted((dts if pts is None else pts) or 0 for pts, dts in times), dtype=np.float64)
                there = len(ticks)
            step = float(ticks[-1] - ticks[0]) / (len(ticks) - 1) if len(ticks) > 1 else None
            # AVI stores no display times for B-frames. Those that FFmpeg makes up do not begin with the stream.
            timed = first_pts is not None and first_pts == stream.start_time
            even = timed and step and np.abs(ticks - ticks[0] - step * np.arange(len(ticks))).max() < 0.45 * step
            size = stream.width, stream.height
            rate = float(stream.average_rate or 0)
    except IsADirectoryError:
        raise UserError(
            f"{label}: no such file, but a folder: {url}; check the names in data.videos and data.masks"
        ) from None
    except av.FFmpegError as error:
        raise UserError(f"{label}: not a readable video ({error.strerror}): {url}; export it again") from None
    if not there:
        raise UserError(f"{label}: holds no frames: {url}; export it again")
    return VideoInfo(url, label, *size, there, len(ticks), rate, step if even else None)


def inspect_codec(url: str) -> tuple[str, bool, bool]:
    """How a readable video is stored.

    Returns:
        FFmpeg's name of its codec; whether the codec keeps the very values that were written; whether the file holds an
        opacity beside the pictures, as WebM does, which FFmpeg's own decoders of VP8 and VP9 leave out.
    """
    with objects.open_read(url) as file, _open(file) as container:
        stream = container.streams.video[0]
        codec = stream.codec_context.codec
        # H.264 without loss counts as lossy, because its header does not tell.
        return codec.name, codec.lossless and not codec.lossy, stream.metadata.get("alpha_mode") == "1"


def _first_packets(container: Any, stream: Any, first_missing: int | None) -> tuple[int | None, int]:
    """Display time of the first packet, and the number of packets that are shown before the first one that is cut off.

    Packets lie in the order of decoding, so behind a packet that is there, one that is shown earlier may be missing. No
    packet is shown before it is decoded.
    """
    first, count = None, 0
    for packet in container.demux(stream):
        first = packet.pts if first is None else first
        if first_missing is None or packet.is_corrupt or packet.dts is None or packet.dts >= first_missing:
            break
        count += packet.pts is not None and packet.pts < first_missing
    return first, count


def read_frames(
    info: VideoInfo, start: int, stop: int, jump: int = 1, decoder: str | None = None
) -> Iterator[av.VideoFrame]:
    """Frames `start`, `start + jump`, ... below `stop` of a video, by one pass from a keyframe before `start`.

    Args:
        info: of the video.
        start, stop, jump: as of a range.
        decoder: FFmpeg's name of the decoder; None: the one that FFmpeg prefers for the video.

    Raises:
        UserError: a frame that is missing or cannot be decoded, with its number.
    """
    sought = _numbered(info, start, decoder)
    first = next(sought, None)
    numbered = itertools.chain([first], sought) if first and first[0] <= start else _numbered(info, 0, decoder)
    wanted, at = start, -1
    for at, frame in numbered:
        if at > wanted:
            raise UserError(f"{info.label}: frame {wanted} is missing in {info.url}; export the video again")
        if at == wanted:
            yield frame
            wanted += jump
        if wanted >= stop:
            return
    raise UserError(f"{info.label}: ends at frame {at + 1} of {info.n_declared} in {info.url}; export the video again")


def _numbered(info: VideoInfo, start: int, decoder: str | None) -> Iterator[tuple[int, av.VideoFrame]]:
    """Frames and their numbers from a keyframe before `start`, or, where seeking is not exact, from the first one."""
    at, before = -1, None
    seeking = start > 0 and info.step is not None
    try:
        with objects.open_read(info.url) as file, _open(file) as container:
            stream = container.streams.video[0]
            codec: Any = stream.codec_context
            decode: Any = stream.decode
            if decoder is not None:
                codec = av.CodecContext.create(decoder, "r")
                codec.extradata = stream.codec_context.extradata
                decode = codec.decode
            codec.options = {"err_detect": "explode"}
            codec.thread_count = 1  # The cameras are decoded in parallel instead.
            if seeking:
                # The index holds decoding times, which precede the display times by 16 frames at most (H.264).
                back = start - 0.5 - (16 if codec.has_b_frames else 0)
                container.seek(int((stream.start_time or 0) + max(0, back) * (info.step or 0)), stream=stream)
            for packet in container.demux(stream):
                try:
                    frames = decode(None if packet.is_corrupt else packet)  # cut off: what came before
                except av.InvalidDataError:
                    if seeking and at < 0:
                        continue  # open GOP: pictures before the keyframe that refer to what was not decoded
                    raise
                for frame in frames:
                    if seeking and at < 0:
                        if frame.pts is None:
                            return
                        at = round((frame.pts - (stream.start_time or 0)) / (info.step or 1))
                    elif info.step is None or frame.pts is None or before is None:
                        at += 1
                    else:
                        at += max(1, round((frame.pts - before) / info.step))
                    before = frame.pts
                    if frame.is_corrupt:
                        raise UserError(f"{info.label}: frame {at} is corrupt in {info.url}; export the video again")
                    yield at, frame
                if packet.is_corrupt:
                    return
    except av.FFmpegError as error:
        raise UserError(
            f"{info.label}: frame {at + 1} cannot be decoded ({error.strerror}) in {info.url}; export the video again"
        ) from None


def plane_of(frame: av.VideoFrame, index: int) -> U8:
    """A plane [H, W] uint8 of a frame whose planes have a byte a pixel."""
    found = frame.planes[index]
    data: U8 = np.frombuffer(memoryview(found), np.uint8)
    return data.reshape(found.height, found.line_size)[:, : found.width]


@dataclass(frozen=True)
class Planes:
    """One frame as planes: luma [H, W], chroma [H/s, W/s] each or None, and the way to convert them to RGB.

    Attributes:
        y, u, v: uint8 planes.
        full_range: whether luma spans 0 to 255 instead of 16 to 235.
        matrix: 601 or 709, the standard of the conversion to RGB.
    """

    y: U8
    u: U8 | None
    v: U8 | None
    full_range: bool
    matrix: int

    @property
    def black(self) -> int:
        return 0 if self.full_range else 16

    @property
    def white(self) -> int:
        return 255 if self.full_range else 235


def planes(frame: av.VideoFrame) -> Planes:
    """Planes of a frame of any pixel format (8-bit 4:2:0, 4:4:4 and grey as they are, others through 4:4:4)."""
    name = frame.format.name
    matrix = 709 if int(frame.colorspace) == _BT709 else 601
    if name.startswith("gray") and len(frame.format.components) == 1:
        grey = frame if name == "gray" else frame.reformat(format="gray")
        return Planes(plane_of(grey, 0), None, None, name == "gray" or frame.color_range == 2, matrix)
    full = name.startswith("yuvj") or frame.color_range == 2
    if name not in ("yuv420p", "yuvj420p", "yuv444p", "yuvj444p"):
        frame, full = frame.reformat(format="yuv444p", dst_color_range="MPEG"), False
        matrix = matrix if frame.colorspace != 0 else 601
    return Planes(plane_of(frame, 0), plane_of(frame, 1), plane_of(frame, 2), full, matrix)


def _area(image: Any, width: int, height: int) -> Any:
    if image.shape[1] == width and image.shape[0] == height:
        return image
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)


def luma_mask(frame: Planes, downsample: int, maps: tuple[F32, F32] | None = None) -> npt.NDArray[np.bool_]:
    """Binary mask from a grey 0/255 frame: undistorted, area-averaged, then >= 0.5.

    Args:
        frame: planes, luma [H, W].
        downsample: integer factor d that divides H and W.
        maps: x and y of the distorted picture for every undistorted pixel, each [H, W] float32, or None.

    Returns:
        [H/d, W/d] bool.
    """
    y = frame.y
    if maps is not None:
        y = cv2.remap(y, *maps, interpolation=cv2.INTER_LINEAR, borderValue=(frame.black,))  # type: ignore[assignment]
    h, w = y.shape
    small = _area(y, w // downsample, h // downsample)
    return np.asarray(small >= np.uint8(np.ceil((frame.black + frame.white) / 2)))


def window_rgb(
    frame: Planes,
    origin: tuple[int, int],
    size: tuple[int, int],
    downsample: int,
    maps: tuple[F32, F32] | None = None,
) -> U8:
    """A window of a frame as RGB: undistorted and area-averaged.

    Args:
        frame: planes of the whole frame at full resolution.
        origin: x, y of the window's corner in working (downsampled) pixels.
        size: width, height of the window in working pixels.
        downsample: integer factor d.
        maps: as in `luma_mask`.

    Returns:
        [height, width, 3] uint8.
    """
    d, (x, y), (w, h) = downsample, origin, size
    rows, cols = slice(y * d, (y + h) * d), slice(x * d, (x + w) * d)

    def sample(plane: U8, subsampling: int) -> Any:
        if maps is not None:
            # The centre of chroma sample k lies between luma samples 2k and 2k + 1.
            mx, my = ((m[rows, cols] + np.float32(0.5)) / subsampling - np.float32(0.5) for m in maps)
            part: Any = cv2.remap(plane, mx, my, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        elif subsampling == 1 or d % 2 == 0:
            s = subsampling
            part = plane[rows.start // s : rows.stop // s, cols.start // s : cols.stop // s]
        else:
            part = _upsampled(plane, rows, cols)
        return _area(part, w, h)

    scale = 255.0 / (frame.white - frame.black)
    if frame.u is None or frame.v is None:
        planes_small = [sample(frame.y, 1)] * 3
        matrix = np.array([[scale, 0, 0, -scale * frame.black]] * 3)
    else:
        s = 1 if frame.u.shape == frame.y.shape else 2
        planes_small = [sample(frame.y, 1), sample(frame.u, s), sample(frame.v, s)]
        chroma = 1.0 if frame.full_range else 255.0 / 224.0
        r_v, g_u, g_v, b_u = (k * chroma for k in _MATRIX[frame.matrix])
        matrix = np.array([[scale, 0, r_v, 0], [scale, g_u, g_v, 0], [scale, b_u, 0, 0]])
        matrix[:, 3] = -matrix[:, :3] @ (frame.black, 128, 128)
    # cv2.transform rounds and saturates.
    return np.asarray(cv2.transform(cv2.merge(planes_small), matrix))


def _upsampled(plane: U8, rows: slice, cols: slice) -> Any:
    """Region of a half-size chroma plane at luma resolution, with a margin so that its border interpolates right."""
    y0, y1 = max(0, rows.start // 2 - 1), min(plane.shape[0], -(-rows.stop // 2) + 1)
    x0, x1 = max(0, cols.start // 2 - 1), min(plane.shape[1], -(-cols.stop // 2) + 1)
    big = cv2.resize(plane[y0:y1, x0:x1], (2 * (x1 - x0), 2 * (y1 - y0)), interpolation=cv2.INTER_LINEAR)
    return big[rows.start - 2 * y0 : rows.stop - 2 * y0, cols.start - 2 * x0 : cols.stop - 2 * x0]
