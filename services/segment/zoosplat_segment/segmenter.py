"""Masks of one instant of all cameras: each view alone at first, and then with what the other views tell."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from zoosplat.config.experiment import Experiment
from zoosplat.geometry.cameras import Cameras
from zoosplat.machine import usable_cores
from zoosplat.recording.video import Planes
from zoosplat_segment.adaptation import Lesson
from zoosplat_segment.background import apply_light, fit_light, light_window
from zoosplat_segment.carving import ROOM, Carver, Evidence
from zoosplat_segment.hull import FEWEST_VIEWS
from zoosplat_segment.localization import locate
from zoosplat_segment.mask_pieces import FAINT, box_of_piece, box_of_prior, keep_pieces, soft_iou
from zoosplat_segment.network import NO_PRIOR, MaskNetwork, load_network, predict_masks
from zoosplat_segment.results import InstantMasks, Preparation, Study
from zoosplat_segment.rig import Rig
from zoosplat_segment.sam import LONGEST, Embedding, Sam
from zoosplat_segment.seeds import seed
from zoosplat_segment.windows import Window, as_tensor, whole_picture, windows_round, zoom

U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]
FINE = 320  # pixels; longest edge of a window round the animal
MARGIN = 0.15  # rim of a window, of the longer edge of the animal's box
MIN_TRUSTED = 3  # views that must agree before others are left out of the hull
NOISE_OF_AVERAGE = 0.6  # noise of averaged pixels over that of single ones; compression leaves little to average


@dataclass(frozen=True, eq=False)
class _Instant:
    """C frames, their light [C, 3, 4], and the masks [C, h, w] of their small pictures, each view alone.

    The keypoints [C, K, 3] of each view, where there are some, are in its mask.
    """

    frames: Sequence[Planes]
    light: Tensor
    coarse: Tensor
    keypoints: F32 | None


@dataclass(frozen=True, eq=False)
class _Pictures:
    """Windows of some cameras, of one size: frames and lit plates [n, 3, h, w], 0 to 255, and the noise [n], 0 to 1.

    `seeds` [n, h, w] is 1 round keypoints and 0 elsewhere; None: there are none. For SAM there are also `coarse`
    [n, h, w], the first masks of the views alone, and what it has seen, so that it looks once for all rounds.
    """

    windows: dict[int, Window]
    frames: Tensor
    plates: Tensor
    noise: Tensor
    seeds: Tensor | None = None
    coarse: Tensor | None = None
    embeddings: dict[int, Embedding] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class _View:
    """The mask in a window, and what the other views tell there, [height, width]; None: they tell nothing.

    `seeds` are those of the view's own keypoints; None: there are none.
    """

    window: Window
    mask: Tensor
    prior: Tensor | None
    seeds: Tensor | None


@dataclass(frozen=True, eq=False)
class _Together:
    """What the observed cameras have found together.

    Attributes:
        pictures: of the cameras that the hull lies in front of.
        views: of the same cameras.
        evidence: what the last hull was carved from.
        first_priors: [h, w] of the small picture of every camera, from the first hull.
    """

    pictures: _Pictures
    views: dict[int, _View]
    evidence: Evidence
    first_priors: dict[int, Tensor]


class Segmenter:
    """Segments one instant after the other, each without regard to the others.

    Nothing that a held-out camera shows has an influence on the other cameras. Windows that are segmented at once have
    one size, so those of a held-out camera are segmented by themselves.

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
        self.carver = Carver(self.rig, self.ell_m, self.floor_m, self.observed)
        self.whole = whole_picture(size)
        self.sam, self.longest = sam, FINE if sam is None else LONGEST
        self.small_plates = as_tensor([self.whole.cut_picture(plate, size) for plate in self.plates], device)
        self.network = load_network(preparation.weights or None, device)
        self.single = load_network(None, device)

    # -- an instant ---------------------------------------------------------------------------------------------------
    @torch.inference_mode()
    def segment(self, frames: Sequence[Planes], keypoints: F32 | None = None) -> InstantMasks:
        """The masks of an instant.

        Args:
            frames: C whole frames as the cameras saw them.
            keypoints: [C, K, 3] x, y in pixels as the cameras saw them, and confidence, NaN where they are not told;
                None: there are none. Those of a view are seeds of that view's masks.
        """
        instant = self._look(frames, keypoints)
        together = self._segment_together(instant)
        alone = self._segment_each_alone(instant, self.held_out)
        if together is None:
            # Where no views agree on a place, each view is left with what it sees itself.
            observed, helped = self._segment_alone(instant, self.observed), alone
        else:
            observed, helped = together.views, self._help_held_out(instant, together)
        agreement = np.full(len(frames), np.nan, np.float32)
        seen = np.ones(len(frames), bool)
        if together is not None:
            seen[self.observed] = False
            for c, view in (observed | helped).items():
                agreement[c] = _agreement(view)
                seen[c] = c in self.held_out or bool(agreement[c] >= self.min_agreement)
        all_views = [self._paste(helped.get(c), told=True) for c in self.held_out]
        return InstantMasks(
            self._paste_all(observed, alone),
            np.stack(all_views) if all_views else np.zeros((0, self.size[1], self.size[0]), np.uint8),
            instant.light.cpu().numpy(),
            agreement,
            seen,
        )

    @torch.inference_mode()
    def study(self, frames: Sequence[Planes]) -> Study:
        """What a recording's preparation asks of an instant."""
        instant = self._look(frames)
        together = self._segment_together(instant)
        if together is None:
            return Study(instant.coarse, None, None, float("nan"))
        masks = self._paste_all(together.views, self._segment_each_alone(instant, self.held_out))
        small = [self.whole.cut_picture(np.repeat(mask[..., None], 3, 2), self.size)[..., 0] for mask in masks]
        center, half = self._weigh(together.evidence, together.views, instant).cube
        lesson, agreement = self._lesson(together)
        return Study(
            torch.from_numpy(np.stack(small)).to(self.device).float() / 255,
            lesson,
            float(center[2]) - half / ROOM,
            agreement,
        )

    def _lesson(self, together: _Together) -> tuple[Lesson | None, float]:
        """What the observed views teach, and the mean of their agreement."""
        pictures = together.pictures
        rows, masks, priors, agreements = [], [], [], []
        for row, c in enumerate(pictures.windows):
            view = together.views[c]
            if view.prior is not None and self._agrees(view):
                rows.append(row)
                masks.append(view.mask)
                priors.append(view.prior)
                agreements.append(_agreement(view))
        if not rows:
            return None, float("nan")
        shown = pictures.frames[rows], pictures.plates[rows], pictures.noise[rows]
        return Lesson(*shown, torch.stack(priors), torch.stack(masks)), float(np.mean(agreements))

    # -- its steps ----------------------------------------------------------------------------------------------------
    def _look(self, frames: Sequence[Planes], keypoints: F32 | None = None) -> _Instant:
        """The light of each frame, and a first mask of its small picture."""
        small = as_tensor(list(self.pool.map(lambda frame: self.whole.cut(frame, self.size), frames)), self.device)
        extent = self.whole.extent(self.size)
        light = fit_light(small, self.small_plates, extent)
        lit = apply_light(self.small_plates, light, extent)
        coarse = self._run(self.single, small, lit, self.noise * NOISE_OF_AVERAGE, None)
        if keypoints is not None:
            seeded = [seed(m, k, self.whole, self.size) for m, k in zip(coarse, keypoints, strict=True)]
            coarse = torch.stack(seeded)
        return _Instant(frames, light, coarse, keypoints)

    def _segment_together(self, instant: _Instant) -> _Together | None:
        """Masks of the observed cameras with what the others of them tell, in a few rounds; None without a hull."""
        if len(self.observed) <= FEWEST_VIEWS:
            return None  # A view is told what at least two others see.
        center = locate(self.rig, instant.coarse, self.whole.scale, self.observed, self.ell_m, self.floor_m)
        if center is None:
            return None
        n = len(self.rig)
        whole, coarse = [self.whole] * n, list(instant.coarse)
        evidence = Evidence(whole, coarse, self.observed, self.carver.fit_cube(whole, coarse, center))
        told = self.carver.priors(evidence, dict(enumerate(whole)))
        windows = self._windows_of_priors(instant, told, self.observed)
        pictures = self._cut(instant, windows)
        views = self._segment_told(self.network, pictures, evidence)
        for _ in range(self.rounds - 1):
            evidence = self._weigh(evidence, views, instant)
            views = self._segment_told(self.network, pictures, evidence)
        return _Together(pictures, views, evidence, told)

    def _weigh(self, evidence: Evidence, views: Mapping[int, _View], instant: _Instant) -> Evidence:
        """The evidence of the next round: new masks, and only of views that agree, where these are enough."""
        nothing = torch.zeros_like(instant.coarse[0])
        windows, masks = [self.whole] * len(self.rig), [nothing] * len(self.rig)
        for c, view in views.items():
            windows[c], masks[c] = view.window, view.mask
        agreed = [c for c, view in views.items() if self._agrees(view)]
        trusted = agreed if len(agreed) >= MIN_TRUSTED else self.observed
        return Evidence(windows, masks, trusted, self.carver.fit_cube(windows, masks, evidence.cube[0]))

    def _help_held_out(self, instant: _Instant, together: _Together) -> dict[int, _View]:
        """Masks of the held-out cameras with what the observed ones tell."""
        helped: dict[int, _View] = {}
        for c in self.held_out:
            pictures = self._cut(instant, self._windows_of_priors(instant, together.first_priors, [c]))
            helped |= self._segment_told(self.network, pictures, together.evidence)
        return helped

    def _segment_alone(self, instant: _Instant, cameras: Iterable[int]) -> dict[int, _View]:
        """Masks of some cameras, each by itself, in windows of one size round their largest pieces."""
        boxes = {c: box_of_piece(instant.coarse[c].cpu().numpy(), self.whole.scale) for c in cameras}
        windows = windows_round({c: box for c, box in boxes.items() if box is not None}, MARGIN, self.longest)
        return self._segment_windows(self.single, self._cut(instant, windows), None)

    def _segment_each_alone(self, instant: _Instant, cameras: Iterable[int]) -> dict[int, _View]:
        """The same, and not even the size of the windows depends on the other cameras."""
        return {c: view for camera in cameras for c, view in self._segment_alone(instant, [camera]).items()}

    def _segment_told(self, network: MaskNetwork, pictures: _Pictures, evidence: Evidence) -> dict[int, _View]:
        return self._segment_windows(network, pictures, self.carver.priors(evidence, pictures.windows))

    def _segment_windows(
        self, network: MaskNetwork, pictures: _Pictures, priors: Mapping[int, Tensor] | None
    ) -> dict[int, _View]:
        """Masks in windows, with what the other views tell there."""
        if not pictures.windows:
            return {}
        told = None if priors is None else torch.stack([priors[c] for c in pictures.windows])
        seeds = pictures.seeds
        if seeds is not None:
            told = torch.maximum(torch.full_like(seeds, NO_PRIOR) if told is None else told, seeds)
        if self.sam is None:
            masks = self._run(network, pictures.frames, pictures.plates, pictures.noise, told)
        else:
            hints = pictures.coarse if priors is None else told
            assert hints is not None
            masks = self.sam.masks(pictures.frames, hints, pictures.embeddings)
        return {
            c: _View(window, masks[i], None if priors is None else priors[c], None if seeds is None else seeds[i])
            for i, (c, window) in enumerate(pictures.windows.items())
        }

    # -- windows ------------------------------------------------------------------------------------------------------
    def _windows_of_priors(
        self, instant: _Instant, priors: Mapping[int, Tensor], cameras: Iterable[int]
    ) -> dict[int, Window]:
        """Windows of one size round what the other views tell in the small pictures of some cameras."""
        boxes = {
            c: box_of_prior(priors[c].cpu().numpy(), instant.coarse[c].cpu().numpy(), self.whole.scale) for c in cameras
        }
        return windows_round({c: box for c, box in boxes.items() if box is not None}, MARGIN, self.longest)

    def _cut(self, instant: _Instant, windows: dict[int, Window]) -> _Pictures:
        """What the network is given of windows, but for the priors."""
        if not windows:
            return _Pictures({}, torch.empty(0), torch.empty(0), torch.empty(0))

        def cut(c: int) -> tuple[U8, U8]:
            window = windows[c]
            return window.cut(instant.frames[c], self.size), window.cut_picture(self.plates[c], self.size)

        parts = list(self.pool.map(cut, windows))
        frames, plates = (as_tensor([part[i] for part in parts], self.device) for i in (0, 1))
        lit = [
            light_window(plate, instant.light[c], window, self.size)
            for plate, (c, window) in zip(plates, windows.items(), strict=True)
        ]
        averaged = torch.tensor([window.scale > 1 for window in windows.values()], device=self.device)
        noise = self.noise[list(windows)] * torch.where(averaged, NOISE_OF_AVERAGE, 1.0)
        seeds, coarse = None, None
        if instant.keypoints is not None:
            none = torch.zeros_like(frames[0, 0])
            seeds = torch.stack([seed(none, instant.keypoints[c], window, self.size) for c, window in windows.items()])
        if self.sam is not None:
            coarse = torch.stack([zoom(instant.coarse[c], self.whole, window) for c, window in windows.items()])
        return _Pictures(windows, frames, torch.stack(lit), noise, seeds, coarse)

    def _run(
        self, network: MaskNetwork, frames: Tensor, plates: Tensor, noise: Tensor, priors: Tensor | None
    ) -> Tensor:
        """See `predict_masks`; in half precision on a GPU."""
        with torch.autocast("cuda", torch.float16, enabled=self.device.type == "cuda"):
            return predict_masks(network, frames, plates, noise, priors)

    def _agrees(self, view: _View) -> bool:
        return view.prior is not None and _agreement(view) >= self.min_agreement

    def _paste_all(self, observed: Mapping[int, _View], alone: Mapping[int, _View]) -> U8:
        """[C, H, W] masks: of held-out cameras those that they have made alone."""
        return np.stack(
            [
                self._paste(alone.get(c), told=False) if c in self.held_out else self._paste(observed.get(c), told=True)
                for c in range(len(self.rig))
            ]
        )

    def _paste(self, view: _View | None, told: bool) -> U8:
        """[H, W] 0 to 255, the mask of a view in the whole picture; `told`: only where the other views let it be."""
        if view is None:
            return np.zeros((self.size[1], self.size[0]), np.uint8)
        mask, support = view.mask, None
        if told and view.prior is not None:
            # Where two others see nothing there is nothing, however much this view has changed there; but its own
            # keypoints count.
            prior = view.prior if view.seeds is None else torch.maximum(view.prior, view.seeds)
            mask = mask * (prior / FAINT).clamp_max(1)
            support = prior.cpu().numpy() > FAINT
        return view.window.paste(keep_pieces(mask.cpu().numpy(), support), self.size)


def _agreement(view: _View) -> float:
    """Soft IoU of a view's mask with what the other views tell; NaN where they tell nothing."""
    return float("nan") if view.prior is None else soft_iou(view.mask, view.prior)
