"""The optimisation: an iteration, what it does to the set of Gaussians, and the state that goes on; no files."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zoosplat.config import Dynamic
from zoosplat_model.dynamic.files import Checkpoint
from zoosplat_model.dynamic.gaussians import NAMES, GaussianSet, colors_of
from zoosplat_model.dynamic.hexplane import AXES, TIME, DeformationField, Deformed
from zoosplat_model.dynamic.scene import Scene
from zoosplat_model.dynamic.schedule import SH_EVERY, STAGES, Actions, Stage, actions, decayed
from zoosplat_model.metrics import ssim_map
from zoosplat_model.rasterize import Rendering, Screen, rasterize

NEWEST = 0.4  # weight of the newest loss and PSNR in their averages


def draw(
    deformed: Deformed,
    poses: Tensor,  # [C, 4, 4] to the cameras
    intrinsics: Tensor,  # [C, 3, 3]
    width: int,
    height: int,
    degree: int,
    screen: Screen | None = None,
) -> Rendering:
    """Render Gaussians on white, in the frame of reference and the units of `poses`; colours may exceed 1."""
    eyes = -(poses[:, :3, :3].mT @ poses[:, :3, 3:]).mT  # [C, 1, 3]
    return rasterize(
        deformed.means,
        deformed.quats,
        deformed.log_scales.exp(),
        deformed.logits[:, 0].sigmoid(),
        colors_of(deformed.harmonics, deformed.means - eyes, degree),
        poses,
        intrinsics,
        width,
        height,
        background=poses.new_ones(3),
        screen=screen,
    )


class Trainer:
    """A scene's Gaussians, their field, and the iterations that fit both.

    Which frame and views an iteration takes, and what a split draws, depend on seed, stage and iteration alone.

    Attributes:
        scene, gaussians, field: on one device.
        optimizer: Adam with a group for each attribute, for the decoder and for the planes.
        stage, iteration: iterations of this stage that are done.
        active_sh_degree: degree of the harmonics of colour in use.
        spatial_lr_scale: factor on the learning rate of positions: the extent of the cameras.
        excluded_seconds: spent on changes of the set of Gaussians; who measures time takes them off and resets them.
        figures: [2] averages of loss and PSNR over the last iterations, weight 0.4 for the newest, on the device.
    """

    def __init__(
        self, scene: Scene, points: Tensor, colors: Tensor, field: DeformationField, config: Dynamic, seed: int
    ) -> None:
        self.scene, self.config, self.seed = scene, config, seed
        self.gaussians = GaussianSet.of_points(points, colors)
        self.field = field.to(points.device)
        self.spatial_lr_scale = scene.extent
        self.active_sh_degree = 0
        self.excluded_seconds = 0.0
        self.figures: Tensor | None = None
        self._order: tuple[tuple[str, int], list[int]] | None = None
        self.begin("coarse")

    def begin(self, stage: Stage) -> None:
        """Start a stage, with an optimiser and statistics that know nothing yet."""
        self.stage, self.iteration = stage, 0
        self.gaussians = GaussianSet(self.gaussians.values())
        self._make_optimizer()

    def _make_optimizer(self) -> None:
        c, g = self.config, self.gaussians
        rates = {
            "f_dc": c.feature_lr,
            "f_rest": c.feature_lr / 20,
            "opacity": c.opacity_lr,
            "scaling": c.scaling_lr,
            "rotation": c.rotation_lr,
        }
        groups: list[dict[str, Any]] = [{"params": [getattr(g, n)], "lr": rates.get(n, 0.0), "name": n} for n in NAMES]
        groups.append({"params": self.field.layers(), "lr": 0.0, "name": "deformation"})
        groups.append({"params": self.field.grids(), "lr": 0.0, "name": "grid"})
        self.optimizer = torch.optim.Adam(groups, eps=1e-15, fused=True)

    def restore(self, checkpoint: Checkpoint, stage: Stage, iteration: int) -> None:
        """Go on from a checkpoint of this scene and configuration. Raises what torch raises where it does not fit."""
        device = self.scene.pictures.device
        self.gaussians = GaussianSet({name: value.to(device) for name, value in checkpoint.values().items()})
        for name in ("max_radii2D", "xyz_gradient_accum", "denom", "deformation_table"):
            setattr(self.gaussians, name, getattr(checkpoint, name).to(device))
        self.field.load_state_dict(checkpoint.deformation)
        self._make_optimizer()
        self.optimizer.load_state_dict(checkpoint.optimizer)
        self.active_sh_degree, self.spatial_lr_scale = checkpoint.active_sh_degree, checkpoint.spatial_lr_scale
        self.stage, self.iteration = stage, iteration

    def step(self) -> None:
        """One iteration: render a frame, change the set of Gaussians where it is due, take a step of Adam."""
        self.iteration += 1
        if self.iteration % SH_EVERY == 0:
            self.active_sh_degree = min(self.active_sh_degree + 1, self.config.sh_degree)
        self._set_rates()
        frame, views = self._chosen()
        due = actions(self.iteration, self.stage, len(self.gaussians), self.config)
        scene, g = self.scene, self.gaussians
        height, width = scene.masks.shape[2:]
        screen = None
        if due.collect:
            screen = Screen(g.xyz.new_zeros(len(views), len(g), 2, requires_grad=True))
        rendering = self._draw(frame, views, screen)
        truth = torch.stack([scene.pictures[frame, v] for v in views]).to(rendering.rgb.dtype) / 255
        loss = self._loss(rendering, truth, frame, views)
        torch.autograd.backward(loss)
        self._smooth()
        with torch.no_grad():
            squared = (rendering.rgb.clamp(0, 1) - truth).square().mean((1, 2, 3))
            newest = torch.stack([loss, -10 * squared.clamp_min(1e-10).log10().mean()])
            self.figures = newest if self.figures is None else torch.lerp(self.figures, newest, NEWEST)
        if screen is not None:
            assert screen.offsets.grad is not None
            assert screen.radii is not None
            g.collect(screen.offsets.grad, screen.radii, width, height)
        self._change(due)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _draw(self, frame: int, views: list[int], screen: Screen | None = None) -> Rendering:
        scene = self.scene
        height, width = scene.masks.shape[2:]
        deformed = self.gaussians.canonical()
        if self.stage == "fine":
            deformed = self.field(deformed, scene.times[frame])
        poses, intrinsics = (
            torch.stack([values[frame, v] for v in views]) for values in (scene.poses, scene.intrinsics)
        )
        return draw(deformed, poses, intrinsics, width, height, self.active_sh_degree, screen)

    def _loss(self, rendering: Rendering, truth: Tensor, frame: int, views: list[int]) -> Tensor:
        c = self.config
        loss = (rendering.rgb - truth).abs().mean()
        if c.lambda_dssim > 0:
            similarity = ssim_map(rendering.rgb.permute(0, 3, 1, 2), truth.permute(0, 3, 1, 2))
            loss = loss + c.lambda_dssim * (1 - similarity.mean())
        if c.lambda_mask > 0:
            masks = torch.stack([self.scene.masks[frame, v] for v in views]).to(truth.dtype)
            loss = loss + c.lambda_mask * (rendering.alpha - masks).abs().mean()
        return loss

    def _smooth(self) -> None:
        """Add the gradients of the planes' roughness."""
        c = self.config
        weights = c.plane_tv_weight, c.time_smoothness_weight, c.l1_time_planes
        if self.stage == "coarse" or not any(weights):
            return
        grid = self.field.deformation_net.grid
        planes = self.field.grids()
        if planes[0].is_cuda:
            from zoosplat_model.dynamic import hexplane_gpu

            if hexplane_gpu.works(planes[0].get_device()):
                kinds = [i in TIME for _ in grid.grids for i in range(len(AXES))]
                hexplane_gpu.add_roughness(planes, kinds, weights)
                return
        parts = zip(weights, grid.roughness(), strict=True)
        torch.autograd.backward(torch.stack([weight * part for weight, part in parts]).sum())

    def _change(self, due: Actions) -> None:
        if not (due.densify or due.prune or due.grow or due.reset):
            return
        c, g = self.config, self.gaussians
        if g.xyz.is_cuda:
            torch.cuda.synchronize(g.xyz.device)
        begun = time.monotonic()
        noise = torch.Generator().manual_seed((self.seed * 2 + STAGES.index(self.stage)) * 1_000_003 + self.iteration)
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

    def _set_rates(self) -> None:
        c, i = self.config, self.iteration
        steps = c.lr_steps or max(c.fine_iterations, 1)
        scale = self.spatial_lr_scale
        rates = {
            "xyz": scale * decayed(c.position_lr_init, c.position_lr_final, i, steps),
            "deformation": decayed(c.deformation_lr_init, c.deformation_lr_final, i, steps),
            "grid": decayed(c.grid_lr_init, c.grid_lr_final, i, steps),
        }
        for group in self.optimizer.param_groups:
            group["lr"] = rates.get(group["name"], group["lr"])

    def _chosen(self) -> tuple[int, list[int]]:
        """Frame and views of this iteration: every frame once an epoch, some of its views."""
        n, kind = len(self.scene.shown), STAGES.index(self.stage)
        epoch, position = divmod(self.iteration - 1, n)
        if self._order is None or self._order[0] != (self.stage, epoch):
            order = np.random.default_rng([self.seed, 5, kind, epoch]).permutation(n).tolist()
            self._order = (self.stage, epoch), order
        frame = self._order[1][position]
        shown = self.scene.shown[frame]
        picked = np.random.default_rng([self.seed, 6, kind, self.iteration]).permutation(len(shown))
        return frame, [shown[i] for i in picked[: self.config.views]]

    @torch.no_grad()
    def compare(self, frame: int) -> tuple[Tensor, Tensor]:
        """Truth and rendering of a frame's views, [V, h, w, 3] each, 0 to 1."""
        truth = self.scene.pictures[frame].float() / 255
        return truth, self._draw(frame, list(range(len(truth)))).rgb.clamp(0, 1)
