"""Stage features: model, images.zarr, tracking.zarr, crop.zarr -> features.zarr."""

from __future__ import annotations

import numpy as np
import torch

from zoosplat.errors import UserError
from zoosplat.stages.contract import Context, Outcome, Plan, Shard, Stage, shard_bounds
from zoosplat.storage import groups, schema
from zoosplat_features import encoders, ops
from zoosplat_model.frames import open_reader
from zoosplat_model.gpu_memory import out_of_memory
from zoosplat_model.registry import open_predictor


class FeaturesStage(Stage):
    """Compute a descriptor of the animal in every frame that does not depend on its heading."""

    def prepare(self, ctx: Context) -> Plan:
        settings = ctx.experiment.features
        reader = open_reader(ctx.run, torch.device("cpu"))
        if not reader.valid.any():
            raise UserError("no frame has a visual hull; check the masks and center_rotation.ell")
        sizes = {"gaussians": ops.cylinder_size(), "images": encoders.ImagesEncoder.size}
        if settings.encoder == "images":
            encoders.resnet18(
                encoders.weights_file(ctx.experiment) or settings.weights
            )  # an error of the weights shows before hours of shards
        radius_m = reader.ell_m / 2
        if settings.radius is not None:
            unit_m = ctx.run.open_input("pack").attrs["unit_m"] if ctx.experiment.unit == "normalized" else 1.0
            radius_m = settings.radius * float(str(unit_m))
        attributes: dict[str, str | float] = {"encoder": settings.encoder, "radius_m": radius_m}
        if settings.encoder == "images":
            # A file counts by its content, because descriptors do not depend on where it lies.
            file = ctx.run.sources[self.name].get("features.weights")
            attributes["weights"] = settings.weights if file is None else file.fingerprint
        size = sizes[settings.encoder]
        block = schema.block_frames(4 * size)
        url = ctx.run.output_url(self.name)
        schema.create(url, "features.zarr", {"T": reader.n_frames, "D": size}, block, attributes)
        per_shard = max(1, ctx.experiment.scheduling.frames_per_shard // ctx.experiment.ingest.frame_jump)
        return Plan(shard_bounds(reader.n_frames, per_shard, block), {"radius_m": radius_m, "block": block})

    def run_shard(self, ctx: Context, shard: Shard, plan: Plan) -> Outcome:
        with out_of_memory(ctx.run, self.name):
            return self._run(ctx, shard, plan)

    def _run(self, ctx: Context, shard: Shard, plan: Plan) -> Outcome:
        predictor = open_predictor(ctx.run, ctx.experiment.features.device)
        reader, block = predictor.reader, plan.values["block"]
        encode = encoders.open_encoder(ctx.experiment, plan.values["radius_m"], predictor.render, reader.device)
        function = encoders.flattened(encode) if ctx.experiment.flat_gaussians else encode
        group = groups.open_group(ctx.run.output_url(self.name), write=True)
        frames = [t for t in range(shard.start, shard.stop) if reader.valid[t]]
        found = predictor.map_frames(frames, function, capture=encode.capturable)
        done = 0
        for start in range(shard.start, shard.stop, block):
            stop = min(start + block, shard.stop)
            values = np.full((stop - start, encode.size), np.nan, np.float32)
            for _ in range(int(reader.valid[start:stop].sum())):
                t, descriptor = next(found)
                values[t - start] = descriptor.float().cpu().numpy()
                done += 1
            if not np.isfinite(values[reader.valid[start:stop]]).all():
                where = ctx.run.output_url("train")
                raise UserError(f"{where}: the model gives values that are not finite; run stage train with --force")
            schema.write_block(group, "features", start, values)
            ctx.progress(stop - shard.start, shard.stop - shard.start, "")
        return Outcome(done)


STAGE = FeaturesStage("features")
