"""The process of a service, `python -m zoosplat_<stage>`."""

from __future__ import annotations

import importlib
from typing import NoReturn

from zoosplat.stages.stopping import run_stoppable


def run_service(stage: str) -> NoReturn:
    """Run the command line of a service, and exit. The stage is `STAGE` in the module `zoosplat_<stage>.stage`.

    Both are imported here and not above, because a service can also be stopped while it imports them.
    """

    def main() -> int:
        command = importlib.import_module("zoosplat.stages.command")
        status: int = command.main(importlib.import_module(f"zoosplat_{stage}.stage").STAGE)
        return status

    run_stoppable(stage, main)
