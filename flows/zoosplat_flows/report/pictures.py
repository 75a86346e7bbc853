"""Pictures of a report, as data URIs: the page holds them itself."""

from __future__ import annotations

import base64
from pathlib import PurePosixPath

import cv2
import numpy as np
import numpy.typing as npt

from zoosplat.formats import media
from zoosplat.storage import objects

OUTLINE_COLOUR = (255, 60, 90)  # of the outline of a mask, RGB
OUTLINE_WIDTH = 480  # pixels that a picture is about enlarged to before its outline is drawn, which makes the line thin
JPEG_QUALITY = 88  # in percent: the loss is not seen, and the file a fifth of a PNG
MEDIA_TYPES = {".png": "image/png", ".mp4": "video/mp4"}


def draw_outline(picture: media.Picture, mask: npt.NDArray[np.bool_]) -> media.Picture:
    """A picture with the outline of a mask, enlarged by a whole factor so that the line is thin.

    The line lies outside the mask and hides nothing of the animal.

    Args:
        picture: [h, w, 3] uint8.
        mask: [h, w].

    Returns:
        [f h, f w, 3] uint8, where f is the factor.
    """
    factor = max(1, round(OUTLINE_WIDTH / picture.shape[1]))
    size = (picture.shape[1] * factor, picture.shape[0] * factor)
    large = np.ascontiguousarray(cv2.resize(picture, size, interpolation=cv2.INTER_CUBIC), dtype=np.uint8)
    contours, _ = cv2.findContours(
        cv2.resize(mask.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST),
        cv2.RETR_EXTERNAL,
        cv2.CHAIN_APPROX_NONE,
    )
    cv2.drawContours(large, contours, -1, OUTLINE_COLOUR, 2 if factor > 1 else 1, cv2.LINE_AA)
    return large


def jpeg_data_uri(picture: media.Picture) -> str:
    """A picture [h, w, 3] as the data URI of a JPEG."""
    _, data = cv2.imencode(".jpg", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    return "data:image/jpeg;base64," + base64.b64encode(data.tobytes()).decode()


def read_picture(url: str) -> str:
    """A PNG at a URL as the data URI of a JPEG, small enough for a page with dozens.

    Raises:
        ValueError: the file is not a picture.
    """
    picture = cv2.imdecode(np.frombuffer(objects.read_bytes(url), np.uint8), cv2.IMREAD_COLOR_RGB)
    if picture is None:
        raise ValueError(f"{url} is not a picture")
    return jpeg_data_uri(np.asarray(picture, dtype=np.uint8))


def read_data_uri(url: str) -> str:
    """A PNG or MP4 file at a URL as a data URI, as it is."""
    kind = MEDIA_TYPES[PurePosixPath(url).suffix.lower()]
    return f"data:{kind};base64," + base64.b64encode(objects.read_bytes(url)).decode()
