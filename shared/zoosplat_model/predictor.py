"""A trained model, ready to reconstruct any kept frame and to render it from anywhere."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zoosplat.config import Experiment
from zoosplat.errors import UserError
from zoosplat.project import Project
from zoosplat_model import checkpoints
from zoosplat_model.frames import FrameReader
from zoosplat_model.rasterize import Rendering
from zoosplat_model.splatter import Gaussians, PoseSplatter


def pick_device(name: str) -> torch.device:
    """`auto` (CUDA where there is a usable GPU, else CPU), `cpu`, `cuda` or `cuda:<i>`.

    Raises:
        UserError: CUDA is asked for and there is none, or the name is unknown.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device {name}: unknown; use auto, cpu, cuda or cuda:0") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device {name}: not supported; use auto, cpu, cuda or cuda:0")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {name}: no such CUDA GPU here ({torch.cuda.device_count()} found); use auto or cpu")
    return device


class Predictor:
    """The best checkpoint of a project and the frames that it reconstructs.

    Attributes:
        reader: the project's frames.
        model: the network, in evaluation mode.
        step: optimiser steps behind the checkpoint.
    """

    def __init__(self, reader: FrameReader, model: PoseSplatter, step: int) -> None:
        self.reader, self.model, self.step = reader, model.eval(), step

    @classmethod
    def open(
        cls, project: Project, experiment: Experiment, device: str = "auto", *, finished: bool = True
    ) -> Predictor:
        """Load the best checkpoint of a project whose stages pack, center_rotation, crop and train are done.

        Args:
            project: where.
            experiment: its configuration.
            device: see `pick_device`.
            finished: False takes the best checkpoint so far of a training that has not ended.

        Raises:
            UserError: a stage is missing or was made with another configuration, or the device does not exist.
        """
        chosen = pick_device(device)
        if finished:
            project.input_url("train", experiment)
        reader = open_reader(project, experiment, chosen)
        if experiment.train.method == "dynamic":
            from zoosplat_model.dynamic.predictor import DynamicPredictor

            return DynamicPredictor(reader, project, experiment)
        model = PoseSplatter.of(reader, experiment).on(chosen)
        checkpoint = checkpoints.load(project, "best")
        if checkpoint is None:
            raise UserError(f"{project.output_url('train')}: no checkpoint; run stage train again with --force")
        model.load_state_dict(checkpoint.average)
        return cls(reader, model, checkpoint.step)

    @torch.no_grad()
    def gaussians(self, t: int) -> Gaussians:
        """Gaussians of kept frame t in the world, from its observed views only."""
        frame = self.reader.frame(t)
        gaussians: Gaussians = self.model([frame])[0]
        return gaussians.to_world(frame.center, frame.angle)

    def tracks(self, frames: Sequence[int], count: int) -> Tensor | None:
        """Where some Gaussians are over time; None: those of one frame are not those of another."""
        return None

    @torch.no_grad()
    def render(
        self,
        gaussians: Gaussians,
        world_to_camera: Tensor,  # [C, 4, 4]
        intrinsics: Tensor,  # [C, 3, 3] calibration pixels
        width: int,
        height: int,
        cameras: Sequence[int | None] | None = None,  # [C]
    ) -> Rendering:
        """Render on white.

        Args:
            gaussians: in the world.
            world_to_camera, intrinsics, width, height: the views; any pixels, any number.
            cameras: the recording's camera that each view belongs to, for its learned colour; None (for a view or for
                all) and held-out cameras: the colour of the average camera.
        """
        return self.model.render(gaussians, world_to_camera, intrinsics, width, height, cameras=cameras)


def open_reader(project: Project, experiment: Experiment, device: torch.device) -> FrameReader:
    """Frames of a project whose stages pack, center_rotation and crop are done. Raises UserError otherwise."""
    return FrameReader(
        project.open_input("pack", experiment),
        project.open_input("center_rotation", experiment),
        project.open_input("crop", experiment),
        experiment,
        device,
    )
