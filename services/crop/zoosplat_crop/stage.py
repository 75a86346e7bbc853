"""Stage crop: masks.zarr, tracking.zarr -> crop.zarr."""

from __future__ import annotations

import numpy as np

from zoosplat.config.sections import CROP_MULTIPLE
from zoosplat.errors import UserError
from zoosplat.geometry import visual_hull
from zoosplat.stages.contract import Context, Outcome, Plan, Shard, Stage
from zoosplat.storage import groups, schema
from zoosplat_crop import ops

# Largest number of frames whose hulls are computed.
MAX_FRAMES = 5000


class Crop(Stage):
    """Choose the part of the model's cube that holds the animal in all frames.

    All frames count, evenly thinned to MAX_FRAMES, and not only the training third, because a rearing animal of the
    last third must fit too. Only observed views that are there are used, so nothing is learned from the held-out views.
    """

    def prepare(self, ctx: Context) -> Plan:
        masks, experiment = ctx.open_input("ingest"), ctx.experiment
        valid = np.flatnonzero(schema.read(ctx.open_input("center_rotation"), "valid"))
        chosen = valid[np.unique(np.linspace(0, len(valid) - 1, min(len(valid), MAX_FRAMES)).round().astype(int))]
        ell_m = experiment.crop.ell * (masks.attrs["unit_m"] if experiment.unit == "normalized" else 1.0)
        observed = list(experiment.observed_views(masks["mask"].shape[1]))
        attributes = {"ell_m": ell_m, "grid_size": experiment.crop.grid_size, "observed": observed}
        per_shard = max(1, experiment.scheduling.frames_per_shard // experiment.ingest.frame_jump)
        bounds = (*range(0, len(chosen), per_shard), len(chosen))
        sizes = {"S": len(bounds) - 1, "n": experiment.crop.grid_size}
        schema.create(ctx.run.output_url(self.name), "crop.zarr", sizes, 1, attributes)
        return Plan(bounds, {**attributes, "frames": chosen.tolist()})

    def run_shard(self, ctx: Context, shard: Shard, plan: Plan) -> Outcome:
        masks, tracking = ctx.open_input("ingest"), ctx.open_input("center_rotation")
        intrinsics, world_to_camera = (schema.read(masks, key) for key in ("intrinsics", "world_to_camera"))
        centers, angles, shifts = (schema.read(tracking, key) for key in ("centers", "angles", "principal_shift"))
        values, seen = plan.values, schema.read_seen(masks)
        axis = visual_hull.grid_axis(values["ell_m"], values["grid_size"])
        frames = values["frames"][shard.start : shard.stop]
        mask = schema.array(masks, "mask")
        block = mask.shards[0] if mask.shards else 1
        counts = np.zeros((3, values["grid_size"]), np.int64)
        held, held_block = np.empty(0), -1
        for done, t in enumerate(frames):
            if t // block != held_block:
                held_block = t // block
                held = schema.read(masks, "mask", held_block * block, (held_block + 1) * block)
            observed = [c for c in values["observed"] if seen[t, c]]
            aimed = intrinsics.copy()
            aimed[:, :2, 2] += shifts[t]
            cells, _ = visual_hull.hull_indices(
                held[t % block][observed],
                aimed[observed],
                world_to_camera[observed],
                (axis, axis, axis),
                centers[t],
                float(angles[t]),
                visual_hull.min_views(len(values["observed"]), len(values["observed"]) - len(observed)),
            )
            counts += ops.index_counts(cells, values["grid_size"])
            ctx.progress(done + 1, len(frames), "")
        group = groups.open_group(ctx.run.output_url(self.name), write=True)
        schema.write_block(group, "counts", shard.index, counts[None])
        return Outcome(len(frames))

    def finish(self, ctx: Context, plan: Plan) -> Outcome:
        group = groups.open_group(ctx.run.output_url(self.name), write=True)
        marginals = schema.read(group, "counts").sum(axis=0)
        crop = ctx.experiment.crop
        if crop.volume_idx is not None:
            ranges = [tuple(r) for r in crop.volume_idx]
        else:
            try:
                ranges = [ops.index_range(m, crop.min_voxels, CROP_MULTIPLE) for m in marginals]
            except ValueError:
                raise UserError(
                    f"crop.min_voxels = {crop.min_voxels}: no grid index has so many hull voxels; lower it, or check "
                    "crop.ell"
                ) from None
        outside = max(int(m.sum() - m[i:j].sum()) for m, (i, j) in zip(marginals, ranges, strict=True))
        warnings = []
        if outside:
            warnings.append(f"the crop leaves out {outside} of {marginals[0].sum()} hull voxels; enlarge crop.ell")
        if any(m[0] or m[-1] for m in marginals):
            warnings.append("the animal touches the edge of the cube; enlarge crop.ell")
        schema.array(group, "marginals")[...] = marginals
        schema.array(group, "volume_idx")[...] = np.array(ranges)
        return Outcome(
            warnings=tuple(warnings),
            figures={"volume_idx": [[int(i), int(j)] for i, j in ranges], "voxels_outside": outside},
        )


STAGE = Crop("crop")
