"""Reads what a project has to show, frame by frame, as far as its stages are done."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
import zarr

from zoosplat.config.experiment import Experiment
from zoosplat.errors import UserError
from zoosplat.formats import media
from zoosplat.formats.comparison import draw_comparison
from zoosplat.geometry import visual_hull
from zoosplat.geometry.rotations import matrix_from_quaternion
from zoosplat.stages.lookup import open_run
from zoosplat.stages.projects import Project
from zoosplat.stages.registry import SEGMENT
from zoosplat.stages.runs import Run
from zoosplat.storage import listing, objects, schema, urls
from zoosplat_flows.viewer.camera_frustum import CameraFrustum
from zoosplat_flows.viewer.mask_overlays import MaskOverlays
from zoosplat_flows.viewer.result_cache import ResultCache

if TYPE_CHECKING:
    from zoosplat_model.gaussians import Gaussians
    from zoosplat_model.predictor import Predictor

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

# Stages whose results the page shows.
STAGES_SHOWN = (SEGMENT, "ingest", "center_rotation", "crop", "pack", "train", "embedding")
PICTURE_SIDE = 320  # pixels of the longer side of a camera's picture in the scene
FLOOR_DEVIATIONS = 2.0  # standard deviations of the hull from its centre down to where the ground is drawn
LEAST_OPACITY = 1 / 255  # of a Gaussian that is drawn: a smaller one changes no colour of 8 bits


class Splats(NamedTuple):
    """N Gaussians for drawing, in voxels from an origin.

    The browser gets half floats, in which the covariances of a mouse in metres would be 0.

    Attributes:
        means: [N, 3] float32, voxels.
        covariances: [N, 3, 3] float32, square voxels.
        opacities: [N, 1] float32, 0 to 1.
        colors: [N, 3] float32, 0 to 1.
        origin: [3] in the world, metres.
        voxel_m: side of a voxel, metres.
    """

    means: F32
    covariances: F32
    opacities: F32
    colors: F32
    origin: F64
    voxel_m: float


class Hull(NamedTuple):
    """A frame's visual hull, in the animal's frame.

    Attributes:
        points: [n, 3] float32, the outermost voxels, metres.
        voxel_m: their spacing.
    """

    points: F32
    voxel_m: float


class EmbeddingMap(NamedTuple):
    """The map of an embedding.

    Attributes:
        place: [T, 2] float32, the place of each frame in the map, without unit.
        valid: [T], whether a frame has a place.
    """

    place: F32
    valid: npt.NDArray[np.bool_]


def project_state(url: str, run_id: str | None = None) -> tuple[object, ...]:
    """A value that changes when there is more, or something else, to see in a project. It takes a few small reads."""
    run = open_run(Project.at(url), run_id)
    done = [run.id, *(run.read_mark(stage) is not None for stage in STAGES_SHOWN)]
    return (*done, *_checkpoints(run))


def _checkpoints(run: Run) -> tuple[object, object]:
    """A value for the checkpoints of the method pose_splatter, and one for those of dynamic; None: there are none."""
    if "train" not in run.results:
        return None, None
    url = run.output_url("train")
    best = objects.read_json(urls.join(url, "best.json"))
    dynamic = sorted(name for name in listing.list_files(url) if name.startswith("chkpnt_"))
    shown = (best.get("checkpoint"), best.get("valid_loss")) if best else None
    return shown, tuple(dynamic) or None


class ProjectData:
    """A project as far as it is done. Its methods may be called from one thread at a time.

    Attributes:
        experiment: the configuration.
        notes: what is there but cannot be shown, and why, a line each.
        n_frames: number T of kept frames; 0 before stage ingest is done.
        times_s: [T] seconds from the recording's start.
        video_frames: [T] indices in the video.
        cameras: the cameras of the recording.
        centers: [T, 3] the animal's centres in the world, metres; None before stage center_rotation is done.
        angles: [T] headings, radians; None as `centers`.
        valid: [T] whether a frame has a hull; None as `centers`.
        floor_m: approximate height of the ground under the animal, metres.
        predictor: the model; None before `load_model`, which takes seconds, and before there is a checkpoint.
        has_model: whether there is a checkpoint to load, also one of a training that has not ended.
        training: whether the training has not ended.
        embedding: the map of the embedding; None where there is none.
        mask_overlays: masks that stage segment has made; None where there are none.
    """

    def __init__(self, url: str, run_id: str | None = None) -> None:
        """Open a run of a project.

        Args:
            url: path or URL of the project.
            run_id: id of a run, or its beginning; None: the latest run.

        Raises:
            UserError: there is no such run.
        """
        self.run = open_run(Project.at(url), run_id)
        self.experiment: Experiment = self.run.experiment
        self.notes: list[str] = []
        self.n_frames, self.cameras = 0, list[CameraFrustum]()
        self.times_s = self.video_frames = np.zeros(0)
        self.centers: F64 | None = None
        self.angles: F64 | None = None
        self.valid: npt.NDArray[np.bool_] | None = None
        self.floor_m = 0.0
        self.embedding: EmbeddingMap | None = None
        self.predictor: Predictor | None = None
        self._cache = ResultCache()
        self._masks, self._tracking = self._open("ingest"), self._open("center_rotation")
        self._crop, self._images = self._open("crop"), self._open("pack")
        segments = self._open(SEGMENT)
        self.mask_overlays = None if segments is None else MaskOverlays(self.experiment, segments)
        if self._masks is not None:
            self._read_recording(self._masks)
            if self._tracking is not None:
                self._read_tracking(self._tracking)
            self._read_embedding()
        ready = all(group is not None for group in (self._masks, self._tracking, self._crop, self._images))
        self.training = self.run.read_mark("train") is None
        found = _checkpoints(self.run)[self.experiment.train.method == "dynamic"]
        self.has_model = ready and (not self.training or found is not None)

    def _open(self, stage: str) -> zarr.Group | None:
        """The group of a stage's result; None where it does not exist yet, or where it cannot be read (it is noted)."""
        if self.run.read_mark(stage) is None:
            return None
        try:
            return self.run.open_input(stage)
        except UserError as error:
            self.notes.append(str(error))
            return None

    def _read_recording(self, masks: zarr.Group) -> None:
        self._mask, self._seen = schema.array(masks, "mask"), schema.read_seen(masks)
        self.n_frames, n_cameras, height, width = self._mask.shape
        self.video_frames = schema.read(masks, "frame")
        attributes: Any = masks.attrs
        self.times_s = self.video_frames / attributes["fps"]
        intrinsics, world_to_camera = schema.read(masks, "intrinsics"), schema.read(masks, "world_to_camera")
        self.cameras = [
            CameraFrustum.from_calibration(
                str(attributes["camera_names"][c]),
                c in self.experiment.holdout_views,
                world_to_camera[c],
                intrinsics[c],
                width,
                height,
            )
            for c in range(n_cameras)
        ]

    def _read_tracking(self, tracking: zarr.Group) -> None:
        keys = ("centers", "angles", "valid", "principal_shift")
        self.centers, self.angles, self.valid, self._shift = (schema.read(tracking, key) for key in keys)
        deviations = np.sqrt(schema.read(tracking, "covs")[:, 2, 2])
        self.floor_m = float(np.median(self.centers[:, 2] - FLOOR_DEVIATIONS * deviations))

    def _read_embedding(self) -> None:
        mark = self.run.read_mark("embedding")
        if mark is None:
            return
        try:
            group = self.run.open_input("embedding")
            place, valid = (schema.read(group, key) for key in ("map", "valid"))
        except UserError as error:
            self.notes.append(str(error))
            return
        except Exception as error:  # a damaged group leads to any error, and the page shows the rest
            where = self.run.output_url("embedding")
            self.notes.append(f"{where}: damaged ({type(error).__name__}: {error}); run stage embedding with --force")
            return
        if len(place) == self.n_frames and valid.any():
            self.embedding = EmbeddingMap(place.astype(np.float32), valid.astype(bool) & np.isfinite(place).all(1))

    def load_model(self, device: str) -> None:
        """Load the best checkpoint, or the newest one for the method dynamic, and note why none can be loaded.

        Args:
            device: auto, cpu, cuda or cuda:0.

        Raises:
            UserError: the device does not exist.
        """
        if not self.has_model:
            return
        from zoosplat_model.devices import pick_device
        from zoosplat_model.registry import open_predictor

        pick_device(device)
        try:
            self.predictor = open_predictor(self.run, device, finished=not self.training)
        except UserError as error:
            self.notes.append(str(error))

    # -- frames -------------------------------------------------------------------------------------------------
    def pictures(self, t: int) -> list[media.Picture]:
        """The picture of each camera in frame t, white around the animal; silhouettes before stage pack is done."""
        return self._cache.get(("pictures", t), lambda: self._pictures(t), lambda made: sum(p.nbytes for p in made))

    def _pictures(self, t: int) -> list[media.Picture]:
        if self._images is not None:
            windows = np.asarray(schema.array(self._images, "rgb")[t])
            origins = schema.read(self._images, "origin", t, t + 1)[0]
        else:
            windows = np.where(np.asarray(self._mask[t])[..., None], 90, 255).astype(np.uint8).repeat(3, axis=3)
            origins = np.zeros((len(self.cameras), 2), int)
        shift = np.zeros((len(self.cameras), 2)) if self.centers is None else self._shift[t]
        made = []
        for camera, window, origin, moved in zip(self.cameras, windows, origins, shift, strict=True):
            whole = np.full((camera.height, camera.width, 3), 255, np.uint8)
            x, y = np.rint(origin + camera.offset - moved).astype(int)
            _paste(whole, window, x, y)
            scale = min(1.0, PICTURE_SIDE / max(whole.shape[:2]))
            size = (max(1, round(camera.width * scale)), max(1, round(camera.height * scale)))
            made.append(np.asarray(cv2.resize(whole, size, interpolation=cv2.INTER_AREA), dtype=np.uint8))
        return made

    def mask_overlay(self, t: int, camera: int, kind: str, whole: bool) -> media.Picture:
        """A raw picture with a mask of `mask_overlays`, which there must be; arguments and errors as of its `draw`."""
        overlays = self.mask_overlays
        assert overlays is not None
        key = ("mask", t, camera, kind, whole)
        return self._cache.get(key, lambda: overlays.draw(t, camera, kind, whole), lambda made: made.nbytes)

    def is_seen(self, t: int, camera: int) -> bool:
        """Whether the view of a camera is there in frame t; the mask of an absent view means nothing."""
        return bool(self._seen[t, camera])

    def has_hull(self, t: int) -> bool:
        """Whether frame t has a hull, and the grid of the hull is known."""
        return self._crop is not None and self.valid is not None and bool(self.valid[t])

    def hull(self, t: int) -> Hull:
        """The visual hull of a frame that has one, from the observed views as in training."""
        return self._cache.get(("hull", t), lambda: self._hull(t), lambda made: made.points.nbytes)

    def _hull(self, t: int) -> Hull:
        assert self._crop is not None
        assert self.centers is not None
        assert self.angles is not None
        attributes: Any = self._crop.attrs
        axis = visual_hull.grid_axis(attributes["ell_m"], attributes["grid_size"])
        ranges = schema.read(self._crop, "volume_idx")
        x, y, z = (axis[start:stop] for start, stop in ranges)
        observed = [c for c, camera in enumerate(self.cameras) if not camera.held_out]
        seen = [c for c in observed if self.is_seen(t, c)]
        aimed = np.stack([camera.intrinsics for camera in self.cameras])[seen]
        aimed[:, :2, 2] += self._shift[t][seen]
        cells, _ = visual_hull.hull_indices(
            np.asarray(self._mask[t])[seen],
            aimed,
            np.stack([camera.world_to_camera for camera in self.cameras])[seen],
            (x, y, z),
            self.centers[t],
            float(self.angles[t]),
            visual_hull.min_views(len(observed), len(observed) - len(seen)),
        )
        filled = np.zeros([n + 2 for n in (len(x), len(y), len(z))], bool)
        filled[tuple(cells.T + 1)] = True
        inner = filled.copy()
        for dim in range(3):
            inner &= np.roll(filled, 1, dim) & np.roll(filled, -1, dim)
        i, j, k = np.argwhere(filled & ~inner).T - 1
        points = np.stack([x[i], y[j], z[k]], -1).astype(np.float32)
        return Hull(points, float(axis[1] - axis[0]))

    def has_gaussians(self, t: int) -> bool:
        """Whether the model is loaded and predicts frame t."""
        return self.predictor is not None and bool(self.predictor.reader.valid[t])

    def _gaussians(self, t: int) -> Gaussians:
        assert self.predictor is not None
        predictor = self.predictor
        return self._cache.get(
            ("gaussians", t), lambda: predictor.gaussians(t), lambda made: sum(v.nbytes for v in made)
        )

    def _smoothed_gaussians(self, t: int) -> Gaussians:
        """Gaussians of frame t in the world, smoothed for views from closer than the cameras, as in stage render."""
        assert self.predictor is not None
        reader = self.predictor.reader
        return self._gaussians(t).with_low_pass(reader.pixel_size_m(reader.frame(t)))

    def splats(self, t: int) -> Splats:
        """The Gaussians of a frame that has a hull."""
        assert self.predictor is not None
        means, quats, scales, opacities, colors = (v.cpu().numpy() for v in self._smoothed_gaussians(t))
        drawn = opacities >= LEAST_OPACITY
        means, quats, scales, opacities, colors = (v[drawn] for v in (means, quats, scales, opacities, colors))
        voxel_m, origin = self.predictor.reader.voxel_size_m, self.predictor.reader.pose(t)[0].cpu().numpy()
        if self.experiment.flat_gaussians:
            scales = scales * np.array([1, 1, 0], np.float32)
        axes = matrix_from_quaternion(quats) * (scales / voxel_m)[:, None]
        return Splats(
            ((means - origin) / voxel_m).astype(np.float32),
            (axes @ axes.transpose(0, 2, 1)).astype(np.float32),
            opacities[:, None],
            colors,
            origin.astype(float),
            voxel_m,
        )

    def comparison(self, t: int, camera: int) -> media.Picture:
        """Truth, rendering and difference as stage evaluate shows them, [h, w, 3].

        The frame has a hull, and the view is there.
        """
        return self._cache.get(("comparison", t, camera), lambda: self._comparison(t, camera), lambda made: made.nbytes)

    def _comparison(self, t: int, camera: int) -> media.Picture:
        assert self.predictor is not None
        reader, frame = self.predictor.reader, self.predictor.reader.frame(t)
        view = slice(camera, camera + 1)
        rgb, alpha = self.predictor.render(
            self._gaussians(t),
            frame.world_to_camera[view],
            frame.intrinsics[view],
            reader.width,
            reader.height,
            cameras=[camera],
        )
        layers = rgb[0], alpha[0], frame.composite_on_white()[camera], frame.mask[camera] > 0
        return draw_comparison(*(layer.cpu().numpy() for layer in layers))

    def render_from(
        self, t: int, position: F64, to_world: F64, fov_rad: float, width: int, height: int
    ) -> media.Picture:
        """Render a frame that has a hull from any viewpoint, [height, width, 3].

        Args:
            t: kept frame.
            position: [3] of the viewpoint, metres.
            to_world: [3, 3] rotation from the view's axes (x right, y down, z forwards) to the world's.
            fov_rad: angle from the picture's lower to its upper edge.
            width, height: pixels.
        """
        assert self.predictor is not None
        gaussians = self._smoothed_gaussians(t)
        focal = height / 2 / math.tan(fov_rad / 2)
        pose = np.eye(4)
        pose[:3, :3], pose[:3, 3] = to_world.T, -to_world.T @ position
        intrinsics = np.array([[focal, 0, (width - 1) / 2], [0, focal, (height - 1) / 2], [0, 0, 1]])
        like = gaussians.means
        views = like.new_tensor(pose)[None], like.new_tensor(intrinsics)[None]
        rgb, _ = self.predictor.render(gaussians, *views, width, height)
        return media.to_uint8(rgb[0].cpu().numpy())


def _paste(whole: media.Picture, window: media.Picture, x: int, y: int) -> None:
    """Copy a picture into a larger one, its first pixel to (x, y). Pixels that would lie outside are left out."""
    height, width = whole.shape[:2]
    x0, y0 = max(x, 0), max(y, 0)
    x1, y1 = min(x + window.shape[1], width), min(y + window.shape[0], height)
    if x0 < x1 and y0 < y1:
        whole[y0:y1, x0:x1] = window[y0 - y : y1 - y, x0 - x : x1 - x]
