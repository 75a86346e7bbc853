"""What training minimises: errors of silhouette, colour and structure in the observed views (arXiv 2505.18342)."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from zoosplat_model.background import lay_over
from zoosplat_model.metrics import ssim_map


class Losses(NamedTuple):
    """Scalars: the weighted sum, and its parts without their weights.

    Attributes:
        total: weighted sum of the others.
        soft_iou: 1 - soft IoU.
        color: sum of absolute colour errors / mask area (pixels).
        square: sum of squared colour errors / mask area (pixels).
        dissimilarity: 1 - SSIM.
        plate: sum of absolute colour errors over the plates / mask area (pixels).
    """

    total: Tensor
    soft_iou: Tensor
    color: Tensor
    square: Tensor
    dissimilarity: Tensor
    plate: Tensor


def soft_iou(alpha: Tensor, mask: Tensor) -> Tensor:
    """The soft IoU [V] of opacities and masks [V, h, w]: sum(a m) / sum(a + m - a m), 1 where both are empty."""
    overlap = alpha * mask
    return (overlap.sum((1, 2)) + 1e-6) / ((alpha + mask - overlap).sum((1, 2)) + 1e-6)


def frame_losses(
    rgb: Tensor,  # [V, h, w, 3] rendered on white
    alpha: Tensor,  # [V, h, w]
    truth: Tensor,  # [V, h, w, 3] masked picture on white
    mask: Tensor,  # [V, h, w] 0 or 1
    img_lambda: float,
    ssim_lambda: float,
    counted: Tensor | None = None,  # [V] bool
    square_lambda: float = 0.0,
    plate_lambda: float = 0.0,
    photo: Tensor | None = None,  # [V, h, w, 3]
    background: Tensor | None = None,  # [V, h, w, 3]
) -> Losses:
    """The losses of a frame: (1 - soft IoU) + img_lambda * sum|error| / mask area + ssim_lambda * (1 - SSIM).

    Each is a mean over the views. The paper does not have the further term square_lambda * sum(error^2) / mask area.
    Absolute errors are least where everything that is likelier than not is drawn as if it were certain. Squared errors
    are least where it is drawn as likely as it is.

    Nor does it have plate_lambda * sum|error over the plate| / mask area: the error of the rendering laid over the
    `background` of its camera against the raw picture, `photo`. A wrong mask is no part of that error. Both pictures
    are needed where plate_lambda is not 0.

    Errors of colour are summed over pixels and channels. Views that are not `counted` (by default all are) are left
    out: such are those that are absent from the frame. Views with an empty mask are left out too, because no mask area
    is there to measure their errors by.
    """
    area = mask.sum((1, 2))
    weight = (area > 0).to(rgb.dtype) * (1 if counted is None else counted)
    weight = weight / weight.sum().clamp_min(1)
    shape = (weight * (1 - soft_iou(alpha, mask))).sum()
    error, area = rgb - truth, area.clamp_min(1)
    color = (weight * error.abs().sum((1, 2, 3)) / area).sum()
    total = shape + img_lambda * color
    square = dissimilarity = plate = rgb.new_zeros(())
    if square_lambda > 0:
        square = (weight * error.square().sum((1, 2, 3)) / area).sum()
        total = total + square_lambda * square
    if ssim_lambda > 0:
        similarity = ssim_map(rgb.permute(0, 3, 1, 2), truth.permute(0, 3, 1, 2))
        dissimilarity = (weight * (1 - similarity.mean((1, 2, 3)))).sum()
        total = total + ssim_lambda * dissimilarity
    if plate_lambda > 0:
        assert photo is not None
        assert background is not None
        plate = (weight * (lay_over(rgb, alpha, background) - photo).abs().sum((1, 2, 3)) / area).sum()
        total = total + plate_lambda * plate
    return Losses(total, shape, color, square, dissimilarity, plate)
