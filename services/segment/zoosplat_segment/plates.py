"""The plate of each camera, also where the animal rests for most of the recording.

The network is symmetric in a way that helps: with frame and plate exchanged it tells where the *plate* shows an animal
that the frame does not. So an animal that rested long enough to be taken for background gives itself away in the frames
in which it is elsewhere, and its place in the plate is filled from those.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from zoosplat.recording.video import Planes, window_rgb
from zoosplat_segment.background import apply_light, fit_light
from zoosplat_segment.network import NO_PRIOR, MaskNetwork
from zoosplat_segment.windows import Window, as_tensor

U8 = npt.NDArray[np.uint8]
ROUNDS = 3  # rounds of masks and plates
GHOST = 0.5  # mean probability from which the plate shows an animal
FEWEST_FRAMES = 3  # frames that must tell a pixel of the plate
RIM = 9  # pixels of a small picture that are left out round a mask, edge of the square
STRIP = 64  # rows of the plate that are computed at once
TOLERANCES = (16.0, 8.0)  # grey levels; a frame that differs so much from the mean has 1/e of the weight
MAX_SECOND = 24  # frames of the second pass at most, those for full resolution


def small_plates(
    network: MaskNetwork, frames: Tensor, noise: Tensor, first: Tensor | None, progress: Callable[[int, int, str], None]
) -> tuple[Tensor, Tensor, Tensor]:
    """Plates of small pictures.

    Args:
        network: for inference.
        frames: [K, C, 3, h, w] uint8.
        noise: [C] standard deviation of a pixel, 0 to 1.
        first: [C, 3, h, w] 0 to 255, plates that are known; None: they are looked for.
        progress: told what is done.

    Returns:
        plates [C, 3, h, w] float32, masks [K, C, h, w] float16 and light [K, C, 3, 4].
    """
    known = first is not None
    plates = first if first is not None else frames.float().median(0).values
    n = len(frames)
    masks, lights = [], []
    rounds = 1 if known else ROUNDS
    for turn in range(rounds):
        masks, lights = [], []
        ghosts = torch.zeros_like(plates[:, 0])
        told = torch.zeros_like(plates[:, 0])
        for k in range(n):
            frame = frames[k].float()
            light = fit_light(frame, plates)
            lit = apply_light(plates, light)
            mask = _run(network, frame, lit, noise)
            masks.append(mask.half())
            lights.append(light)
            if not known:
                ghost = _run(network, lit, frame, noise)
                free = 1 - mask
                ghosts += ghost * free
                told += free * (ghost > GHOST).float()
            progress(turn * n + k + 1, rounds * n, "background")
        if known:
            break
        stacked, light_stack = torch.stack(masks), torch.stack(lights)
        ghost_mask = grow((ghosts / told.clamp_min(1) > GHOST) & (told >= FEWEST_FRAMES))
        plates = _masked_plates(frames, plates, stacked, light_stack, ghost_mask)
    return plates, torch.stack(masks), torch.stack(lights)


def _run(network: MaskNetwork, frames: Tensor, plates: Tensor, noise: Tensor) -> Tensor:
    none = torch.full_like(frames[:, :1], NO_PRIOR)
    return network(frames / 255, plates / 255, noise, none).float().sigmoid()[:, 0]


def grow(mask: Tensor) -> Tensor:
    """Masks [n, h, w] bool with a rim."""
    return F.max_pool2d(mask.float()[:, None], RIM, 1, RIM // 2)[:, 0] > 0.5


def _masked_plates(frames: Tensor, plates: Tensor, masks: Tensor, lights: Tensor, ghosts: Tensor) -> Tensor:
    """The median of what frames show where nothing is in the way; a camera at a time."""
    out = []
    for c, plate in enumerate(plates):
        lit = torch.stack([_unlit(frame, light) for frame, light in zip(frames[:, c].float(), lights[:, c], strict=True)])
        hidden = grow(masks[:, c] > 0.3)
        # Where the plate shows the animal, only frames that differ from the plate show what is behind it.
        alike = (lit - plate).abs().amax(1) < 12
        hidden = hidden | (ghosts[c] & alike)
        enough = (~hidden).sum(0) >= FEWEST_FRAMES
        values = torch.where(hidden[:, None], torch.nan, lit).nanmedian(0).values
        out.append(torch.where(enough, values, plate))
    return torch.stack(out)


def _unlit(frame: Tensor, light: Tensor) -> Tensor:
    """A frame [3, h, w] in the light of the plate."""
    height, width = frame.shape[1:]
    x = (torch.arange(width, device=frame.device) + 0.5) / width - 0.5
    y = (torch.arange(height, device=frame.device) + 0.5) / height - 0.5
    g0, g1, g2, offset = light[..., None, None].unbind(1)
    return ((frame - offset) / (g0 + g1 * x + g2 * y[:, None]).clamp_min(0.2)).clamp(0, 255)


def full_plate(
    frames: Sequence[Planes], hidden: Tensor, lights: Tensor, coarse: Tensor, whole: Window, size: tuple[int, int]
) -> tuple[U8, float]:
    """The plate of a camera at full resolution, and the noise of its pixels.

    Each pixel is a mean over the frames in which nothing is in the way, without those that differ from the rest.

    Args:
        frames: K frames.
        hidden: [K, h, w] bool, where the small pictures of the frames do not show the background.
        lights: [K, 3, 4] of the frames.
        coarse: [3, h, w] the small plate; it tells pixels that no frame shows.
        whole: the window of the small pictures.
        size: width and height, pixels.

    Returns:
        plate [H, W, 3] uint8, and the standard deviation of a pixel against it, grey levels.
    """
    width, height = size
    s = whole.scale
    plate = np.zeros((height, width, 3), np.uint8)
    squares: list[Tensor] = []
    gains = lights[..., None, None]
    x = (torch.arange(width) + 0.5) / width - 0.5
    step = max(1, STRIP // s) * s
    for top in range(0, height, step):
        rows = min(step, height - top)
        y = ((torch.arange(rows) + top + 0.5) / height - 0.5)[:, None]
        cut = torch.from_numpy(np.stack([window_rgb(frame, (0, top), (width, rows), 1) for frame in frames]))
        values = cut.permute(0, 3, 1, 2).float()
        g0, g1, g2, offset = gains.unbind(2)
        values = (values - offset) / (g0 + g1 * x + g2 * y).clamp_min(0.2)
        last = min(hidden.shape[1], -(-(top + rows) // s))
        free = (~hidden[:, top // s : last]).float().repeat_interleave(s, 1).repeat_interleave(s, 2)
        free = F.pad(free, (0, max(0, width - free.shape[2]), 0, max(0, rows - free.shape[1])))[:, :rows, :width]
        guess = F.interpolate(coarse[None, :, top // s : last], scale_factor=float(s), mode="nearest")[0]
        guess = F.pad(guess, (0, max(0, width - guess.shape[2]), 0, max(0, rows - guess.shape[1])), mode="replicate")
        guess = guess[:, :rows, :width]
        total = free.sum(0)
        mean = torch.where(total > 0, (values * free[:, None]).sum(0) / total.clamp_min(1), guess)
        weight = free
        for tolerance in TOLERANCES:
            distance = (values - mean).abs().amax(1)
            weight = free * torch.exp(-((distance / tolerance) ** 2))
            sure = weight.sum(0)
            mean = torch.where(sure > 1e-3, (values * weight[:, None]).sum(0) / sure.clamp_min(1e-3), mean)
        plate[top : top + rows] = mean.clamp(0, 255).round().byte().permute(1, 2, 0).numpy()
        deviation = ((values - mean).abs().mean(1))[weight > 0.2]
        if deviation.numel():
            squares.append(deviation[:: max(1, deviation.numel() // 20000)])
    spread = torch.cat(squares) if squares else torch.zeros(1)
    # 1.4826 medians of the absolute deviation are a standard deviation; the mean of few frames takes a little of it.
    few = (len(frames) / max(1, len(frames) - 1)) ** 0.5
    return plate, float(1.4826 * spread.median()) * few
