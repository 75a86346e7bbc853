"""Ranks that torchrun has started: the first runs the stage, the others wait until it trains."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from zoosplat.config.experiment import Experiment
from zoosplat.stages.command import main, report_failure, service_parser
from zoosplat.stages.contract import Context, Outcome, Stage
from zoosplat.stages.lookup import open_run
from zoosplat.stages.projects import Project
from zoosplat_model.devices import pick_device
from zoosplat_train.ranks import Ranks, TrainFunction, claim_device, process_group

RUN_KEY = "zoosplat/begin"  # key of torchrun's store: the id of the run to train for, or NO_RUN
NO_RUN = "over"  # value under RUN_KEY when the first rank has ended


def is_torchrun() -> bool:
    """Whether torchrun has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def train_as_first_rank(train: TrainFunction, ctx: Context) -> Outcome:
    """Train as the first rank; the others begin too."""
    _store().set(RUN_KEY, ctx.run.id)
    return _train(train, ctx)


@contextmanager
def own_rank(experiment: Experiment) -> Iterator[tuple[torch.device, Ranks]]:
    """This process's device and its rank among those that torchrun has started; without torchrun it is alone."""
    if not is_torchrun():
        yield pick_device(experiment.train.device), Ranks()
        return
    device = claim_device(experiment, int(os.environ["LOCAL_RANK"]))
    with process_group(device) as ranks:
        yield device, ranks


def run_rank(stage: Stage, train: TrainFunction) -> int:
    """Do what a process of torchrun does: the first rank is the stage, the others wait until it trains or has ended.

    Returns:
        The exit status.
    """
    store = _store()
    if os.environ["RANK"] == "0":
        status = main(stage)
        store.set(RUN_KEY, NO_RUN)
        if status:
            os._exit(status)  # a group that has failed cannot be left
        return 0
    args = service_parser(stage.name).parse_args()
    store.wait([RUN_KEY], timedelta(days=365))
    run_id = store.get(RUN_KEY).decode()
    if run_id == NO_RUN:
        return 0
    try:
        run = open_run(Project.at(args.project), run_id)
        _train(train, Context(run, lambda done, total, message: None))
    except Exception as error:
        return report_failure(stage.name, error, args.project)
    return 0


def _train(train: TrainFunction, ctx: Context) -> Outcome:
    with own_rank(ctx.experiment) as (device, ranks):
        return train(ctx, device, ranks)


def _store() -> Any:
    store, _, _ = next(dist.rendezvous("env://"))  # type: ignore[attr-defined]
    return store
