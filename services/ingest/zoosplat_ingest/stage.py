"""Stage ingest: masks (files, or those of segments.zarr) and calibration -> masks.zarr."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from zoosplat.errors import UserError
from zoosplat.geometry.cameras import Cameras
from zoosplat.recording.facts import kept_frames
from zoosplat.recording.mask_files import MaskInfo
from zoosplat.recording.source import RecordingSource
from zoosplat.recording.sources import open_source
from zoosplat.stages.contract import Context, Outcome, Plan, Shard, Stage, shard_bounds
from zoosplat.storage import groups, schema
from zoosplat_ingest import ops


def _source(ctx: Context) -> RecordingSource:
    made = ctx.experiment.data.masks_are_made
    return open_source(ctx.experiment, ctx.open_input("segment") if made else None)


class Ingest(Stage):
    """Read masks and calibration of a recording into masks.zarr."""

    def prepare(self, ctx: Context) -> Plan:
        experiment = ctx.experiment
        source = _source(ctx)
        facts = source.check()
        d, jump = experiment.ingest.image_downsample, experiment.ingest.frame_jump
        frames = np.arange(kept_frames(experiment, facts.n_frames)) * jump
        geometry = source.mask_geometry(facts, frames)
        h, w, n_cameras = facts.height // d, facts.width // d, len(facts.cameras)
        block = schema.block_frames(n_cameras * h * w)
        attributes = {
            "camera_names": geometry.camera_names,
            "fps": facts.fps,
            "frame_jump": jump,
            "n_video_frames": facts.n_frames,
            "image_downsample": d,
            "full_width": w,
            "full_height": h,
            "unit_m": geometry.unit_m,
            "world": geometry.world.to_json(),
            "cameras": facts.cameras.to_json(),
        }
        sizes = {"T": len(frames), "C": n_cameras, "h": h, "w": w}
        group = schema.create(ctx.run.output_url(self.name), "masks.zarr", sizes, block, attributes)
        schema.array(group, "intrinsics")[...] = geometry.intrinsics
        schema.array(group, "world_to_camera")[...] = geometry.world_to_camera
        schema.array(group, "frame")[...] = frames
        if geometry.moving:
            schema.add_moving(group, geometry.moving)
        if geometry.seen is not None:
            schema.add_seen(group, geometry.seen)
        per_shard = max(1, experiment.scheduling.frames_per_shard // jump)
        values: dict[str, Any] = {"block": block}
        if facts.masks:
            infos = [dataclasses.asdict(info) for info in facts.masks]
            values |= {"infos": infos, "decoder": ops.decoder_version()}
        return Plan(shard_bounds(len(frames), per_shard, block), values, facts.warnings)

    def run_shard(self, ctx: Context, shard: Shard, plan: Plan) -> Outcome:
        group = groups.open_group(ctx.run.output_url(self.name), write=True)
        infos = [MaskInfo(**info) for info in plan.values.get("infos", [])]
        cameras = Cameras.from_json(dict(group.attrs["cameras"]))  # type: ignore[arg-type]
        seen, empty = schema.read_seen(group), np.zeros(len(cameras), int)
        at = shard.start
        source = _source(ctx)
        for masks in source.read_masks(infos, cameras, shard.start, shard.stop, plan.values["block"]):
            schema.write_block(group, "mask", at, masks)
            schema.write_block(group, "box", at, ops.boxes(masks))
            empty += (~masks.any(axis=(2, 3)) & seen[at : at + len(masks)]).sum(axis=0)
            at += len(masks)
            ctx.progress(at - shard.start, shard.stop - shard.start, "")
        figures = {} if source.cameras_move else {f"empty_{shard.index}": empty.tolist()}
        return Outcome(shard.stop - shard.start, figures=figures)

    def finish(self, ctx: Context, plan: Plan) -> Outcome:
        group = groups.open_group(ctx.run.output_url(self.name))
        box, seen = schema.read(group, "box"), schema.read_seen(group)
        warnings = []
        if open_source(ctx.experiment).cameras_move:
            return Outcome()  # A time is seen by one camera, so most views are absent.
        empty = (box[..., 2] == 0) & seen
        made = ctx.experiment.data.masks_are_made
        advice = (
            "give masks of your own in data.masks"
            if made
            else "make the masks again; masks of 0 and 1 must be PNG pictures or FFV1, not compressed videos"
        )
        names: Any = group.attrs["camera_names"]
        labels = [info["label"] for info in plan.values.get("infos", ())] or [f"camera {name}" for name in names]
        for c, count in enumerate(empty.sum(axis=0)):
            label = labels[c]
            if count == len(box):
                raise UserError(f"{label}: the mask is empty in all {count} frames; {advice}")
            if count:
                first = int(np.argmax(empty[:, c]))
                warnings.append(
                    f"{label}: the mask is empty in {count} of {len(box)} frames, first at kept frame {first}"
                )
        # Stage segment, which leaves views out, has warned of them.
        figures = {"empty_masks": empty.sum(axis=0).tolist()}
        if not seen.all():
            figures["absent_views"] = (~seen).sum(axis=0).tolist()
        return Outcome(warnings=tuple(warnings), figures=figures)


STAGE = Ingest("ingest")
