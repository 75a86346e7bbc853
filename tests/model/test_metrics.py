from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from zoosplat_model.metrics import METRICS, ColorFit, apply_color_maps, frame_metrics, ssim_map


def whole_frame_metrics(
    rgb: Tensor, alpha: Tensor, photo: Tensor, mask: Tensor, origin: Tensor, width: int, height: int, d: int
) -> Tensor:
    """Slow twin: paste every window into its whole white frame, average, compare everything."""
    rows = []
    for c, (x, y) in enumerate(origin.tolist()):
        h, w = mask[c].shape
        frames = {
            "rgb": torch.ones(height, width, 3, dtype=torch.float64),
            "photo": torch.ones(height, width, 3, dtype=torch.float64),
            "alpha": torch.zeros(height, width, 1, dtype=torch.float64),
            "mask": torch.zeros(height, width, 1, dtype=torch.float64),
        }
        for name, value in (("rgb", rgb), ("photo", photo), ("alpha", alpha[..., None]), ("mask", mask[..., None])):
            frames[name][y : y + h, x : x + w] = value[c].double()
        small = {k: torch.nn.functional.avg_pool2d(v.permute(2, 0, 1)[None], d) for k, v in frames.items()}
        a, m = small["alpha"], (small["mask"] >= 0.5).double()
        pred, truth = small["rgb"], small["photo"] * m + 1 - m
        error = (pred - truth).abs()
        rows.append(
            [
                float(error.sum() / m.sum()),
                float(error.mean()),
                float(((a > 0.5) & (m > 0)).sum() / ((a > 0.5) | (m > 0)).sum()),
                float((a * m).sum() / (a + m - a * m).sum()),
                10 * math.log10(1 / float((error**2).mean())),
                float(structural_similarity_index_measure(pred, truth, data_range=1.0)),  # type: ignore[arg-type]
            ]
        )
        rows[-1] += [rows[-1][0], rows[-1][4]]  # nothing to correct
        inside = ((a >= 0.5) | (m > 0)).expand(pred.shape)
        rows[-1].append(10 * math.log10(1 / float((error[inside] ** 2).mean())))
    return torch.tensor(rows, dtype=torch.float64)


def blob(n: int, h: int, w: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A soft ellipse and its mask in random colours, filling much of the window."""
    g = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.linspace(-1, 1, h), torch.linspace(-1, 1, w), indexing="ij")
    shift = 0.3 * torch.rand(n, 2, 1, 1, generator=g)
    r = ((x - shift[:, 0]) ** 2 + (y + shift[:, 1]) ** 2).sqrt()
    alpha = (2 - 2.5 * r).clamp(0, 1)
    mask = r < 0.65
    color = torch.rand(n, h, w, 3, generator=g)
    photo = (color + 0.1 * torch.rand(n, h, w, 3, generator=g)).clamp(0, 1)
    return color * alpha[..., None] + 1 - alpha[..., None], alpha, photo, mask


# Windows inside, in each corner, along borders, a little off the border, and as large as the frame.
PLACES = [(20, 17), (0, 0), (37, 31), (0, 31), (3, 1), (33, 24), (0, 15), (18, 0)]


@pytest.mark.parametrize("d", [1, 2, 3])
def test_windows_give_the_metrics_of_whole_frames(d: int) -> None:
    width, height = 61, 53  # not multiples of 2 or 3
    images = blob(len(PLACES), 22, 24, seed=d)
    origin = torch.tensor(PLACES, dtype=torch.int32)
    fast = frame_metrics(*images, origin, width, height, d)
    slow = whole_frame_metrics(*images, origin, width, height, d)
    assert fast.dtype == torch.float64
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-6)


def test_window_as_large_as_the_frame() -> None:
    images = blob(2, 30, 40, seed=0)
    origin = torch.zeros(2, 2, dtype=torch.int32)
    torch.testing.assert_close(
        frame_metrics(*images, origin, 40, 30), whole_frame_metrics(*images, origin, 40, 30, 1), rtol=0, atol=1e-6
    )


def test_numbers_worked_out_by_hand() -> None:
    # A frame of 10 x 10; the animal is 2 x 2 grey pixels of 0.5. The model sees 3 of them, one 0.1 too bright,
    # and one pixel more that is not there, black and half opaque.
    photo = torch.full((1, 4, 4, 3), 0.2)
    photo[0, 1:3, 1:3] = 0.5
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    mask[0, 1:3, 1:3] = True
    rgb, alpha = torch.ones(1, 4, 4, 3), torch.zeros(1, 4, 4)
    for y, x, color, opacity in ((1, 1, 0.5, 1.0), (1, 2, 0.6, 1.0), (2, 1, 0.5, 1.0), (3, 1, 0.4, 0.6)):
        rgb[0, y, x], alpha[0, y, x] = color, opacity
    found = dict(zip(METRICS, frame_metrics(rgb, alpha, photo, mask, torch.tensor([[2, 3]]), 10, 10)[0], strict=True))
    # Errors: 0.1 (bright), 0.5 (missing), 0.6 (extra), in 3 channels each.
    assert float(found["l1"]) == pytest.approx(3 * 1.2 / 4, abs=1e-6)
    assert float(found["mae"]) == pytest.approx(3 * 1.2 / 300, abs=1e-7)
    assert float(found["iou"]) == pytest.approx(3 / 5)
    assert float(found["soft_iou"]) == pytest.approx(3 / (3 + 1 + 0.6), abs=1e-6)
    assert float(found["psnr"]) == pytest.approx(10 * math.log10(300 / (3 * (0.01 + 0.25 + 0.36))), abs=1e-5)
    # The same error, over the 5 pixels that are animal or opaque.
    assert float(found["foreground_psnr"]) == pytest.approx(10 * math.log10(5 / (0.01 + 0.25 + 0.36)), abs=1e-5)


def test_a_perfect_rendering() -> None:
    _, _, photo, mask = blob(1, 16, 16, seed=3)
    rgb = photo * mask[..., None] + (1 - mask[..., None].float())
    found = frame_metrics(rgb, mask.float(), photo, mask, torch.tensor([[0, 5]]), 40, 40)[0]
    assert found.tolist() == [0, 0, 1, 1, 100, 1, 0, 100, 100]


def test_an_unseen_animal_has_no_mask_area() -> None:
    white, nothing = torch.ones(1, 8, 8, 3), torch.zeros(1, 8, 8)
    found = frame_metrics(white, nothing, white * 0.3, nothing > 0, torch.tensor([[4, 4]]), 20, 20)[0].tolist()
    assert math.isnan(found[0])
    assert math.isnan(found[6])
    assert math.isnan(found[8])
    assert [*found[1:6], found[7]] == [0, 1, 1, 100, 1, 100]
    false_alarm = frame_metrics(white * 0.5, nothing + 0.9, white, nothing > 0, torch.tensor([[4, 4]]), 20, 20)[0]
    assert false_alarm[2:4].tolist() == [0, 0]


def test_tiny_frames_are_refused() -> None:
    images = blob(1, 4, 4, seed=0)
    with pytest.raises(ValueError, match="5 x 10 px"):
        frame_metrics(*images, torch.zeros(1, 2, dtype=torch.int32), 20, 40, 4)


def test_mask_cut_at_half_after_averaging() -> None:
    # Of the two 2 x 2 squares that the window [x = 3 .. 6] touches whole, one is half animal and counts, one is not.
    mask = torch.zeros(1, 2, 4, dtype=torch.bool)
    mask[0, :, 1] = True  # x = 4: half of the square of x = 4, 5
    mask[0, 0, 3] = True  # x = 6: a quarter of the square of x = 6, 7
    alpha = torch.zeros(1, 2, 4)
    alpha[0, :, 1:3] = 1
    rgb = 1 - alpha[..., None].expand(1, 2, 4, 3)
    found = frame_metrics(rgb, alpha, torch.zeros(1, 2, 4, 3), mask, torch.tensor([[3, 2]]), 16, 16, 2)[0]
    assert found.tolist() == [0, 0, 1, 1, 100, 1, 0, 100, 100]


def test_ssim_map_and_its_gradient_are_those_of_torchmetrics() -> None:
    g = torch.Generator().manual_seed(0)
    pictures = torch.rand(2, 3, 14, 9, generator=g, dtype=torch.float64, requires_grad=True)
    truths = torch.rand(2, 3, 14, 9, generator=g, dtype=torch.float64)
    expected = structural_similarity_index_measure(pictures, truths, data_range=1.0)
    assert isinstance(expected, Tensor)
    found = ssim_map(pictures, truths).mean()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    gradients = [torch.autograd.grad(value, pictures)[0] for value in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


@pytest.mark.parametrize("d", [1, 2])
def test_a_known_colour_map_is_found_and_leaves_no_error(d: int) -> None:
    # Photographs are renderings after a map of each camera's own that stays within 0 to 1.
    g = torch.Generator().manual_seed(1)
    color = torch.cat([torch.eye(3) * 0.6 + 0.1 * torch.rand(2, 3, 3, generator=g), torch.full((2, 1, 3), 0.05)], 1)
    fit, frames = ColorFit(2), []
    for t in range(3):
        rgb, alpha, _, _ = blob(2, 24, 24, seed=t)
        mask = alpha > 0
        photo = apply_color_maps(rgb, alpha, color)
        frames.append((rgb, alpha, photo, mask))
        fit.add(rgb, alpha, photo, mask)
    found = fit.solve()
    torch.testing.assert_close(found, color.double(), rtol=0, atol=1e-4)
    origin = torch.tensor([[4, 6], [0, 0]])
    for images in frames:
        values = frame_metrics(*images, origin, 60, 50, d, found)
        plain = frame_metrics(*images, origin, 60, 50, d)
        torch.testing.assert_close(values[:, :6], plain[:, :6])
        assert (plain[:, 0] > 0.1).all()
        if d == 1:  # else the soft mask at the edge is cut
            assert (values[:, 6] < 1e-3).all()
            assert (values[:, 7] > 75).all()
        assert (values[:, 6] < plain[:, 0]).all()


def test_the_colour_map_by_hand_for_one_colour_alone() -> None:
    # A grey animal says nothing about the map of other colours: the smallest change from the identity.
    rgb, alpha = torch.ones(1, 4, 4, 3), torch.zeros(1, 4, 4)
    rgb[0, 1:3, 1:3], alpha[0, 1:3, 1:3] = 0.5, 1.0
    fit = ColorFit(2)
    fit.add(rgb.expand(2, -1, -1, -1), alpha.expand(2, -1, -1), rgb * 0.8, torch.stack([alpha[0] > 0, alpha[0] > 1]))
    after = apply_color_maps(rgb.expand(2, -1, -1, -1), alpha.expand(2, -1, -1), fit.solve())
    assert after[0, 1, 1].tolist() == pytest.approx([0.4] * 3, abs=1e-3)
    assert after[0, 0, 0].tolist() == [1, 1, 1]
    torch.testing.assert_close(after[1], rgb[0].double())  # never seen: as it is
