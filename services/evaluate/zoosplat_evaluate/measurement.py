"""What is measured in a frame, by the kind of recording and configuration, and the columns of the tables."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from zoosplat.config.sections import Evaluate
from zoosplat_model.background import lay_over
from zoosplat_model.frames import Frame, FrameReader
from zoosplat_model.lpips import LEAST_SIDE, read_lpips
from zoosplat_model.metrics import METRICS, frame_metrics
from zoosplat_model.rasterize import Rendering
from zoosplat_model.raw_metrics import (
    RAW_METRICS,
    Measure,
    Surroundings,
    compare_windows,
    judged_windows,
    raw_errors,
    white_beyond,
)

LPIPS, RAW_LPIPS = "lpips", "raw_lpips"


def metric_columns(settings: Evaluate, has_plates: bool) -> tuple[str, ...]:
    """The names of the metrics: those on raw pictures need plates, and LPIPS needs weights."""
    of_network = () if settings.lpips_weights is None else (LPIPS, RAW_LPIPS) if has_plates else (LPIPS,)
    return (*METRICS, *(RAW_METRICS if has_plates else ()), *of_network)


class Measurement:
    """Measures the renderings of frames.

    Attributes:
        columns: names of the metrics, in their order.
        factor: of averaging, from the pixels of the recording to those of the metrics.
    """

    def __init__(self, reader: FrameReader, settings: Evaluate, factor: int) -> None:
        """Read what is needed. Raises UserError where the weights of LPIPS cannot be used."""
        self.reader, self.factor = reader, factor
        self.columns = metric_columns(settings, reader.has_plates)
        self._lpips = None if settings.lpips_weights is None else read_lpips(settings.lpips_weights, reader.device)

    def __call__(self, frame: Frame, rendering: Rendering, color: Tensor) -> Tensor:
        """The metrics [C, M] float64 of a frame; NaN where one is not defined.

        Args:
            frame: the truth.
            rendering: of all cameras' windows on white.
            color: [C, 4, 3] map of each camera's colours, see `ColorFit`.
        """
        reader, (rgb, alpha) = self.reader, rendering
        size = reader.full_width, reader.full_height
        parts = [frame_metrics(rgb, alpha, frame.rgb, frame.mask, frame.origin, *size, self.factor, color)]
        in_frame = frame.intrinsics.clone()
        in_frame[:, :2, 2] += frame.origin.to(in_frame)
        windows = judged_windows(frame.center, reader.ell_m, in_frame, frame.world_to_camera, *size)
        pairs: list[tuple[Tensor, Tensor, Surroundings]] = [(rgb.clamp(0, 1), frame.composite_on_white(), white_beyond)]
        if reader.has_plates:
            over_plate = lay_over(rgb, alpha, reader.background(frame.t)).clamp(0, 1)
            pairs.append((over_plate, frame.rgb, partial(reader.background_in, frame.t)))

        def compare(pair: tuple[Tensor, Tensor, Surroundings], measure: Measure, *sizes: int) -> Tensor:
            picture, truth, surroundings = pair
            return compare_windows(picture, truth, frame.origin, windows, surroundings, self.factor, measure, *sizes)

        if reader.has_plates:
            parts.append(compare(pairs[1], raw_errors, len(RAW_METRICS)))
        if self._lpips is not None:
            parts += [compare(pair, self._lpips, 1, LEAST_SIDE) for pair in pairs]
        return torch.cat([part.to(parts[0].device) for part in parts], 1)
