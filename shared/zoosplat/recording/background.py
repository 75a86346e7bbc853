"""The background of a camera: a plate, which is its picture without the animal, and the light on it at a time.

At frame t, channel k of the background at column x and row y of a frame of W x H pixels is
plate_k * (g0 + g1 * (x / W - 0.5) + g2 * (y / H - 0.5)) + o, with (g0, g1, g2, o) = light[t, camera, k].
"""

from __future__ import annotations

import itertools

import av
import cv2
import numpy as np
import numpy.typing as npt

from zoosplat.errors import UserError
from zoosplat.recording import video

U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]

# The light under which a channel of the background is its plate: gain, its slopes along x and y, and offset (grey).
SAME_LIGHT = (1.0, 0.0, 0.0, 0.0)
MIN_FIT_PIXELS = 200  # Fewest pixels that a gain is fitted to.
FIT_ROUNDS = 4  # Rounds of the fit, each without the pixels that fit badly in the one before.
MAX_FIT_ERROR = 3.0  # Largest error of a pixel that fits, over the median error.
# Most frames of a video of the empty scene that are read: the noise of their median is a quarter of one frame's.
MAX_EMPTY_FRAMES = 25


def lit_plate(
    plate: npt.ArrayLike,  # [..., h, w, 3]
    light: npt.ArrayLike,  # [..., 3, 4]
    origin: npt.ArrayLike,  # [..., 2]
    full_size: tuple[int, int],
) -> F32:
    """The background of windows, [..., h, w, 3] float32, 0 to 255.

    Args:
        plate: the window's part of the plate, 0 to 255.
        light: gain, slope along x, slope along y, and offset in grey levels, for each channel.
        origin: x, y of the window's corner in the whole frame, pixels.
        full_size: width and height of the whole frame, pixels of the same size.
    """
    plate = np.asarray(plate, np.float32)
    gain, slope_x, slope_y, offset = np.moveaxis(np.asarray(light, np.float32), -1, 0)[..., None, None, :]
    place = np.asarray(origin, np.float32)
    height, width = plate.shape[-3:-1]
    x = (place[..., 0, None] + np.arange(width, dtype=np.float32)) / np.float32(full_size[0]) - np.float32(0.5)
    y = (place[..., 1, None] + np.arange(height, dtype=np.float32)) / np.float32(full_size[1]) - np.float32(0.5)
    lit = plate * (gain + slope_x * x[..., None, :, None] + slope_y * y[..., :, None, None]) + offset
    return np.asarray(lit.clip(0, 255), np.float32)


def fit_gain(plate: U8, picture: U8, is_background: npt.NDArray[np.bool_]) -> F32:
    """The light [3, 4] on a plate in one picture: a gain of each channel, without slopes and offset.

    The gain is fitted by least squares to the pixels of the background. Pixels whose error is far above the median are
    left out of the next round, such as those of shadows and of an animal that its mask lacks. Pixels at white tell
    nothing. With too few pixels the light is `SAME_LIGHT`.

    Args:
        plate: [h, w, 3].
        picture: [h, w, 3], the same pixels.
        is_background: [h, w].
    """
    light = np.tile(np.array(SAME_LIGHT, np.float32), (3, 1))
    usable = is_background & (picture < 255).all(-1)
    behind, seen = (values[usable].astype(np.float64) for values in (plate, picture))
    if len(behind) < MIN_FIT_PIXELS:
        return light
    kept = np.ones((len(behind), 1), bool)
    for _ in range(FIT_ROUNDS):
        gain = (behind * seen * kept).sum(0) / np.maximum((behind**2 * kept).sum(0), 1)
        error = np.abs(seen - gain * behind).max(-1, keepdims=True)
        kept = error <= MAX_FIT_ERROR * max(float(np.median(error)), 1.0)
    light[:, 0] = gain
    return light


def undistort_plate(plate: U8, downsample: int, maps: tuple[F32, F32] | None) -> U8:
    """A plate as pack shows pictures: without distortion, and averaged over squares of pixels.

    Args:
        plate: [H, W, 3], as the camera saw it.
        downsample: integer factor d that divides H and W.
        maps: x and y of the distorted picture for every undistorted pixel, each [H, W], or None.

    Returns:
        [H/d, W/d, 3].
    """
    if maps is not None:
        # The same interpolation and border as of the pictures, see `video.window_rgb`.
        plate = np.asarray(cv2.remap(plate, *maps, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE), np.uint8)
    if downsample == 1:
        return plate
    size = plate.shape[1] // downsample, plate.shape[0] // downsample
    return np.asarray(cv2.resize(plate, size, interpolation=cv2.INTER_AREA), np.uint8)


def background_label(camera: int, file: str) -> str:
    """The name of a file of `data.backgrounds` in messages."""
    return f"data.backgrounds[{camera}] = {file}"


def probe_empty_scene(url: str, label: str, size: tuple[int, int]) -> video.VideoInfo:
    """The header of a picture or video of the empty scene; a picture is a video of one frame. Arguments and errors are
    those of `read_empty_scene`."""
    info = video.probe(url, label)
    if (info.width, info.height) != size:
        raise UserError(
            f"{label}: {info.width} x {info.height} pixels, but the videos have {size[0]} x {size[1]}; give a picture "
            "of the empty scene as the camera takes it"
        )
    return info


def read_empty_scene(url: str, label: str, size: tuple[int, int]) -> U8:
    """The plate [H, W, 3] of a picture of the empty scene, or of a video: the median of frames from all of it.

    Args:
        url: file that FFmpeg can read, such as a PNG or an MP4.
        label: name of the file in messages, with its key.
        size: width and height that it must have, pixels.

    Raises:
        UserError: the file is missing, cannot be read, or has another size.
    """
    info = probe_empty_scene(url, label, size)
    jump = -(-info.n_frames // MAX_EMPTY_FRAMES)
    frames = itertools.islice(video.read_frames(info, 0, info.n_frames, jump), MAX_EMPTY_FRAMES)
    return np.asarray(np.median([_rgb(frame) for frame in frames], axis=0), np.uint8)


def _rgb(frame: av.VideoFrame) -> U8:
    """Colours [H, W, 3] of a frame; those of videos are converted as pack converts them."""
    if frame.format.is_rgb:
        return np.asarray(frame.to_ndarray(format="rgb24"), np.uint8)
    return video.window_rgb(video.planes(frame), (0, 0), (frame.width, frame.height), 1)
