"""Stand-ins for what tests and benchmarks do not want to compute: longer videos, and results of earlier stages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

from zoosplat.config.experiment import Experiment
from zoosplat.stages import runner
from zoosplat.stages.contract import Context, Outcome, Plan, Shard, Stage
from zoosplat.stages.dependencies import outside_files
from zoosplat.stages.drafts import draft_run
from zoosplat.stages.projects import Project
from zoosplat.stages.run_records import record_run
from zoosplat.stages.runs import Run
from zoosplat.storage import objects


def loop_video(source: Path, target: Path, times: int) -> None:
    """Write a video that plays `source` several times over; no frame is decoded."""
    import av

    with av.open(str(source)) as file, av.open(str(target), "w") as looped:
        stream = file.streams.video[0]
        copy: Any = looped.add_stream_from_template(stream)
        length, time_base = stream.duration or 0, stream.time_base or Fraction(1)
        packets = [(p.pts or 0, p.dts or 0, bytes(p), p.is_keyframe) for p in file.demux(stream) if p.size]
        for i in range(times):
            for pts, dts, data, key in packets:
                packet = av.Packet(data)
                packet.pts, packet.dts, packet.is_keyframe = pts + i * length, dts + i * length, key
                packet.stream, packet.time_base = copy, time_base
                looped.mux(packet)


def begin_with_results(project: Project, experiment: Experiment, results: Mapping[str, Callable[[str], None]]) -> Run:
    """Begin a run of which some stages are finished: a stand-in for each of them writes the result.

    Files of the recording that are not there are written too, a byte each: their content is what they are known by.

    Args:
        project: where the run begins.
        experiment: the configuration of the run.
        results: by the name of a stage, in the order of the pipeline, what writes its group or folder at a URL. Stages
            that are finished under this configuration are left as they are.
    """

    class StandIn(Stage):
        def prepare(self, ctx: Context) -> Plan:
            return Plan((0, 1))

        def run_shard(self, ctx: Context, shard: Shard, plan: Plan) -> Outcome:
            results[self.name](ctx.run.output_url(self.name))
            return Outcome(1)

    for stage in ("ingest", "pack"):
        for url in outside_files(stage, experiment).values():
            if not objects.exists(url):
                objects.write_bytes(url, b"0")
    run = record_run(draft_run(project, experiment), list(results))
    for stage in results:
        runner.run_stage(StandIn(stage), run)
    return run
