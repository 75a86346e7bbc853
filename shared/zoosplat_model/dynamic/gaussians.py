"""The canonical Gaussians as parameters, and the surgery on them: densify, prune, grow, reset, optimiser included.

3D Gaussian Splatting (Kerbl 2023), in the order and with the limits of 4D Gaussian Splatting (arXiv 2310.08528).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoosplat.geometry.spherical_harmonics import SH_C0
from zoosplat_model.dynamic.hexplane import Deformed
from zoosplat_model.network.splatter import quaternion_product

FIRST_OPACITY = 0.1
RESET_OPACITY = 0.01
SPLIT_SHRINK = 1.6  # of the scale of a Gaussian that becomes two
TOO_LARGE = 0.1  # share of the extent of the cameras above which a scale is pruned
NAMES = ("xyz", "f_dc", "f_rest", "scaling", "rotation", "opacity")  # in the order of the files
CELLS = 64  # along an edge of the box in which lonely points are looked for
LONELY = 2  # Gaussians in a cell, at most


class GaussianSet(nn.Module):
    """N Gaussians to be optimised, in scene units.

    Attributes:
        xyz: [N, 3] centres.
        f_dc, f_rest: [N, 1, 3] and [N, 15, 3] spherical harmonics of colour - 0.5, in the order of 3DGS.
        scaling: [N, 3] natural logarithms of standard deviations.
        rotation: [N, 4] quaternions (w, x, y, z) of any length.
        opacity: [N, 1] logits.
        max_radii2D: [N] largest radius on the screen since the last densification, pixels.
        xyz_gradient_accum, denom: [N, 1] sum of screen-space gradient norms since then, and how many there are.
        deformation_table: [N] bool, part of the files of the published tool; all move.
        deformation_accum: [N, 3] likewise; zeros.
    """

    xyz: nn.Parameter
    f_dc: nn.Parameter
    f_rest: nn.Parameter
    scaling: nn.Parameter
    rotation: nn.Parameter
    opacity: nn.Parameter

    def __init__(self, values: dict[str, Tensor]) -> None:
        """From tensors of the names and shapes of the parameters."""
        super().__init__()
        for name in NAMES:
            setattr(self, name, nn.Parameter(values[name].contiguous()))
        self._forget()

    @classmethod
    def of_points(cls, points: Tensor, colors: Tensor) -> GaussianSet:
        """Round Gaussians as wide as the mean distance to three neighbours, at [N, 3] points of [N, 3] colours."""
        n = len(points)
        log_scale = neighbour_distance(points).log()
        return cls(
            {
                "xyz": points,
                "f_dc": ((colors - 0.5) / SH_C0)[:, None],
                "f_rest": points.new_zeros(n, 15, 3),
                "scaling": log_scale[:, None].repeat(1, 3),
                "rotation": points.new_tensor([1.0, 0, 0, 0]).repeat(n, 1),
                "opacity": points.new_full((n, 1), math.log(FIRST_OPACITY / (1 - FIRST_OPACITY))),
            }
        )

    def __len__(self) -> int:
        return len(self.xyz)

    def values(self) -> dict[str, Tensor]:
        """The parameters' tensors by name."""
        return {name: getattr(self, name).detach() for name in NAMES}

    def canonical(self) -> Deformed:
        """What the deformation field starts from."""
        harmonics = torch.cat([self.f_dc, self.f_rest], 1)
        return Deformed(self.xyz, self.scaling, self.rotation, self.opacity, harmonics)

    def _forget(self) -> None:
        """Empty statistics of the present size."""
        n, like = len(self), self.xyz.detach()
        self.max_radii2D = like.new_zeros(n)
        self.xyz_gradient_accum, self.denom = like.new_zeros(n, 1), like.new_zeros(n, 1)
        self.deformation_table = torch.ones(n, dtype=torch.bool, device=like.device)
        self.deformation_accum = like.new_zeros(n, 3)

    # -- statistics ---------------------------------------------------------------------------------------------
    @torch.no_grad()
    def collect(
        self,
        gradient: Tensor,  # [C, N, 2] of the loss by pixels
        radii: Tensor,  # [C, N] pixels, 0 where not drawn
        width: int,
        height: int,
    ) -> None:
        """Add what the views of an iteration show; gradients count per half the picture's size, as in 3DGS.

        The loss is a mean over the C views; each counts as if it were alone.
        """
        across, down = (gradient * len(gradient)).unbind(-1)
        seen = (radii > 0).to(gradient.dtype)
        torch.maximum(self.max_radii2D, radii.amax(0).to(gradient.dtype), out=self.max_radii2D)
        self.xyz_gradient_accum += (torch.hypot(across * (width / 2), down * (height / 2)) * seen).sum(0)[:, None]
        self.denom += seen.sum(0)[:, None]

    def mean_gradient(self) -> Tensor:
        """[N] mean norm of the screen-space gradient; 0 where never seen."""
        return (self.xyz_gradient_accum / self.denom.clamp_min(1))[:, 0]

    # -- surgery --------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def densify(
        self, optimizer: torch.optim.Optimizer, threshold: float, dense: float, most: int, noise: torch.Generator
    ) -> tuple[int, int]:
        """Clone small Gaussians whose mean gradient reaches the threshold, split large ones in two.

        The two of a split are drawn from the Gaussian (`noise`), and 1.6 times smaller; it goes. Of more candidates
        than there is room for, those of the highest gradient. Kept ones keep their place and their optimiser state,
        new ones follow with moments of zero: clones, then halves. Statistics start anew.

        Args:
            dense: largest scale up to which a Gaussian is cloned, scene units.
            most: Gaussians afterwards, at most.
            noise: on the CPU.

        Returns:
            How many are cloned and split.
        """
        gradient = self.mean_gradient()
        chosen = gradient >= threshold
        room = max(most - len(self), 0)
        if int(chosen.sum()) > room:
            order = torch.where(chosen, gradient, -1).argsort(descending=True, stable=True)[:room]
            chosen = torch.zeros_like(chosen).index_fill_(0, order, True)
        large = self.scaling.detach().exp().amax(1) > dense
        cloned, split = chosen & ~large, chosen & large
        values = self.values()
        halves = {name: value[split].repeat_interleave(2, 0) for name, value in values.items()}
        scales = halves["scaling"].exp()
        normal = torch.randn(scales.shape, generator=noise).to(scales)
        halves["xyz"] = halves["xyz"] + rotated(halves["rotation"], normal * scales)
        halves["scaling"] = halves["scaling"] - math.log(SPLIT_SHRINK)
        added = {name: torch.cat([value[cloned], halves[name]]) for name, value in values.items()}
        self._replace(optimizer, ~split, added)
        self._forget()
        return int(cloned.sum()), int(split.sum())

    @torch.no_grad()
    def prune(self, optimizer: torch.optim.Optimizer, opacity: float, size_px: float | None, extent: float) -> int:
        """Remove Gaussians fainter than `opacity`, and, with a limit on sizes, those of a radius above `size_px` or a
        scale above 0.1 `extent`. The others' statistics and optimiser state stay.

        Returns:
            How many are removed.
        """
        gone = self.opacity.detach().sigmoid()[:, 0] < opacity
        if size_px is not None:
            gone |= (self.max_radii2D > size_px) | (self.scaling.detach().exp().amax(1) > TOO_LARGE * extent)
        self._replace(optimizer, ~gone, {})
        for name in ("max_radii2D", "xyz_gradient_accum", "denom", "deformation_table", "deformation_accum"):
            setattr(self, name, getattr(self, name)[~gone])
        return int(gone.sum())

    @torch.no_grad()
    def grow(
        self,
        optimizer: torch.optim.Optimizer,
        threshold: float,
        aabb: Tensor,  # [2, 3] maximum, minimum
        most: int,
        noise: torch.Generator,
    ) -> int:
        """Add a point beside each lonely Gaussian whose mean gradient reaches the threshold, where it is in the box.

        Lonely: at most 2 Gaussians in its cell, a 64th of the box along each axis. The point lies a cell's diagonal
        away in a random direction and is like the Gaussian otherwise. Statistics start anew if there are any.

        Returns:
            How many are added.
        """
        cell = (aabb[0] - aabb[1]) / CELLS
        at = ((self.xyz - aabb[1]) / cell).floor().clamp(0, CELLS - 1).long()
        flat = (at[:, 0] * CELLS + at[:, 1]) * CELLS + at[:, 2]
        crowd = torch.bincount(flat, minlength=CELLS**3)[flat]
        gradient = self.mean_gradient()
        chosen = torch.nonzero((crowd <= LONELY) & (gradient >= threshold))[:, 0]
        direction = F.normalize(torch.randn(len(chosen), 3, generator=noise), dim=1).to(self.xyz)
        moved = self.xyz[chosen] + direction * cell.norm()
        inside = ((moved <= aabb[0]) & (moved >= aabb[1])).all(1)
        chosen, moved = chosen[inside], moved[inside]
        first = gradient[chosen].argsort(descending=True, stable=True)[: max(most - len(self), 0)]
        added = {name: value[chosen[first]] for name, value in self.values().items()} | {"xyz": moved[first]}
        if len(first):
            self._replace(optimizer, torch.ones_like(gradient, dtype=torch.bool), added)
            self._forget()
        return len(first)

    @torch.no_grad()
    def reset_opacity(self, optimizer: torch.optim.Optimizer) -> None:
        """Opacity at most 0.01, with moments of zero."""
        limit = math.log(RESET_OPACITY / (1 - RESET_OPACITY))
        self.opacity.clamp_(max=limit)
        self.opacity.grad = None  # as if it were another parameter: this iteration's step does not raise it again
        state = optimizer.state.get(self.opacity, {})
        for key in ("exp_avg", "exp_avg_sq"):
            if key in state:
                state[key].zero_()

    def _replace(self, optimizer: torch.optim.Optimizer, kept: Tensor, added: dict[str, Tensor]) -> None:
        """Keep some Gaussians, with their moments, and add others behind them, with moments of zero."""
        for group in optimizer.param_groups:
            name = group["name"]
            if name not in NAMES:
                continue
            old = getattr(self, name)
            new = added.get(name, old.detach()[:0])
            parameter = nn.Parameter(torch.cat([old.detach()[kept], new]))
            state = optimizer.state.pop(old, None)
            if state is not None:
                for key in ("exp_avg", "exp_avg_sq"):
                    state[key] = torch.cat([state[key][kept], torch.zeros_like(new)])
                optimizer.state[parameter] = state
            group["params"] = [parameter]
            setattr(self, name, parameter)


def neighbour_distance(points: Tensor, block: int = 2048) -> Tensor:
    """[N] root of the mean squared distance of [N, 3] points to their three nearest others, at least 1e-4."""
    near = []
    k = min(4, len(points))
    for start in range(0, len(points), block):
        part = points[start : start + block]
        squared = (part[:, None] - points).square().sum(-1) if len(points) < 256 else torch.cdist(part, points).square()
        near.append(squared.topk(k, largest=False).values[:, 1:].sum(1) / 3)
    return torch.cat(near).sqrt().clamp_min(1e-4)


def rotated(quats: Tensor, vectors: Tensor) -> Tensor:
    """[N, 3] vectors turned by [N, 4] quaternions (w, x, y, z) of any length."""
    unit = F.normalize(quats, dim=-1)
    zero = torch.zeros_like(vectors[:, :1])
    conjugate = unit * unit.new_tensor([1.0, -1, -1, -1])
    return quaternion_product(quaternion_product(unit, torch.cat([zero, vectors], 1)), conjugate)[:, 1:]


def colors_of(harmonics: Tensor, directions: Tensor, degree: int) -> Tensor:
    """Colours of Gaussians as cameras see them, at least 0.

    Args:
        harmonics: [N, 16, 3] coefficients of colour - 0.5, in the order and with the signs of 3DGS.
        directions: [C, N, 3] from the cameras to the Gaussians, of any length.
        degree: 0 to 3; higher harmonics are left out.

    Returns:
        [C, N, 3].
    """
    if harmonics.is_cuda and harmonics.dtype == torch.float32:
        import gsplat

        each = harmonics.expand(len(directions), -1, -1, -1)
        color: Tensor = gsplat.spherical_harmonics(degree, directions, each)
    else:
        color = torch.einsum("cnk,nkd->cnd", _basis(directions, degree), harmonics[:, : (degree + 1) ** 2])
    return (color + 0.5).clamp_min(0)


def _basis(directions: Tensor, degree: int) -> Tensor:
    """Real spherical harmonics up to a degree of 3: [..., (degree + 1) ** 2]."""
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
