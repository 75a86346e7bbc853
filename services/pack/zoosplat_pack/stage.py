"""Stage pack: pictures of a recording, masks.zarr -> images.zarr."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import zarr

from zoosplat.geometry.cameras import Cameras
from zoosplat.recording.background import SAME_LIGHT, background_label, read_empty_scene, undistort_plate
from zoosplat.recording.sources import open_source
from zoosplat.recording.video import VideoInfo
from zoosplat.recording.video_source import undistort_maps
from zoosplat.stages.contract import Context, Outcome, Plan, Shard, Stage, shard_bounds
from zoosplat.storage import groups, schema
from zoosplat_pack import ops


class Pack(Stage):
    """Read the pictures of a recording into windows round the animal."""

    def prepare(self, ctx: Context) -> Plan:
        masks = ctx.open_input("ingest")
        width, height, d = (int(masks.attrs[key]) for key in ("full_width", "full_height", "image_downsample"))
        footage = open_source(ctx.experiment).check_pictures()
        footage.check_against_masks(width * d, height * d, int(schema.read(masks, "frame")[-1]))
        return self._create(ctx, masks, footage.videos)

    def _create(self, ctx: Context, masks: zarr.Group, infos: Sequence[VideoInfo]) -> Plan:
        """Create the empty group and plan the shards."""
        full: Any = masks.attrs["full_width"], masks.attrs["full_height"]
        n_frames, n_cameras = schema.array(masks, "mask").shape[:2]
        size = full
        if ctx.experiment.pack.window == "auto":
            size = ops.window_size(schema.read(masks, "box")[schema.read_seen(masks)], full)
        block = schema.block_frames(n_cameras * size[0] * size[1] * 3)
        copied = ("camera_names", "fps", "frame_jump", "image_downsample", "full_width", "full_height", "unit_m")
        attributes = {key: masks.attrs[key] for key in copied}
        sizes = {"T": n_frames, "C": n_cameras, "w": size[0], "h": size[1]}
        group = schema.create(ctx.run.output_url(self.name), "images.zarr", sizes, block, attributes)
        for key in ("intrinsics", "world_to_camera"):
            schema.array(group, key)[...] = schema.read(masks, key)
        if "pose" in masks:
            schema.add_moving(group, {key: schema.read(masks, key) for key in schema.MOVING})
        background = _read_background(ctx, masks, infos)
        if background is not None:
            schema.add_background(group, *background)
        if schema.has_seen(masks):
            schema.add_seen(group, schema.read_seen(masks))
        jump = ctx.experiment.ingest.frame_jump
        # Large shards, because the first frame of a shard costs decoding from the keyframe before it.
        per_shard = max(1, ctx.experiment.scheduling.frames_per_shard // jump)
        values = {"infos": [dataclasses.asdict(i) for i in infos], "block": block, "size": size}
        return Plan(shard_bounds(n_frames, per_shard, block), values)

    def run_shard(self, ctx: Context, shard: Shard, plan: Plan) -> Outcome:
        masks = ctx.open_input("ingest")
        group = groups.open_group(ctx.run.output_url(self.name), write=True)
        infos = [VideoInfo(**info) for info in plan.values["infos"]]
        cameras = Cameras.from_json(masks.attrs["cameras"])
        full = int(masks.attrs["full_width"]), int(masks.attrs["full_height"])
        width, height = plan.values["size"]
        readers = open_source(ctx.experiment).read_pictures(infos, cameras, shard.start, shard.stop)
        whole_windows = "plate" in group
        # Pictures of the empty scene do not tell how the light changes. Stage segment does.
        plates = schema.read(group, "plate") if whole_windows and not ctx.experiment.data.masks_are_made else None
        boxes = schema.read(masks, "box")
        if whole_windows:
            boxes[~schema.read_seen(masks)] = 0  # the masks of absent views do not tell where the animal is
            boxes = ops.fill_empty_boxes(boxes, full)
        with ThreadPoolExecutor(min(len(readers), cv2.getNumberOfCPUs())) as pool:
            for start in range(shard.start, shard.stop, plan.values["block"]):
                stop = min(start + plan.values["block"], shard.stop)
                whole = schema.read(masks, "mask", start, stop)
                origins = ops.window_origins(boxes[start:stop], (width, height), full)

                rgb = np.empty((len(whole), len(readers), height, width, 3), np.uint8)
                small = np.empty(rgb.shape[:-1], bool)

                def windows(
                    c: int,
                    whole: ops.Bool = whole,
                    origins: ops.I32 = origins,
                    rgb: npt.NDArray[np.uint8] = rgb,
                    small: ops.Bool = small,
                ) -> None:
                    pictures = itertools.islice(readers[c], len(whole))
                    ops.read_windows(pictures, whole[:, c], origins[:, c], rgb[:, c], small[:, c], whole_windows)

                list(pool.map(windows, range(len(readers))))
                schema.write_block(group, "rgb", start, rgb)
                schema.write_block(group, "mask", start, small)
                schema.write_block(group, "origin", start, origins)
                if plates is not None:
                    of_camera = zip(plates, *(v.swapaxes(0, 1) for v in (rgb, small, origins)), strict=True)
                    schema.write_block(group, "light", start, np.stack([ops.fit_light(*v) for v in of_camera], 1))
                ctx.progress(stop - shard.start, shard.stop - shard.start, "")
        return Outcome(shard.stop - shard.start)

    def finish(self, ctx: Context, plan: Plan) -> Outcome:
        width, height = plan.values["size"]
        return Outcome(figures={"window": [int(width), int(height)]})


def _read_background(
    ctx: Context, masks: zarr.Group, infos: Sequence[VideoInfo]
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]] | None:
    """Plates [C, h, w, 3] at working resolution and their light [T, C, 3, 4]; None where there are none.

    They are those of stage segment, or pictures of the empty scene, on which each shard fits the light of its frames.

    Raises:
        UserError: a picture of the empty scene cannot be read, or has another size than the videos.
    """
    data, attributes = ctx.experiment.data, dict[str, Any](masks.attrs)
    n_frames, n_cameras = schema.array(masks, "mask").shape[:2]
    sizes = [(info.width, info.height) for info in infos]
    if data.masks_are_made:
        segments = ctx.open_input("segment")
        seen, light = list(schema.read(segments, "plate")), schema.read(segments, "light")
    elif data.backgrounds is not None:
        seen = [
            read_empty_scene(data.url(file), background_label(c, file), sizes[c])
            for c, file in enumerate(data.backgrounds)
        ]
        light = np.broadcast_to(np.array(SAME_LIGHT, np.float32), (n_frames, n_cameras, 3, 4))
    else:
        return None
    downsample = int(attributes["image_downsample"])
    maps = undistort_maps(Cameras.from_json(attributes["cameras"]), sizes)
    return np.stack([undistort_plate(plate, downsample, m) for plate, m in zip(seen, maps, strict=True)]), light


STAGE = Pack("pack")
