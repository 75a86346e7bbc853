"""Stage center_rotation: masks.zarr -> tracking.zarr."""

from __future__ import annotations

import numpy as np
import zarr

from zoosplat.errors import UserError
from zoosplat.geometry import visual_hull
from zoosplat.stages.contract import Context, Outcome, Plan, Shard, Stage, shard_bounds
from zoosplat.storage import groups, schema
from zoosplat_center_rotation import ops

# Share of the median number of voxels below which a hull is discarded, because the masks do not meet.
SMALL_HULL = 0.2


class CenterRotation(Stage):
    """Find centre and heading of the animal in every frame."""

    def prepare(self, ctx: Context) -> Plan:
        masks, experiment = ctx.open_input("ingest"), ctx.experiment
        n_frames, n_cameras = masks["mask"].shape[:2]
        ell_m = experiment.center_rotation.ell * (masks.attrs["unit_m"] if experiment.unit == "normalized" else 1.0)
        observed = list(experiment.observed_views(n_cameras))
        attributes = {"ell_m": ell_m, "grid_size": experiment.center_rotation.grid_size, "observed": observed}
        sizes = {"T": n_frames, "C": n_cameras}
        schema.create(ctx.run.output_url(self.name), "tracking.zarr", sizes, schema.SMALL_BLOCK, attributes)
        per_shard = max(1, experiment.scheduling.frames_per_shard // experiment.ingest.frame_jump)
        return Plan(shard_bounds(n_frames, per_shard, schema.SMALL_BLOCK), attributes)

    def run_shard(self, ctx: Context, shard: Shard, plan: Plan) -> Outcome:
        masks = ctx.open_input("ingest")
        group = groups.open_group(ctx.run.output_url(self.name), write=True)
        intrinsics, world_to_camera = (schema.read(masks, key) for key in ("intrinsics", "world_to_camera"))
        seen, observed = schema.read_seen(masks), plan.values["observed"]
        if "pose" in masks:
            return self._in_place(group, shard, plan)
        axis = visual_hull.grid_axis(plan.values["ell_m"], plan.values["grid_size"])
        adaptive = ctx.experiment.adaptive_camera
        mask = schema.array(masks, "mask")
        read = mask.shards[0] if mask.shards else 1
        for start in range(shard.start, shard.stop, schema.SMALL_BLOCK):
            stop = min(start + schema.SMALL_BLOCK, shard.stop)
            hulls = []
            for first in range(start, stop, read):
                for t, frame in enumerate(schema.read(masks, "mask", first, min(first + read, stop)), first):
                    cameras = intrinsics, world_to_camera
                    hulls.append(ops.frame_hull(frame, seen[t], observed, *cameras, axis, adaptive))
                    ctx.progress(start - shard.start + len(hulls), shard.stop - shard.start, "")
            schema.write_block(group, "hull_mean", start, np.stack([h.mean for h in hulls]))
            schema.write_block(group, "hull_cov", start, np.stack([h.cov for h in hulls]))
            schema.write_block(group, "n_voxels", start, np.array([h.n_voxels for h in hulls]))
            schema.write_block(group, "principal_shift", start, np.stack([h.shift for h in hulls]))
        return Outcome(shard.stop - shard.start)

    def _in_place(self, group: zarr.Group, shard: Shard, plan: Plan) -> Outcome:
        """Write constant tracking: moving cameras see a time once, so there is no hull and the scene stays in place."""
        n, cameras = shard.stop - shard.start, schema.array(group, "principal_shift").shape[1]
        variance = (plan.values["ell_m"] / 4) ** 2
        for start in range(0, n, schema.SMALL_BLOCK):
            m = min(schema.SMALL_BLOCK, n - start)
            schema.write_block(group, "hull_mean", shard.start + start, np.zeros((m, 3)))
            schema.write_block(group, "hull_cov", shard.start + start, np.tile(variance * np.eye(3), (m, 1, 1)))
            schema.write_block(group, "n_voxels", shard.start + start, np.ones(m, np.int64))
            schema.write_block(group, "principal_shift", shard.start + start, np.zeros((m, cameras, 2)))
        return Outcome(n)

    def finish(self, ctx: Context, plan: Plan) -> Outcome:
        group = groups.open_group(ctx.run.output_url(self.name), write=True)
        means, covs, counts = (schema.read(group, key) for key in ("hull_mean", "hull_cov", "n_voxels"))
        valid = np.isfinite(means).all(axis=1)
        if valid.any():
            valid &= counts >= SMALL_HULL * np.median(counts[valid])
        if valid.sum() < 2:
            raise UserError(
                f"{ctx.run.output_url(self.name)}: no visual hull in {(~valid).sum()} of {len(valid)} frames: the "
                "masks of the observed views do not meet; check calibration, its unit, data.up and center_rotation.ell"
            )
        for key, values in (
            ("centers", ops.interpolate(means, valid)),
            ("covs", ops.interpolate(covs, valid)),
            ("angles", ops.headings(means, covs, valid)),
            ("valid", valid),
        ):
            schema.array(group, key)[...] = values
        lost = np.flatnonzero(~valid)
        warnings: tuple[str, ...] = ()
        if len(lost):
            shown = ", ".join(map(str, lost[:10])) + (", ..." if len(lost) > 10 else "")
            warnings = (
                f"no usable visual hull in {len(lost)} of {len(valid)} frames (kept frames {shown}): interpolated",
            )
        return Outcome(
            warnings=warnings, figures={"invalid_frames": len(lost), "median_voxels": float(np.median(counts))}
        )


STAGE = CenterRotation("center_rotation")
