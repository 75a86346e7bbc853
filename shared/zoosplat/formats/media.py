"""Pictures and films: PNG files through OpenCV, H.264 in MP4 files through PyAV, and how pictures are composed."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from typing import IO

import numpy as np
import numpy.typing as npt

Picture = npt.NDArray[np.uint8]  # [h, w, 3], R, G, B

GAP = 4  # pixels between pictures that stand beside each other


def to_uint8(rgb: npt.ArrayLike) -> Picture:
    """Picture [..., 3] uint8 of colours 0 to 1 (float, clamped)."""
    values = np.asarray(rgb, dtype=np.float32)
    return np.asarray(np.rint(values.clip(0, 1) * 255), dtype=np.uint8)


def encode_png(picture: Picture) -> bytes:
    """PNG file of a picture [h, w, 3] uint8 RGB."""
    import cv2

    ok, data = cv2.imencode(".png", np.ascontiguousarray(picture[..., ::-1]))
    if not ok:
        raise ValueError(f"cannot encode a picture of shape {picture.shape} as PNG")
    return bytes(data)


def encode_grey_png(picture: npt.NDArray[np.uint8]) -> bytes:
    """PNG file of grey levels [h, w] uint8."""
    import cv2

    ok, data = cv2.imencode(".png", np.ascontiguousarray(picture))
    if not ok:
        raise ValueError(f"cannot encode a picture of shape {picture.shape} as PNG")
    return bytes(data)


class GreyVideoWriter:
    """A Matroska file of grey pictures as FFV1, which keeps every grey level. It is closed at the end of its block.

    Args:
        path: of the file.
        width, height: of the pictures, pixels.
        fps: frames per second.
    """

    def __init__(self, path: str, width: int, height: int, fps: float) -> None:
        import av

        self._file = av.open(path, "w", format="matroska")
        self._stream = self._file.add_stream("ffv1", rate=Fraction(fps).limit_denominator(100_000))
        self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, "gray"
        # Checksums let damage be found. One thread is enough, because the cameras are written in parallel.
        self._stream.options = {"slicecrc": "1", "threads": "1"}

    def __enter__(self) -> GreyVideoWriter:
        return self

    def __exit__(self, *error: object) -> None:
        with self._file:
            if error[0] is None:
                self._file.mux(self._stream.encode(None))

    def add(self, picture: npt.NDArray[np.uint8]) -> None:
        """Append a picture [height, width] uint8."""
        import av

        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="gray")
        self._file.mux(self._stream.encode(frame))


class Mp4Writer:
    """An MP4 file of pictures as H.264, yuv420p and BT.709 in limited range, which it is also tagged with.

    Odd sizes get a white column or row more, because yuv420p has even sizes only.

    Args:
        target: path of the file, or a binary file to write to.
        fps: frames per second.
        options: of the encoder x264.
    """

    def __init__(self, target: str | IO[bytes], fps: float, options: Mapping[str, str]) -> None:
        import av

        self._file = av.open(target, "w", format="mp4")
        self._stream = self._file.add_stream("libx264", rate=Fraction(fps).limit_denominator(100_000))
        self._options = options
        self._size: tuple[int, int] | None = None

    def add(self, picture: Picture) -> None:
        """Append a picture [h, w, 3] uint8 RGB. Raises ValueError where its size is not that of the first one."""
        import av
        from av.video.reformatter import ColorRange, Colorspace

        height, width = picture.shape[:2]
        if self._size is None:
            self._size = height, width
            self._stream.width, self._stream.height = width + width % 2, height + height % 2
            self._stream.pix_fmt = "yuv420p"
            self._stream.options = dict(self._options)
            context = self._stream.codec_context
            context.colorspace = context.color_primaries = context.color_trc = 1
            context.color_range = 1
        elif self._size != (height, width):
            first_height, first_width = self._size
            raise ValueError(f"a film of {first_width} x {first_height} px got a picture of {width} x {height} px")
        even = np.pad(picture, ((0, height % 2), (0, width % 2), (0, 0)), constant_values=255)
        # Without these arguments swscale would convert RGB by the matrix of BT.601.
        frame = av.VideoFrame.from_ndarray(even, format="rgb24").reformat(
            format="yuv420p",
            dst_colorspace=Colorspace.ITU709,
            src_color_range=ColorRange.JPEG,
            dst_color_range=ColorRange.MPEG,
        )
        self._file.mux(self._stream.encode(frame))

    def close(self) -> None:
        """Write what the encoder still holds, and the index. Raises ValueError where no picture was added."""
        if self._size is None:
            raise ValueError("a film needs at least one picture")
        self._file.mux(self._stream.encode(None))
        self._file.close()


# Options of x264 for films. The bytes are the same every time: one thread makes them independent of the number of
# cores, and without macroblock tree x264's vector code reads no uninitialized memory (core 165; MALLOC_PERTURB_ shows
# it).
FILM_OPTIONS = {"crf": "18", "preset": "medium", "threads": "1", "mbtree": "0"}


def encode_mp4(pictures: Iterable[Picture], fps: float) -> bytes:
    """MP4 file (see `Mp4Writer`) of pictures [h, w, 3] uint8 RGB of one size, which are taken one by one.

    Raises:
        ValueError: no pictures, or pictures of different sizes.
    """
    data = io.BytesIO()
    writer = Mp4Writer(data, fps, FILM_OPTIONS)
    for picture in pictures:
        writer.add(picture)
    writer.close()
    return data.getvalue()


def zoom_matrix(box: Sequence[float], width: int, height: int) -> npt.NDArray[np.float64]:
    """The enlargement that fits a box into the middle of a picture, as a matrix on pixels.

    Args:
        box: x0, y0, x1, y1 in pixels, covering the pixels x0 to x1 - 1; pixel centres are whole numbers.
        width: of the new picture.
        height: likewise.

    Returns:
        [3, 3] float64 that takes (x, y, 1) of the old picture to the new one; times K, it is the K of the new one.
    """
    x0, y0, x1, y1 = box
    scale = min(width / (x1 - x0), height / (y1 - y0))
    # The middle of pixels x0 .. x1 - 1 lies at (x0 + x1 - 1) / 2.
    dx = (width - 1) / 2 - scale * (x0 + x1 - 1) / 2
    dy = (height - 1) / 2 - scale * (y0 + y1 - 1) / 2
    return np.array([[scale, 0, dx], [0, scale, dy], [0, 0, 1]])


def zoom(picture: Picture, box: Sequence[float], width: int, height: int) -> Picture:
    """A box of a picture, enlarged (bilinear) into the middle of a new picture of the given size; white around it."""
    import cv2

    matrix = zoom_matrix(box, width, height)[:2]
    white = (255.0, 255.0, 255.0)
    enlarged = cv2.warpAffine(np.ascontiguousarray(picture), matrix, (width, height), borderValue=white)
    return np.asarray(enlarged, dtype=np.uint8)


def side_by_side(pictures: Sequence[Picture]) -> Picture:
    """Pictures of one height beside each other, with `GAP` grey columns between them."""
    height = pictures[0].shape[0]
    line = np.full((height, GAP, 3), 128, dtype=np.uint8)
    parts = [part for picture in pictures for part in (line, picture)][1:]
    return np.concatenate(parts, axis=1)
