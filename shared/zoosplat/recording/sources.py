"""The source of an experiment's recording."""

from __future__ import annotations

import zarr

from zoosplat.config.experiment import Experiment
from zoosplat.recording.dnerf_source import DnerfSource
from zoosplat.recording.segmented_source import SegmentedSource
from zoosplat.recording.source import RecordingSource
from zoosplat.recording.video_source import VideoSource


def open_source(experiment: Experiment, segments: zarr.Group | None = None) -> RecordingSource:
    """The source that `ingest.source` and `data.masks` name. Nothing is read yet.

    Args:
        experiment: the configuration.
        segments: the finished segments.zarr, without which masks that are made from the videos cannot be read.
    """
    if experiment.ingest.source == "dnerf":
        return DnerfSource(experiment)
    if experiment.data.masks_are_made:
        return SegmentedSource(experiment, segments)
    return VideoSource(experiment)
