"""Masks of one instant of all cameras: each view alone at first, and then with what the other views tell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from zoosplat.config.experiment import Experiment
from zoosplat.geometry.cameras import Cameras
from zoosplat.recording.video import Planes
from zoosplat_segment import hull
from zoosplat_segment.background import apply_light, fit_light
from zoosplat_segment.localization import locate
from zoosplat_segment.network import NO_PRIOR, MaskNetwork, load_network
from zoosplat_segment.rig import Rig
from zoosplat_segment.windows import Window, as_tensor, pixels_of, whole_picture, windows_round

U8 = npt.NDArray[np.uint8]
FINE = 320  # pixels; longest edge of a window round the animal
MARGIN = 0.15  # rim of a window, of the longer edge of the animal's box
GRID = 64  # voxels along an edge of the hull
PRIOR_STEP = 4.0  # pixels of a window between the rays along which the hull is looked at
SAMPLES = 80  # places on a ray
SURE = 0.5  # value from which hull and mask count as the animal
FAINT = 0.25  # value of a prior from which the animal may be there
HALF = 0.6  # half the edge of the first cube, in edges of the tracking cube
ROOM = 1.25  # edge of the second cube over the extent of the hull
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


class Segmenter:
    """Segments one instant after the other, each without regard to the others.

    Args:
        preparation: of the recording.
        experiment: the configuration.
        cameras: at full resolution, with distortion, in the oriented world, metres.
        size: width and height of the pictures, pixels.
        device: where to compute.
    """

    def __init__(
        self,
        preparation: Preparation,
        experiment: Experiment,
        cameras: Cameras,
        size: tuple[int, int],
        device: torch.device,
    ) -> None:
        self.size, self.device = size, device
        self.rig = Rig(cameras, size, device)
        self.plates = preparation.plates
        self.floor_m = preparation.floor_m
        self.noise = torch.as_tensor(preparation.noise, dtype=torch.float32, device=device) / 255
        self.ell_m = experiment.center_rotation.ell
        self.rounds, self.min_agreement = experiment.segment.rounds, experiment.segment.min_agreement
        self.held_out = sorted(experiment.holdout_views)
        self.observed = [c for c in range(len(cameras)) if c not in self.held_out]
        self.whole = whole_picture(size)
        self.network = load_network(preparation.weights or None, device)
        self.single = load_network(None, device)
        self.small_plates = self._small([self.whole.cut_picture(plate, size) for plate in self.plates])
        self.voxels = hull.cube_voxels(GRID, device)

    def _small(self, pictures: Sequence[U8]) -> Tensor:
        return as_tensor(pictures, self.device)

    # -- steps ----------------------------------------------------------------------------------------------------
    def _run(self, network: MaskNetwork, frames: Tensor, plates: Tensor, noise: Tensor, prior: Tensor) -> Tensor:
        """[n, h, w] probabilities; pictures 0 to 255, priors [n, h, w]."""
        with torch.autocast("cuda", torch.float16, enabled=self.device.type == "cuda"):
            logits = network(frames / 255, plates / 255, noise, prior[:, None])
        return logits.float().sigmoid()[:, 0]

    def coarse(self, frames: Sequence[Planes]) -> tuple[Tensor, Tensor]:
        """Masks [C, h, w] of whole pictures, each view alone, and the light [C, 3, 4]."""
        small = self._small([self.whole.cut(frame, self.size) for frame in frames])
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
            world = center + half * self.voxels
            values = self._values(windows, masks, world, 2 * half / GRID)
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
        values = self._values(windows, masks, world, 2 * half / GRID)
        volumes = hull.leave_one_out(values, self._flags(trusted)) * self._above_floor(world)
        volumes = volumes.view(-1, GRID, GRID, GRID)
        out: list[Tensor | None] = []
        for c, target in enumerate(targets):
            if target is None:
                out.append(None)
                continue
            places = pixels_of(target, PRIOR_STEP, self.device)
            rays = self.rig.rays_at(places.expand(len(self.rig), *places.shape))[c : c + 1]
            points = hull.ray_points(self.rig.centers[c], rays, center, half, SAMPLES)
            small = hull.look(volumes[c : c + 1], points)
            size = target.height, target.width
            small = small * self.rig.inside(places)
            out.append(F.interpolate(small[None], size=size, mode="bilinear", align_corners=False)[0, 0])
        return out

    def _fine(
        self,
        network: MaskNetwork,
        frames: Sequence[Planes],
        light: Tensor,
        windows: Sequence[Window | None],
        priors: Sequence[Tensor | None],
    ) -> list[Tensor | None]:
        """Masks in windows, with priors; None: no prior."""
        chosen = [c for c, window in enumerate(windows) if window is not None]
        out: list[Tensor | None] = [None] * len(windows)
        if not chosen:
            return out
        pictures, backgrounds, told = [], [], []
        for c in chosen:
            window = windows[c]
            assert window is not None
            pictures.append(window.cut(frames[c], self.size))
            backgrounds.append(window.cut_picture(self.plates[c], self.size))
            prior = priors[c]
            none = torch.full((window.height, window.width), NO_PRIOR, device=self.device)
            told.append(none if prior is None else prior)
        lit = _light_windows(as_tensor(backgrounds, self.device), light[chosen], [windows[c] for c in chosen], self.size)
        averaged = torch.tensor([windows[c].scale > 1 for c in chosen], device=self.device)  # type: ignore[union-attr]
        noise = self.noise[chosen] * torch.where(averaged, NOISE_OF_AVERAGE, 1.0)
        masks = self._run(network, as_tensor(pictures, self.device), lit, noise, torch.stack(told))
        for c, mask in zip(chosen, masks, strict=True):
            out[c] = mask
        return out

    # -- an instant -----------------------------------------------------------------------------------------------
    @torch.inference_mode()
    def segment(self, frames: Sequence[Planes]) -> InstantMasks:
        """The masks of an instant.

        Args:
            frames: C whole frames as the cameras saw them.
        """
        coarse, light = self.coarse(frames)
        n = len(frames)
        whole = [self.whole] * n
        alone = self._alone(frames, light, coarse)
        center = locate(self.rig, coarse, self.whole.scale, self.observed, self.ell_m, self.floor_m)
        agreement, seen = np.full(n, np.nan, np.float32), np.ones(n, bool)
        if center is None:
            found = alone
        else:
            found = self._together(frames, light, whole, list(coarse), center)
            for c in range(n):
                mask, prior = found.masks[c], found.priors[c]
                if mask is None or prior is None:
                    seen[c] = c in self.held_out
                    continue
                agreement[c] = _soft_iou(mask, prior)
                seen[c] = c in self.held_out or bool(agreement[c] >= self.min_agreement)
        probability = np.stack([
            self._paste(alone if c in self.held_out else found, c, told=c not in self.held_out) for c in range(n)
        ])
        helped = [self._paste(found, c, told=True) for c in self.held_out]
        shape = (0, self.size[1], self.size[0])
        return InstantMasks(
            probability,
            np.stack(helped) if helped else np.zeros(shape, np.uint8),
            light.cpu().numpy(),
            agreement,
            seen,
        )

    @torch.inference_mode()
    def small_masks(self, frames: Sequence[Planes]) -> Tensor:
        """[C, h, w] masks of whole pictures, downsampled as `whole`, in which held-out cameras see for themselves."""
        masks = self.segment(frames)
        small = [self.whole.cut_picture(np.repeat(mask[..., None], 3, 2), self.size)[..., 0] for mask in masks.probability]
        return torch.from_numpy(np.stack(small)).to(self.device).float() / 255

    def _alone(self, frames: Sequence[Planes], light: Tensor, coarse: Tensor) -> _Found:
        """Masks of each view by itself, in a window round its largest piece: of held-out views only, or of all."""
        boxes = [_box_of_piece(mask.cpu().numpy(), self.whole.scale) for mask in coarse]
        windows = windows_round(boxes, MARGIN, FINE)
        nothing: list[Tensor | None] = [None] * len(windows)
        return _Found(windows, self._fine(self.single, frames, light, windows, nothing), nothing)

    def _together(
        self, frames: Sequence[Planes], light: Tensor, whole: list[Window], coarse: list[Tensor], center: Tensor
    ) -> _Found:
        """Masks with what the other views tell, in windows round what they tell; a few rounds."""
        cube = self._cube(whole, coarse, center)
        told = self._priors(whole, coarse, self.observed, cube, list(whole))
        boxes = [
            None if prior is None else _box_of_prior(prior.cpu().numpy(), mask.cpu().numpy(), self.whole.scale)
            for prior, mask in zip(told, coarse, strict=True)
        ]
        windows = windows_round(boxes, MARGIN, FINE)
        sources, masks, trusted = list(whole), list(coarse), list(self.observed)
        found = _Found(windows, [None] * len(windows), [None] * len(windows))
        for _ in range(self.rounds):
            priors = self._priors(sources, masks, trusted, cube, windows)
            fresh = self._fine(self.network, frames, light, windows, priors)
            found = _Found(windows, fresh, priors)
            sources = [window or self.whole for window in windows]
            masks = [mask if mask is not None else torch.zeros_like(coarse[0]) for mask in fresh]
            agreed = [c for c in self.observed if self._agrees(found, c)]
            trusted = agreed if len(agreed) >= 3 else trusted
            cube = self._cube(sources, masks, cube[0])
        final = self._priors(sources, masks, trusted, cube, windows)
        return replace(found, priors=final)

    def _agrees(self, found: _Found, c: int) -> bool:
        mask, prior = found.masks[c], found.priors[c]
        return mask is not None and prior is not None and _soft_iou(mask, prior) >= self.min_agreement

    def _paste(self, found: _Found, c: int, told: bool) -> U8:
        window, mask = found.windows[c], found.masks[c]
        if window is None or mask is None:
            return np.zeros((self.size[1], self.size[0]), np.uint8)
        values = mask.cpu().numpy()
        prior = found.priors[c]
        support = prior.cpu().numpy() > FAINT if told and prior is not None else None
        return window.paste(_keep_pieces(values, support), self.size)


def _light_windows(
    plates: Tensor, light: Tensor, windows: Sequence[Window | None], size: tuple[int, int]
) -> Tensor:
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


def _box_of_piece(mask: npt.NDArray[np.float32], scale: int) -> tuple[float, float, float, float] | None:
    """The box of the largest piece of a small mask, in pixels of the whole picture."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats((mask >= SURE).astype(np.uint8))
    if count <= 1:
        return None
    masses = np.bincount(labels.ravel(), weights=mask.ravel(), minlength=count)
    masses[0] = 0
    largest = int(masses.argmax())
    x, y, w, h = (int(stats[largest, i]) for i in range(4))
    return x * scale, (x + w) * scale, y * scale, (y + h) * scale


def _box_of_prior(
    prior: npt.NDArray[np.float32], mask: npt.NDArray[np.float32], scale: int
) -> tuple[float, float, float, float] | None:
    """The box of what the other views tell, and of what this view adds to it, in pixels of the whole picture."""
    there = prior > FAINT
    if not there.any():
        return None
    count, labels = cv2.connectedComponents(((mask >= SURE) | there).astype(np.uint8))
    pieces = np.unique(labels[there])
    rows, columns = np.nonzero(np.isin(labels, pieces[pieces > 0]))
    # A piece that reaches far beyond the prior is not the animal's alone, such as an arm.
    own_rows, own_columns = np.nonzero(there)
    spare = 0.5 * max(np.ptp(own_rows), np.ptp(own_columns)) + 4
    left, right = max(columns.min(), own_columns.min() - spare), min(columns.max(), own_columns.max() + spare)
    top, bottom = max(rows.min(), own_rows.min() - spare), min(rows.max(), own_rows.max() + spare)
    return left * scale, (right + 1) * scale, top * scale, (bottom + 1) * scale
