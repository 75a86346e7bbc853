"""Frames of a recording as tensors: the windows of all cameras, their poses and intrinsics, and the animal's place."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
import zarr
from torch import Tensor

from zoosplat.config.experiment import Experiment
from zoosplat.errors import UserError
from zoosplat.stages.memory import CACHE_BYTES, READ_AHEAD_FRAMES
from zoosplat.stages.runs import Run
from zoosplat.storage import schema
from zoosplat_model.background import lit_plate

Split = Literal["train", "valid", "test"]


@dataclass(frozen=True)
class Frame:
    """One time, seen by all C cameras, in windows of h x w pixels.

    Places are in calibration pixels: pixel centres have integer coordinates.

    Attributes:
        t: index among the kept frames.
        rgb: [C, h, w, 3] float32, 0 to 1, the photograph near the animal, white elsewhere; the whole photograph where
            there are plates.
        mask: [C, h, w] float32, 0 or 1.
        intrinsics: [C, 3, 3] float32, pixels of the window.
        world_to_camera: [C, 4, 4] float32, metres.
        origin: [C, 2] int64, x, y of the window's corner in the whole frame.
        center: [3] float32, metres, the animal's centre in the world.
        angle: [] float32, radians, its heading about +z.
        tilt: [4] float32, unit quaternion (w, x, y, z), its rotation before that about +z; None means none.
        seen: [C] bool, whether the view is there; None means that all are. The mask of an absent view means nothing.
        background: [C, h, w, 3] float32, 0 to 1, what the windows show without the animal; None where nobody needs it.
    """

    t: int
    rgb: Tensor
    mask: Tensor
    intrinsics: Tensor
    world_to_camera: Tensor
    origin: Tensor
    center: Tensor
    angle: Tensor
    tilt: Tensor | None = None
    seen: Tensor | None = None
    background: Tensor | None = None

    def composite_on_white(self) -> Tensor:
        """The masked picture on white, [C, h, w, 3], with which renderings are compared."""
        mask = self.mask[..., None]
        return self.rgb * mask + (1 - mask)


def copy_to_device(value: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the CPU to the device, without waiting for the work that the device has queued."""
    return value.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else value.to(device)


class FrameReader:
    """Reads frames of `images.zarr` with the tracking and the crop that belong to them.

    Attributes:
        n_frames, n_cameras: T and C.
        camera_names: [C] names.
        observed: indices of the cameras that are carved from and trained on.
        held_out: indices of the other cameras.
        valid: [T] bool, whether a frame has a visual hull.
        height: of a window, working pixels.
        width: of a window, working pixels.
        full_height: of the whole frame, working pixels.
        full_width: of the whole frame, working pixels.
        image_downsample: video pixels along the edge of a working pixel.
        fps: kept frames in a second.
        world_to_camera: [C, 4, 4] float32 on the device.
        full_intrinsics: [C, 3, 3] float32 on the device, of the whole frame without principal shift.
        times: [T] float32, 0 to 1 from the first to the last kept frame.
        moving: whether the cameras move; then `world_to_camera` is that of the first frame.
        seen: [T, C] bool, whether the view is there in that frame. An absent view tells nothing: it is neither carved
            from, nor trained on, nor measured.
        has_plates: whether the background of the cameras is known; then `rgb` of a frame is the whole picture.
        volume_idx: (start, stop) of the kept grid points along x, y, z.
        ell_m: edge of the cubic grid, metres.
        grid_size: grid points along its edge.
        voxel_size_m: spacing of the grid points, metres.
    """

    def __init__(
        self,
        images: zarr.Group,
        tracking: zarr.Group,
        crop: zarr.Group,
        experiment: Experiment,
        device: torch.device | str = "cpu",
    ) -> None:
        """Open the groups of a project; `open_reader` does so for a run.

        Raises:
            UserError: the groups do not belong together, or a held-out view does not exist.
        """
        for group, name in ((images, "images.zarr"), (tracking, "tracking.zarr"), (crop, "crop.zarr")):
            schema.validate(group, name, str(group.store_path))
        self.device = torch.device(device)
        self._rgb, self._mask = (schema.FrameArray(images, name) for name in ("rgb", "mask"))
        self.n_frames, self.n_cameras, self.height, self.width = (int(n) for n in self._mask.shape)
        attributes: dict[str, Any] = dict(images.attrs)
        self.full_height, self.full_width = int(attributes["full_height"]), int(attributes["full_width"])
        self.image_downsample = int(attributes["image_downsample"])
        self.fps = float(attributes["fps"]) / int(attributes.get("frame_jump", 1))
        self.camera_names = [str(name) for name in attributes["camera_names"]]

        self.held_out = sorted(experiment.holdout_views)
        if self.held_out and not 0 <= self.held_out[0] <= self.held_out[-1] < self.n_cameras:
            raise UserError(f"holdout_views {self.held_out}: the recording has cameras 0 to {self.n_cameras - 1}")
        self.observed = [c for c in range(self.n_cameras) if c not in self.held_out]

        self._origin = schema.read(images, "origin").astype(np.int64)
        self._intrinsics = schema.read(images, "intrinsics")
        self._centers = schema.read(tracking, "centers")
        self.valid = schema.read(tracking, "valid").astype(bool)
        if len(self.valid) != self.n_frames:
            raise UserError(f"tracking has {len(self.valid)} frames, images have {self.n_frames}; run center_rotation")
        self.world_to_camera = self._tensor(schema.read(images, "world_to_camera"))
        self.full_intrinsics = self._tensor(self._intrinsics)
        of_window = np.tile(self._intrinsics, (self.n_frames, 1, 1, 1))
        of_window[:, :, :2, 2] += schema.read(tracking, "principal_shift") - self._origin
        # Intrinsics and places of all frames are copied at once. One by one, each copy would wait for the steps before.
        self._of_window = self._tensor(of_window)
        self._places = self._tensor(self._centers), self._tensor(schema.read(tracking, "angles"))
        self._copies = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None  # type: ignore[no-untyped-call]

        self._images, self.has_plates = images, "plate" in images
        self.times = np.linspace(0, 1, self.n_frames, dtype=np.float32)
        self.moving = "pose" in images
        self.seen = schema.read_seen(images)
        self._seen = None if self.seen.all() else torch.as_tensor(self.seen, device=self.device)
        if self.moving:
            self._poses = self._tensor(schema.read(images, "pose"))
            self.times = schema.read(images, "time").astype(np.float32)
        self.ell_m, self.grid_size = float(str(crop.attrs["ell_m"])), int(str(crop.attrs["grid_size"]))
        self.voxel_size_m = self.ell_m / (self.grid_size - 1)
        self.volume_idx = tuple((int(a), int(b)) for a, b in schema.read(crop, "volume_idx"))
        self._cache: dict[int, tuple[Tensor, Tensor]] | None = None
        if self.n_frames * self.n_cameras * self.height * self.width * 4 <= CACHE_BYTES:
            self._cache = {}

    def _tensor(self, values: Any) -> Tensor:
        return torch.as_tensor(np.asarray(values, dtype=np.float32), device=self.device)

    def split(self, name: Split) -> list[int]:
        """Valid kept frames of the first ("train"), second ("valid") or last ("test") third of all kept frames.

        Moving cameras have held-out pictures of all times. So their splits are the frames of which the observed cameras
        ("train") or the held-out ones ("valid" and "test") have pictures.
        """
        if self.moving:
            cameras = self.observed if name == "train" or not self.held_out else self.held_out
            return np.flatnonzero(self.valid & self.seen[:, cameras].any(axis=1)).tolist()
        third = {"train": 0, "valid": 1, "test": 2}[name]
        start, stop = self.n_frames * third // 3, self.n_frames * (third + 1) // 3
        return [t for t in range(start, stop) if self.valid[t]]

    def footprint_px(self) -> int:
        """Size of a voxel in the view that shows it largest, pixels, odd; the depth is a median over frames."""
        centers = self._centers[self.valid] if self.valid.any() else self._centers
        camera = self.world_to_camera.cpu().numpy().astype(float)
        depth = np.median(np.einsum("cj,tj->tc", camera[:, 2, :3], centers) + camera[:, 2, 3], axis=0)
        largest = np.max(self._intrinsics[:, 0, 0] * self.voxel_size_m / np.maximum(depth, self.voxel_size_m))
        return 2 * int(np.ceil(largest) // 2) + 1

    def pixel_size_m(self, frame: Frame) -> float:
        """Width of a window's pixel at the animal's centre, metres: the mean over the observed views of a frame."""
        depth = frame.world_to_camera[:, 2, :3] @ frame.center + frame.world_to_camera[:, 2, 3]
        return float((depth / frame.intrinsics[:, 0, 0])[self.observed].mean())

    def pose(self, t: int) -> tuple[Tensor, Tensor]:
        """Centre ([3] metres) and heading ([] radians) of the animal, interpolated where the frame is not valid."""
        centers, angles = self._places
        return centers[t], angles[t]

    @cached_property
    def _plates(self) -> tuple[Tensor, Tensor]:
        """Plates [C, H, W, 3] uint8 and light [T, C, 3, 4] float32, on the device."""
        plate, light = (schema.read(self._images, key) for key in schema.BACKGROUND)
        return torch.as_tensor(plate, device=self.device), self._tensor(light)

    def background_in(self, t: int, camera: int, box: tuple[int, int, int, int]) -> Tensor:
        """As `background`, [h, w, 3], in a box of the whole frame of a camera: x0, y0, x1, y1 (exclusive), pixels."""
        (plates, light), (x0, y0, x1, y1) = self._plates, box
        origin = torch.tensor([[x0, y0]], dtype=torch.float32, device=self.device)
        part = plates[camera : camera + 1, y0:y1, x0:x1]
        return lit_plate(part, light[t, camera : camera + 1], origin, (self.full_width, self.full_height))[0]

    def background(self, t: int) -> Tensor:
        """What the windows of frame t show without the animal, [C, h, w, 3] float32, 0 to 1; there must be plates."""
        plates, light = self._plates
        corners = zip(plates, self._origin[t].tolist(), strict=True)
        windows = torch.stack([plate[y : y + self.height, x : x + self.width] for plate, (x, y) in corners])
        origin = copy_to_device(torch.from_numpy(self._origin[t].astype(np.float32)), self.device)
        return lit_plate(windows, light[t], origin, (self.full_width, self.full_height))

    def _read(self, t: int) -> tuple[Tensor, Tensor]:
        if self._cache is not None and t in self._cache:
            return self._cache[t]
        rgb, mask = (torch.from_numpy(array[t]) for array in (self._rgb, self._mask))
        if self._copies is not None:
            # Copies have their own stream, because on the stream of the steps both would wait for each other.
            with torch.cuda.stream(self._copies):
                rgb, mask = copy_to_device(rgb, self.device), copy_to_device(mask, self.device)
            self._copies.synchronize()
        if self._cache is not None:
            self._cache[t] = rgb, mask
        return rgb, mask

    def _frame(self, t: int, rgb: Tensor, mask: Tensor) -> Frame:
        center, angle = self.pose(t)
        if self._copies is not None:
            for value in (rgb, mask):  # so that the next copies do not overwrite them before the steps have used them
                value.record_stream(torch.cuda.current_stream(self.device))
        return Frame(
            t=t,
            rgb=rgb.float() / 255,
            mask=mask.float(),
            intrinsics=self._of_window[t],
            world_to_camera=self._poses[t] if self.moving else self.world_to_camera,
            origin=torch.from_numpy(self._origin[t]),
            center=center,
            angle=angle,
            seen=None if self._seen is None else self._seen[t],
        )

    def frame(self, t: int) -> Frame:
        """Read one frame; its tensors lie on the device, but for `origin`, which stays on the CPU."""
        return self._frame(t, *self._read(t))

    def prefetch(self, frames: Iterable[int]) -> Generator[Frame]:
        """Yield frames in the given order; threads read the next ones meanwhile."""
        waiting: deque[tuple[int, Future[tuple[Tensor, Tensor]]]] = deque()
        with ThreadPoolExecutor(READ_AHEAD_FRAMES, thread_name_prefix="frames") as pool:
            for t in frames:
                waiting.append((t, pool.submit(self._read, t)))
                if len(waiting) > READ_AHEAD_FRAMES:
                    first, future = waiting.popleft()
                    yield self._frame(first, *future.result())
            while waiting:
                first, future = waiting.popleft()
                yield self._frame(first, *future.result())


def open_reader(run: Run, device: torch.device) -> FrameReader:
    """The frames of a run whose stages pack, center_rotation and crop are done.

    Raises:
        UserError: one of these stages is missing, or their results do not belong together.
    """
    return FrameReader(
        run.open_input("pack"),
        run.open_input("center_rotation"),
        run.open_input("crop"),
        run.experiment,
        device,
    )
