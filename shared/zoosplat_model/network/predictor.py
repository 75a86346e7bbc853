"""A trained network as a predictor."""

from __future__ import annotations

from collections.abc import Sequence

from zoosplat_model.frames import Frame, FrameReader
from zoosplat_model.gaussians import Gaussians
from zoosplat_model.network.splatter import PoseSplatter
from zoosplat_model.predictor import Predictor
from zoosplat_model.rasterize import Rendering
from zoosplat_model.rasterize.types import Cameras


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

    def _render(self, gaussians: Gaussians, views: Cameras, cameras: Sequence[int | None] | None) -> Rendering:
        return self.model.render(gaussians, *views, cameras=cameras)
