"""The background of cameras on tensors: plates under the light of a frame, and renderings laid over them."""

from __future__ import annotations

import torch
from torch import Tensor


def lit_plate(
    plate: Tensor,  # [C, h, w, 3]
    light: Tensor,  # [C, 3, 4]
    origin: Tensor,  # [C, 2]
    full_size: tuple[int, int],
) -> Tensor:
    """The background of windows, [C, h, w, 3] float32, 0 to 1: `zoosplat.recording.background.lit_plate` over 255.

    Args:
        plate: the window's part of each camera's plate, 0 to 255, uint8 or float32.
        light: gain, slope along x, slope along y, and offset in grey levels, for each channel.
        origin: x, y of the window's corner in the whole frame, pixels.
        full_size: width and height of the whole frame, pixels of the same size.
    """
    gain, slope_x, slope_y, offset = light[:, None, None].unbind(-1)  # [C, 1, 1, 3]
    height, width = plate.shape[1:3]
    columns = torch.arange(width, device=plate.device, dtype=light.dtype)
    rows = torch.arange(height, device=plate.device, dtype=light.dtype)
    x = (origin[:, 0, None] + columns) / full_size[0] - 0.5
    y = (origin[:, 1, None] + rows) / full_size[1] - 0.5
    lit = plate * (gain + slope_x * x[:, None, :, None] + slope_y * y[:, :, None, None]) + offset
    return lit.clamp(0, 255) / 255


def lay_over(
    rgb: Tensor,  # [..., h, w, 3]
    alpha: Tensor,  # [..., h, w]
    background: Tensor,  # [..., h, w, 3]
) -> Tensor:
    """A rendering on white laid over another background: the white that shows through is replaced."""
    return rgb - (1 - alpha[..., None]) * (1 - background)
