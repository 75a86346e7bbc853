"""Stage segment: raw videos and calibration -> segments.zarr, the masks that data.masks: auto stands for."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import zarr
from safetensors.torch import load, save

from zoosplat.config.experiment import Experiment
from zoosplat.geometry.cameras import Cameras
from zoosplat.machine import usable_cores
from zoosplat.recording.background import background_label, read_empty_scene
from zoosplat.recording.facts import RecordingFacts, kept_frames
from zoosplat.recording.keypoints import keypoints_label, read_all_keypoints
from zoosplat.recording.segmented_source import SegmentedSource
from zoosplat.recording.video import VideoInfo
from zoosplat.stages.contract import Context, Outcome, Plan, Shard, Stage, shard_bounds
from zoosplat.storage import groups, objects, schema, urls
from zoosplat_model.devices import device_figures, pick_device
from zoosplat_segment.preparation import prepare_recording
from zoosplat_segment.reading import InstantReader
from zoosplat_segment.results import InstantMasks, Preparation
from zoosplat_segment.sam import Sam, load_sam
from zoosplat_segment.segmenter import Segmenter

WEIGHTS = "weights.safetensors"  # The network's weights after it has learned from the recording, beside the group.
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)  # Of the agreement of a camera, in the mark.
LOW_AGREEMENT = 0.6  # Median soft IoU of a camera below which the user is warned.
MOST_SHOWN = 12  # Views of which the mark says where they disagree most.
AT_ONCE = 4  # Instants that are segmented at a time; a block holds more of them in memory anyway.
BLOCK_ARRAYS = ("probability", "light", "agreement", "seen")  # What a shard writes, block by block.


class Segment(Stage):
    """Tell the animal from its background in the raw videos, by all cameras together."""

    def prepare(self, ctx: Context) -> Plan:
        experiment = ctx.experiment
        # What cannot be loaded is told before anything else is done; weights of a name at the hub are downloaded once.
        _load_sam(experiment, torch.device("cpu"))
        facts = SegmentedSource(experiment, None).check()
        jump, n_kept = experiment.ingest.frame_jump, kept_frames(experiment, facts.n_frames)
        keypoints = _read_keypoints(experiment, facts, np.arange(n_kept) * jump)
        cameras, _ = facts.cameras.oriented(facts.up)
        reader = InstantReader(facts.videos, jump)
        scenes = _read_empty_scenes(experiment, (facts.width, facts.height))
        device = pick_device(experiment.segment.device)
        prepared = prepare_recording(experiment, facts, cameras, n_kept, reader.read, scenes, device, ctx.progress)
        held_out = list(experiment.holdout_views)
        block = schema.block_frames(len(cameras) * facts.height * facts.width)
        attributes = {
            "camera_names": list(cameras.names),
            "frame_jump": jump,
            "n_video_frames": facts.n_frames,
            "width": facts.width,
            "height": facts.height,
            "holdout_views": held_out,
            "floor_m": prepared.floor_m,
            "cameras": cameras.to_json(),
        }
        sizes = {"T": n_kept, "C": len(cameras), "Ch": len(held_out), "H": facts.height, "W": facts.width}
        group = schema.create(ctx.run.output_url(self.name), "segments.zarr", sizes, block, attributes)
        if held_out:
            schema.add_all_views(group, sizes, block)
        if keypoints is not None:
            schema.add_keypoints(group, keypoints)
        schema.array(group, "frame")[...] = np.arange(n_kept) * jump
        schema.array(group, "plate")[...] = prepared.plates
        schema.array(group, "noise")[...] = prepared.noise
        objects.write_bytes(_weights_url(ctx), save(prepared.weights))
        per_shard = max(1, experiment.scheduling.frames_per_shard // jump)
        values = {"infos": [dataclasses.asdict(info) for info in facts.videos], "block": block}
        return Plan(shard_bounds(n_kept, per_shard, block), values, (*facts.warnings, *prepared.warnings))

    def run_shard(self, ctx: Context, shard: Shard, plan: Plan) -> Outcome:
        group = groups.open_group(ctx.run.output_url(self.name), write=True)
        attributes: Any = dict(group.attrs)
        infos = [VideoInfo(**info) for info in plan.values["infos"]]
        reader = InstantReader(infos, attributes["frame_jump"])
        size = attributes["width"], attributes["height"]
        device = pick_device(ctx.experiment.segment.device)
        cameras = Cameras.from_json(attributes["cameras"])
        sam = _load_sam(ctx.experiment, device)
        segmenter = Segmenter(_read_preparation(ctx, group), ctx.experiment, cameras, size, device, sam)
        keypoints = schema.read(group, "keypoints", shard.start, shard.stop) if "keypoints" in group else None
        instants = reader.read(range(shard.start, shard.stop))
        # A block is compressed and written while the next one is computed. Instants do not depend on each other; a few
        # at a time keep a GPU busy while the windows of others are cut.
        with ThreadPoolExecutor(1) as writer, ThreadPoolExecutor(min(AT_ONCE, usable_cores())) as pool:
            pending: list[Future[None]] = []
            for start in range(shard.start, shard.stop, plan.values["block"]):
                stop = min(start + plan.values["block"], shard.stop)
                block = _Block(group, stop - start)
                frames = itertools.islice(instants, stop - start)
                told = [None] * (stop - start) if keypoints is None else keypoints[start - shard.start :]
                for i, masks in enumerate(pool.map(segmenter.segment, frames, told)):
                    block.fill(i, masks)
                    ctx.progress(start + i + 1 - shard.start, shard.stop - shard.start, "")
                for written in pending:
                    written.result()
                pending = [writer.submit(block.write, start)]
            for written in pending:
                written.result()
        return Outcome(shard.stop - shard.start, figures=device_figures(device))

    def finish(self, ctx: Context, plan: Plan) -> Outcome:
        group = groups.open_group(ctx.run.output_url(self.name))
        agreement, seen = (schema.read(group, key) for key in ("agreement", "seen"))
        names: Any = group.attrs["camera_names"]
        least = ctx.experiment.segment.min_agreement
        return Outcome(
            warnings=tuple(_warnings(names, agreement, seen, least)), figures=_figures(agreement, seen, least)
        )


class _Block:
    """The arrays of a storage block, which is written at once."""

    def __init__(self, group: zarr.Group, n: int) -> None:
        self._group = group
        keys = [*BLOCK_ARRAYS, "all_views"] if "all_views" in group else BLOCK_ARRAYS
        found = {key: schema.array(group, key) for key in keys}
        self._arrays = {key: np.empty((n, *array.shape[1:]), array.dtype) for key, array in found.items()}

    def fill(self, i: int, masks: InstantMasks) -> None:
        for key, array in self._arrays.items():
            array[i] = getattr(masks, key)

    def write(self, start: int) -> None:
        for key, array in self._arrays.items():
            schema.write_block(self._group, key, start, array)


def _weights_url(ctx: Context) -> str:
    return urls.join(ctx.run.result("segment").data_folder, WEIGHTS)


def _read_preparation(ctx: Context, group: zarr.Group) -> Preparation:
    """What `prepare` has stored."""
    floor: Any = group.attrs["floor_m"]
    weights = load(objects.read_bytes(_weights_url(ctx)))
    return Preparation(schema.read(group, "plate"), schema.read(group, "noise"), floor, weights)


def _load_sam(experiment: Experiment, device: torch.device) -> Sam | None:
    """The model of `segment.method: sam`; None where the network makes the masks."""
    return load_sam(experiment.segment, device) if experiment.segment.method == "sam" else None


def _read_keypoints(
    experiment: Experiment, facts: RecordingFacts, frames: npt.NDArray[np.int64]
) -> npt.NDArray[np.float32] | None:
    """The keypoints [T, C, K, 3] of `data.keypoints` in some frames of the videos [T]; None where there are none."""
    data = experiment.data
    if data.keypoints is None:
        return None
    labels = [keypoints_label(c, file) for c, file in enumerate(data.keypoints)]
    return read_all_keypoints([data.url(file) for file in data.keypoints], labels, facts.videos, frames)


def _read_empty_scenes(experiment: Experiment, size: tuple[int, int]) -> list[npt.NDArray[np.uint8]] | None:
    """The pictures [H, W, 3] of `data.backgrounds`, one a camera; None where there are none."""
    data = experiment.data
    if data.backgrounds is None:
        return None
    return [
        read_empty_scene(data.url(file), background_label(c, file), size) for c, file in enumerate(data.backgrounds)
    ]


def _figures(agreement: npt.NDArray[np.float32], seen: npt.NDArray[np.bool_], least: float) -> dict[str, Any]:
    """Figures of the mark, from agreement [T, C] and seen [T, C].

    Of each camera there are quantiles of its agreement (null where it never took part) and the share of frames from
    which it is absent; of the recording the number of frames in which a view disagrees, and the views that agree least.
    """
    quantiles: list[list[float] | None] = []
    for values in agreement.T:
        known = values[np.isfinite(values)]
        quantiles.append([round(float(q), 4) for q in np.quantile(known, QUANTILES)] if len(known) else None)
    return {
        "agreement_quantiles": quantiles,
        "absent_share": [round(float(share), 4) for share in 1 - seen.mean(axis=0)],
        "disagreeing_frames": int(_disagrees(agreement, least).sum()),
        "least_agreeing": _least_agreeing(agreement),
    }


def _least_agreeing(agreement: npt.NDArray[np.float32]) -> list[list[int]]:
    """Kept frame and camera of the views that agree least, the least agreeing first."""
    order = np.argsort(agreement, axis=None, kind="stable")[: min(MOST_SHOWN, np.isfinite(agreement).sum())]
    return [[int(t), int(c)] for t, c in zip(*np.unravel_index(order, agreement.shape), strict=True)]


def _disagrees(agreement: npt.NDArray[np.float32], least: float) -> npt.NDArray[np.bool_]:
    """Whether a view of each frame agrees less than `segment.min_agreement`, [T]."""
    with np.errstate(invalid="ignore"):
        return np.asarray((agreement < least).any(axis=1))


def _warnings(
    names: list[str], agreement: npt.NDArray[np.float32], seen: npt.NDArray[np.bool_], least: float
) -> Iterator[str]:
    """Cameras that agree little with the others or are absent, and in how many frames views disagree."""
    for name, values, there in zip(names, agreement.T, seen.T, strict=True):
        known = values[np.isfinite(values)]
        if len(known) and np.median(known) < LOW_AGREEMENT:
            yield (
                f"camera {name}: its masks agree little with what the other views tell (median IoU "
                f"{np.median(known):.2f}); check its calibration and that its video is in step with the others"
            )
        absent = np.flatnonzero(~there)
        if len(absent):
            yield f"camera {name}: is left out of {len(absent)} of {len(there)} frames, first of kept frame {absent[0]}"
    frames = np.flatnonzero(_disagrees(agreement, least))
    if len(frames):
        yield f"views disagree in {len(frames)} of {len(agreement)} frames, first at kept frame {frames[0]}"


STAGE = Segment("segment")
