"""A trained dynamic scene as a predictor."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from zoosplat.geometry.spherical_harmonics import SH_C0
from zoosplat.stages.runs import Run
from zoosplat_model.dynamic import files
from zoosplat_model.dynamic.gaussian_set import GaussianSet
from zoosplat_model.dynamic.hexplane import Deformed, build_field
from zoosplat_model.dynamic.scene import SceneUnits
from zoosplat_model.dynamic.schedule import Phase
from zoosplat_model.frames import Frame, FrameReader
from zoosplat_model.gaussians import Gaussians
from zoosplat_model.predictor import Predictor
from zoosplat_model.rasterize import Rendering, rasterize
from zoosplat_model.rasterize.types import Cameras
from zoosplat_model.rotations import animal_to_world
from zoosplat_model.spherical_harmonics import evaluate_colors

TRACK_SEED = 0  # of the draw of the Gaussians that `tracks` follows


class ShadedGaussians(Gaussians):
    """Gaussians whose colours change with the direction from which they are seen.

    Attributes:
        colors: those of the constant harmonic.
        harmonics: [N, 16, 3] coefficients of colour - 0.5.
        axes: [3, 3] rotation from the harmonics' axes to those of the Gaussians' frame.
    """

    harmonics: Tensor
    axes: Tensor

    @classmethod
    def from_deformed(cls, deformed: Deformed) -> ShadedGaussians:
        """The Gaussians of raw parameters, in scene units."""
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
        new.axes = animal_to_world(angle, tilt) @ self.axes
        return new


class DynamicPredictor(Predictor):
    """The result of a dynamic training, or the newest checkpoint of one that is not finished."""

    capturable = False  # the Gaussians of a frame follow from its time, which is no tensor of the frame

    def __init__(self, reader: FrameReader, run: Run, *, finished: bool = True) -> None:
        """Read the result of a run's training, or with `finished=False` the newest checkpoint.

        Raises:
            UserError: it is missing, damaged or of another configuration.
        """
        config, url = run.experiment.dynamic, run.output_url("train")
        self._units = SceneUnits.from_reader(reader)
        phase: Phase = "fine" if config.fine_iterations > 0 else "coarse"
        iteration = config.fine_iterations or config.coarse_iterations
        field = build_field(config)
        if finished:
            values = files.read_result(url, phase, iteration, field)
            self._degree = config.sh_degree
        else:
            values, self._degree, phase, iteration = files.read_newest(url, field)
        super().__init__(reader, iteration + (config.coarse_iterations if phase == "fine" else 0))
        self._moves = phase == "fine"
        self._canonical = GaussianSet(values).to(reader.device).requires_grad_(False).canonical()
        self._field = field.to(reader.device).requires_grad_(False)

    @torch.no_grad()
    def gaussians(self, t: int) -> Gaussians:
        """The Gaussians of kept frame t in the world."""
        return self._reconstruct(t).to_world(*self.reader.pose(t))

    def animal_gaussians(self, frame: Frame) -> Gaussians:
        return self._reconstruct(frame.t)

    def _reconstruct(self, t: int) -> ShadedGaussians:
        """The Gaussians of kept frame t in the animal's frame, metres."""
        scene = ShadedGaussians.from_deformed(self._deform(t))
        unit = self._units.unit_m
        return scene._replace(means=scene.means * unit + self._units.middle, scales=scene.scales * unit)

    def _deform(self, t: int) -> Deformed:
        if not self._moves:
            return self._canonical
        deformed: Deformed = self._field(self._canonical, torch.tensor(self.reader.times[t], device=self.reader.device))
        return deformed

    def _render(self, gaussians: Gaussians, views: Cameras, cameras: Sequence[int | None] | None) -> Rendering:
        world_to_camera = views.world_to_camera  # `cameras` has no effect, because all have the same colours
        colors = gaussians.colors
        if isinstance(gaussians, ShadedGaussians):
            eyes = -(world_to_camera[:, :3, :3].mT @ world_to_camera[:, :3, 3:]).mT
            directions = (gaussians.means - eyes) @ gaussians.axes
            colors = evaluate_colors(gaussians.harmonics, directions, self._degree)
        white = gaussians.means.new_ones(3)
        rgb, alpha = rasterize(*gaussians[:4], colors, *views, background=white, mode="3d")
        return Rendering(rgb.clamp(0, 1), alpha)

    @torch.no_grad()
    def tracks(self, frames: Sequence[int], count: int) -> Tensor:
        """As `Predictor.tracks`; the Gaussians are drawn by opacity times squared size."""
        weight = self._canonical.logits[:, 0].sigmoid() * self._canonical.log_scales.mean(1).exp() ** 2
        share = weight.double().cpu().numpy()
        rng = np.random.default_rng(TRACK_SEED)
        chosen = rng.choice(len(share), min(count, int((share > 0).sum())), replace=False, p=share / share.sum())
        index = torch.from_numpy(chosen).to(self.reader.device)
        return torch.stack([self.gaussians(t).means[index] for t in frames])
