"""The plate of each camera, also where the animal rests for most of the recording.

The network is given one frame as the picture and another as the plate. It tells where the first shows an animal that
the second does not, and with both exchanged, where the second does. Each pair of frames votes so for every pixel, and
frames in which the animal covers a pixel stand out, even if they are most of the frames: those that do not cover it say
so. A median of the others is a first plate, and masks against it tell better what to leave out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from zoosplat.recording.video import Planes, window_rgb
from zoosplat_segment.background import Extent, apply_light, fit_light, remove_light
from zoosplat_segment.network import MULTIPLE, MaskNetwork, predict_masks
from zoosplat_segment.windows import Window

U8 = npt.NDArray[np.uint8]
ROUNDS = 2  # rounds of masks and plates
PAIRED = 12  # frames that vote on each other
APART = 2  # places between two frames that vote on each other, at least
PAIR_EDGE = 208  # pixels; longest edge of the pictures that vote
CHANGES = 0.2  # range of a pixel's mean votes over the frames from which the animal covers it in some of them
COVERED = 0.35  # place in that range from which it covers the pixel of a frame
CLOSING = 9  # pixels; gaps that are closed before enclosed pixels are looked for, edge of the square
STILL_SHARE = 0.9  # share of the frames in which a static pixel is as it always is
STILL = 2.0  # spread of a static pixel at most, over that of most pixels of the picture
LEAST_SPREAD = 0.8  # grey levels; spread of most pixels at least
FEWEST_FRAMES = 2  # frames that must tell a pixel of the plate
RIM = 5  # pixels of a small picture that are left out round a mask, edge of the square
STRIP = 64  # rows of the plate that are computed at once
TOLERANCES = (16.0, 8.0)  # grey levels; a frame that differs so much from the mean has 1/e of the weight


def small_plates(
    network: MaskNetwork,
    frames: Tensor,
    noise: Tensor,
    first: Tensor | None,
    extent: Extent,
    progress: Callable[[int, int, str], None],
) -> tuple[Tensor, Tensor, Tensor]:
    """Plates of small pictures.

    Args:
        network: for inference.
        frames: [K, C, 3, h, w] uint8.
        noise: [C] standard deviation of a pixel, 0 to 1.
        first: [C, 3, h, w] 0 to 255, plates that are known; None: they are looked for.
        extent: of the whole pictures, in pixels of the small ones, which may have a margin to the right and below.
        progress: told what is done.

    Returns:
        plates [C, 3, h, w] float32, masks [K, C, h, w] float16 and light [K, C, 3, 4].
    """
    n = len(frames)
    if first is None:
        static = find_static(frames)
        plates = _vote(network, frames, noise, static, progress)
    else:
        plates = first
    masks: list[Tensor] = []
    lights: list[Tensor] = []
    rounds = ROUNDS if first is None else 1
    for turn in range(rounds):
        masks, lights = [], []
        for k in range(n):
            frame = frames[k].float()
            light = fit_light(frame, plates, extent)
            masks.append(predict_masks(network, frame, apply_light(plates, light, extent), noise).half())
            lights.append(light)
            progress(turn * n + k + 1, rounds * n, "background")
        if first is None and turn < rounds - 1:
            plates = masked_plates(frames, torch.stack(masks), torch.stack(lights), static, extent)
    return plates, torch.stack(masks), torch.stack(lights)


def _vote(
    network: MaskNetwork, frames: Tensor, noise: Tensor, static: Tensor, progress: Callable[[int, int, str], None]
) -> Tensor:
    """First plates [C, 3, h, w] of frames [K, C, 3, h, w]: medians of frames in which no animal covers the pixel."""
    chosen = frames[sorted({round(i * (len(frames) - 1) / (PAIRED - 1)) for i in range(PAIRED)})]
    height, width = chosen.shape[-2:]
    ratio = min(1.0, PAIR_EDGE / max(height, width))
    size = [max(MULTIPLE, round(n * ratio / MULTIPLE) * MULTIPLE) for n in (height, width)]
    extent = float(size[1]), float(size[0])
    small = torch.stack([F.interpolate(frame.float(), size=size, mode="area") for frame in chosen])
    votes = torch.zeros(len(chosen), chosen.shape[1], *size, device=frames.device)
    counts = torch.zeros(len(chosen), device=frames.device)
    pairs = [(i, j) for i in range(len(chosen)) for j in range(i + APART, len(chosen))]
    for number, (i, j) in enumerate(pairs):
        lit = apply_light(small[j], fit_light(small[i], small[j], extent), extent)
        here = predict_masks(network, torch.cat([small[i], lit]), torch.cat([lit, small[i]]), noise.repeat(2))
        difference = here[: len(lit)] - here[len(lit) :]
        votes[i] += difference
        votes[j] -= difference
        counts[[i, j]] += 1
        progress(number + 1, len(pairs), "which frames show the background")
    mean = votes / counts.clamp_min(1).view(-1, 1, 1, 1)
    low, high = mean.amin(0), mean.amax(0)
    changes = high - low > CHANGES
    covered = changes & ((mean - low) / (high - low).clamp_min(1e-3) > COVERED)

    def enlarge(flags: Tensor) -> Tensor:
        return F.interpolate(flags.float(), size=(height, width), mode="bilinear", align_corners=False) > 0.3

    hidden = torch.stack([enlarge(frame[None])[0] for frame in covered])
    enclosed = enlarge(_enclosed(changes)[None])[0]
    plates = []
    for c in range(chosen.shape[1]):
        plate = _median(chosen[:, c].float(), hidden[:, c])
        unknown = (hidden[:, c].all(0) | enclosed[c]) & ~static[c]
        plates.append(_inpaint(plate, unknown))
    return torch.stack(plates)


def grow(mask: Tensor) -> Tensor:
    """Masks [n, h, w] bool with a rim."""
    return F.max_pool2d(mask.float()[:, None], RIM, 1, RIM // 2)[:, 0] > 0.5


def _enclosed(changes: Tensor) -> Tensor:
    """Pixels [C, h, w] that never change, and lie within those that do: the animal may cover them all the time."""
    kernel = np.ones((CLOSING, CLOSING), np.uint8)
    out = []
    for flags in changes.cpu().numpy():
        closed = cv2.morphologyEx(flags.astype(np.uint8), cv2.MORPH_CLOSE, kernel)
        framed = cv2.copyMakeBorder(closed, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=(0,))
        cv2.floodFill(framed, None, (0, 0), (2,))
        out.append((framed[1:-1, 1:-1] != 2) & ~flags)
    return torch.from_numpy(np.stack(out)).to(changes.device)


def find_static(frames: Tensor) -> Tensor:
    """Pixels [C, h, w] that show the same in all but a few of K frames [K, C, 3, h, w]: they are background.

    Where an animal covers a pixel in all frames its fur still passes by, so the pixel changes by more than the noise.
    """
    middle = frames.float().median(0).values
    extent = float(frames.shape[-1]), float(frames.shape[-2])
    deviation = torch.empty(len(frames), *frames.shape[1:2], *frames.shape[3:], device=frames.device)
    for k, frame in enumerate(frames):
        light = fit_light(frame.float(), middle, extent)
        deviation[k] = (frame - apply_light(middle, light, extent)).abs().mean(1)
    spread = deviation.quantile(STILL_SHARE, dim=0)
    usual = spread.flatten(1).median(1).values.clamp_min(LEAST_SPREAD)
    around = F.avg_pool2d(spread[:, None], 3, 1, 1, count_include_pad=False)[:, 0]
    return around < STILL * usual[:, None, None]


def _inpaint(plate: Tensor, unknown: Tensor) -> Tensor:
    """A plate [3, h, w] in which unknown pixels [h, w] are told from those around them.

    Known pixels are averaged into smaller and smaller pictures, and what is unknown is filled from the next smaller one
    (push and pull, Gortler et al. 1996): smooth, without the streaks of methods that continue edges.
    """
    if not unknown.any() or unknown.all():
        return plate
    known = (~unknown).float()[None]
    levels = [(plate * known, known)]
    while min(levels[-1][1].shape[1:]) > 1:
        colour, weight = (F.avg_pool2d(t[None], 2, ceil_mode=True)[0] for t in levels[-1])
        levels.append((colour, weight))
    filled = levels[-1][0] / levels[-1][1].clamp_min(1e-6)
    for colour, weight in reversed(levels[:-1]):
        grown = F.interpolate(filled[None], size=weight.shape[1:], mode="bilinear", align_corners=False)[0]
        share = weight.clamp_max(1)
        filled = colour / weight.clamp_min(1e-6) * (weight > 0) * share + grown * (1 - share)
    return torch.where(unknown, filled, plate)


def _median(values: Tensor, hidden: Tensor) -> Tensor:
    """[3, h, w] medians of K pictures [K, 3, h, w] where they are not hidden [K, h, w]; of all where all are."""
    never = hidden.all(0)
    shown = torch.where((hidden & ~never)[:, None], torch.nan, values)
    return shown.nanmedian(0).values


def masked_plates(frames: Tensor, masks: Tensor, lights: Tensor, static: Tensor, extent: Extent) -> Tensor:
    """Plates [C, 3, h, w]: the median of what frames show where nothing is in the way.

    Args:
        frames: [K, C, 3, h, w].
        masks: [K, C, h, w] of the frames.
        lights: [K, C, 3, 4] of the frames.
        static: [C, h, w] of `find_static`.
        extent: see `small_plates`.
    """
    out = []
    for c in range(frames.shape[1]):  # a camera at a time, for memory
        lit = remove_light(frames[:, c].float(), lights[:, c], extent).clamp(0, 255)
        hidden = grow(masks[:, c] > 0.5) & ~static[c]
        unknown = (~hidden).sum(0) < FEWEST_FRAMES
        out.append(_inpaint(_median(lit, hidden), unknown))
    return torch.stack(out)


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
    step = max(1, STRIP // s) * s
    for top in range(0, height, step):
        rows = min(step, height - top)
        cut = torch.from_numpy(np.stack([window_rgb(frame, (0, top), (width, rows), 1) for frame in frames]))
        values = cut.permute(0, 3, 1, 2).float()
        values = remove_light(values, lights, (width, height), top)
        last = min(hidden.shape[1], -(-(top + rows) // s))
        free = (~hidden[:, top // s : last]).float().repeat_interleave(s, 1).repeat_interleave(s, 2)
        free = F.pad(free, (0, max(0, width - free.shape[2]), 0, max(0, rows - free.shape[1])))[:, :rows, :width]
        guess = F.interpolate(
            coarse[None, :, top // s : last], scale_factor=float(s), mode="bilinear", align_corners=False
        )[0]
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
