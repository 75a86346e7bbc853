"""The optimisation of a dynamic scene: one iteration, and the state that it changes; no files."""

from __future__ import annotations

import math
import time
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zoosplat.config.training import Dynamic
from zoosplat_model.cuda_graph import CudaGraphPool
from zoosplat_model.dynamic.files import DynamicCheckpoint
from zoosplat_model.dynamic.gaussian_set import PARAMETER_NAMES, GaussianSet
from zoosplat_model.dynamic.hexplane import AXES, TIME, DeformationField, Deformed
from zoosplat_model.dynamic.scene import DynamicScene
from zoosplat_model.dynamic.schedule import (
    PHASES,
    SH_DEGREE_INTERVAL,
    Actions,
    Phase,
    decay_learning_rate,
    plan_actions,
)
from zoosplat_model.frames import copy_to_device
from zoosplat_model.metrics import ssim_map
from zoosplat_model.rasterize import PairBuffer, Rendering, ScreenStatistics, rasterize
from zoosplat_model.spherical_harmonics import evaluate_colors

NEWEST_WEIGHT = 0.4  # weight of the newest loss and PSNR in their moving averages
PAIR_HEADROOM = 2  # capacity of a captured iteration for (Gaussian, tile) pairs, over the pairs that there have been
FRAME_STREAM, VIEW_STREAM = 5, 6  # random streams of a seed, from which frames and views are drawn


def draw(
    deformed: Deformed,
    poses: Tensor,  # [C, 4, 4] to the cameras
    intrinsics: Tensor,  # [C, 3, 3]
    width: int,
    height: int,
    degree: int,
    screen_statistics: ScreenStatistics | None = None,
    pair_buffer: PairBuffer | None = None,
) -> Rendering:
    """Render Gaussians on white, in scene units; colours may exceed 1.

    Args:
        deformed: the Gaussians.
        poses: from the scene to the cameras.
        intrinsics: calibration pixels.
        width: of the pictures, pixels.
        height: of the pictures, pixels.
        degree: of the harmonics of colour in use.
        screen_statistics: see `rasterize`.
        pair_buffer: see `rasterize`.
    """
    eyes = -(poses[:, :3, :3].mT @ poses[:, :3, 3:]).mT  # [C, 1, 3]
    return rasterize(
        deformed.means,
        deformed.quats,
        deformed.log_scales.exp(),
        deformed.logits[:, 0].sigmoid(),
        evaluate_colors(deformed.harmonics, deformed.means - eyes, degree),
        poses,
        intrinsics,
        width,
        height,
        background=poses.new_ones(3),
        screen_statistics=screen_statistics,
        pair_buffer=pair_buffer,
    )


class DynamicTrainer:
    """The Gaussians of a scene, their deformation field, and the iterations that fit both.

    Which frame and views an iteration takes, and what a split draws, depend on seed, phase and iteration alone.

    On a GPU an iteration is a CUDA graph, which is captured anew after each change of the set of Gaussians. Iterations
    that change the set run as on a CPU.

    Attributes:
        scene: the pictures and cameras.
        gaussians: the canonical Gaussians, on the device of the scene.
        field: the deformation field, on the device of the scene.
        optimizer: Adam with a group for each attribute, for the decoder and for the planes.
        graphs: runs the iterations.
        phase: "coarse" fits one set of Gaussians to all frames, "fine" fits the deformation too.
        iteration: number of iterations of this phase that are done.
        active_sh_degree: degree of the harmonics of colour in use.
        spatial_lr_scale: factor on the learning rate of positions, which is the extent of the cameras, scene units.
        excluded_seconds: time spent on changes of the set of Gaussians. Whoever measures the time of iterations
            subtracts it and sets it to 0.
        figures: [2] moving averages of loss and PSNR (dB), on the device; NaN before the first iteration.
    """

    def __init__(
        self, scene: DynamicScene, points: Tensor, colors: Tensor, field: DeformationField, config: Dynamic, seed: int
    ) -> None:
        self.scene, self.config, self.seed = scene, config, seed
        self.gaussians = GaussianSet.from_points(points, colors)
        self.field = field.to(points.device)
        self.spatial_lr_scale = scene.extent
        self.active_sh_degree = 0
        self.excluded_seconds = 0.0
        self.figures = points.new_full((2,), math.nan)
        self.graphs = CudaGraphPool(points.device, PAIR_HEADROOM)
        self._order: tuple[tuple[str, int], list[int]] | None = None
        self.begin("coarse")

    def begin(self, phase: Phase) -> None:
        """Start a phase with a new optimiser and empty statistics."""
        self.phase, self.iteration = phase, 0
        self.gaussians = GaussianSet(self.gaussians.values())
        self.graphs.clear()
        self._make_optimizer()

    def _make_optimizer(self) -> None:
        g = self.gaussians
        groups: list[dict[str, Any]] = [{"params": [getattr(g, n)], "lr": 0.0, "name": n} for n in PARAMETER_NAMES]
        groups.append({"params": self.field.layers(), "lr": 0.0, "name": "deformation"})
        groups.append({"params": self.field.grids(), "lr": 0.0, "name": "grid"})
        self.optimizer = torch.optim.Adam(groups, eps=1e-15, fused=True)
        self._move_rates_to_device()

    def _move_rates_to_device(self) -> None:
        """Make the learning rates tensors on a GPU, where a captured iteration reads them."""
        gpu = self.gaussians.xyz.is_cuda
        for group in self.optimizer.param_groups:
            group["capturable"] = gpu
            group["lr"] = self.gaussians.xyz.new_tensor(group["lr"]) if gpu else float(group["lr"])

    def restore(self, checkpoint: DynamicCheckpoint, phase: Phase, iteration: int) -> None:
        """Go on from a checkpoint of this scene and configuration; torch raises its errors where it does not fit."""
        device = self.scene.pictures.device
        self.gaussians = GaussianSet({name: value.to(device) for name, value in checkpoint.values().items()})
        for name in ("max_radii2D", "xyz_gradient_accum", "denom", "deformation_table"):
            setattr(self.gaussians, name, getattr(checkpoint, name).to(device))
        self.field.load_state_dict(checkpoint.deformation)
        self._make_optimizer()
        self.optimizer.load_state_dict(checkpoint.optimizer)
        self._move_rates_to_device()
        self.active_sh_degree, self.spatial_lr_scale = checkpoint.active_sh_degree, checkpoint.spatial_lr_scale
        self.phase, self.iteration = phase, iteration

    def step(self) -> None:
        """Run one iteration: render a frame, change the set of Gaussians where that is due, take a step of Adam."""
        self.iteration += 1
        if self.iteration % SH_DEGREE_INTERVAL == 0 and self.active_sh_degree < self.config.sh_degree:
            self.active_sh_degree += 1
            self.graphs.clear()
        frame, views = self._choose_views()
        due = plan_actions(self.iteration, self.phase, len(self.gaussians), self.config)
        scene, rates = (
            self.scene,
            copy_to_device(torch.tensor(self._rates(), dtype=torch.float64), self.gaussians.xyz.device),
        )
        of_views = (scene.pictures, scene.masks, scene.poses, scene.intrinsics)
        inputs = [*(torch.stack([values[frame, v] for v in views]) for values in of_views), scene.times[frame]]
        if due.densify or due.prune or due.grow or due.reset:
            self._backward(due.collect, *inputs)
            self._change_set(due)
            self._update(rates)
        else:
            self.graphs((len(views), due.collect), partial(self._iterate, due.collect), [*inputs, rates])

    def ensure_capacity(self) -> None:
        """Capture iterations anew if Gaussians now cover more tiles than the captured one has capacity for."""
        self.graphs.ensure_capacity(int(self.graphs.pair_buffer.required))

    def _iterate(self, collect: bool, *inputs: Any) -> Tensor:
        """Run an iteration that does not change the set of Gaussians."""
        *of_frame, rates = inputs
        self._backward(collect, *of_frame)
        self._update(rates)
        return self.figures

    def _backward(
        self,
        collect: bool,
        pictures: Tensor,  # [V, h, w, 3] uint8
        masks: Tensor,  # [V, h, w] bool
        poses: Tensor,  # [V, 4, 4]
        intrinsics: Tensor,  # [V, 3, 3]
        moment: Tensor,  # []
    ) -> None:
        """Compute the gradients of an iteration, and update statistics and figures."""
        g = self.gaussians
        height, width = masks.shape[1:]
        self.optimizer.zero_grad()
        screen = ScreenStatistics(g.xyz.new_zeros(len(poses), len(g), 2, requires_grad=True)) if collect else None
        rendering = self._draw(poses, intrinsics, moment, width, height, screen)
        truth = pictures.to(rendering.rgb.dtype) / 255
        loss = self._loss(rendering, truth, masks)
        torch.autograd.backward(loss)
        self._add_roughness_gradients()
        with torch.no_grad():
            squared = (rendering.rgb.clamp(0, 1) - truth).square().mean((1, 2, 3))
            newest = torch.stack([loss, -10 * squared.clamp_min(1e-10).log10().mean()])
            average = torch.lerp(self.figures, newest, NEWEST_WEIGHT)
            self.figures.copy_(torch.where(self.figures.isnan(), newest, average))
        if screen is not None:
            assert screen.offsets.grad is not None
            assert screen.radii is not None
            g.accumulate_statistics(screen.offsets.grad, screen.radii, width, height)

    def _update(self, rates: Tensor) -> None:
        """Take a step of Adam with these learning rates of its groups."""
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].copy_(rate)
            else:
                group["lr"] = float(rate)
        self.optimizer.step()

    def _draw(
        self,
        poses: Tensor,
        intrinsics: Tensor,
        moment: Tensor,
        width: int,
        height: int,
        screen: ScreenStatistics | None = None,
    ) -> Rendering:
        deformed = self.gaussians.canonical()
        if self.phase == "fine":
            deformed = self.field(deformed, moment)
        return draw(deformed, poses, intrinsics, width, height, self.active_sh_degree, screen, self.graphs.pair_buffer)

    def _loss(self, rendering: Rendering, truth: Tensor, masks: Tensor) -> Tensor:
        c = self.config
        loss = (rendering.rgb - truth).abs().mean()
        if c.lambda_dssim > 0:
            similarity = ssim_map(rendering.rgb.permute(0, 3, 1, 2), truth.permute(0, 3, 1, 2))
            loss = loss + c.lambda_dssim * (1 - similarity.mean())
        if c.lambda_mask > 0:
            loss = loss + c.lambda_mask * (rendering.alpha - masks.to(truth.dtype)).abs().mean()
        return loss

    def _add_roughness_gradients(self) -> None:
        """Add the gradients of the weighted roughness of the planes."""
        c = self.config
        weights = c.plane_tv_weight, c.time_smoothness_weight, c.l1_time_planes
        if self.phase == "coarse" or not any(weights):
            return
        grid = self.field.deformation_net.grid
        planes = self.field.grids()
        if planes[0].is_cuda:
            from zoosplat_model.dynamic import hexplane_triton

            if hexplane_triton.is_available(planes[0].get_device()):
                kinds = [i in TIME for _ in grid.grids for i in range(len(AXES))]
                hexplane_triton.add_roughness(planes, kinds, weights)
                return
        parts = zip(weights, grid.roughness(), strict=True)
        torch.autograd.backward(torch.stack([weight * part for weight, part in parts]).sum())

    def _change_set(self, due: Actions) -> None:
        """Change the set of Gaussians as is due, and add the time that it takes to `excluded_seconds`."""
        c, g = self.config, self.gaussians
        self.graphs.clear()
        if g.xyz.is_cuda:
            torch.cuda.synchronize(g.xyz.device)
        begun = time.monotonic()
        noise = torch.Generator().manual_seed((self.seed * 2 + PHASES.index(self.phase)) * 1_000_003 + self.iteration)
        if due.densify:
            dense = c.percent_dense * self.spatial_lr_scale
            g.densify(self.optimizer, due.gradient, dense, c.max_gaussians, noise)
        if due.prune:
            g.prune(self.optimizer, due.opacity, due.size_px, self.spatial_lr_scale)
        if due.grow:
            aabb = self.field.deformation_net.grid.aabb
            g.grow(self.optimizer, due.gradient, aabb, c.max_gaussians, noise)
        if due.reset:
            g.reset_opacity(self.optimizer)
        if g.xyz.is_cuda:
            torch.cuda.synchronize(g.xyz.device)
        self.excluded_seconds += time.monotonic() - begun

    def _rates(self) -> list[float]:
        """The learning rates of this iteration, one for each group of the optimiser."""
        c, i = self.config, self.iteration
        steps = c.lr_steps or max(c.fine_iterations, 1)
        scale = self.spatial_lr_scale
        rates = {
            "xyz": scale * decay_learning_rate(c.position_lr_init, c.position_lr_final, i, steps),
            "f_dc": c.feature_lr,
            "f_rest": c.feature_lr / 20,
            "opacity": c.opacity_lr,
            "scaling": c.scaling_lr,
            "rotation": c.rotation_lr,
            "deformation": decay_learning_rate(c.deformation_lr_init, c.deformation_lr_final, i, steps),
            "grid": decay_learning_rate(c.grid_lr_init, c.grid_lr_final, i, steps),
        }
        return [rates[group["name"]] for group in self.optimizer.param_groups]

    def _choose_views(self) -> tuple[int, list[int]]:
        """Draw the frame and the views of this iteration; every frame comes once in an epoch."""
        n, kind = len(self.scene.shown), PHASES.index(self.phase)
        epoch, position = divmod(self.iteration - 1, n)
        if self._order is None or self._order[0] != (self.phase, epoch):
            order = np.random.default_rng([self.seed, FRAME_STREAM, kind, epoch]).permutation(n).tolist()
            self._order = (self.phase, epoch), order
        frame = self._order[1][position]
        shown = self.scene.shown[frame]
        picked = np.random.default_rng([self.seed, VIEW_STREAM, kind, self.iteration]).permutation(len(shown))
        return frame, [shown[i] for i in picked[: self.config.views]]

    @torch.no_grad()
    def compare(self, frame: int) -> tuple[Tensor, Tensor]:
        """The truth and the rendering of the views of a frame that are shown, [n, h, w, 3] each, 0 to 1."""
        scene, views = self.scene, self.scene.shown[frame]
        truth = scene.pictures[frame, views].float() / 255
        height, width = truth.shape[1:3]
        place = scene.poses[frame, views], scene.intrinsics[frame, views], scene.times[frame]
        return truth, self._draw(*place, width, height).rgb.clamp(0, 1)
