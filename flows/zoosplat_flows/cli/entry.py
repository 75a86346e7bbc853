"""The entry point of the `zoosplat` command: answers Ctrl-C while everything else is still being imported."""

from __future__ import annotations

import os
import signal
import sys


def _leave(number: int, frame: object) -> None:
    """Say one line and end at once, without what libraries print as they are torn down."""
    sys.stderr.write("\nzoosplat: stopped; finished work is kept, the same command goes on from here\n")
    sys.stderr.flush()
    os._exit(130)


def main() -> None:
    """Run the command line; `zoosplat run` has a way of its own to stop, which ends its stages first."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _leave)
    from zoosplat_flows.cli.app import app

    app()
