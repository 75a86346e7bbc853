"""The canonical Gaussians as parameters, and the changes to their number: densify, prune, grow, reset.

3D Gaussian Splatting (Kerbl 2023), in the order and with the limits of 4D Gaussian Splatting (arXiv 2310.08528). Every
change keeps the state of the optimiser in step.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoosplat.geometry.spherical_harmonics import SH_C0
from zoosplat_model.dynamic.hexplane import Deformed
from zoosplat_model.rotations import rotate_vectors

INITIAL_OPACITY = 0.1  # opacity of a new set's Gaussians (3DGS)
RESET_OPACITY = 0.01  # limit to which a reset lowers opacities (3DGS)
SPLIT_SHRINK = 1.6  # factor by which the two halves of a split are smaller (3DGS)
MAX_SCALE_SHARE = 0.1  # share of the extent of the cameras; Gaussians with a larger scale are pruned (3DGS)
PARAMETER_NAMES = ("xyz", "f_dc", "f_rest", "scaling", "rotation", "opacity")  # in the order of the files
STATISTICS = ("max_radii2D", "xyz_gradient_accum", "denom", "deformation_table", "deformation_accum")
GROW_CELLS = 64  # cells along each edge of the box in which lonely Gaussians are looked for
MAX_LONELY = 2  # Gaussians in the cell of a lonely one, at most


class GaussianSet(nn.Module):
    """N Gaussians to be optimised, in scene units.

    Attributes:
        xyz: [N, 3] centres.
        f_dc: [N, 1, 3] constant spherical harmonic of colour - 0.5.
        f_rest: [N, 15, 3] its other spherical harmonics, in the order of 3DGS.
        scaling: [N, 3] natural logarithms of standard deviations.
        rotation: [N, 4] quaternions (w, x, y, z) of any length.
        opacity: [N, 1] logits.
        max_radii2D: [N] largest radius on the screen since the statistics were reset, pixels.
        xyz_gradient_accum: [N, 1] sum of the norms of screen-space gradients since then.
        denom: [N, 1] number of these norms.
        deformation_table: [N] bool, which Gaussians move; it is part of the files of the published tool, and all True.
        deformation_accum: [N, 3] zeros, likewise part of these files.
    """

    xyz: nn.Parameter
    f_dc: nn.Parameter
    f_rest: nn.Parameter
    scaling: nn.Parameter
    rotation: nn.Parameter
    opacity: nn.Parameter

    def __init__(self, values: dict[str, Tensor]) -> None:
        """Make the set of tensors with the names and shapes of the parameters."""
        super().__init__()
        for name in PARAMETER_NAMES:
            setattr(self, name, nn.Parameter(values[name].contiguous()))
        self._reset_statistics()

    @classmethod
    def from_points(cls, points: Tensor, colors: Tensor) -> GaussianSet:
        """Round Gaussians at points [N, 3] of colours [N, 3], as wide as the mean distance to three neighbours."""
        n = len(points)
        log_scale = rms_neighbour_distance(points).log()
        return cls(
            {
                "xyz": points,
                "f_dc": ((colors - 0.5) / SH_C0)[:, None],
                "f_rest": points.new_zeros(n, 15, 3),
                "scaling": log_scale[:, None].repeat(1, 3),
                "rotation": points.new_tensor([1.0, 0, 0, 0]).repeat(n, 1),
                "opacity": points.new_full((n, 1), math.log(INITIAL_OPACITY / (1 - INITIAL_OPACITY))),
            }
        )

    def __len__(self) -> int:
        return len(self.xyz)

    def values(self) -> dict[str, Tensor]:
        """The tensors of the parameters by name, without gradients."""
        return {name: getattr(self, name).detach() for name in PARAMETER_NAMES}

    def canonical(self) -> Deformed:
        """The Gaussians as the deformation field takes them."""
        harmonics = torch.cat([self.f_dc, self.f_rest], 1)
        return Deformed(self.xyz, self.scaling, self.rotation, self.opacity, harmonics)

    def _reset_statistics(self) -> None:
        """Set the statistics to zeros of the present size."""
        n, like = len(self), self.xyz.detach()
        self.max_radii2D = like.new_zeros(n)
        self.xyz_gradient_accum, self.denom = like.new_zeros(n, 1), like.new_zeros(n, 1)
        self.deformation_table = torch.ones(n, dtype=torch.bool, device=like.device)
        self.deformation_accum = like.new_zeros(n, 3)

    # -- statistics ---------------------------------------------------------------------------------------------
    @torch.no_grad()
    def accumulate_statistics(
        self,
        gradient: Tensor,  # [C, N, 2] of the loss by the projected centres, 1 / pixels
        radii: Tensor,  # [C, N] pixels, 0 where not drawn
        width: int,
        height: int,
    ) -> None:
        """Add the views of an iteration to the statistics.

        Gradients are counted by half the picture's size instead of by pixels, as in 3DGS. The loss is a mean over the C
        views, and each view counts as if it were the only one.
        """
        across, down = (gradient * len(gradient)).unbind(-1)
        seen = (radii > 0).to(gradient.dtype)
        torch.maximum(self.max_radii2D, radii.amax(0).to(gradient.dtype), out=self.max_radii2D)
        self.xyz_gradient_accum += (torch.hypot(across * (width / 2), down * (height / 2)) * seen).sum(0)[:, None]
        self.denom += seen.sum(0)[:, None]

    def mean_gradient(self) -> Tensor:
        """The mean norm of the screen-space gradient, [N]; 0 where a Gaussian was never seen."""
        return (self.xyz_gradient_accum / self.denom.clamp_min(1))[:, 0]

    # -- changes --------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def densify(
        self, optimizer: torch.optim.Optimizer, threshold: float, dense: float, most: int, noise: torch.Generator
    ) -> tuple[int, int]:
        """Clone small Gaussians whose mean gradient reaches the threshold, and split large ones in two.

        A split replaces a Gaussian by two that are 1.6 times smaller, at places drawn from it. Where there are more
        candidates than `most` allows, those of the highest gradient are taken. The kept Gaussians stay in place with
        their optimiser state. The new ones follow with moments of zero, first the clones, then the halves. The
        statistics are reset.

        Args:
            optimizer: of the parameters.
            threshold: of the mean gradient norm.
            dense: largest scale up to which a Gaussian is cloned, scene units.
            most: Gaussians afterwards, at most.
            noise: draws the places of the halves, on the CPU.

        Returns:
            The number of Gaussians that are cloned, and that of those that are split.
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
        halves["xyz"] = halves["xyz"] + rotate_vectors(halves["rotation"], normal * scales)
        halves["scaling"] = halves["scaling"] - math.log(SPLIT_SHRINK)
        added = {name: torch.cat([value[cloned], halves[name]]) for name, value in values.items()}
        self._replace(optimizer, ~split, added)
        self._reset_statistics()
        return int(cloned.sum()), int(split.sum())

    @torch.no_grad()
    def prune(self, optimizer: torch.optim.Optimizer, opacity: float, size_px: float | None, extent: float) -> int:
        """Remove Gaussians that are too faint or too large; the others keep their statistics and optimiser state.

        Args:
            optimizer: of the parameters.
            opacity: Gaussians with an opacity below this are removed.
            size_px: Gaussians with a radius on the screen above this, or with a scale above 0.1 `extent`, are removed;
                None: there is no limit on sizes.
            extent: extent of the cameras, scene units.

        Returns:
            The number of Gaussians that are removed.
        """
        gone = self.opacity.detach().sigmoid()[:, 0] < opacity
        if size_px is not None:
            gone |= (self.max_radii2D > size_px) | (self.scaling.detach().exp().amax(1) > MAX_SCALE_SHARE * extent)
        self._replace(optimizer, ~gone, {})
        for name in STATISTICS:
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
        """Add a Gaussian beside each lonely one whose mean gradient reaches the threshold, where that is in the box.

        A Gaussian is lonely if its cell, a 64th of the box along each axis, holds at most 2. The new one lies a cell's
        diagonal away in a random direction, and is the same otherwise. The statistics are reset if any is added.

        Args:
            optimizer: of the parameters.
            threshold: of the mean gradient norm.
            aabb: the box, scene units.
            most: Gaussians afterwards, at most.
            noise: draws the directions, on the CPU.

        Returns:
            The number of Gaussians that are added.
        """
        cell = (aabb[0] - aabb[1]) / GROW_CELLS
        at = ((self.xyz - aabb[1]) / cell).floor().clamp(0, GROW_CELLS - 1).long()
        flat = (at[:, 0] * GROW_CELLS + at[:, 1]) * GROW_CELLS + at[:, 2]
        crowd = torch.bincount(flat, minlength=GROW_CELLS**3)[flat]
        gradient = self.mean_gradient()
        chosen = torch.nonzero((crowd <= MAX_LONELY) & (gradient >= threshold))[:, 0]
        direction = F.normalize(torch.randn(len(chosen), 3, generator=noise), dim=1).to(self.xyz)
        moved = self.xyz[chosen] + direction * cell.norm()
        inside = ((moved <= aabb[0]) & (moved >= aabb[1])).all(1)
        chosen, moved = chosen[inside], moved[inside]
        first = gradient[chosen].argsort(descending=True, stable=True)[: max(most - len(self), 0)]
        added = {name: value[chosen[first]] for name, value in self.values().items()} | {"xyz": moved[first]}
        if len(first):
            self._replace(optimizer, torch.ones_like(gradient, dtype=torch.bool), added)
            self._reset_statistics()
        return len(first)

    @torch.no_grad()
    def reset_opacity(self, optimizer: torch.optim.Optimizer) -> None:
        """Lower all opacities to at most 0.01, and set their moments to zero."""
        limit = math.log(RESET_OPACITY / (1 - RESET_OPACITY))
        self.opacity.clamp_(max=limit)
        self.opacity.grad = None  # so that this iteration's step does not raise it again
        state = optimizer.state.get(self.opacity, {})
        for key in ("exp_avg", "exp_avg_sq"):
            if key in state:
                state[key].zero_()

    def _replace(self, optimizer: torch.optim.Optimizer, kept: Tensor, added: dict[str, Tensor]) -> None:
        """Keep some Gaussians with their moments, and append others with moments of zero."""
        for group in optimizer.param_groups:
            name = group["name"]
            if name not in PARAMETER_NAMES:
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


def rms_neighbour_distance(points: Tensor, block: int = 2048) -> Tensor:
    """The root mean square distance [N] of points [N, 3] to the three nearest others, at least 1e-4.

    Args:
        points: in any unit of length.
        block: points whose distances are computed at once.
    """
    near = []
    k = min(4, len(points))
    for start in range(0, len(points), block):
        part = points[start : start + block]
        squared = (part[:, None] - points).square().sum(-1) if len(points) < 256 else torch.cdist(part, points).square()
        near.append(squared.topk(k, largest=False).values[:, 1:].sum(1) / 3)
    return torch.cat(near).sqrt().clamp_min(1e-4)
