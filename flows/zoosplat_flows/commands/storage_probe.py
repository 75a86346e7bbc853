"""Checks that files can be written and read where a project lies."""

from __future__ import annotations

import os
import threading
import time

from zoosplat.errors import UserError
from zoosplat.storage import objects, urls
from zoosplat.storage.errors import as_user_error

ANSWER_WITHIN_S = 25.0  # seconds for a storage server to answer; a local one takes milliseconds


def check_writable(url: str) -> None:
    """Write a file at a URL, read it back and delete it.

    Raises:
        UserError: that fails, or takes longer than `ANSWER_WITHIN_S`.
    """
    errors: list[BaseException] = []
    probe = urls.join(url, f".probe-{os.getpid()}-{time.time_ns()}")

    def attempt() -> None:
        try:
            objects.write_bytes(probe, b"zoosplat")
            if objects.read_bytes(probe) != b"zoosplat":
                raise UserError(f"{url}: what is written there reads back differently; use another place")
            objects.delete(probe)
        except BaseException as error:
            errors.append(error)

    # In a thread that may be left behind: a server that accepts connections and is silent costs minutes of retries.
    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(ANSWER_WITHIN_S)
    if thread.is_alive():
        where = os.environ.get("AWS_ENDPOINT_URL", "the S3 endpoint") if urls.is_s3(url) else "the file system"
        raise UserError(f"{url}: {where} does not answer; start the server or correct AWS_ENDPOINT_URL")
    if errors:
        error = errors[0]
        known = error if isinstance(error, UserError) else as_user_error(error, url)
        if known is None and isinstance(error, OSError):
            known = UserError(f"{url}: cannot be written ({error}); use another place")
        raise known or error
