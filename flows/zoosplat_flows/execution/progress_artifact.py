"""A stage's progress bar in Prefect's interface."""

from __future__ import annotations

import threading
import time
import uuid
from contextlib import suppress
from contextvars import copy_context
from typing import cast

import httpx
from prefect.artifacts import create_progress_artifact, update_progress_artifact

UPDATE_EVERY_S = 5.0  # seconds between updates, and seconds that the last update may take


class ProgressArtifact:
    """The progress bar of a stage, updated every few seconds.

    Threads make the updates: a call to a server that has stopped takes minutes, and no stage waits for that.
    """

    def __init__(self, stage: str) -> None:
        self._stage = stage
        self._id: uuid.UUID | None = None
        self._last_update = 0.0
        self._thread: threading.Thread | None = None

    def update(self, percent: float) -> None:
        """Show a percentage, unless the last update is a moment ago. 100 is always shown."""
        now = time.monotonic()
        if percent >= 100 and self._thread is not None:
            self._thread.join(timeout=UPDATE_EVERY_S)
        is_early = percent < 100 and now - self._last_update < UPDATE_EVERY_S
        if self._thread is not None and (is_early or self._thread.is_alive()):
            return
        self._last_update = now
        # In a copy of the context, which says which task run the artifact belongs to.
        self._thread = threading.Thread(target=copy_context().run, args=(self._send, percent), daemon=True)
        self._thread.start()
        if percent >= 100:
            self._thread.join(timeout=UPDATE_EVERY_S)

    def _send(self, percent: float) -> None:
        # A stage must not fail because its progress bar cannot be updated.
        with suppress(httpx.HTTPError):
            if self._id is None:
                key = self._stage.replace("_", "-")
                self._id = cast(uuid.UUID, create_progress_artifact(percent, key=key, description=self._stage))
            else:
                update_progress_artifact(self._id, percent)
