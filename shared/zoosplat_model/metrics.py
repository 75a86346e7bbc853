"""How good renderings are: the metrics of whole frames, computed on windows around the animal (arXiv 2505.18342)."""

from __future__ import annotations

import torch
from torch import Tensor

METRICS = ("l1", "mae", "iou", "soft_iou", "psnr", "ssim", "l1_corrected", "psnr_corrected", "foreground_psnr")
SSIM_RADIUS = 5  # pixels; radius of the 11 x 11 Gaussian window (Wang 2004)
SSIM_SIGMA = 1.5  # pixels; standard deviation of that window (Wang 2004)
COLOR_PRIOR = 1e-3  # pixels; weight of the identity in the fit of a colour map
PSNR_MAX = 100.0  # dB; PSNR of equal pictures, so that means stay finite


def frame_metrics(
    rgb: Tensor,  # [C, h, w, 3]
    alpha: Tensor,  # [C, h, w]
    true_rgb: Tensor,  # [C, h, w, 3]
    mask: Tensor,  # [C, h, w]
    origin: Tensor,  # [C, 2]
    width: int,
    height: int,
    downsample: int = 1,
    color: Tensor | None = None,  # [C, 4, 3]
) -> Tensor:
    """Metrics of the renderings of one frame against its photographs, a row for each camera.

    All are metrics of the whole frame, which is white outside the window. The truth is
    `photo * mask + white * (1 - mask)`. With `downsample` d > 1, photo, mask, rendering and alpha are first averaged
    over d x d pixels, and the mask is then cut at 0.5, which gives the picture that packing at that resolution would
    give. Columns and rows beyond the last whole d x d square are left out. An empty mask makes l1 NaN, and the IoUs 1
    where alpha is empty too.

    Args:
        rgb: rendering of the window on white, 0 to 1 (clamped).
        alpha: its opacity, 0 to 1.
        true_rgb: photograph, 0 to 1, same pixels.
        mask: whether a pixel shows animal, bool or 0 / 1.
        origin: x, y of the window's corner in the whole frame, integer pixels; the window lies in the frame.
        width: of the whole frame, pixels before downsampling.
        height: of the whole frame, likewise; both are at least 6 after downsampling.
        downsample: integer factor d.
        color: affine colour map of each camera, from `ColorFit`, for the corrected l1 and psnr; None means no map.

    Returns:
        [C, 9] float64, columns as in `METRICS`: l1 = sum over pixels and channels of |error| / mask area; mae = mean of
        |error| over pixels and channels; iou of alpha > 0.5 and the mask; soft_iou = sum(a m) / sum(a + m - a m);
        psnr in dB for peak 1, at most 100; ssim as torchmetrics computes it (11 x 11 Gaussian, data range 1, frame
        reflected at its border, mean over pixels and channels); l1 and psnr of the rendering after `color`; psnr of the
        pixels that belong to the mask or have alpha >= 0.5, NaN where there are none.

    Raises:
        ValueError: the downsampled frame is smaller than 6 pixels.
    """
    width, height = width // downsample, height // downsample
    if min(width, height) <= SSIM_RADIUS:
        raise ValueError(f"a frame of {width} x {height} px is too small for SSIM")
    rows = []
    corrected = rgb if color is None else apply_color_maps(rgb, alpha, color)
    for camera, (x, y) in enumerate(origin.tolist()):
        pictures = (rgb[camera].clamp(0, 1), true_rgb[camera], corrected[camera].clamp(0, 1))
        layers = torch.cat(
            [*pictures, alpha[camera, ..., None], mask[camera, ..., None]], dim=-1
        ).double()  # [h, w, 11]
        layers, x, y = _downsample(layers, x, y, width, height, downsample)
        pictures = layers[..., :3], layers[..., 3:6], layers[..., 6:9]
        rows.append(_metrics(*pictures, layers[..., 9], layers[..., 10], x, y, width, height))
    return torch.stack(rows)


class ColorFit:
    """Fits, by least squares, the affine map of each camera's colours that brings renderings closest to photographs.

    A camera has one map [4, 3] for all frames, from colour and 1 to colour. It applies to what is opaque, and the white
    behind stays white. The fit uses the pixels of the masks. A weak prior keeps the map of a colour that never varies
    at the identity.
    """

    def __init__(self, n_cameras: int) -> None:
        identity = torch.eye(4, 3, dtype=torch.float64)
        self.products = COLOR_PRIOR * torch.eye(4, dtype=torch.float64).repeat(n_cameras, 1, 1)
        self.targets = COLOR_PRIOR * identity.repeat(n_cameras, 1, 1)

    def add(
        self,
        rgb: Tensor,  # [C, h, w, 3] on white
        alpha: Tensor,  # [C, h, w]
        true_rgb: Tensor,  # [C, h, w, 3]
        mask: Tensor,  # [C, h, w]
    ) -> None:
        """Add the renderings of a frame to the fit."""
        behind = 1 - alpha[..., None].double()
        known = torch.cat([rgb - behind, alpha[..., None].double()], -1) * (mask > 0)[..., None]
        known, wanted = known.flatten(1, 2), (true_rgb - behind).flatten(1, 2)
        self.products += (known.mT @ known).cpu()
        self.targets += (known.mT @ wanted).cpu()

    def solve(self) -> Tensor:
        """The fitted maps, [C, 4, 3] float64."""
        color: Tensor = torch.linalg.solve(self.products, self.targets)
        return color


def apply_color_maps(rgb: Tensor, alpha: Tensor, color: Tensor) -> Tensor:
    """Apply colour maps [C, 4, 3] to renderings on white, [C, h, w, 3]."""
    behind = 1 - alpha[..., None].double()
    known = torch.cat([rgb - behind, 1 - behind], -1).flatten(1, 2)
    return (known @ color.to(known)).view(rgb.shape) + behind


def _downsample(layers: Tensor, x: int, y: int, width: int, height: int, d: int) -> tuple[Tensor, int, int]:
    """Average a window [h, w, 11], with white around it, over the d x d squares of the whole frame that it touches."""
    if d == 1:
        return layers, x, y
    h, w, n = layers.shape
    x0, y0 = x // d, y // d
    x1, y1 = min(-(-(x + w) // d), width), min(-(-(y + h) // d), height)
    white = torch.tensor([1.0] * 9 + [0.0] * 2, dtype=layers.dtype, device=layers.device)
    padded = white.repeat((max(y1 * d, y + h) - y0 * d, max(x1 * d, x + w) - x0 * d, 1))
    padded[y - y0 * d : y - y0 * d + h, x - x0 * d : x - x0 * d + w] = layers
    padded = padded[: (y1 - y0) * d, : (x1 - x0) * d]
    return padded.reshape(y1 - y0, d, x1 - x0, d, n).mean((1, 3)), x0, y0


def _metrics(
    rgb: Tensor,
    photo: Tensor,
    corrected: Tensor,
    alpha: Tensor,
    soft_mask: Tensor,
    x: int,
    y: int,
    width: int,
    height: int,
) -> Tensor:
    mask = (soft_mask >= 0.5).to(rgb.dtype)
    truth = photo * mask[..., None] + (1 - mask[..., None])
    area = mask.sum()
    l1_sum = (rgb - truth).abs().sum()
    n_values = 3 * width * height
    inside = alpha > 0.5
    union = (inside | (mask > 0)).sum()
    overlap = alpha * mask
    soft_union = (alpha + mask - overlap).sum()
    one = torch.ones_like(area)
    psnrs = [-10 * torch.log10((p - truth).square().sum() / n_values) for p in (rgb, corrected)]
    foreground = (alpha >= 0.5) | (mask > 0)
    squared = ((rgb - truth).square().sum(-1) * foreground).sum() / (3 * foreground.sum())  # 0 / 0 is NaN
    return torch.stack(
        [
            torch.where(area > 0, l1_sum / area, torch.nan),
            l1_sum / n_values,
            torch.where(union > 0, (inside & (mask > 0)).sum() / union, one),
            torch.where(soft_union > 0, overlap.sum() / soft_union, one),
            psnrs[0].clamp(max=PSNR_MAX),
            one - _dissimilarity(rgb, truth, x, y, width, height) / n_values,
            torch.where(area > 0, (corrected - truth).abs().sum() / area, torch.nan),
            psnrs[1].clamp(max=PSNR_MAX),
            (-10 * torch.log10(squared)).clamp(max=PSNR_MAX),
        ]
    )


def _dissimilarity(rgb: Tensor, truth: Tensor, x: int, y: int, width: int, height: int) -> Tensor:
    """The sum of 1 - SSIM over the pixels and channels of a whole frame that is white outside these windows.

    Where both pictures are white within the SSIM radius, SSIM is 1. So it may differ from 1 only in the box of what is
    not white, enlarged by one radius, and it depends only on that box enlarged by two. A side that meets the border of
    the frame ends there and is reflected, as in the whole frame.
    """
    seen = ((rgb != 1) | (truth != 1)).any(-1)  # [h, w]
    rows, columns = torch.nonzero(seen.any(1)).flatten().tolist(), torch.nonzero(seen.any(0)).flatten().tolist()
    if not rows:
        return rgb.new_zeros(())
    # Boxes are in pixels of the whole frame, from the first to the last + 1.
    x0, x1, y0, y1 = x + columns[0], x + columns[-1] + 1, y + rows[0], y + rows[-1] + 1
    r = SSIM_RADIUS
    inner = (max(x0 - r, 0), min(x1 + r, width), max(y0 - r, 0), min(y1 + r, height))
    outer = (max(x0 - 2 * r, 0), min(x1 + 2 * r, width), max(y0 - 2 * r, 0), min(y1 + 2 * r, height))
    patches = rgb.new_ones((2, 3, outer[3] - outer[2], outer[1] - outer[0]))
    rows_of_patch = slice(y0 - outer[2], y1 - outer[2])
    columns_of_patch = slice(x0 - outer[0], x1 - outer[0])
    for patch, image in zip(patches, (rgb, truth), strict=True):
        patch[:, rows_of_patch, columns_of_patch] = image[y0 - y : y1 - y, x0 - x : x1 - x].permute(2, 0, 1)
    similarity = ssim_map(patches[:1], patches[1:])[0]
    kept = similarity[:, inner[2] - outer[2] : inner[3] - outer[2], inner[0] - outer[0] : inner[1] - outer[0]]
    return (1 - kept).sum()


def ssim_map(
    pictures: Tensor,  # [B, 3, H, W]
    truths: Tensor,  # [B, 3, H, W]
) -> Tensor:
    """The SSIM [B, 3, H, W] of every pixel and channel (Wang 2004), with a gradient; sides have at least 6 pixels.

    The window is an 11 x 11 Gaussian of sigma 1.5, colours are 0 to 1, and pictures are reflected at the border. The
    numbers are those of torchmetrics, but by matrix products instead of its grouped convolution, which takes 50 times
    as long in float64 on a CPU.
    """
    height, width = pictures.shape[-2:]
    # Autocast would compute the products in bfloat16, which loses the variances.
    with torch.autocast(pictures.device.type, enabled=False):
        layers = torch.stack([pictures, truths, pictures * pictures, truths * truths, pictures * truths])
        m1, m2, s11, s22, s12 = _blur(height, layers) @ layers @ _blur(width, layers).T
        v1, v2 = (s11 - m1 * m1).clamp(min=0), (s22 - m2 * m2).clamp(min=0)
        c1, c2 = 0.01**2, 0.03**2  # the constants of Wang 2004 for colours 0 to 1
        upper: Tensor = (2 * m1 * m2 + c1) * (2 * (s12 - m1 * m2) + c2)
        similarity: Tensor = upper / ((m1 * m1 + m2 * m2 + c1) * (v1 + v2 + c2))
        return similarity


def _blur(n: int, like: Tensor) -> Tensor:
    """The Gaussian window along an axis of n pixels, reflected at its ends, as a matrix [n, n]."""
    offsets = torch.arange(-SSIM_RADIUS, SSIM_RADIUS + 1, device=like.device)
    weights = torch.exp(-((offsets.to(like.dtype) / SSIM_SIGMA) ** 2) / 2)
    rows = torch.arange(n, device=like.device)[:, None].expand(n, len(offsets))
    columns = (rows + offsets).abs()
    columns = (n - 1) - ((n - 1) - columns).abs()
    weights = (weights / weights.sum()).expand(n, -1)
    return like.new_zeros((n, n)).index_put((rows, columns), weights, accumulate=True)
