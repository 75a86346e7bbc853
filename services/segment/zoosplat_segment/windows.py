"""Windows of pictures at a common size: what the network is given, and how its masks get back into whole pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from zoosplat.recording.video import Planes, window_rgb
from zoosplat_segment.network import MULTIPLE

U8 = npt.NDArray[np.uint8]
Box = tuple[float, float, float, float]  # first and last column, first and last row, pixels
LEAST_RIM = 8  # pixels; rim of a window beside its share of the box
COARSE = 288  # pixels; longest edge of a whole picture that is segmented at first


@dataclass(frozen=True)
class Window:
    """A window of a picture, averaged over squares of pixels; it may reach over the picture's border.

    Attributes:
        x, y: its corner in pixels of the picture; multiples of `scale`.
        scale: edge of the squares, pixels.
        width, height: of the window in averaged pixels, multiples of the network's `MULTIPLE`.
    """

    x: int
    y: int
    scale: int
    width: int
    height: int

    def inner(self, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """First and end column, first and end row of the part that lies in a picture of this size, averaged pixels."""
        left, top = max(0, -(self.x // self.scale)), max(0, -(self.y // self.scale))
        right = min(self.width, (size[0] - self.x) // self.scale)
        bottom = min(self.height, (size[1] - self.y) // self.scale)
        return left, max(left + 1, right), top, max(top + 1, bottom)

    def extent(self, size: tuple[int, int]) -> tuple[float, float]:
        """Width and height of a picture of this size, in averaged pixels."""
        return size[0] / self.scale, size[1] / self.scale

    def cut(self, frame: Planes, size: tuple[int, int]) -> U8:
        """The window of a frame, [height, width, 3]; beyond the border the outermost pixels are repeated."""
        left, right, top, bottom = self.inner(size)
        origin = self.x // self.scale + left, self.y // self.scale + top
        part = window_rgb(frame, origin, (right - left, bottom - top), self.scale)
        return self._pad(part, left, right, top, bottom)

    def cut_picture(self, picture: U8, size: tuple[int, int]) -> U8:
        """The same of a picture [H, W, 3]."""
        left, right, top, bottom = self.inner(size)
        x, y, s = self.x + left * self.scale, self.y + top * self.scale, self.scale
        part = picture[y : y + (bottom - top) * s, x : x + (right - left) * s]
        small = cv2.resize(part, (right - left, bottom - top), interpolation=cv2.INTER_AREA)
        return self._pad(np.asarray(small), left, right, top, bottom)

    def _pad(self, part: npt.NDArray[np.uint8], left: int, right: int, top: int, bottom: int) -> U8:
        margins = top, self.height - bottom, left, self.width - right
        return np.asarray(cv2.copyMakeBorder(part, *margins, cv2.BORDER_REPLICATE)) if any(margins) else part

    def paste(self, probability: npt.NDArray[np.float32], size: tuple[int, int]) -> U8:
        """A picture [H, W] uint8, 0 to 255, with the window's probability [height, width] in its place, 0 elsewhere."""
        left, right, top, bottom = self.inner(size)
        part = probability[top:bottom, left:right]
        if self.scale > 1:
            wanted = (right - left) * self.scale, (bottom - top) * self.scale
            part = np.asarray(cv2.resize(part, wanted, interpolation=cv2.INTER_LINEAR))
        out = np.zeros((size[1], size[0]), np.uint8)
        x, y = self.x + left * self.scale, self.y + top * self.scale
        out[y : y + part.shape[0], x : x + part.shape[1]] = np.rint(255 * part.clip(0, 1))[: size[1] - y, : size[0] - x]
        return out


def zoom(mask: Tensor, whole: Window, window: Window) -> Tensor:
    """The part of a mask [h, w] of the window `whole` that another window shows, [height, width]; 0 beyond."""
    places = pixels_of(window, 1.0, mask.device)
    corner = torch.tensor([whole.x, whole.y], dtype=torch.float32, device=mask.device)
    size = torch.tensor([whole.width, whole.height], dtype=torch.float32, device=mask.device)
    grid = 2 * (places - corner + 0.5) / whole.scale / size - 1
    return F.grid_sample(mask[None, None], grid[None], padding_mode="zeros", align_corners=False)[0, 0]


def whole_picture(size: tuple[int, int]) -> Window:
    """The window that shows a whole picture of this size, averaged until no edge is longer than `COARSE` pixels."""
    scale = -(-max(size) // COARSE)
    width, height = (-(-n // (scale * MULTIPLE)) * MULTIPLE for n in size)
    return Window(0, 0, scale, width, height)


def windows_round(boxes: Mapping[int, Box], margin: float, longest: int) -> dict[int, Window]:
    """Windows of one common size round boxes, with a margin, averaged where a box is larger than `longest` pixels.

    Args:
        boxes: first and last column, first and last row, pixels, by camera.
        margin: share of the box's longer edge that is added on each side.
        longest: longest edge of a window, averaged pixels, a multiple of the network's `MULTIPLE`.
    """
    if not boxes:
        return {}
    sizes, scales = [], {}
    for c, (left, right, top, bottom) in boxes.items():
        rim = margin * max(right - left, bottom - top) + LEAST_RIM
        width, height = right - left + 2 * rim, bottom - top + 2 * rim
        scales[c] = max(1, int(np.ceil(max(width, height) / longest)))
        sizes.append((width / scales[c], height / scales[c]))
    width, height = (min(longest, int(np.ceil(max(s) / MULTIPLE)) * MULTIPLE) for s in zip(*sizes, strict=True))
    out = {}
    for c, box in boxes.items():
        scale = scales[c]
        corners = [((a + b) / 2 - n * scale / 2) for (a, b), n in ((box[:2], width), (box[2:], height))]
        x, y = (int(np.floor(corner / scale)) * scale for corner in corners)
        out[c] = Window(x, y, scale, width, height)
    return out


def as_tensor(pictures: Sequence[U8], device: torch.device) -> Tensor:
    """[n, 3, h, w] float32, 0 to 255, of n pictures [h, w, 3]."""
    stacked = torch.from_numpy(np.stack(pictures))
    return stacked.to(device).permute(0, 3, 1, 2).float()


def pixels_of(window: Window, step: float, device: torch.device) -> Tensor:
    """[h, w, 2] places in the whole picture of every `step`-th averaged pixel of a window."""
    count_x, count_y = int(window.width / step), int(window.height / step)
    x = (torch.arange(count_x, device=device, dtype=torch.float32) + 0.5) * step * window.scale - 0.5 + window.x
    y = (torch.arange(count_y, device=device, dtype=torch.float32) + 0.5) * step * window.scale - 0.5 + window.y
    rows, columns = torch.meshgrid(y, x, indexing="ij")
    return torch.stack([columns, rows], -1)
