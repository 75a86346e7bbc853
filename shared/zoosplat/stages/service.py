"""The process of a service, `python -m zoosplat_<stage>`."""

from __future__ import annotations

import importlib
from typing import NoReturn

from zoosplat.stages.stopping import run_stoppable


def run_service(stage: str) -> NoReturn:
    """`__main__` of a service: the command line of the stage that `zoosplat_<stage>` has as `stage.STAGE`."""

    def main() -> int:
        command = importlib.import_module("zoosplat.stages.command")
        status: int = command.main(importlib.import_module(f"zoosplat_{stage}.stage").STAGE)
        return status

    run_stoppable(stage, main)
