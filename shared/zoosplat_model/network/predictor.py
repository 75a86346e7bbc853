"""A trained network as a predictor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zoosplat_model.frames import Frame, FrameReader
from zoosplat_model.gaussians import Gaussians
from zoosplat_model.network.splatter import PoseSplatter
from zoosplat_model.predictor import Predictor
from zoosplat_model.rasterize import Rendering


class SplatterPredictor(Predictor):
    """A trained network and the frames that it reconstructs.

    Attributes:
        model: the network, in evaluation mode.
    """

    def __init__(self, reader: FrameReader, model: PoseSplatter, step: int) -> None:
        super().__init__(reader, step)
        self.model = model.eval()

    def animal_gaussians(self, frame: Frame) -> Gaussians:
        gaussians: Gaussians = self.model([frame])[0]
        return gaussians

    @torch.no_grad()
    def render(
        self,
        gaussians: Gaussians,
        world_to_camera: Tensor,
        intrinsics: Tensor,
        width: int,
        height: int,
        cameras: Sequence[int | None] | None = None,
    ) -> Rendering:
        return self.model.render(gaussians, world_to_camera, intrinsics, width, height, cameras=cameras)
