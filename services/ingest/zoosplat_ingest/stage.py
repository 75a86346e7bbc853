"""Stage ingest: mask videos and calibration -> masks.zarr."""

from __future__ import annotations

import dataclasses

import numpy as np
import zarr

from zoosplat import calibration, dnerf, schema, stores, video
from zoosplat.cameras import Cameras, WorldTransform
from zoosplat.config import Experiment
from zoosplat.errors import UserError
from zoosplat.stages.contract import Context, Outcome, Plan, Shard, Stage, split
from zoosplat_ingest import ops


def _calibration_urls(experiment: Experiment) -> list[str]:
    names = experiment.data.calibration
    return [experiment.data.url(n) for n in ([names] if isinstance(names, str) else names)]


def _read_bytes(url: str) -> bytes:
    try:
        return stores.read_bytes(url)
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"{url}: no such file; check data.calibration and data.up in the config") from None


def _probe_all(experiment: Experiment) -> tuple[list[video.VideoInfo], list[str]]:
    """Mask videos, after checking masks and RGB videos against each other; and warnings."""
    data = experiment.data
    names = [
        (kind, c, name)
        for kind, files in (("mask", data.masks), ("video", data.videos))
        for c, name in enumerate(files)
    ]
    infos = [video.probe(data.url(name), f"{name} ({kind} of camera {c})") for kind, c, name in names]
    first, warnings = infos[0], []
    for info in infos:
        if (info.width, info.height) != (first.width, first.height):
            raise UserError(
                f"{info.label}: {info.width} x {info.height} pixels, "
                f"but {first.label} has {first.width} x {first.height}"
            )
        if abs(info.fps - first.fps) > 0.01 * max(first.fps, 1e-9):
            warnings.append(f"{info.label}: {info.fps:g} frames/s, but {first.label} has {first.fps:g}")
    lengths = [info.n_frames for info in infos]
    short = infos[int(np.argmin(lengths))]
    if min(lengths) != max(max(lengths), *(info.n_declared for info in infos)):
        longest = infos[int(np.argmax([info.n_declared for info in infos]))]
        what = f"{short.label} has {short.n_frames} frames, {longest.label} has {longest.n_declared}"
        if short.n_frames < short.n_declared:
            what = f"{short.label} is truncated: {short.n_frames} of its {short.n_declared} frames are there"
        if experiment.ingest.on_short == "error":
            raise UserError(f"{what}; export it again, or set ingest.on_short: truncate")
        warnings.append(f"{what}; all are used up to frame {min(lengths)}")
    return [dataclasses.replace(i, n_frames=min(lengths)) for i in infos[: len(data.masks)]], warnings


def _prepare_scene(ctx: Context, url: str) -> Plan:
    """Of a D-NeRF scene, in its own world and without orientation."""
    experiment, data = ctx.experiment, ctx.experiment.data
    scene = dnerf.read_scene(stores.normalize(data.directory))
    experiment.check(len(dnerf.SPLITS), scene.width, scene.height)
    jump, d = experiment.ingest.frame_jump, experiment.ingest.image_downsample
    frames = np.arange(0, len(scene.times), jump)[: experiment.ingest.max_frames]
    poses, pictured = scene.world_to_camera[frames], np.array([[p is not None for p in row] for row in scene.pictures])
    k = np.tile(scene.intrinsics(1), (2, 1, 1))
    cameras = Cameras(dnerf.SPLITS, k, poses[0, :, :3, :3], poses[0, :, :3, 3], np.zeros((2, 5)))
    h, w = scene.height // d, scene.width // d
    block = schema.block_frames(2 * h * w)
    attributes = {
        "camera_names": list(data.camera_names or dnerf.SPLITS),
        "fps": data.fps or 25.0,
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
    return Plan(split(len(frames), per_shard, block), {"block": block})


def _read_scene(ctx: Context, group: zarr.Group, shard: Shard, plan: Plan) -> Outcome:
    """The masks of a D-NeRF scene: where a picture is not transparent."""
    scene = dnerf.read_scene(stores.normalize(ctx.experiment.data.directory))
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
        experiment, data = ctx.experiment, ctx.experiment.data
        infos, warnings = _probe_all(experiment)
        width, height, n_video = infos[0].width, infos[0].height, infos[0].n_frames
        cameras = calibration.read_cameras(
            _calibration_urls(experiment),
            format=data.calibration_format,
            unit=data.calibration_unit,
            names=data.camera_names,
            open_bytes=_read_bytes,
        )
        experiment.check(len(cameras), width, height)
        up = calibration.read_up(
            data.url(data.up) if isinstance(data.up, str) and data.up != "auto" else data.up, cameras, _read_bytes
        )
        oriented, world = cameras.oriented(up)
        centers = oriented.centers_m
        d, jump = experiment.ingest.image_downsample, experiment.ingest.frame_jump
        n_frames = -(-n_video // jump)
        if experiment.ingest.max_frames is not None:
            n_frames = min(n_frames, experiment.ingest.max_frames)
        h, w, n_cameras = height // d, width // d, len(cameras)
        block = schema.block_frames(n_cameras * h * w)
        attributes = {
            "camera_names": list(cameras.names),
            "fps": data.fps or infos[0].fps or 25.0,
            "frame_jump": jump,
            "n_video_frames": n_video,
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
        values = {"infos": [dataclasses.asdict(i) for i in infos], "block": block, "decoder": ops.decoder_version()}
        return Plan(split(n_frames, per_shard, block), values, tuple(warnings))

    def run_shard(self, ctx: Context, shard: Shard, plan: Plan) -> Outcome:
        group = stores.open_group(ctx.run.output_url(self.name), write=True)
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
        group = stores.open_group(ctx.run.output_url(self.name))
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
