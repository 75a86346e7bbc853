"""A trained dynamic scene, as what evaluate and render ask for: the Gaussians of a frame in the world."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from zoosplat.geometry.spherical_harmonics import SH_C0
from zoosplat.stages.runs import Run
from zoosplat_model.dynamic import files
from zoosplat_model.dynamic.gaussians import GaussianSet, colors_of
from zoosplat_model.dynamic.hexplane import Deformed
from zoosplat_model.dynamic.scene import Scale
from zoosplat_model.dynamic.schedule import Stage
from zoosplat_model.frames import Frame, FrameReader
from zoosplat_model.network.splatter import Gaussians, orientation
from zoosplat_model.predictor import Predictor
from zoosplat_model.rasterize import Rendering, rasterize


class ShadedGaussians(Gaussians):
    """Gaussians whose colours change with the direction that they are seen from; `colors` are without that change.

    Attributes:
        harmonics: [N, 16, 3] coefficients of colour - 0.5.
        axes: [3, 3] rotation from the harmonics' axes to those of the Gaussians' frame.
    """

    harmonics: Tensor
    axes: Tensor

    @classmethod
    def of(cls, deformed: Deformed) -> ShadedGaussians:
        """In scene units, from raw parameters."""
        made = cls(
            deformed.means,
            torch.nn.functional.normalize(deformed.quats, dim=1),
            deformed.log_scales.exp(),
            deformed.logits[:, 0].sigmoid(),
            (deformed.harmonics[:, 0] * SH_C0 + 0.5).clamp(0, 1),
        )
        made.harmonics, made.axes = deformed.harmonics, torch.eye(3).to(deformed.means)
        return made

    def _replace(self, **changes: Tensor) -> ShadedGaussians:
        new = super()._replace(**changes)
        new.harmonics, new.axes = self.harmonics, self.axes
        return new

    def to_world(self, center: Tensor, angle: Tensor, tilt: Tensor | None = None) -> ShadedGaussians:
        new = super().to_world(center, angle, tilt)
        assert isinstance(new, ShadedGaussians)
        new.axes = orientation(angle, tilt) @ self.axes
        return new


class DynamicPredictor(Predictor):
    """The result of a project's dynamic training, or what it has come to.

    Attributes:
        reader: the project's frames.
        step: iterations behind the result, of both stages.
    """

    recordable = False  # they follow from its time

    def __init__(self, reader: FrameReader, run: Run, *, finished: bool = True) -> None:
        """Read the result, or the newest checkpoint of a training that is not finished.

        Raises UserError where it is missing, damaged or of another configuration.
        """
        config, url = run.experiment.dynamic, run.output_url("train")
        self.reader, self._scale = reader, Scale.of(reader)
        stage: Stage = "fine" if config.fine_iterations > 0 else "coarse"
        iteration = config.fine_iterations or config.coarse_iterations
        field = files.build_field(run.experiment)
        if finished:
            values = files.read_result(url, stage, iteration, field)
            self._degree = config.sh_degree
        else:
            values, self._degree, stage, iteration = files.read_newest(url, field)
        self.step = iteration + (config.coarse_iterations if stage == "fine" else 0)
        self._moves = stage == "fine"
        self._canonical = GaussianSet(values).to(reader.device).requires_grad_(False).canonical()
        self._field = field.to(reader.device).requires_grad_(False)

    def _deformed(self, t: int) -> Deformed:
        if not self._moves:
            return self._canonical
        deformed: Deformed = self._field(self._canonical, torch.tensor(self.reader.times[t], device=self.reader.device))
        return deformed

    @torch.no_grad()
    def gaussians(self, t: int) -> Gaussians:
        """Gaussians of kept frame t in the world."""
        return self._own(t).to_world(*self.reader.pose(t))

    def _animal(self, frame: Frame) -> Gaussians:
        return self._own(frame.t)

    def _own(self, t: int) -> ShadedGaussians:
        """In the animal's frame, metres."""
        scene = ShadedGaussians.of(self._deformed(t))
        unit = self._scale.unit_m
        return scene._replace(means=scene.means * unit + self._scale.middle, scales=scene.scales * unit)

    @torch.no_grad()
    def render(
        self,
        gaussians: Gaussians,  # in the world
        world_to_camera: Tensor,  # [C, 4, 4]
        intrinsics: Tensor,  # [C, 3, 3] calibration pixels
        width: int,
        height: int,
        cameras: Sequence[int | None] | None = None,
    ) -> Rendering:
        """Render on white; all cameras have the same colours."""
        colors = gaussians.colors
        if isinstance(gaussians, ShadedGaussians):
            eyes = -(world_to_camera[:, :3, :3].mT @ world_to_camera[:, :3, 3:]).mT
            directions = (gaussians.means - eyes) @ gaussians.axes
            colors = colors_of(gaussians.harmonics, directions, self._degree)
        white = gaussians.means.new_ones(3)
        rgb, alpha = rasterize(
            *gaussians[:4], colors, world_to_camera, intrinsics, width, height, background=white, mode="3d"
        )
        return Rendering(rgb.clamp(0, 1), alpha)

    @torch.no_grad()
    def tracks(self, frames: Sequence[int], count: int) -> Tensor:
        """Where at most `count` Gaussians, drawn by opacity and size, are in the world: [len(frames), count, 3]."""
        weight = self._canonical.logits[:, 0].sigmoid() * self._canonical.log_scales.mean(1).exp() ** 2
        share = weight.double().cpu().numpy()
        rng = np.random.default_rng(0)
        chosen = rng.choice(len(share), min(count, int((share > 0).sum())), replace=False, p=share / share.sum())
        index = torch.from_numpy(chosen).to(self.reader.device)
        return torch.stack([self.gaussians(t).means[index] for t in frames])
