"""The entry point of the `zoosplat` command, which answers Ctrl-C also while everything else is being imported."""

from __future__ import annotations

import os
import signal
import sys

from zoosplat_flows.messages import STOPPED


def _leave(number: int, frame: object) -> None:
    """Print a line and end at once, without what libraries print when an interrupt reaches them."""
    sys.stderr.write(f"\n{STOPPED}\n")
    sys.stderr.flush()
    os._exit(130)


def main() -> None:
    """Run the command line. `zoosplat run` replaces the handlers by its own, which end its stages first."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _leave)
    from zoosplat_flows.cli.app import app

    app()
