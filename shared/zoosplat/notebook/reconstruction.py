"""Gaussians and renderings of a trained model as NumPy arrays, and how this package reaches the model."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import NamedTuple, Protocol, cast

import numpy as np
import numpy.typing as npt

from zoosplat.geometry.rotations import FloatArray, look_at
from zoosplat.notebook.extras import needs_extra
from zoosplat.stages.runs import Run

# The package that needs torch is reached by name: nothing in `zoosplat` imports it.
MODEL_MODULE = "zoosplat_model.notebook"
FloatArray32 = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class GaussianArrays:
    """The n Gaussians of one frame, in the world: metres, +z up, origin at the mean camera centre. All float32.

    Attributes:
        centers_m: [n, 3] means, metres.
        quaternions: [n, 4] unit quaternions (w, x, y, z): rotations from the Gaussians' axes to the world's.
        scales_m: [n, 3] standard deviations along the Gaussians' axes, metres.
        opacities: [n] 0 to 1.
        colors: [n, 3] red, green and blue, 0 to 1. Of a dynamic model, whose colours depend on the direction from which
            they are seen, they are the part that does not.
    """

    centers_m: FloatArray32
    quaternions: FloatArray32
    scales_m: FloatArray32
    opacities: FloatArray32
    colors: FloatArray32

    def __len__(self) -> int:
        return len(self.opacities)


@dataclass(frozen=True, eq=False)
class PinholeCamera:
    """A camera without distortion, to render from.

    Attributes:
        world_to_camera: [4, 4] float64, its pose: x_camera = world_to_camera @ x_world, metres, homogeneous; OpenCV
            axes (x right, y down, z forward).
        intrinsics: [3, 3] float64, pixels; the centre of the top-left pixel is (0, 0).
        width, height: of the picture, pixels.
    """

    world_to_camera: FloatArray
    intrinsics: FloatArray
    width: int
    height: int

    @classmethod
    def looking_at(
        cls,
        eye_m: npt.ArrayLike,
        target_m: npt.ArrayLike,
        *,
        width: int = 512,
        height: int = 512,
        field_of_view_rad: float = 0.4,
    ) -> PinholeCamera:
        """An upright camera that sees a point in the middle of its picture.

        Args:
            eye_m: [3] where it is, metres; not straight above or below the point.
            target_m: [3] the point, metres.
            width, height: of the picture, pixels.
            field_of_view_rad: angle from the lower to the upper edge of the picture.
        """
        eye, target = np.asarray(eye_m, dtype=np.float64), np.asarray(target_m, dtype=np.float64)
        focal = height / 2 / np.tan(field_of_view_rad / 2)
        intrinsics = np.array([[focal, 0, (width - 1) / 2], [0, focal, (height - 1) / 2], [0, 0, 1]])
        return cls(look_at(eye, target), intrinsics, width, height)


class RenderedImage(NamedTuple):
    """A picture of the model.

    Attributes:
        image: [h, w, 3] uint8, red, green and blue, on white.
        opacity: [h, w] float32, 0 where nothing is to 1 where the animal hides what is behind it.
    """

    image: npt.NDArray[np.uint8]
    opacity: FloatArray32


class Reconstructor(Protocol):
    """What the trained model of a run gives; `zoosplat_model.notebook` implements it."""

    def gaussians(self, t: int) -> GaussianArrays:
        """See `ProjectReader.gaussians`."""

    def render(self, t: int, camera: int | PinholeCamera) -> RenderedImage:
        """See `ProjectReader.render`; a camera of the recording is given by its index."""


def open_reconstructor(run: Run) -> Reconstructor:
    """The model of a run whose training is done, on a GPU where there is one, else on the CPU.

    Raises:
        UserError: PyTorch is not installed, a stage is missing, or the checkpoint is damaged.
    """
    with needs_extra("model,gpu"):
        module = importlib.import_module(MODEL_MODULE)
    return cast(Reconstructor, module.ModelReconstructor(run))
