"""The trained model of a run for `zoosplat.notebook`: tensors become NumPy arrays here."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from torch import Tensor

from zoosplat.errors import UserError
from zoosplat.formats import media
from zoosplat.notebook.reconstruction import GaussianArrays, PinholeCamera, RenderedImage
from zoosplat.stages.runs import Run
from zoosplat_model.gaussians import Gaussians
from zoosplat_model.registry import open_predictor

CACHED_FRAMES = 4  # number of frames whose Gaussians stay in memory, for more views of the same frames


class ModelReconstructor:
    """Implements `zoosplat.notebook.reconstruction.Reconstructor` with the best checkpoint of a run."""

    def __init__(self, run: Run) -> None:
        """Open the best checkpoint of a run.

        Raises:
            UserError: as `registry.open_predictor`.
        """
        self._predictor = open_predictor(run)
        self._reader = self._predictor.reader
        self._gaussians = lru_cache(maxsize=CACHED_FRAMES)(self._predictor.gaussians)

    def gaussians(self, t: int) -> GaussianArrays:
        """The Gaussians of kept frame t.

        Raises:
            UserError: the frame does not exist or has no visual hull.
        """
        self._check(t)
        means, quats, scales, opacities, colors = self._with_low_pass(t)
        return GaussianArrays(*(_read_only(v) for v in (means, quats, scales, opacities, colors)))

    def render(self, t: int, camera: int | PinholeCamera) -> RenderedImage:
        """Render kept frame t.

        Raises:
            UserError: the frame does not exist or has no visual hull.
        """
        self._check(t)
        if isinstance(camera, PinholeCamera):
            gaussians = self._with_low_pass(t)
            pose, intrinsics = (gaussians.means.new_tensor(v) for v in (camera.world_to_camera, camera.intrinsics))
            width, height, color_of = camera.width, camera.height, None
        else:
            frame, gaussians = self._reader.frame(t), self._gaussians(t)
            pose, intrinsics = frame.world_to_camera[camera], frame.intrinsics[camera]
            width, height, color_of = self._reader.width, self._reader.height, camera
        rgb, alpha = self._predictor.render(gaussians, pose[None], intrinsics[None], width, height, cameras=[color_of])
        return RenderedImage(media.to_uint8(rgb[0].cpu().numpy()), alpha[0].cpu().numpy())

    def _check(self, t: int) -> None:
        n_frames, valid = self._reader.n_frames, np.flatnonzero(self._reader.valid)
        if not 0 <= t < n_frames:
            raise UserError(f"frame t = {t}: there are {n_frames} kept frames, 0 to {n_frames - 1}")
        if not self._reader.valid[t]:
            near = f"; nearest: {valid[np.abs(valid - t).argmin()]}" if len(valid) else ", and no other frame has one"
            raise UserError(f"frame t = {t} has no visual hull{near}")

    def _with_low_pass(self, t: int) -> Gaussians:
        """The Gaussians of a frame, for views from closer than in training, as stage render writes them."""
        return self._gaussians(t).with_low_pass(self._reader.pixel_size_m(self._reader.frame(t)))


def _read_only(values: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    array: np.ndarray[tuple[int, ...], np.dtype[np.float32]] = values.detach().cpu().numpy().astype(np.float32)
    array.setflags(write=False)
    return array
