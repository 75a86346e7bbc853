"""Stage ingest: mask videos and calibration -> masks.zarr."""

from __future__ import annotations

import dataclasses

import numpy as np
import zarr

from zoosplat.config.dnerf_defaults import SPLITS
from zoosplat.errors import UserError
from zoosplat.geometry.cameras import Cameras, WorldTransform
from zoosplat.recording import dnerf, video
from zoosplat.recording.checks import check_recording, kept_frames
from zoosplat.stages.contract import Context, Outcome, Plan, Shard, Stage, shard_bounds
from zoosplat.storage import groups, schema, urls
from zoosplat_ingest import ops


def _prepare_scene(ctx: Context, url: str) -> Plan:
    """Of a D-NeRF scene, in its own world and without orientation."""
    experiment, data = ctx.experiment, ctx.experiment.data
    facts = check_recording(experiment)
    scene, cameras = facts.scene, facts.cameras
    assert scene is not None
    jump, d = experiment.ingest.frame_jump, experiment.ingest.image_downsample
    frames = np.arange(kept_frames(experiment, facts.n_frames)) * jump
    poses, pictured = scene.world_to_camera[frames], np.array([[p is not None for p in row] for row in scene.pictures])
    h, w = scene.height // d, scene.width // d
    block = schema.block_frames(2 * h * w)
    attributes = {
        "camera_names": list(data.camera_names or SPLITS),
        "fps": facts.fps,
        "frame_jump": jump,
        "n_video_frames": len(scene.times),
        "image_downsample": d,
        "full_width": w,
        "full_height": h,
        "unit_m": 1.0,
        "world": WorldTransform(np.eye(3), np.zeros(3), 1.0).to_json(),
        "cameras": cameras.to_json(),
    }
    group = schema.create(url, "masks.zarr", {"T": len(frames), "C": 2, "h": h, "w": w}, block, attributes)
    schema.array(group, "intrinsics")[...] = np.tile(scene.intrinsics(d), (2, 1, 1))
    schema.array(group, "world_to_camera")[...] = poses[0]
    schema.array(group, "frame")[...] = frames
    schema.add_moving(group, {"time": scene.times[frames], "pose": poses, "pictured": pictured[frames]})
    per_shard = max(1, experiment.scheduling.frames_per_shard // jump)
    return Plan(shard_bounds(len(frames), per_shard, block), {"block": block})


def _read_scene(ctx: Context, group: zarr.Group, shard: Shard, plan: Plan) -> Outcome:
    """The masks of a D-NeRF scene: where a picture is not transparent."""
    scene = dnerf.read_scene(urls.normalize(ctx.experiment.data.directory))
    frames = schema.read(group, "frame")
    shape = schema.array(group, "mask").shape[1:]
    for start in range(shard.start, shard.stop, plan.values["block"]):
        stop = min(start + plan.values["block"], shard.stop)
        masks = np.zeros((stop - start, *shape), bool)
        for i, c in np.ndindex(*masks.shape[:2]):
            url = scene.pictures[frames[start + i]][c]
            if url is not None:
                masks[i, c] = dnerf.read_picture(url, ctx.experiment.ingest.image_downsample)[..., 3] > 0
        schema.write_block(group, "mask", start, masks)
        schema.write_block(group, "box", start, ops.boxes(masks))
        ctx.progress(stop - shard.start, shard.stop - shard.start, "")
    return Outcome(shard.stop - shard.start)


class Ingest(Stage):
    """Read mask videos and calibration into masks.zarr."""

    def prepare(self, ctx: Context) -> Plan:
        if ctx.experiment.ingest.source == "dnerf":
            return _prepare_scene(ctx, ctx.run.output_url(self.name))
        experiment = ctx.experiment
        facts = check_recording(experiment)
        cameras, width, height = facts.cameras, facts.width, facts.height
        oriented, world = cameras.oriented(facts.up)
        centers = oriented.centers_m
        d, jump = experiment.ingest.image_downsample, experiment.ingest.frame_jump
        n_frames = kept_frames(experiment, facts.n_frames)
        h, w, n_cameras = height // d, width // d, len(cameras)
        block = schema.block_frames(n_cameras * h * w)
        attributes = {
            "camera_names": list(cameras.names),
            "fps": facts.fps,
            "frame_jump": jump,
            "n_video_frames": facts.n_frames,
            "image_downsample": d,
            "full_width": w,
            "full_height": h,
            "unit_m": float(np.linalg.norm(centers - centers.mean(axis=0), axis=1).max()),
            "world": world.to_json(),
            "cameras": cameras.to_json(),
        }
        sizes = {"T": n_frames, "C": n_cameras, "h": h, "w": w}
        group = schema.create(ctx.run.output_url(self.name), "masks.zarr", sizes, block, attributes)
        small = oriented.downsampled(d)
        schema.array(group, "intrinsics")[...] = small.intrinsics
        schema.array(group, "world_to_camera")[...] = small.world_to_camera
        schema.array(group, "frame")[...] = np.arange(n_frames) * jump
        per_shard = max(1, experiment.scheduling.frames_per_shard // jump)
        infos = [dataclasses.asdict(info) for info in facts.masks]
        values = {"infos": infos, "block": block, "decoder": ops.decoder_version()}
        return Plan(shard_bounds(n_frames, per_shard, block), values, facts.warnings)

    def run_shard(self, ctx: Context, shard: Shard, plan: Plan) -> Outcome:
        group = groups.open_group(ctx.run.output_url(self.name), write=True)
        if ctx.experiment.ingest.source == "dnerf":
            return _read_scene(ctx, group, shard, plan)
        infos = [video.VideoInfo(**i) for i in plan.values["infos"]]
        cameras = Cameras.from_json(dict(group.attrs["cameras"]))  # type: ignore[arg-type]
        maps = [
            cameras.undistort_maps(c, infos[c].width, infos[c].height) if cameras.distortion[c].any() else None
            for c in range(len(cameras))
        ]
        ingest, block = ctx.experiment.ingest, plan.values["block"]
        empty = np.zeros(len(cameras), int)
        at = shard.start
        for masks in ops.mask_blocks(
            infos, maps, shard.start, shard.stop, ingest.frame_jump, ingest.image_downsample, block
        ):
            schema.write_block(group, "mask", at, masks)
            schema.write_block(group, "box", at, ops.boxes(masks))
            empty += (~masks.any(axis=(2, 3))).sum(axis=0)
            at += len(masks)
            ctx.progress(at - shard.start, shard.stop - shard.start, "")
        return Outcome(shard.stop - shard.start, figures={f"empty_{shard.index}": empty.tolist()})

    def finish(self, ctx: Context, plan: Plan) -> Outcome:
        group = groups.open_group(ctx.run.output_url(self.name))
        box = schema.read(group, "box")
        empty = (box[..., 2] == 0).sum(axis=0)
        warnings = []
        if ctx.experiment.ingest.source == "dnerf":
            return Outcome()
        for c, count in enumerate(empty):
            label = plan.values["infos"][c]["label"]
            if count == len(box):
                raise UserError(f"{label}: the mask is empty in all {count} frames; make the masks again")
            if count:
                first = int(np.argmax(box[:, c, 2] == 0))
                warnings.append(
                    f"{label}: the mask is empty in {count} of {len(box)} frames, first at kept frame {first}"
                )
        return Outcome(warnings=tuple(warnings), figures={"empty_masks": [int(e) for e in empty]})


STAGE = Ingest("ingest")
