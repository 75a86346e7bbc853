"""The pipeline of a recording whose masks are files, which most tests have."""

from __future__ import annotations

from dataclasses import replace

from zoosplat.stages.registry import PIPELINE, SEGMENT, StageSpec

FILES_PIPELINE: tuple[StageSpec, ...] = tuple(
    replace(spec, reads=tuple(name for name in spec.reads if name != SEGMENT))
    for spec in PIPELINE
    if spec.name != SEGMENT
)
FILES_STAGES = {spec.name: spec for spec in FILES_PIPELINE}
