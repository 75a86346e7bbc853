"""Hands on what the pods of a Job print."""

from __future__ import annotations

import time
from datetime import datetime

from zoosplat_flows.runners.kubernetes.api import JsonObject, KubernetesApi
from zoosplat_flows.runners.kubernetes.objects import container_end, final_condition, is_indexed, log_source
from zoosplat_flows.runners.protocol import Log
from zoosplat_flows.runners.stage_output import PROGRESS_LOG_S, parse_progress

# Seconds by which the next reading of a log reaches back before the last one, so that no line is lost between the two.
LOG_OVERLAP_S = 5


class PodLogReader:
    """Hands on, line by line, what the pods of a Job have printed, before the Job is deleted and the logs with it.

    The pod of a Job that is not indexed is followed while it runs. Other pods are read when they have ended.
    """

    def __init__(self, api: KubernetesApi, log: Log) -> None:
        self._api, self._log = api, log
        self._last_lines: dict[str, frozenset[str]] = {}  # pod -> the lines of its last reading, each with its time
        self._last_reading: dict[str, float] = {}  # pod -> when its log was read last, by time.monotonic
        self._last_progress: dict[str, datetime] = {}  # pod -> time of the last line of progress that was handed on
        self._complete: set[str] = set()  # pods whose whole log has been handed on

    def read(self, job: JsonObject, pods: list[JsonObject]) -> tuple[int, int, str] | None:
        """Hand on the new lines of all pods.

        Returns:
            What a running pod last said of its progress; None where nothing new is known.
        """
        progress = None
        for pod in pods:
            name, phase = pod["metadata"]["name"], pod.get("status", {}).get("phase")
            has_ended = phase in ("Succeeded", "Failed")
            is_followed = phase == "Running" and not is_indexed(job)
            if name in self._complete or not (has_ended or is_followed):
                continue
            try:
                progress = self._read_pod(pod) or progress
            except Exception:
                # The log is read again as long as the Job lasts. After that its lines are lost, but not the stage.
                if not has_ended or final_condition(job) is None:
                    continue
            if has_ended:
                self._complete.add(name)
                end = container_end(pod)
                # Kubernetes keeps the time of the end in whole seconds, which would sort before the last lines.
                text = f"exit status {end.get('exitCode', 'unknown')} {end.get('reason', '')}".rstrip()
                self._log(text, log_source(pod))
        return progress

    def _read_pod(self, pod: JsonObject) -> tuple[int, int, str] | None:
        name, source, now = pod["metadata"]["name"], log_source(pod), time.monotonic()
        since = None if name not in self._last_reading else int(now - self._last_reading[name]) + LOG_OVERLAP_S
        last_progress = None
        lines = self._api.read_log(name, since).splitlines()
        known = self._last_lines.get(name, frozenset())
        for text in lines:
            at, _, line = text.partition(" ")
            progress = parse_progress(line)
            last_progress = progress or last_progress
            # The times of a container's two streams are in no order, so a time alone does not say what is new.
            if text in known or not line.strip():
                continue
            if progress is None or self._is_progress_due(name, at):
                self._log(line, source, at)
        self._last_reading[name], self._last_lines[name] = now, frozenset(lines)
        return last_progress

    def _is_progress_due(self, name: str, at: str) -> bool:
        """Whether a line of progress of this time is handed on: stages print several a second."""
        printed = datetime.fromisoformat(at)
        if name in self._last_progress:
            since_last = (printed - self._last_progress[name]).total_seconds()
            if since_last < PROGRESS_LOG_S:
                return False
        self._last_progress[name] = printed
        return True
