"""The source of an experiment's recording."""

from __future__ import annotations

from zoosplat.config.experiment import Experiment
from zoosplat.recording.dnerf_source import DnerfSource
from zoosplat.recording.source import RecordingSource
from zoosplat.recording.video_source import VideoSource


def open_source(experiment: Experiment) -> RecordingSource:
    """The source that `ingest.source` names. Nothing is read yet."""
    return DnerfSource(experiment) if experiment.ingest.source == "dnerf" else VideoSource(experiment)
