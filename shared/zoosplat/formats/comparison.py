"""The picture that compares a rendering with the photograph: truth, rendering and error beside each other."""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt

from zoosplat.formats import media

SQUARE_SIDE = 320  # pixels of each of the three squares
MARGIN = 1.2  # side of the square that is cut out, over the longer side of the animal's box
ERROR_AT_END = 0.5  # mean |error| over the channels that the last colour of the error picture stands for
OPAQUE = 0.5  # opacity from which a pixel of the rendering belongs to the animal

Values = npt.NDArray[np.float64]


def square_around(seen: npt.NDArray[np.bool_]) -> tuple[float, float, float, float]:
    """The square around what is seen, 1.2 times as large as its box.

    Args:
        seen: [h, w].

    Returns:
        x0, y0, x1, y1 in pixels; the square may reach outside the picture. The whole picture where nothing is seen.
    """
    ys, xs = np.nonzero(seen)
    if len(xs) == 0:
        return 0.0, 0.0, float(seen.shape[1]), float(seen.shape[0])
    x0, x1, y0, y1 = xs.min(), xs.max() + 1, ys.min(), ys.max() + 1
    half = MARGIN * max(x1 - x0, y1 - y0) / 2
    x, y = (x0 + x1) / 2, (y0 + y1) / 2
    return float(x - half), float(y - half), float(x + half), float(y + half)


def draw_comparison(rgb: Values, alpha: Values, truth: Values, mask: npt.NDArray[np.bool_]) -> media.Picture:
    """Truth, rendering and error beside each other, cut out around the animal and enlarged.

    Args:
        rgb: [h, w, 3] rendering on white or over the camera's plate, 0 to 1.
        alpha: [h, w] opacity of the rendering.
        truth: [h, w, 3] photograph, on white or whole.
        mask: [h, w] of the photograph.

    Returns:
        [320, 968, 3] uint8. The error is the mean over channels of |rgb - truth|, from white (0) through yellow and red
        to black (0.5 and more).
    """
    error = np.abs(rgb - truth).mean(axis=-1) / ERROR_AT_END
    heat = cv2.applyColorMap(media.to_uint8(1 - error), cv2.COLORMAP_HOT)[..., ::-1]
    box = square_around(mask | (alpha > OPAQUE))
    pictures = [media.to_uint8(truth), media.to_uint8(rgb), np.asarray(heat, dtype=np.uint8)]
    return media.side_by_side([media.zoom(p, box, SQUARE_SIDE, SQUARE_SIDE) for p in pictures])


def split_comparison(picture: media.Picture) -> tuple[media.Picture, media.Picture]:
    """Truth and rendering [h, h, 3] of a picture [h, 3 h + 2 gaps, 3] that `draw_comparison` has drawn."""
    side = picture.shape[0]
    return picture[:, :side], picture[:, side + media.GAP : 2 * side + media.GAP]
