"""Colours as real spherical harmonics, in the order and with the signs of 3D Gaussian Splatting (Kerbl 2023)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoosplat.geometry.spherical_harmonics import SH_C0


def evaluate_colors(harmonics: Tensor, directions: Tensor, degree: int) -> Tensor:
    """Colours [C, N, 3] of Gaussians as C cameras see them, at least 0.

    Args:
        harmonics: [N, 16, 3] coefficients of colour - 0.5.
        directions: [C, N, 3] from the cameras to the Gaussians, of any length.
        degree: 0 to 3; harmonics of higher degrees are left out.
    """
    if harmonics.is_cuda and harmonics.dtype == torch.float32:
        import gsplat

        each = harmonics.expand(len(directions), -1, -1, -1)
        color: Tensor = gsplat.spherical_harmonics(degree, directions, each)
    else:
        color = torch.einsum("cnk,nkd->cnd", _basis(directions, degree), harmonics[:, : (degree + 1) ** 2])
    return (color + 0.5).clamp_min(0)


def _basis(directions: Tensor, degree: int) -> Tensor:
    """The real spherical harmonics up to a degree of at most 3: [..., (degree + 1) ** 2]."""
    x, y, z = F.normalize(directions, dim=-1).unbind(-1)
    values = [torch.full_like(x, SH_C0)]
    if degree > 0:
        values += [-0.4886025119029199 * y, 0.4886025119029199 * z, -0.4886025119029199 * x]
    if degree > 1:
        xx, yy, zz = x * x, y * y, z * z
        values += [1.0925484305920792 * x * y, -1.0925484305920792 * y * z, 0.31539156525252005 * (2 * zz - xx - yy)]
        values += [-1.0925484305920792 * x * z, 0.5462742152960396 * (xx - yy)]
    if degree > 2:
        values += [-0.5900435899266435 * y * (3 * xx - yy), 2.890611442640554 * x * y * z]
        values += [-0.4570457994644658 * y * (4 * zz - xx - yy), 0.3731763325901154 * z * (2 * zz - 3 * xx - 3 * yy)]
        values += [-0.4570457994644658 * x * (4 * zz - xx - yy), 1.445305721320277 * z * (xx - yy)]
        values += [-0.5900435899266435 * x * (xx - 3 * yy)]
    return torch.stack(values, -1)
