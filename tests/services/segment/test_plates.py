"""Plates of scenes whose true background is known."""

from __future__ import annotations

import numpy as np
import torch

from zoosplat.recording.video import Planes
from zoosplat_segment.network import load_network
from zoosplat_segment.plates import find_static, full_plate, masked_plates, small_plates
from zoosplat_segment.sprites import Sprites
from zoosplat_segment.windows import whole_picture

HEIGHT, WIDTH, FRAMES = 128, 160, 10
EXTENT = float(WIDTH), float(HEIGHT)
RNG = np.random.default_rng(0)


def smooth_noise(height: int, width: int, cells: int, amplitude: float) -> torch.Tensor:
    grid = torch.from_numpy(RNG.normal(0, amplitude, (1, 3, cells, cells))).float()
    return torch.nn.functional.interpolate(grid, (height, width), mode="bilinear", align_corners=False)[0]


# Columns and rows of the animal's middle: it rests for 7 of 10 frames, or its middle is never free.
RESTS = [(50, 60)] * 3 + [(125, 70)] + [(50, 60)] * 2 + [(125, 60), (120, 55)] + [(50, 60)] * 2
STAYS = [(60, 60), (72, 60), (54, 68), (54, 52)] * 2 + [(60, 60)] * 2


def make_scene(sprites: Sprites, places: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A background [3, h, w], frames [K, 1, 3, h, w], and where the animal is in each [K, h, w]."""
    background = 150 + smooth_noise(HEIGHT, WIDTH, 6, 12) + smooth_noise(HEIGHT, WIDTH, 40, 4)
    rgba = sprites.rgba[1, 0].astype(np.float32)
    rows, columns = (np.flatnonzero(rgba[..., 3].any(axis)) for axis in (1, 0))
    animal = torch.from_numpy(rgba[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]).permute(2, 0, 1)
    animal = torch.nn.functional.avg_pool2d(animal, 2)
    height, width = animal.shape[1:]
    frames, covered = [], []
    for column, row in places:
        canvas = torch.zeros(4, HEIGHT, WIDTH)
        top, left = row - height // 2, column - width // 2
        canvas[:, top : top + height, left : left + width] = animal
        alpha = canvas[3] / 255
        moving = canvas[:3] + alpha * smooth_noise(HEIGHT, WIDTH, 30, 9)
        frame = background * (1 - alpha) + moving
        frames.append((frame + torch.from_numpy(RNG.normal(0, 1.2, frame.shape))).clamp(0, 255))
        covered.append(alpha > 0.5)
    return background, torch.stack(frames)[:, None].round().byte(), torch.stack(covered)


def find_plates(frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    network = load_network(None, torch.device("cpu"))
    with torch.inference_mode():
        plates, masks, lights = small_plates(
            network, frames, torch.tensor([1.5 / 255]), None, EXTENT, lambda *told: None
        )
    assert lights.shape == (FRAMES, 1, 3, 4)
    return plates[0], masks[:, 0]


def test_plate_under_an_animal_that_rests(sprites: Sprites) -> None:
    """The network tells which frames show the background of a pixel, even if they are the fewer."""
    background, frames, covered = make_scene(sprites, RESTS)
    plate, masks = find_plates(frames)
    share = covered.float().mean(0)
    error = (plate - background).abs().mean(0)
    assert float(error[share == 0].mean()) < 1
    rested = share == 0.7
    assert rested.sum() > 700
    assert float(error[rested].median()) < 2
    assert float(error[rested].quantile(0.95)) < 6
    found = masks > 0.5
    assert float((found & covered).sum() / (found | covered).sum()) > 0.9


def test_what_no_frame_shows_is_told_from_what_is_around_it(sprites: Sprites) -> None:
    background, frames, covered = make_scene(sprites, STAYS)
    lights = torch.tensor([1.0, 0, 0, 0]).expand(FRAMES, 1, 3, 4)
    plate = masked_plates(frames, covered[:, None].float(), lights, find_static(frames), EXTENT)[0]
    never = covered.all(0)
    assert never.sum() > 50
    animal = frames[:, 0].float().median(0).values
    error, contrast = ((picture - background).abs().mean(0)[never] for picture in (plate, animal))
    assert float(error.quantile(0.9)) < 20
    assert float(error.mean()) < 0.3 * float(contrast.mean())


def test_plate_of_known_masks_is_the_background(sprites: Sprites) -> None:
    background, frames, covered = make_scene(sprites, RESTS)
    lights = torch.tensor([1.0, 0, 0, 0]).expand(FRAMES, 1, 3, 4)
    plates = masked_plates(frames, covered[:, None].float(), lights, find_static(frames), EXTENT)
    seen = torch.nn.functional.max_pool2d(covered.float()[:, None], 5, 1, 2)[:, 0] < 0.5
    often = seen.sum(0) >= 2
    error = (plates[0] - background).abs().amax(0)
    assert float(error[often].max()) < 5


def test_static_pixels(sprites: Sprites) -> None:
    """They are those that the animal covers in no frame; where it does in all of them, its fur still moves."""
    _, frames, covered = make_scene(sprites, STAYS)
    static = find_static(frames)[0]
    share = covered.float().mean(0)
    away = torch.nn.functional.max_pool2d((share > 0).float()[None, None], 7, 1, 3)[0, 0] == 0
    assert float(static[away].float().mean()) > 0.99
    within = torch.nn.functional.max_pool2d(1 - (share > 0).float()[None, None], 5, 1, 2)[0, 0] == 0
    assert float(static[within].float().mean()) < 0.02


def test_static_pixels_stay_though_a_mask_covers_them(sprites: Sprites) -> None:
    """A mask that is wrong in all frames, such as one of a still cable, does not take the cable out of the plate."""
    background, frames, covered = make_scene(sprites, RESTS)
    wrong = covered.clone()
    wrong[:, 110:120, 10:40] = True
    lights = torch.tensor([1.0, 0, 0, 0]).expand(FRAMES, 1, 3, 4)
    plates = masked_plates(frames, wrong[:, None].float(), lights, find_static(frames), EXTENT)
    assert float((plates[0] - background)[:, 110:120, 10:40].abs().max()) < 4


def test_full_plate_in_changing_light() -> None:
    """Grey frames at full resolution, whose light changes; the animal covers half of the frames of its place."""
    height, width, n = 90, 310, 8
    truth = 120 + 40 * np.sin(np.arange(width) / 9.0)[None, :] + 20 * np.cos(np.arange(height) / 5.0)[:, None]
    whole = whole_picture((width, height))
    assert whole.scale == 2
    gains = np.linspace(0.85, 1.15, n)
    gains /= gains.mean()
    frames, hidden = [], torch.zeros(n, whole.height, whole.width, dtype=torch.bool)
    lights = torch.zeros(n, 3, 4)
    for k in range(n):
        values = truth * gains[k] + RNG.normal(0, 2, truth.shape)
        if k < n // 2:
            values[30:60, 100:160] = 30
            hidden[k, 15:30, 50:80] = True
        frames.append(Planes(values.round().clip(0, 255).astype(np.uint8), None, None, True, 601))
        lights[k, :, 0] = gains[k]
    plate, noise = full_plate(frames, hidden, lights, torch.zeros(3, whole.height, whole.width), whole, (width, height))
    assert plate.shape == (height, width, 3)
    assert np.abs(plate.astype(float) - truth[..., None]).max() < 6
    assert np.abs(plate.astype(float) - truth[..., None]).mean() < 1
    assert 1.5 < noise < 2.6


def test_full_plate_takes_what_no_frame_shows_from_the_small_one() -> None:
    height, width = 64, 96
    whole = whole_picture((width, height))
    frame = Planes(np.full((height, width), 100, np.uint8), None, None, True, 601)
    hidden = torch.zeros(3, whole.height, whole.width, dtype=torch.bool)
    hidden[:, 20:40, 30:50] = True
    lights = torch.tensor([1.0, 0, 0, 0]).expand(3, 3, 4)
    coarse = torch.full((3, whole.height, whole.width), 70.0)
    plate, noise = full_plate([frame] * 3, hidden, lights, coarse, whole, (width, height))
    inner = np.zeros((height, width), bool)
    inner[20:40, 30:50] = True
    assert np.unique(plate[inner]).tolist() == [70]
    assert np.unique(plate[~inner]).tolist() == [100]
    assert noise == 0
