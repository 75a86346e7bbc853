"""Masks of one instant of all cameras: each view alone at first, and then with what the other views tell."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from zoosplat.config.experiment import Experiment
from zoosplat.geometry.cameras import Cameras
from zoosplat.machine import usable_cores
from zoosplat.recording.video import Planes
from zoosplat_segment import hull
from zoosplat_segment.adaptation import Lesson
from zoosplat_segment.background import apply_light, fit_light
from zoosplat_segment.localization import locate
from zoosplat_segment.network import NO_PRIOR, MaskNetwork, load_network
from zoosplat_segment.rig import Rig
from zoosplat_segment.sam import LONGEST, Embedding, Sam
from zoosplat_segment.seeds import seed
from zoosplat_segment.windows import Window, as_tensor, pixels_of, whole_picture, windows_round, zoom

U8 = npt.NDArray[np.uint8]
Box = tuple[float, float, float, float]  # first and last column, first and last row, pixels
FINE = 320  # pixels; longest edge of a window round the animal
MARGIN = 0.15  # rim of a window, of the longer edge of the animal's box
GRID = 32, 64  # voxels along an edge of the hull, for small pictures and for large ones
PIXELS_PER_VOXEL = 6  # pixels of the picture's longer edge for each voxel between the two
CUBE_GRID = 28  # voxels along an edge where the cube round the animal is looked for
PRIOR_STEP = 4.0  # pixels of a window between the rays along which the hull is looked at
SAMPLES = 80  # places on a ray
SURE = 0.5  # value from which hull and mask count as the animal
FAINT = 0.25  # value of a prior from which the animal may be there
HALF = 0.6  # half the edge of the first cube, in edges of the tracking cube
ROOM = 1.25  # edge of the second cube over the extent of the hull
MIN_TRUSTED = 3  # views that must agree before others are left out of the hull
LEAST_PIECE = 0.02  # area of a piece of a mask that is kept, of the largest piece
NOISE_OF_AVERAGE = 0.6  # noise of averaged pixels over that of single ones; compression leaves little to average


@dataclass(frozen=True, eq=False)
class Preparation:
    """What is known of a recording of C cameras of W x H pixels. Pictures are as the cameras saw them (distorted).

    Attributes:
        plates: [C, H, W, 3] uint8, RGB of the background.
        noise: [C] float32, standard deviation of a pixel against the plate, grey levels.
        floor_m: height of the floor in the oriented world (+z up, origin at the mean camera), metres; None: not known.
        weights: tensors of the network by name, as they are after it has learned from the recording; may be empty.
        warnings: lines for the user about what is odd.
    """

    plates: npt.NDArray[np.uint8]
    noise: npt.NDArray[np.float32]
    floor_m: float | None
    weights: dict[str, Tensor]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class InstantMasks:
    """The masks of an instant of C cameras of W x H pixels, of which Ch are held out.

    Attributes:
        probability: [C, H, W] uint8, 0 to 255, that a pixel is animal. Of observed cameras it comes from all observed
            views together, of a held-out camera from that camera alone.
        all_views: [Ch, H, W] uint8, the same of the held-out cameras, ascending, with the help of the observed views.
        light: [C, 3, 4] float32, how the background differs from the plate: see the README of the service.
        agreement: [C] float32, soft IoU of the view's mask with the silhouette that the other observed views tell; NaN
            where the view took no part.
        seen: [C] bool, False where the view is absent. A held-out view that disagrees is not: it must serve as truth.
    """

    probability: U8
    all_views: U8
    light: npt.NDArray[np.float32]
    agreement: npt.NDArray[np.float32]
    seen: npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class _Found:
    """Masks in windows, and what the other views tell there; C entries each, None without a window."""

    windows: list[Window | None]
    masks: list[Tensor | None]
    priors: list[Tensor | None]
    pictures: _Pictures | None = None
    lowest_m: float | None = None  # height of the hull's lowest point, about


@dataclass(frozen=True, eq=False)
class Study:
    """What the preparation of a recording learns from an instant.

    Attributes:
        masks: [C, h, w] of whole pictures, downsampled; held-out cameras see for themselves.
        lesson: what the observed views teach the network; None where they do not agree on a place.
        lowest_m: height of the hull's lowest point, metres; None without a hull.
        agreement: mean soft IoU of the observed views with what the others tell; NaN without a hull.
    """

    masks: Tensor
    lesson: Lesson | None
    lowest_m: float | None
    agreement: float


@dataclass(frozen=True, eq=False)
class _Pictures:
    """Windows of n views: frames and lit plates [n, 3, h, w], 0 to 255, the noise [n], 0 to 1, and seeds [n, h, w].

    `embeddings` is what SAM has seen in them, so that it looks once for all rounds.
    """

    views: list[int]
    frames: Tensor
    plates: Tensor
    noise: Tensor
    seeds: Tensor
    embeddings: dict[int, Embedding] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class _Instant:
    """C frames, their light [C, 3, 4], and keypoints [C, K, 3]; None: there are none."""

    frames: Sequence[Planes]
    light: Tensor
    keypoints: npt.NDArray[np.float32] | None

    def seed(self, mask: Tensor, c: int, window: Window, size: tuple[int, int]) -> Tensor:
        """A mask of view c with the view's own keypoints in it: see `seeds.seed`."""
        return mask if self.keypoints is None else seed(mask, self.keypoints[c], window, size)


class Segmenter:
    """Segments one instant after the other, each without regard to the others.

    Args:
        preparation: of the recording.
        experiment: the configuration.
        cameras: at full resolution, with distortion, in the oriented world, metres.
        size: width and height of the pictures, pixels.
        device: where to compute.
        sam: what makes the masks in windows; None: the network.
    """

    def __init__(
        self,
        preparation: Preparation,
        experiment: Experiment,
        cameras: Cameras,
        size: tuple[int, int],
        device: torch.device,
        sam: Sam | None = None,
    ) -> None:
        self.size, self.device = size, device
        self.rig = Rig(cameras, size, device)
        self.plates = preparation.plates
        self.floor_m = preparation.floor_m
        self.noise = torch.as_tensor(preparation.noise, dtype=torch.float32, device=device) / 255
        reach_m = float(np.linalg.norm(cameras.centers_m - cameras.centers_m.mean(axis=0), axis=1).max())
        self.ell_m = experiment.center_rotation.ell * (reach_m if experiment.unit == "normalized" else 1.0)
        self.pool = ThreadPoolExecutor(min(len(cameras), usable_cores()))
        self.rounds, self.min_agreement = experiment.segment.rounds, experiment.segment.min_agreement
        self.held_out = sorted(experiment.holdout_views)
        self.observed = [c for c in range(len(cameras)) if c not in self.held_out]
        self.whole = whole_picture(size)
        self.sam, self.longest = sam, FINE if sam is None else LONGEST
        self.network = load_network(preparation.weights or None, device)
        self.single = load_network(None, device)
        self.small_plates = self._small([self.whole.cut_picture(plate, size) for plate in self.plates])
        self.grid = int(np.clip(max(size) // PIXELS_PER_VOXEL, *GRID))
        self.voxels, self.few_voxels = hull.cube_voxels(self.grid, device), hull.cube_voxels(CUBE_GRID, device)

    def _small(self, pictures: Sequence[U8]) -> Tensor:
        return as_tensor(pictures, self.device)

    # -- steps ----------------------------------------------------------------------------------------------------
    def _run(self, network: MaskNetwork, frames: Tensor, plates: Tensor, noise: Tensor, prior: Tensor) -> Tensor:
        """[n, h, w] probabilities; pictures 0 to 255, priors [n, h, w]."""
        with torch.autocast("cuda", torch.float16, enabled=self.device.type == "cuda"):
            logits = network(frames / 255, plates / 255, noise, prior[:, None])
        masks: Tensor = logits.float().sigmoid()[:, 0]
        return masks

    def coarse(self, frames: Sequence[Planes]) -> tuple[Tensor, Tensor]:
        """Masks [C, h, w] of whole pictures, each view alone, and the light [C, 3, 4]."""
        small = self._small(list(self.pool.map(lambda frame: self.whole.cut(frame, self.size), frames)))
        light = fit_light(small, self.small_plates)
        lit = apply_light(self.small_plates, light)
        none = torch.full_like(small[:, 0], NO_PRIOR)
        return self._run(self.single, small, lit, self.noise * NOISE_OF_AVERAGE, none), light

    def _values(self, windows: Sequence[Window], masks: Sequence[Tensor], world: Tensor, spacing_m: float) -> Tensor:
        """[C, N] values of masks in windows at voxels [N, 3]."""
        pixels, _ = self.rig.project(world)
        seen = self.rig.inside(pixels)
        per_metre = self.rig.pixels_per_metre(world.mean(0))
        out = []
        for c, (window, mask) in enumerate(zip(windows, masks, strict=True)):
            corner = torch.tensor([window.x, window.y], dtype=torch.float32, device=self.device)
            place = (pixels[c] - corner + 0.5) / window.scale - 0.5
            footprint = max(1, round(float(per_metre[c]) * spacing_m / window.scale))
            out.append(hull.sample_views(mask[None], place[None], seen[c : c + 1], footprint)[0])
        return torch.stack(out)

    def _above_floor(self, world: Tensor) -> Tensor:
        if self.floor_m is None:
            return torch.ones(len(world), dtype=torch.bool, device=self.device)
        return world[:, 2] > self.floor_m

    def _cube(self, windows: Sequence[Window], masks: Sequence[Tensor], center: Tensor) -> tuple[Tensor, float]:
        """Centre and half edge of a cube that just holds the hull, from one that holds the animal for sure."""
        half = HALF * self.ell_m
        flags = self._flags(self.observed)
        for _ in range(2):
            world = center + half * self.few_voxels
            values = self._values(windows, masks, world, 2 * half / CUBE_GRID)
            together = hull.all_views(values, flags) * self._above_floor(world)
            inside = world[together > SURE]
            if len(inside) < 8:
                return center, HALF * self.ell_m
            low, high = inside.amin(0), inside.amax(0)
            center = (low + high) / 2
            half = min(HALF * self.ell_m, max(ROOM / 2 * float((high - low).max()), 0.15 * self.ell_m))
        return center, half

    def _flags(self, views: Sequence[int]) -> Tensor:
        flags = torch.zeros(len(self.rig), dtype=torch.bool, device=self.device)
        flags[list(views)] = True
        return flags

    def _priors(
        self,
        windows: Sequence[Window],
        masks: Sequence[Tensor],
        trusted: Sequence[int],
        cube: tuple[Tensor, float],
        targets: Sequence[Window | None],
    ) -> list[Tensor | None]:
        """What the trusted views but the view itself tell of each target window, [h, w] each."""
        center, half = cube
        world = center + half * self.voxels
        values = self._values(windows, masks, world, 2 * half / self.grid)
        volumes = hull.leave_one_out(values, self._flags(trusted)) * self._above_floor(world)
        volumes = volumes.view(-1, *(self.grid,) * 3)
        out: list[Tensor | None] = []
        for c, target in enumerate(targets):
            if target is None:
                out.append(None)
                continue
            places = pixels_of(target, PRIOR_STEP, self.device)
            points = hull.ray_points(self.rig.centers[c], self.rig.rays_at(c, places), center, half, SAMPLES)
            small = hull.look(volumes[c : c + 1], points[None])
            size = target.height, target.width
            small = small * self.rig.inside(places)
            out.append(F.interpolate(small[None], size=size, mode="bilinear", align_corners=False)[0, 0])
        return out

    def _look(
        self, frames: Sequence[Planes], keypoints: npt.NDArray[np.float32] | None = None
    ) -> tuple[_Instant, Tensor]:
        """An instant, and its masks [C, h, w] of whole pictures, each view alone, with its own keypoints in them."""
        coarse, light = self.coarse(frames)
        instant = _Instant(frames, light, keypoints)
        return instant, torch.stack([instant.seed(mask, c, self.whole, self.size) for c, mask in enumerate(coarse)])

    def _cut(self, instant: _Instant, windows: Sequence[Window | None]) -> _Pictures:
        """What the network is given of the windows, but for the priors."""
        chosen = [(c, window) for c, window in enumerate(windows) if window is not None]
        views = [c for c, _ in chosen]
        if not chosen:
            nothing = torch.empty(0)
            return _Pictures([], nothing, nothing, nothing, nothing)

        def cut(item: tuple[int, Window]) -> tuple[U8, U8]:
            c, window = item
            return window.cut(instant.frames[c], self.size), window.cut_picture(self.plates[c], self.size)

        parts = list(self.pool.map(cut, chosen))
        pictures, backgrounds = (as_tensor([part[i] for part in parts], self.device) for i in (0, 1))
        lit = _light_windows(backgrounds, instant.light[views], [window for _, window in chosen], self.size)
        averaged = torch.tensor([window.scale > 1 for _, window in chosen], device=self.device)
        noise = self.noise[views] * torch.where(averaged, NOISE_OF_AVERAGE, 1.0)
        none = torch.zeros_like(pictures[0, 0])
        seeds = torch.stack([instant.seed(none, c, window, self.size) for c, window in chosen])
        return _Pictures(views, pictures, lit, noise, seeds)

    def _fine(
        self,
        network: MaskNetwork,
        pictures: _Pictures,
        priors: Sequence[Tensor | None],
        hints: Sequence[Tensor | None] | None = None,
    ) -> list[Tensor | None]:
        """Masks in windows, one a camera.

        Args:
            network: what makes them, unless SAM does.
            pictures: the windows.
            priors: [h, w] what the other views tell of each; None: nothing.
            hints: [h, w] where the animal is in each, for SAM; None: where the priors tell.
        """
        out: list[Tensor | None] = [None] * len(self.rig)
        if not pictures.views:
            return out
        none = torch.full(pictures.frames.shape[2:], NO_PRIOR, device=self.device)
        told = torch.stack([none if (prior := priors[c]) is None else prior for c in pictures.views])
        told = torch.maximum(told, pictures.seeds)
        if self.sam is None:
            masks = self._run(network, pictures.frames, pictures.plates, pictures.noise, told)
        else:
            shown = told if hints is None else torch.stack([hint for hint in hints if hint is not None])
            masks = self.sam.masks(pictures.frames, shown, pictures.embeddings)
        for c, mask in zip(pictures.views, masks, strict=True):
            out[c] = mask
        return out

    # -- an instant -----------------------------------------------------------------------------------------------
    @torch.inference_mode()
    def segment(self, frames: Sequence[Planes], keypoints: npt.NDArray[np.float32] | None = None) -> InstantMasks:
        """The masks of an instant.

        Args:
            frames: C whole frames as the cameras saw them.
            keypoints: [C, K, 3] x, y in pixels as the cameras saw them, and confidence, NaN where they are not told;
                None: there are none. Those of a view are seeds of that view's masks.
        """
        instant, coarse = self._look(frames, keypoints)
        n = len(frames)
        whole = [self.whole] * n
        center = locate(self.rig, coarse, self.whole.scale, self.observed, self.ell_m, self.floor_m)
        # Where no views agree on a place, each view is left with what it sees itself.
        alone = self._alone(instant, coarse, self.held_out if center is not None else range(n))
        agreement, seen = np.full(n, np.nan, np.float32), np.ones(n, bool)
        if center is None:
            found = alone
        else:
            found = self._together(instant, whole, list(coarse), center)
            for c in range(n):
                mask, prior = found.masks[c], found.priors[c]
                if mask is None or prior is None:
                    seen[c] = c in self.held_out
                    continue
                agreement[c] = _soft_iou(mask, prior)
                seen[c] = c in self.held_out or bool(agreement[c] >= self.min_agreement)
        probability = np.stack(
            [self._paste(alone if c in self.held_out else found, c, told=c not in self.held_out) for c in range(n)]
        )
        helped = [self._paste(found, c, told=True) for c in self.held_out]
        shape = (0, self.size[1], self.size[0])
        return InstantMasks(
            probability,
            np.stack(helped) if helped else np.zeros(shape, np.uint8),
            instant.light.cpu().numpy(),
            agreement,
            seen,
        )

    @torch.inference_mode()
    def study(self, frames: Sequence[Planes]) -> Study:
        """What a recording's preparation asks of an instant."""
        instant, coarse = self._look(frames)
        center = locate(self.rig, coarse, self.whole.scale, self.observed, self.ell_m, self.floor_m)
        if center is None:
            return Study(coarse, None, None, float("nan"))
        found = self._together(instant, [self.whole] * len(frames), list(coarse), center)
        alone = self._alone(instant, coarse, self.held_out)
        masks = [
            self._paste(alone if c in self.held_out else found, c, c not in self.held_out) for c in range(len(frames))
        ]
        small = [self.whole.cut_picture(np.repeat(mask[..., None], 3, 2), self.size)[..., 0] for mask in masks]
        lesson, agreement = self._lesson(found)
        return Study(torch.from_numpy(np.stack(small)).to(self.device).float() / 255, lesson, found.lowest_m, agreement)

    def _lesson(self, found: _Found) -> tuple[Lesson | None, float]:
        """What the observed views teach, and the mean of their agreement."""
        pictures = found.pictures
        assert pictures is not None
        rows, masks, priors = [], [], []
        for row, c in enumerate(pictures.views):
            mask, prior = found.masks[c], found.priors[c]
            if c in self.observed and mask is not None and prior is not None and self._agrees(found, c):
                rows.append(row)
                masks.append(mask)
                priors.append(prior)
        if not rows:
            return None, float("nan")
        agreement = float(np.mean([_soft_iou(mask, prior) for mask, prior in zip(masks, priors, strict=True)]))
        shown = pictures.frames[rows], pictures.plates[rows], pictures.noise[rows]
        return Lesson(*shown, torch.stack(priors), torch.stack(masks)), agreement

    def _alone(self, instant: _Instant, coarse: Tensor, views: Iterable[int]) -> _Found:
        """Masks of some views, each by itself, in a window round its largest piece."""
        nothing: list[Tensor | None] = [None] * len(self.rig)
        boxes: list[Box | None] = [None] * len(self.rig)
        for c in views:
            boxes[c] = _box_of_piece(coarse[c].cpu().numpy(), self.whole.scale)
        windows = windows_round(boxes, MARGIN, self.longest)
        hints = [None if w is None else zoom(mask, self.whole, w) for w, mask in zip(windows, coarse, strict=True)]
        pictures = self._cut(instant, windows)
        return _Found(windows, self._fine(self.single, pictures, nothing, hints), nothing, pictures)

    def _together(self, instant: _Instant, whole: list[Window], coarse: list[Tensor], center: Tensor) -> _Found:
        """Masks with what the other views tell, in windows round what they tell; a few rounds."""
        cube = self._cube(whole, coarse, center)
        told = self._priors(whole, coarse, self.observed, cube, list(whole))
        boxes = [
            None if prior is None else _box_of_prior(prior.cpu().numpy(), mask.cpu().numpy(), self.whole.scale)
            for prior, mask in zip(told, coarse, strict=True)
        ]
        windows = windows_round(boxes, MARGIN, self.longest)
        pictures = self._cut(instant, windows)
        sources, masks, trusted = list(whole), list(coarse), list(self.observed)
        for _ in range(self.rounds):
            priors = self._priors(sources, masks, trusted, cube, windows)
            fresh = self._fine(self.network, pictures, priors)
            found = _Found(windows, fresh, priors, pictures)
            sources = [window or self.whole for window in windows]
            masks = [mask if mask is not None else torch.zeros_like(coarse[0]) for mask in fresh]
            agreed = [c for c in self.observed if self._agrees(found, c)]
            trusted = agreed if len(agreed) >= MIN_TRUSTED else list(self.observed)
            cube = self._cube(sources, masks, cube[0])
        return replace(found, lowest_m=float(cube[0][2]) - cube[1] / ROOM)

    def _agrees(self, found: _Found, c: int) -> bool:
        mask, prior = found.masks[c], found.priors[c]
        return mask is not None and prior is not None and _soft_iou(mask, prior) >= self.min_agreement

    def _paste(self, found: _Found, c: int, told: bool) -> U8:
        window, mask = found.windows[c], found.masks[c]
        if window is None or mask is None:
            return np.zeros((self.size[1], self.size[0]), np.uint8)
        prior = found.priors[c]
        support = None
        if told and prior is not None and found.pictures is not None:
            prior = torch.maximum(prior, found.pictures.seeds[found.pictures.views.index(c)])
            # Where two others see nothing there is nothing, however much this view has changed there; but
            # the view's own keypoints count.
            mask = mask * (prior / FAINT).clamp_max(1)
            support = prior.cpu().numpy() > FAINT
        values = mask.cpu().numpy()
        return window.paste(_keep_pieces(values, support), self.size)


def _light_windows(plates: Tensor, light: Tensor, windows: Sequence[Window | None], size: tuple[int, int]) -> Tensor:
    """Plates of windows [n, 3, h, w] in their light [n, 3, 4]."""
    out = []
    for plate, values, window in zip(plates, light, windows, strict=True):
        assert window is not None
        places = pixels_of(window, 1.0, plates.device)
        x, y = (places[..., 0] + 0.5) / size[0] - 0.5, (places[..., 1] + 0.5) / size[1] - 0.5
        g0, g1, g2, offset = values[..., None, None].unbind(1)
        out.append((plate * (g0 + g1 * x + g2 * y) + offset).clamp(0, 255))
    return torch.stack(out)


def _soft_iou(mask: Tensor, prior: Tensor) -> float:
    both, either = torch.minimum(mask, prior).sum(), torch.maximum(mask, prior).sum()
    return float(both / either.clamp_min(1e-6))


def _keep_pieces(mask: npt.NDArray[np.float32], support: npt.NDArray[np.bool_] | None) -> npt.NDArray[np.float32]:
    """The mask without small pieces, and without pieces that touch no support."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats((mask >= SURE).astype(np.uint8))
    if count <= 1:
        return mask
    areas = stats[:, cv2.CC_STAT_AREA].copy()
    areas[0] = 0
    if support is not None:
        touched = np.bincount(labels[support], minlength=count)
        areas[touched == 0] = 0
    kept = areas >= max(1, LEAST_PIECE * areas.max())
    kept[0] = True
    return np.where(kept[labels], mask, np.minimum(mask, np.float32(0.49)))


def _box_of_piece(mask: npt.NDArray[np.float32], scale: int) -> Box | None:
    """The box of the largest piece of a small mask, in pixels of the whole picture."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats((mask >= SURE).astype(np.uint8))
    if count <= 1:
        return None
    masses = np.bincount(labels.ravel(), weights=mask.ravel(), minlength=count)
    masses[0] = 0
    largest = int(masses.argmax())
    x, y, w, h = (int(stats[largest, i]) for i in range(4))
    return x * scale, (x + w) * scale, y * scale, (y + h) * scale


def _box_of_prior(prior: npt.NDArray[np.float32], mask: npt.NDArray[np.float32], scale: int) -> Box | None:
    """The box of what the other views tell, and of what this view adds to it, in pixels of the whole picture."""
    there = prior > FAINT
    if not there.any():
        return None
    _, labels = cv2.connectedComponents(((mask >= SURE) | there).astype(np.uint8))
    pieces = np.unique(labels[there])
    rows, columns = np.nonzero(np.isin(labels, pieces[pieces > 0]))
    # A piece that reaches far beyond the prior is not the animal's alone, such as an arm.
    own_rows, own_columns = np.nonzero(there)
    spare = 0.5 * max(np.ptp(own_rows), np.ptp(own_columns)) + 4
    left, right = max(columns.min(), own_columns.min() - spare), min(columns.max(), own_columns.max() + spare)
    top, bottom = max(rows.min(), own_rows.min() - spare), min(rows.max(), own_rows.max() + spare)
    return left * scale, (right + 1) * scale, top * scale, (bottom + 1) * scale
