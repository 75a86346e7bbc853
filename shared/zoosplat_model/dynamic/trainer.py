"""The optimisation: an iteration, what it does to the set of Gaussians, and the state that goes on; no files."""

from __future__ import annotations

import math
import time
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zoosplat.config.training import Dynamic
from zoosplat_model.dynamic.files import Checkpoint
from zoosplat_model.dynamic.gaussians import NAMES, GaussianSet, colors_of
from zoosplat_model.dynamic.hexplane import AXES, TIME, DeformationField, Deformed
from zoosplat_model.dynamic.scene import Scene
from zoosplat_model.dynamic.schedule import SH_EVERY, STAGES, Actions, Stage, actions, decayed
from zoosplat_model.frames import send
from zoosplat_model.metrics import ssim_map
from zoosplat_model.network.cuda_graph import Recorder
from zoosplat_model.rasterize import Pairs, Rendering, Screen, rasterize

NEWEST = 0.4  # weight of the newest loss and PSNR in their averages
ROOM = 2  # for pairs of Gaussians and tiles in a recorded iteration, over those that there have been


def draw(
    deformed: Deformed,
    poses: Tensor,  # [C, 4, 4] to the cameras
    intrinsics: Tensor,  # [C, 3, 3]
    width: int,
    height: int,
    degree: int,
    screen: Screen | None = None,
    pairs: Pairs | None = None,
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
        pairs=pairs,
    )


class Trainer:
    """A scene's Gaussians, their field, and the iterations that fit both.

    Which frame and views an iteration takes, and what a split draws, depend on seed, stage and iteration alone.

    On a GPU an iteration is a CUDA graph, recorded anew after each change of the set of Gaussians. Those that change
    it run as on a CPU.

    Attributes:
        scene, gaussians, field: on one device.
        optimizer: Adam with a group for each attribute, for the decoder and for the planes.
        recorder: runs the iterations.
        stage, iteration: iterations of this stage that are done.
        active_sh_degree: degree of the harmonics of colour in use.
        spatial_lr_scale: factor on the learning rate of positions: the extent of the cameras.
        excluded_seconds: spent on changes of the set of Gaussians; who measures time takes them off and resets them.
        figures: [2] averages of loss and PSNR over the last iterations, weight 0.4 for the newest, on the device; not
            a number before the first.
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
        self.figures = points.new_full((2,), math.nan)
        self.recorder = Recorder(points.device, ROOM)
        self._order: tuple[tuple[str, int], list[int]] | None = None
        self.begin("coarse")

    def begin(self, stage: Stage) -> None:
        """Start a stage, with an optimiser and statistics that know nothing yet."""
        self.stage, self.iteration = stage, 0
        self.gaussians = GaussianSet(self.gaussians.values())
        self.recorder.forget()
        self._make_optimizer()

    def _make_optimizer(self) -> None:
        g = self.gaussians
        groups: list[dict[str, Any]] = [{"params": [getattr(g, n)], "lr": 0.0, "name": n} for n in NAMES]
        groups.append({"params": self.field.layers(), "lr": 0.0, "name": "deformation"})
        groups.append({"params": self.field.grids(), "lr": 0.0, "name": "grid"})
        self.optimizer = torch.optim.Adam(groups, eps=1e-15, fused=True)
        self._rates_on_device()

    def _rates_on_device(self) -> None:
        """A recorded iteration reads its learning rates from the device."""
        gpu = self.gaussians.xyz.is_cuda
        for group in self.optimizer.param_groups:
            group["capturable"] = gpu
            group["lr"] = self.gaussians.xyz.new_tensor(group["lr"]) if gpu else float(group["lr"])

    def restore(self, checkpoint: Checkpoint, stage: Stage, iteration: int) -> None:
        """Go on from a checkpoint of this scene and configuration. Raises what torch raises where it does not fit."""
        device = self.scene.pictures.device
        self.gaussians = GaussianSet({name: value.to(device) for name, value in checkpoint.values().items()})
        for name in ("max_radii2D", "xyz_gradient_accum", "denom", "deformation_table"):
            setattr(self.gaussians, name, getattr(checkpoint, name).to(device))
        self.field.load_state_dict(checkpoint.deformation)
        self._make_optimizer()
        self.optimizer.load_state_dict(checkpoint.optimizer)
        self._rates_on_device()
        self.active_sh_degree, self.spatial_lr_scale = checkpoint.active_sh_degree, checkpoint.spatial_lr_scale
        self.stage, self.iteration = stage, iteration

    def step(self) -> None:
        """One iteration: render a frame, change the set of Gaussians where it is due, take a step of Adam."""
        self.iteration += 1
        if self.iteration % SH_EVERY == 0 and self.active_sh_degree < self.config.sh_degree:
            self.active_sh_degree += 1
            self.recorder.forget()
        frame, views = self._chosen()
        due = actions(self.iteration, self.stage, len(self.gaussians), self.config)
        scene, rates = self.scene, send(torch.tensor(self._rates(), dtype=torch.float64), self.gaussians.xyz.device)
        of_views = (scene.pictures, scene.masks, scene.poses, scene.intrinsics)
        inputs = [*(torch.stack([values[frame, v] for v in views]) for values in of_views), scene.times[frame]]
        if due.densify or due.prune or due.grow or due.reset:
            self._backward(due.collect, *inputs)
            self._change(due)
            self._update(rates)
        else:
            self.recorder((len(views), due.collect), partial(self._iterate, due.collect), [*inputs, rates])

    def make_room(self) -> None:
        """Record anew where Gaussians have come to cover more tiles than the recorded iteration has room for."""
        self.recorder.make_room(int(self.recorder.pairs.needed))

    def _iterate(self, collect: bool, *inputs: Any) -> Tensor:
        """An iteration that does not change the set of Gaussians."""
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
        """Gradients, statistics and figures."""
        g = self.gaussians
        height, width = masks.shape[1:]
        self.optimizer.zero_grad()
        screen = Screen(g.xyz.new_zeros(len(poses), len(g), 2, requires_grad=True)) if collect else None
        rendering = self._draw(poses, intrinsics, moment, width, height, screen)
        truth = pictures.to(rendering.rgb.dtype) / 255
        loss = self._loss(rendering, truth, masks)
        torch.autograd.backward(loss)
        self._smooth()
        with torch.no_grad():
            squared = (rendering.rgb.clamp(0, 1) - truth).square().mean((1, 2, 3))
            newest = torch.stack([loss, -10 * squared.clamp_min(1e-10).log10().mean()])
            average = torch.lerp(self.figures, newest, NEWEST)
            self.figures.copy_(torch.where(self.figures.isnan(), newest, average))
        if screen is not None:
            assert screen.offsets.grad is not None
            assert screen.radii is not None
            g.collect(screen.offsets.grad, screen.radii, width, height)

    def _update(self, rates: Tensor) -> None:
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
        screen: Screen | None = None,
    ) -> Rendering:
        deformed = self.gaussians.canonical()
        if self.stage == "fine":
            deformed = self.field(deformed, moment)
        return draw(deformed, poses, intrinsics, width, height, self.active_sh_degree, screen, self.recorder.pairs)

    def _loss(self, rendering: Rendering, truth: Tensor, masks: Tensor) -> Tensor:
        c = self.config
        loss = (rendering.rgb - truth).abs().mean()
        if c.lambda_dssim > 0:
            similarity = ssim_map(rendering.rgb.permute(0, 3, 1, 2), truth.permute(0, 3, 1, 2))
            loss = loss + c.lambda_dssim * (1 - similarity.mean())
        if c.lambda_mask > 0:
            loss = loss + c.lambda_mask * (rendering.alpha - masks.to(truth.dtype)).abs().mean()
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
        c, g = self.config, self.gaussians
        self.recorder.forget()
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

    def _rates(self) -> list[float]:
        """Learning rates of this iteration, of the optimiser's groups."""
        c, i = self.config, self.iteration
        steps = c.lr_steps or max(c.fine_iterations, 1)
        scale = self.spatial_lr_scale
        rates = {
            "xyz": scale * decayed(c.position_lr_init, c.position_lr_final, i, steps),
            "f_dc": c.feature_lr,
            "f_rest": c.feature_lr / 20,
            "opacity": c.opacity_lr,
            "scaling": c.scaling_lr,
            "rotation": c.rotation_lr,
            "deformation": decayed(c.deformation_lr_init, c.deformation_lr_final, i, steps),
            "grid": decayed(c.grid_lr_init, c.grid_lr_final, i, steps),
        }
        return [rates[group["name"]] for group in self.optimizer.param_groups]

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
        scene = self.scene
        truth = scene.pictures[frame].float() / 255
        height, width = truth.shape[1:3]
        place = scene.poses[frame], scene.intrinsics[frame], scene.times[frame]
        return truth, self._draw(*place, width, height).rgb.clamp(0, 1)
