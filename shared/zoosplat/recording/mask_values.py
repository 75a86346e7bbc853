"""What the pixels of a mask mean: which of them are the animal, and when that cannot be told.

A frame of a mask becomes grey levels, of which at least half of white is the animal. Videos that were compressed have
noise in their grey levels. Files that are stored without loss have exact values, so labels can be read from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import av
import cv2
import numpy as np
import numpy.typing as npt

from zoosplat.errors import UserError
from zoosplat.recording import video
from zoosplat.recording.video import U8, Planes

# How the pixels of a file are read: by brightness (white, inverted), as 0 and 1, by opacity, or by their values.
# In a file that is undecided, the frames that were looked at have nothing bright, so another frame may tell.
Reading = Literal["white", "undecided", "inverted", "zero_one", "alpha", "nonzero", "labels"]
KEY = "data.mask_values"
# Pixel formats of 8 bits whose luma is read as it is stored.
PLAIN_YUV = ("yuv420p", "yuvj420p", "yuv444p", "yuvj444p")

# Largest mean deviation of chroma from neutral in a mask, of 255.
GREY_TOLERANCE = 12
# Largest share of a mask's pixels that are neither black nor white.
MAX_MID_GREY = 0.05
# Share of the scale, at either end of it, that counts as black or as white.
NEAR = 0.2
# Largest share that areas of one grey may have in what is not black. Soft outlines are grey too, but no areas.
MAX_EVEN_GREY = 0.05
# Largest share that areas of other values may have in the animal, where values are exact.
MAX_LABELLED = 0.01
# Number of pixels of one grey that are no area yet.
FEW_PIXELS = 8
# Largest difference of neighbours in an area of one grey after compression, grey levels of 255.
EVEN_LOSSY = 12
# Share of the scale from which areas may be dim labels, and the largest difference of neighbours in them. In masks of
# two recordings, compressed as badly as H.264 can, 0.5% of what was brighter lay in such areas; with labels, over 10%.
DIM, EVEN_DIM = 0.06, 4
# Largest number of labels in a picture. A picture of more values was compressed before, or has soft outlines.
MAX_LABELS = 16
# Largest value that compression leaves in the black of a mask, grey levels of 255.
LARGEST_NOISE = 12
# At least the largest value that a pixel can have.
WHITEST = 65535
# Number of values that a message lists.
LISTED = 6
# Every how many pixels the mean of chroma is taken.
SPARSE = 8
# Smallest deviation of chroma from neutral that is a colour and no compression, of 255.
STRONG_COLOUR = 32


@dataclass(frozen=True)
class Levels:
    """Grey levels of a frame.

    Attributes:
        y: [H, W] uint8 or uint16.
        black, white: the levels that stand for 0 and 1.
        exact: whether they are the values that were written.
    """

    y: npt.NDArray[Any]
    black: int
    white: int
    exact: bool

    def at(self, share: float) -> int:
        """The level at a share of the scale from black to white."""
        return int(np.ceil(self.black + share * (self.white - self.black)))

    def inverted(self) -> Levels:
        """Black for white and white for black."""
        y = self.black + self.white - np.clip(self.y, self.black, self.white)
        return Levels(y.astype(self.y.dtype), self.black, self.white, self.exact)

    def planes(self) -> Planes:
        """The levels as a frame of 8 bits without colours."""
        if self.y.dtype == np.uint8 and self.white in (235, 255):
            return Planes(self.y, None, None, self.black == 0, 601)
        return Planes((self.y * (255.0 / self.white)).astype(np.uint8), None, None, True, 601)


def choose_reading(
    frames: Sequence[av.VideoFrame], wanted: str | tuple[int, ...], lossless: bool, label: str
) -> Reading:
    """How the pixels of a file are read.

    Args:
        frames: some of the file's frames.
        wanted: the key `data.mask_values`.
        lossless: whether the file has exact values.
        label: name of the file in messages.

    Raises:
        UserError: the file cannot be read as it is wanted.
    """
    if wanted == "alpha" and not any(has_alpha(frame) for frame in frames):
        raise UserError(f"{label}: has no opacity, for which {KEY} = alpha asks; remove the key, or export it again")
    if (wanted == "nonzero" or isinstance(wanted, tuple)) and not lossless:
        shown = wanted if isinstance(wanted, str) else list(wanted)
        raise UserError(
            f"{label}: is compressed, so its values are not exact, for which {KEY} = {shown} asks; write the mask as "
            "PNG pictures or as a video by FFV1"
        )
    if isinstance(wanted, tuple):
        return "labels"
    if wanted != "auto":
        return wanted  # type: ignore[return-value]
    if any(_is_transparent(frame) for frame in frames):
        return "alpha"
    values = [stored_values(frame) for frame in frames] if lossless else [None]
    if any(found is None or found.ndim == 3 for found in values):
        return "white"
    brightest = max(int(found.max()) for found in values if found is not None)
    bright = any((found > _white(found) // 2).any() for found in values if found is not None)
    return "white" if bright else "zero_one" if brightest == 1 else "undecided"


def read_mask(
    frame: av.VideoFrame, reading: Reading, wanted: str | tuple[int, ...], lossless: bool, where: str
) -> Planes:
    """A frame of a mask as grey levels, of which at least half of white is the animal.

    Args:
        frame: as it was decoded.
        reading: of the file, see `choose_reading`.
        wanted: the key `data.mask_values`. With auto, a frame that could mean something else is refused.
        lossless: whether the file has exact values.
        where: name of the file and of the frame in messages.

    Returns:
        A frame without colours, whose luma [H, W] is what counts.

    Raises:
        UserError: the frame is no mask, or it cannot be told which of its pixels are the animal.
    """
    if reading == "alpha":
        if not has_alpha(frame):
            raise UserError(f"{where} has no opacity, but other frames have; export it again")
        levels = Levels(_alpha(frame), 0, 255, exact=lossless)
    elif reading in ("white", "undecided", "inverted"):
        levels = _brightness(frame, reading, wanted, lossless, where)
    else:
        levels = Levels(_by_values(frame, reading, wanted, where) * np.uint8(255), 0, 255, exact=True)
    if wanted == "auto":
        if reading != "alpha" and _is_transparent(frame):
            raise UserError(f"{where} has transparent pixels, unlike other frames; set {KEY} to alpha or to white")
        _check_black_and_white(levels, reading, where)
    if reading == "inverted":
        levels = levels.inverted()
    if wanted in ("auto", "inverted"):
        _check_border(levels, reading, where)
    return levels.planes()


# -- what a frame holds -------------------------------------------------------------------------------------------
def has_alpha(frame: av.VideoFrame) -> bool:
    """Whether the pixel format of a frame has an opacity, or may have one in its palette."""
    return frame.format.name == "pal8" or any(component.is_alpha for component in frame.format.components)


def _alpha(frame: av.VideoFrame) -> U8:
    """Opacity [H, W] uint8 of a frame whose format has one."""
    if frame.format.name in ("yuva420p", "yuva422p", "yuva444p"):
        return video.plane_of(frame, 3)
    return np.ascontiguousarray(frame.reformat(format="rgba").to_ndarray()[..., 3])


def _is_transparent(frame: av.VideoFrame) -> bool:
    """Whether a pixel is not opaque. Where all are, the opacity says nothing."""
    return has_alpha(frame) and int(_alpha(frame).min()) < 255


def stored_values(frame: av.VideoFrame) -> npt.NDArray[Any] | None:
    """The values of a frame that was stored without loss.

    Returns:
        [H, W] uint8 or uint16: grey levels or, of a coloured palette, the numbers of the colours. [H, W, 3] where there
        are colours. None where the format keeps no such values.
    """
    name, bits = frame.format.name, frame.format.components[0].bits
    if name == "pal8":
        index, palette = frame.to_ndarray()
        colors = palette[np.unique(index), 1:]  # Each is A, R, G, B.
        return np.asarray(palette[index, 1] if (colors == colors[:, :1]).all() else index)
    if name in ("gray", "monob", "monow"):
        return np.asarray(frame.reformat(format="gray").to_ndarray())
    if name in ("gray16le", "gray16be"):
        return np.ascontiguousarray(frame.to_ndarray(), dtype=np.uint16)
    if name in PLAIN_YUV:
        planes = video.planes(frame)
        grey = all(chroma is None or (chroma == 128).all() for chroma in (planes.u, planes.v))
        if not grey or planes.y.min() < planes.black:
            return None
        scale = 255 / (planes.white - planes.black)
        return np.asarray(np.rint((planes.y - np.uint8(planes.black)) * scale).clip(0, 255), np.uint8)
    if (frame.format.is_rgb or name.startswith("ya")) and bits in (8, 16):
        rgb = frame.reformat(format="rgb24" if bits == 8 else "rgb48le").to_ndarray()
        grey = bool((rgb == rgb[..., :1]).all())
        return np.ascontiguousarray(rgb[..., 0] if grey else rgb)
    return None


def _white(values: npt.NDArray[Any]) -> int:
    """The value of white. Programs that write 16 bits use their range or, with values of 8 bits, its beginning."""
    return 65535 if values.max() > 255 else 255


def _brightness(
    frame: av.VideoFrame, reading: Reading, wanted: str | tuple[int, ...], lossless: bool, where: str
) -> Levels:
    """Grey levels of a frame. Raises UserError where it is coloured."""
    values = stored_values(frame) if lossless else None
    if values is not None and values.ndim == 2 and frame.format.name not in PLAIN_YUV:
        brightest = int(values.max())
        white = 1 if reading == "inverted" and brightest == 1 else _white(values)
        return Levels(values, 0, white, exact=True)
    planes = video.planes(frame)
    levels = Levels(planes.y, planes.black, planes.white, exact=values is not None and values.ndim == 2)
    for chroma in (planes.u, planes.v):
        if chroma is not None and _is_coloured(chroma, levels):
            labels = f"; if colours are labels, set {KEY} to nonzero" if lossless and wanted == "auto" else ""
            raise UserError(f"{where} is coloured; a mask is white on black (is it the RGB video?){labels}")
    return levels


def _is_coloured(chroma: U8, levels: Levels) -> bool:
    """Whether a plane of chroma is not neutral as a whole, or not on the animal."""
    if np.abs(chroma[::SPARSE, ::SPARSE].astype(np.int16) - 128).mean() > GREY_TOLERANCE:
        return True
    coloured = chroma.size - cv2.countNonZero(cv2.inRange(chroma, 128 - STRONG_COLOUR, 128 + STRONG_COLOUR))
    not_black = cv2.countNonZero(cv2.inRange(levels.y, levels.at(NEAR), WHITEST))
    return coloured * levels.y.size / chroma.size > max(FEW_PIXELS, MAX_EVEN_GREY * not_black)


def _by_values(
    frame: av.VideoFrame, reading: Reading, wanted: str | tuple[int, ...], where: str
) -> npt.NDArray[np.bool_]:
    """The animal [H, W], by exact values. Raises UserError where they are not those that are read."""
    values = stored_values(frame)
    if values is None or (reading == "labels" and frame.format.name in PLAIN_YUV):
        raise UserError(
            f"{where} is stored as the luma of a video ({frame.format.name}), which keeps no exact values; write the "
            "mask as grey pictures in PNG or as a grey video by FFV1"
        )
    if reading == "nonzero":
        return np.asarray(values.any(axis=2) if values.ndim == 3 else values > 0)
    if values.ndim == 3:
        raise UserError(f"{where} is coloured, but labels are numbers; set {KEY} to nonzero, or export it again")
    if reading == "zero_one" and values.max() > 1:
        raise UserError(f"{where} has {_listed(np.unique(values))}, but others have 0 and 1; {_which(values)}")
    return np.isin(values, wanted) if isinstance(wanted, tuple) else values > 0


# -- what it could mean instead -----------------------------------------------------------------------------------
def _check_black_and_white(levels: Levels, reading: Reading, where: str) -> None:
    """Raise UserError where a frame has more grey than outlines have, because grey could be animal or not."""
    labels = levels.exact and _has_labels(levels, undecided=reading == "undecided")
    if not labels and not _has_grey(levels):
        return
    found = _listed(np.unique(levels.y)) if labels else "areas of grey"
    if reading == "alpha":
        raise UserError(
            f"{where} is neither opaque nor transparent, but has {found} as opacity; set {KEY} to alpha if what is at "
            "least half opaque is the animal, or to white if its colours tell"
        )
    if labels:
        raise UserError(f"{where} has {found}, so it is not black and white; {_which(levels.y)}")
    raise UserError(
        f"{where} is not black and white, but has {found}; a mask is 255 on the animal, 0 elsewhere; set {KEY} to "
        "white if what is at least half of white is the animal; labels can be read from PNG or FFV1"
    )


def _has_grey(levels: Levels) -> bool:
    """Whether much is neither black nor white, or areas are of one such grey, but for compression."""
    low, high, bright = levels.at(NEAR), levels.at(1 - NEAR), levels.at(0.5)
    if cv2.countNonZero(cv2.inRange(levels.y, low, high)) > MAX_MID_GREY * levels.y.size:
        return True
    y = _part_above(levels.y, levels.at(DIM))
    for share, tolerance in ((NEAR, EVEN_LOSSY), (DIM, EVEN_DIM)):
        even = _count_even(y, levels.at(share), high, tolerance * levels.white // 255, 3)
        not_black = cv2.countNonZero(cv2.inRange(y, levels.at(share), WHITEST))
        if even > max(FEW_PIXELS, MAX_EVEN_GREY * not_black):
            # Compression may leave something dim where an animal was. Beside an animal it leaves no areas.
            return share == NEAR or cv2.countNonZero(cv2.inRange(y, bright, WHITEST)) > FEW_PIXELS
    return False


def _has_labels(levels: Levels, undecided: bool) -> bool:
    """Whether exact values are labels: few different ones, of which some fill areas and are neither 0 nor white."""
    # Squares of two pixels find tails too, and no outlines that were smoothed.
    low = levels.black + 1
    y = _part_above(levels.y, low)
    noise = levels.black + LARGEST_NOISE * levels.white // 255
    labelled = _count_even(y, noise + 1, levels.at(1 - NEAR), 0, 2)
    found = labelled > max(FEW_PIXELS, MAX_LABELLED * cv2.countNonZero(cv2.inRange(y, noise + 1, WHITEST)))
    # What is almost black may be labels from 1 on, or what compression has left round a mask. That has outlines of all
    # greys, and is less than the mask.
    bright = cv2.countNonZero(cv2.inRange(y, levels.at(0.5), WHITEST))
    if not found and (bright or undecided):
        outlines = cv2.countNonZero(cv2.inRange(y, noise + 1, levels.at(1 - NEAR)))
        found = _count_even(y, low, noise, 0, 2) > max(FEW_PIXELS, bright if outlines else MAX_LABELLED * bright)
    return found and int(np.count_nonzero(np.bincount(y.ravel()))) <= MAX_LABELS


def _part_above(y: npt.NDArray[Any], low: int) -> npt.NDArray[Any]:
    """The part of a picture in which all levels from `low` on lie, with a margin; one pixel where there are none."""
    x, top, width, height = cv2.boundingRect(cv2.inRange(y, low, WHITEST))
    return y[max(top - 1, 0) : top + height + 1, max(x - 1, 0) : x + width + 1]


def _count_even(y: npt.NDArray[Any], low: int, high: int, tolerance: int, edge: int) -> int:
    """Number of pixels from `low` to `high` in a square of `edge` pixels whose levels differ by `tolerance` at most."""
    within = cv2.inRange(y, low, high)
    if cv2.countNonZero(within) <= FEW_PIXELS:
        return 0
    kernel = np.ones((edge, edge), np.uint8)
    contrast = cv2.subtract(cv2.dilate(y, kernel), cv2.erode(y, kernel))
    even = cv2.inRange(contrast, 0, tolerance)
    return cv2.countNonZero(cv2.bitwise_and(even, within))


def _check_border(levels: Levels, reading: Reading, where: str) -> None:
    """Raise UserError where the animal would cover most of the picture and of its border."""
    y, half = levels.y, levels.at(0.5)
    border = np.concatenate([y[0], y[-1], y[:, 0], y[:, -1]]) >= half
    if border.mean() <= 0.5 or cv2.countNonZero(cv2.inRange(y, half, WHITEST)) <= 0.5 * y.size:
        return
    if reading == "inverted":
        raise UserError(
            f"{where} is black on most of the picture and of its border, so it is not inverted; export all masks "
            f"alike, or remove {KEY}"
        )
    if reading == "alpha":
        raise UserError(
            f"{where} is opaque on most of the picture and of its border; the animal must be opaque, and the rest "
            f"transparent; export it again, or set {KEY} to alpha if the animal is that large"
        )
    raise UserError(
        f"{where} is white on most of the picture and of its border; if the mask is inverted (the animal black on "
        f"white), set {KEY} to inverted; if the animal is that large, set it to "
        f"{'nonzero' if reading == 'zero_one' else 'white'}"
    )


def _listed(values: npt.NDArray[Any]) -> str:
    more = f" and {len(values) - LISTED} more" if len(values) > LISTED else ""
    return f"the values {', '.join(str(value) for value in values[:LISTED])}{more}"


def _which(values: npt.NDArray[Any]) -> str:
    """What to set where several values could be the animal."""
    some = [int(value) for value in np.unique(values) if value][:LISTED]
    return (
        f"set {KEY} to nonzero if all but 0 are the animal, to a list of those that are, such as {some}, or to white "
        "if those from half of white on are"
    )
