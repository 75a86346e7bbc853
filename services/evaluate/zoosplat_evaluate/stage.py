"""Stage evaluate: model, images.zarr, tracking.zarr, crop.zarr -> evaluation/."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zoosplat.errors import UserError
from zoosplat.formats import media
from zoosplat.formats.comparison import draw_comparison
from zoosplat.formats.csv_table import encode_csv
from zoosplat.stages.contract import Context, Outcome, Plan, Shard, Stage
from zoosplat.storage import objects, urls
from zoosplat_evaluate import ops
from zoosplat_evaluate.measurement import Measurement, metric_columns
from zoosplat_model.background import lay_over
from zoosplat_model.frames import Frame, FrameReader, open_reader
from zoosplat_model.gpu_memory import out_of_memory
from zoosplat_model.metrics import METRICS, SSIM_RADIUS, ColorFit
from zoosplat_model.predictor import Predictor
from zoosplat_model.rasterize import Rendering
from zoosplat_model.registry import open_predictor

CSV_DIGITS = 6  # Significant digits of numbers in the tables.
VALUES = "metrics.npy"  # [T, C, M] float64, NaN where not defined
IOU, PSNR = METRICS.index("iou"), METRICS.index("psnr")
FIT_BYTES = 1 << 30  # bytes of the renderings that colours are fitted to, which are kept for the metrics
MIN_FIT_FRAMES = 8  # frames that colours are fitted to at least, however large they are


def _downsample(ctx: Context, reader: FrameReader) -> int:
    """The factor from the working resolution to that of the metrics.

    Raises:
        UserError: images cannot be averaged to the resolution that is asked for.
    """
    wanted = ctx.experiment.evaluate.image_downsample or reader.image_downsample
    factor = wanted // reader.image_downsample
    if wanted % reader.image_downsample or min(reader.full_width, reader.full_height) // factor <= SSIM_RADIUS:
        size = f"{reader.full_width} x {reader.full_height} px at downsample {reader.image_downsample}"
        raise UserError(
            f"evaluate.image_downsample = {wanted}: images of {size} cannot be averaged so; give a smaller multiple of "
            f"{reader.image_downsample}"
        )
    return factor


def _render(predictor: Predictor, frame: Frame) -> Rendering:
    reader = predictor.reader
    views = list(range(reader.n_cameras))
    gaussians = predictor.gaussians(frame.t)
    return predictor.render(
        gaussians, frame.world_to_camera, frame.intrinsics, reader.width, reader.height, cameras=views
    )


def _measured_before(ctx: Context) -> ops.Values | None:
    """Metrics [T, C, M] of an evaluation of the same model with another gallery; None where there is none."""
    earlier = ctx.run.find_sibling("evaluate", ignoring=["evaluate.gallery_frames"])
    if earlier is None:
        return None
    try:
        data = objects.read_bytes(urls.join(earlier.data_url, VALUES))
    except FileNotFoundError:  # the result is of a version that did not keep them
        return None
    return np.asarray(np.load(io.BytesIO(data), allow_pickle=False))


def _to_npy(values: ops.Values) -> bytes:
    data = io.BytesIO()
    np.save(data, values, allow_pickle=False)
    return data.getvalue()


class EvaluateStage(Stage):
    """Compare renderings of one split with its photographs, in observed and held-out views."""

    def prepare(self, ctx: Context) -> Plan:
        reader = open_reader(ctx.run, torch.device("cpu"))
        split = ctx.experiment.evaluate.split
        _downsample(ctx, reader)
        frames = reader.split(split)
        if not frames:
            raise UserError(f"evaluate.split = {split}: no frame of it has a visual hull; choose another split")
        return Plan((0, len(frames)), {"frames": frames})

    def run_shard(self, ctx: Context, shard: Shard, plan: Plan) -> Outcome:
        with torch.no_grad(), out_of_memory(ctx.run, self.name):
            return self._run(ctx, shard, plan)

    def _run(self, ctx: Context, shard: Shard, plan: Plan) -> Outcome:
        predictor = open_predictor(ctx.run, ctx.experiment.evaluate.device)
        reader, frames = predictor.reader, plan.values["frames"]
        values = _measured_before(ctx)
        if values is None:
            values = self._measure(ctx, predictor, frames)
        self._write(ctx, VALUES, _to_npy(values))
        self._write_tables(ctx, reader, frames, values)
        self._write_gallery(ctx, predictor, frames, values)
        means = ops.camera_means(values)
        groups = {"held_out": reader.held_out, "observed": reader.observed}
        columns = metric_columns(ctx.experiment.evaluate, reader.has_plates)
        figures = {
            name: _named(columns, ops.group_means(means, cameras)) for name, cameras in groups.items() if cameras
        }
        return Outcome(len(frames), figures=figures)

    def _measure(self, ctx: Context, predictor: Predictor, frames: list[int]) -> ops.Values:
        """The metrics [T, C, M] of the frames; NaN where a view is absent."""
        reader = predictor.reader
        measure = Measurement(reader, ctx.experiment.evaluate, _downsample(ctx, reader))
        color, kept = self._fit_color(predictor, frames)
        measured = {}
        # The frames that were rendered for the fit come first, so that their memory is soon free again.
        for frame in reader.prefetch([*kept, *(t for t in frames if t not in kept)]):
            layers = kept.pop(frame.t, None) or _render(predictor, frame)
            rendering = Rendering(*(layer.to(reader.device) for layer in layers))
            measured[frame.t] = measure(frame, rendering, color).cpu().numpy()
            ctx.progress(len(measured), len(frames), "")
        values = np.stack([measured[t] for t in frames])  # [T, C, M]
        values[~reader.seen[frames]] = np.nan
        return values

    def _fit_color(self, predictor: Predictor, frames: list[int]) -> tuple[Tensor, dict[int, Rendering]]:
        """Fit an affine map of each camera's colours.

        The frames are evenly spread over the split, as many as `FIT_BYTES` hold, so that none is rendered twice. A few
        frames determine the twelve numbers of a camera.

        Returns:
            The maps [C, 4, 3], and by frame the renderings that they were fitted to, on the CPU.
        """
        reader = predictor.reader
        most = max(FIT_BYTES // (16 * reader.n_cameras * reader.height * reader.width), MIN_FIT_FRAMES)
        fit, kept = ColorFit(reader.n_cameras), {}
        for frame in reader.prefetch(frames[:: -(-len(frames) // most)]):
            rendering = _render(predictor, frame)
            seen = torch.from_numpy(reader.seen[frame.t]).to(frame.mask.device)
            fit.add(*rendering, frame.rgb, frame.mask * seen[:, None, None])
            kept[frame.t] = Rendering(*(layer.cpu() for layer in rendering))
        return fit.solve(), kept

    def _write(self, ctx: Context, name: str, data: bytes) -> None:
        objects.write_bytes(urls.join(ctx.run.output_url(self.name), name), data)

    def _write_tables(self, ctx: Context, reader: FrameReader, frames: list[int], values: ops.Values) -> None:
        split, jump = ctx.experiment.evaluate.split, ctx.experiment.ingest.frame_jump
        held_out = [int(c in reader.held_out) for c in range(reader.n_cameras)]
        columns = metric_columns(ctx.experiment.evaluate, reader.has_plates)
        means = ops.camera_means(values)
        absent = (~reader.seen[frames]).sum(0)
        rows: list[list[object]] = [
            [name, held_out[c], len(frames), int(absent[c]), *means[c].tolist()]
            for c, name in enumerate(reader.camera_names)
        ]
        groups = {"observed": reader.observed, "held_out": reader.held_out}
        for name, cameras in groups.items():
            if cameras:
                mean = ops.group_means(means, cameras).tolist()
                rows.append([f"mean_{name}", int(name == "held_out"), len(frames), int(absent[cameras].sum()), *mean])
        header = ["camera", "held_out", "frames", "absent", *columns]
        self._write(ctx, f"metrics_{split}.csv", encode_csv(header, rows, CSV_DIGITS))
        each = (
            [t, t * jump, name, held_out[c], *values[i, c].tolist()]
            for i, t in enumerate(frames)
            for c, name in enumerate(reader.camera_names)
        )
        self._write(
            ctx, f"frames_{split}.csv", encode_csv(["t", "frame", "camera", "held_out", *columns], each, CSV_DIGITS)
        )
        curves = {
            name.replace("_", " "): (
                ops.frame_means(values[..., IOU], cameras),
                ops.frame_means(values[..., PSNR], cameras),
            )
            for name, cameras in groups.items()
            if cameras
        }
        self._write(ctx, "per_frame.png", ops.plot_over_time(np.array(frames) * float(jump), curves))

    def _write_gallery(self, ctx: Context, predictor: Predictor, frames: list[int], values: ops.Values) -> None:
        reader = predictor.reader
        iou = ops.frame_means(values[..., IOU], reader.held_out or reader.observed)
        if np.isnan(iou).all():  # the held-out views are absent from all frames
            iou = ops.frame_means(values[..., IOU], reader.observed)
        entries: list[dict[str, Any]] = []
        for i, kind in ops.choose_frames(iou, ctx.experiment.evaluate.gallery_frames):
            frame = reader.frame(frames[i])
            rgb, alpha = _render(predictor, frame)
            shown = {"file": ("", rgb, frame.composite_on_white())}
            if reader.has_plates:
                shown["raw_file"] = ("_raw", lay_over(rgb, alpha, reader.background(frame.t)), frame.rgb)
            for c in np.flatnonzero(reader.seen[frame.t]).tolist():
                files = {}
                for key, (suffix, picture, truth) in shown.items():
                    layers = (layer[c].cpu().numpy() for layer in (picture, alpha, truth, frame.mask > 0))
                    files[key] = f"gallery/t{frame.t:06d}_camera{c}{suffix}.png"
                    self._write(ctx, files[key], media.encode_png(draw_comparison(*layers)))
                entries.append(
                    {
                        **files,
                        "t": frame.t,
                        "camera": reader.camera_names[c],
                        "held_out": c in reader.held_out,
                        "kind": kind,
                        "iou": round(float(values[i, c, IOU]), 6),
                        "psnr": round(float(values[i, c, PSNR]), 6),
                    }
                )
        entries.sort(key=lambda entry: not entry["held_out"])
        url = urls.join(ctx.run.output_url(self.name), "gallery.json")
        objects.write_json(url, {"split": ctx.experiment.evaluate.split, "pictures": entries})


def _named(columns: Sequence[str], values: ops.Values) -> dict[str, float | None]:
    """Metrics by name; None where a metric is not defined in any frame."""
    return {name: None if math.isnan(v) else round(v, 6) for name, v in zip(columns, values.tolist(), strict=True)}


STAGE = EvaluateStage("evaluate")
