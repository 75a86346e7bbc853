"""A project as notebooks read it: one run's results as xarray Datasets, DataFrames and NumPy arrays."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from zoosplat.config.experiment import Experiment
from zoosplat.errors import UserError
from zoosplat.geometry.cameras import Cameras
from zoosplat.notebook import reconstruction
from zoosplat.notebook.extras import needs_extra
from zoosplat.notebook.reconstruction import GaussianArrays, PinholeCamera, Reconstructor, RenderedImage
from zoosplat.stages.lookup import open_run
from zoosplat.stages.projects import LEGACY_CONFIG, LEGACY_RUN, Project
from zoosplat.stages.registry import SEGMENT, STAGES, require_stage
from zoosplat.stages.runs import CONFIG
from zoosplat.storage import objects, schema, urls

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

    from zoosplat.notebook.datasets import Axes

MODEL_STAGES = ("pack", "center_rotation", "crop", "train")  # A reconstruction reads their results.


class ProjectReader:
    """The runs of a project and the results of one of them, read-only; `zoosplat.open` makes it.

    Each property reads its stage's result when it is first used, so what a run in progress has finished is there as
    soon as it is asked for. Positions and lengths are metres in the oriented world: +z up, origin at the mean camera
    centre. `t` counts the kept frames from 0; `frame` is the number of a frame in the recording.

    Raises:
        UserError: by every property and method, as one line, where a stage has not finished (which one, and the command
            that runs it), a package is not installed, or a file is damaged or cannot be reached.
    """

    def __init__(self, url: str, run: str | None = None) -> None:
        """See `zoosplat.open`."""
        self._run = open_run(Project.at(url), run)

    def __repr__(self) -> str:
        return f"ProjectReader({self.url!r}, run={self.run_id!r})"

    @property
    def url(self) -> str:
        """Absolute path or `s3://` URL of the project."""
        return self._run.project.url

    @property
    def run_id(self) -> str:
        """Id of the run whose results are read."""
        return self._run.id

    @property
    def runs(self) -> pd.DataFrame:
        """The runs of the project as they stand now, the oldest first, a row each.

        Columns: `id`; `created` (UTC; NaT where it is not known); `state` in words; `latest`, whether it is the run
        that is read when none is named; `changes`, what differs from the run before, a tuple of lines; and means of
        the evaluation, NaN before it is done: `held_out_iou`, `held_out_psnr` (dB), `observed_iou`, `observed_psnr`.

        >>> p.runs["latest"].sum()
        np.int64(1)
        """
        with needs_extra("notebook"):
            from zoosplat.notebook.tables import runs_table
        return runs_table(self._run.project)

    @property
    def config(self) -> Experiment:
        """The configuration of the run, with every path resolved.

        >>> p.config.ingest.image_downsample
        1
        """
        return self._run.experiment

    @property
    def cameras(self) -> Cameras:
        """The C cameras of undistorted pictures at the working resolution, in the oriented world.

        Of cameras that move these are the poses of the first kept frame; `masks` has all of them as `pose`.

        >>> p.cameras.centers_m.shape
        (4, 3)
        """
        self._require("ingest")
        masks = self._run.open_input("ingest")
        attributes: Any = masks.attrs
        poses = schema.read(masks, "world_to_camera")
        return Cameras(
            names=tuple(str(name) for name in attributes["camera_names"]),
            intrinsics=schema.read(masks, "intrinsics"),
            rotation=poses[:, :3, :3],
            translation_m=poses[:, :3, 3],
            distortion=np.zeros((len(poses), 5)),
        )

    @cached_property
    def segments(self) -> xr.Dataset:
        """What stage segment has made of the raw videos, where `data.masks` is auto; lazy, as `images`.

        Pictures are as the cameras saw them, distorted and at full resolution, of all T kept frames and C cameras.

        `probability` [T, C, H, W] uint8, 0 to 255, that a pixel is animal: the mask is where it is 128 or more;
        `all_views` [T, Ch, H, W] uint8, the same of the held-out cameras with the help of the others, if there are any;
        `agreement` [T, C] float32, soft IoU of a mask with what the other views tell, NaN where the view took no part;
        `seen` [T, C] bool, False where a view is left out; `plate` [C, H, W, 3] uint8, `noise` [C] grey levels and
        `light` [T, C, 3, 4]: the background.

        >>> (p.segments["probability"].isel(time=3).sel(camera="1") >= 128).dims
        ('frame_y', 'frame_x')
        """
        require_stage(SEGMENT, self.config)
        return self._dataset(SEGMENT, lazy=True)

    @cached_property
    def masks(self) -> xr.Dataset:
        """Silhouettes of the animal, undistorted, at the working resolution, of all T kept frames and C cameras.

        `mask` [T, C, h, w] bool; `box` [T, C, 4] int32, x0, y0, x1, y1 of the silhouette in pixels.

        Lazy, as `images`: values are read when they are used, and only the storage blocks that hold them.

        >>> p.masks["mask"].isel(time=3).sel(camera="1").any().item()
        True
        """
        return self._dataset("ingest", lazy=True)

    @cached_property
    def images(self) -> xr.Dataset:
        """Pictures of the animal in a window round it, undistorted, of all T kept frames and C cameras.

        `rgb` [T, C, h, w, 3] uint8, white away from the animal; `mask` [T, C, h, w] bool; `origin` [T, C, 2] int32,
        x, y in pixels of the window's corner in the whole frame.

        Lazy: an array is read each time its values are used (`values`, arithmetic, plots), and only the storage blocks
        that hold what was selected: a frame lies in one block for all cameras. `isel`, `sel` and `[...]` with
        integers, slices, arrays of integers or booleans, and their combinations, select without reading; `load()`
        keeps what was selected in memory.

        >>> frame = p.images["rgb"].isel(time=3)
        >>> frame.sel(camera="1").dims
        ('y', 'x', 'channel')
        """
        return self._dataset("pack", lazy=True)

    @cached_property
    def tracking(self) -> xr.Dataset:
        """Where the animal is in each of the T kept frames.

        `centers` [T, 3] m; `angles` [T] rad, its heading about +z, continuous over time; `covs` [T, 3, 3] m^2, the
        covariance of its visual hull; `valid` [T] bool, whether the frame has a hull (elsewhere the first three are
        interpolated); `n_voxels` [T]; `hull_mean`, `hull_cov`: before interpolation; `principal_shift` [T, C, 2] px.

        >>> p.tracking["centers"].sel(axis="z").attrs["units"]
        'm'
        >>> p.tracking["angles"].sel(time=0.1, method="nearest").coords["frame"].item()
        5
        """
        return self._dataset("center_rotation", lazy=False)

    @cached_property
    def features(self) -> xr.Dataset:
        """A descriptor of the animal in each frame that does not depend on its heading; lazy, as `images`.

        `features` [T, D] float32; NaN in frames without a visual hull.

        >>> p.features["features"].dims
        ('time', 'descriptor')
        """
        return self._dataset("features", lazy=True)

    @cached_property
    def embedding(self) -> xr.Dataset:
        """Coordinates of behaviour, a map of them, and what the animal did, of all T kept frames.

        `embedding` [T, E] float32; `map` [T, 2] float32; `neighbours` [T, k] int32, indices t of the most alike frames
        at other times, -1 where there are fewer; `state` [T] int32, -1 where not valid; `valid` [T] bool; `center`
        [T, 3] m; `heading` [T] rad; `speed` [T] m/s; `height` [T] m.

        >>> p.embedding["map"].sel(map_axis="x").dims
        ('time',)
        """
        return self._dataset("embedding", lazy=False)

    def metrics(self) -> pd.DataFrame:
        """The evaluation of the run: a row for each frame of the evaluated split and each camera.

        Columns: `t`, `frame`, `camera`, `held_out` (bool), then the metrics as `zoosplat_model.metrics` and
        `raw_metrics` define them, `iou` and `psnr` (dB) among them; NaN where a metric is not defined.

        >>> p.metrics().groupby("held_out")["iou"].mean().between(0, 1).all()
        np.True_
        """
        with needs_extra("notebook"):
            from zoosplat.notebook.tables import metrics_table
        self._require("evaluate")
        name = f"frames_{self.config.evaluate.split}.csv"
        return metrics_table(objects.read_bytes(urls.join(self._run.input_url("evaluate"), name)))

    def gaussians(self, t: int) -> GaussianArrays:
        """The Gaussians of a kept frame, in the world; needs PyTorch.

        They are those of stage render's PLY file: their scales hold the low-pass filter that the pictures of the
        training had, so that they can be looked at from closer.

        Args:
            t: index among the kept frames; the frame must have a visual hull (`tracking.valid`).

        >>> p.gaussians(5).centers_m.shape[1]
        3
        """
        return self._reconstructor.gaussians(t)

    def render(self, t: int, camera: int | str | PinholeCamera) -> RenderedImage:
        """A picture of the model of a kept frame; needs PyTorch.

        Args:
            t: index among the kept frames; the frame must have a visual hull (`tracking.valid`).
            camera: a camera of the recording, by index or name: the picture then has the pixels of
                `images.rgb[t, camera]` and is the one that stage evaluate measures. Or any other camera.

        Returns:
            image [h, w, 3] uint8 on white, and opacity [h, w] float32.

        >>> image, opacity = p.render(5, "1")
        >>> image.shape[:2] == opacity.shape == p.images["mask"].shape[2:]
        True
        """
        if not isinstance(camera, PinholeCamera):
            camera = self._camera_index(camera)
        return self._reconstructor.render(t, camera)

    # -- what the above share -----------------------------------------------------------------------------------
    @cached_property
    def _axes(self) -> Axes:
        with needs_extra("notebook"):
            from zoosplat.notebook.datasets import Axes
        self._require("ingest")
        return Axes.of(self._run.open_input("ingest"))

    @cached_property
    def _reconstructor(self) -> Reconstructor:
        for stage in MODEL_STAGES:
            self._require(stage)
        return reconstruction.open_reconstructor(self._run)

    def _dataset(self, stage: str, *, lazy: bool) -> xr.Dataset:
        with needs_extra("notebook"):
            from zoosplat.notebook.datasets import read_dataset
        self._require(stage)
        group, where = self._run.open_input(stage), self._run.output_url(stage)
        return read_dataset(group, STAGES[stage].writes, where, self._axes, lazy=lazy)

    def _camera_index(self, camera: int | str) -> int:
        names = self.cameras.names
        if isinstance(camera, str) and camera in names:
            return names.index(camera)
        if not isinstance(camera, str) and 0 <= camera < len(names):
            return camera
        raise UserError(f"{self.url}: there is no camera {camera!r}; there are {len(names)}: {', '.join(names)}")

    def _require(self, stage: str) -> None:
        """Raise UserError, with the command that makes it, where a stage has not finished."""
        result = self._run.result(stage)
        if result.is_done():
            return
        if result.reused:
            result.require()
        done, count = result.shards_done()
        progress = f" ({done} of {count} shards are done)" if count else ""
        legacy = self.run_id == LEGACY_RUN
        config = self._run.project.path(LEGACY_CONFIG) if legacy else self._run.path(CONFIG)
        raise UserError(
            f"{self.url}: stage {stage} of run {self.run_id} has not finished{progress}; "
            f"`zoosplat run {config} --project {self.url} --until {stage}` makes it"
        )
