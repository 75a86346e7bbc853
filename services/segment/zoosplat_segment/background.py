"""The background of a camera: its plate without the animal, and the light on it in a frame."""

from __future__ import annotations

import torch
from torch import Tensor

from zoosplat_segment.windows import Window, pixels_of

LIGHT_STEPS = 4  # rounds of reweighting in which pixels that are not background lose their weight
LIGHT_SCALE = 6.0  # grey levels; a pixel that differs so much from the lit plate has half of the weight
LIGHT_SAMPLES = 4096  # pixels of a small picture from which the light is fitted
LEAST_GAIN = 0.2  # gain of a light at least, where frames are brought into the light of the plate
RIDGE = (5.0, 5.0, 5.0, 0.02)  # how strongly gain, slopes and offset are kept at those of the plate, in grey levels


Extent = tuple[float, float]  # width and height of a whole picture, in the pixels of what shows it


def fit_light(frames: Tensor, plates: Tensor, extent: Extent) -> Tensor:
    """How the light on the background differs from that of the plate.

    For each channel frame = plate * (g0 + g1 x + g2 y) + o by least squares with Geman-McClure weights, with x and y
    from -0.5 to 0.5 over the whole picture, near (1, 0, 0, 0) where the picture does not tell.

    Args:
        frames: [C, 3, h, w] 0 to 255.
        plates: [C, 3, h, w].
        extent: of the whole picture, which begins at the first pixel; h and w may be larger by a margin.

    Returns:
        [C, 3, 4]: g0, g1, g2, o.
    """
    height, width = frames.shape[2:]
    step = max(1, round((height * width / LIGHT_SAMPLES) ** 0.5))
    x, y = (places[..., ::step] for places in _places(width, height, extent, frames.device))
    frame, plate = (t[..., ::step, ::step].flatten(2).double() for t in (frames, plates))
    rows, columns = torch.meshgrid(y, x, indexing="ij")
    base = torch.stack([torch.ones_like(rows), columns, rows]).flatten(1).double()
    design = torch.cat([plate[:, :, None] * base, torch.ones_like(plate)[:, :, None]], 2)  # [C, 3, 4, n]
    # Pixels that are burnt out do not tell the light.
    usable = ((frame < 250) & (plate < 250)).double()
    light = torch.zeros(*frames.shape[:2], 4, dtype=torch.float64, device=frames.device)
    light[..., 0] = 1
    neutral = light.clone()
    ridge = torch.diag(torch.tensor(RIDGE, dtype=torch.float64, device=frames.device) ** 2)
    for _ in range(LIGHT_STEPS):
        residual = frame - torch.einsum("cki,ckin->ckn", light, design)
        # One weight for the three channels: a pixel is background or it is not.
        squared = (residual**2).mean(1, keepdim=True) / LIGHT_SCALE**2
        weight = usable / (1 + squared) ** 2
        weight = weight / weight.sum(-1, keepdim=True).clamp_min(1e-6)
        normal = torch.einsum("ckin,ckn,ckjn->ckij", design, weight, design) + ridge
        right = torch.einsum("ckin,ckn->cki", design, weight * frame) + neutral @ ridge
        light = torch.linalg.solve(normal, right)
    return light.float()


def apply_light(plates: Tensor, light: Tensor, extent: Extent) -> Tensor:
    """The background [C, 3, h, w], 0 to 255, of plates [C, 3, h, w] in a light [C, 3, 4]; see `fit_light`."""
    x, y = _places(plates.shape[3], plates.shape[2], extent, plates.device)
    gain, offset = gain_and_offset(light, x, y[:, None])
    return (plates * gain + offset).clamp(0, 255)


def light_window(plate: Tensor, light: Tensor, window: Window, size: tuple[int, int]) -> Tensor:
    """The background [3, h, w], 0 to 255, of a window of a plate in a light [3, 4]; `size`: of the whole picture."""
    places = pixels_of(window, 1.0, plate.device)
    x, y = (places[..., 0] + 0.5) / size[0] - 0.5, (places[..., 1] + 0.5) / size[1] - 0.5
    gain, offset = gain_and_offset(light, x, y)
    return (plate * gain + offset).clamp(0, 255)


def remove_light(frames: Tensor, light: Tensor, extent: Extent, top: int = 0) -> Tensor:
    """Frames [n, 3, h, w] in the light of the plate, from theirs [n, 3, 4]; not clipped.

    Args:
        frames: rows of pictures, 0 to 255.
        light: of the pictures.
        extent: of the whole picture.
        top: the first of the rows.
    """
    x, y = _places(frames.shape[3], top + frames.shape[2], extent, frames.device)
    gain, offset = gain_and_offset(light, x, y[top:, None])
    return (frames - offset) / gain.clamp_min(LEAST_GAIN)


def _places(width: int, height: int, extent: Extent, device: torch.device) -> tuple[Tensor, Tensor]:
    """x [w] of columns and y [h] of rows, -0.5 to 0.5 over the whole picture."""
    x, y = (
        (torch.arange(n, device=device) + 0.5) / whole - 0.5 for n, whole in zip((width, height), extent, strict=True)
    )
    return x, y


def gain_and_offset(light: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """What a light [..., 3, 4] multiplies pixels of the plate at x, y with, and what it adds, as [..., 3, h, w]."""
    g0, g1, g2, offset = light[..., None, None].unbind(-3)
    return g0 + g1 * x + g2 * y, offset
