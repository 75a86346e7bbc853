"""What pods print is handed on once each, whatever the order of its times. A stand-in answers for the API server."""

from __future__ import annotations

from typing import Any

from zoosplat_flows.runners.kubernetes.pod_logs import PodLogReader

JOB: dict[str, Any] = {"spec": {"completionMode": "NonIndexed"}, "status": {}}


def pod(phase: str) -> dict[str, Any]:
    return {
        "metadata": {"name": "one", "labels": {}},
        "spec": {"nodeName": "node"},
        "status": {"phase": phase, "containerStatuses": [{"state": {"terminated": {"exitCode": 1}}}]},
    }


class StandInApi:
    """Answers each request for a log with the next of its texts."""

    def __init__(self, *logs: str) -> None:
        self._logs = list(logs)

    def read_log(self, pod: str, since_s: int | None = None) -> str:
        return self._logs.pop(0)


def handed_on(api: StandInApi, *phases: str) -> list[str]:
    lines: list[str] = []
    reader = PodLogReader(api, lambda line, source="", at="": lines.append(line))  # type: ignore[arg-type]
    for phase in phases:
        reader.read(JOB, [pod(phase)])
    return lines


def test_lines_of_two_streams_that_are_out_of_order_are_all_handed_on() -> None:
    log = "2026-01-01T00:00:00.000000002Z AssertionError\n2026-01-01T00:00:00.000000001Z shard 1\n"
    assert handed_on(StandInApi(log), "Failed") == ["AssertionError", "shard 1", "exit status 1"]


def test_lines_that_are_read_again_are_handed_on_once() -> None:
    first = "2026-01-01T00:00:00.000000002Z b\n2026-01-01T00:00:00.000000003Z c\n"
    late = "2026-01-01T00:00:00.000000001Z a\n"
    again = first + late + "2026-01-01T00:00:00.000000004Z d\n"
    assert handed_on(StandInApi(first, again), "Running", "Succeeded") == ["b", "c", "a", "d", "exit status 1"]
