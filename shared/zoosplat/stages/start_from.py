"""Which finished training `train.start_from` names, where it names a project."""

from __future__ import annotations

import contextlib

from zoosplat.config.experiment import Experiment
from zoosplat.config.training import ANIMALS, RANDOM
from zoosplat.errors import UserError
from zoosplat.stages import dependencies
from zoosplat.stages.lookup import open_run
from zoosplat.stages.projects import Project
from zoosplat.stages.results import RESULTS, Result, Source
from zoosplat.stages.runs import Run
from zoosplat.storage import urls


def trained_result(url: str) -> Result | None:
    """The finished training that a URL names, which is a result's folder or a project; None if there is none.

    In a project it is the training of the newest run that has a finished one.
    """
    url = urls.normalize(url)
    parent, _, name = url.rpartition("/")
    home, _, kind = parent.rpartition("/")
    if kind == "train" and home.endswith(f"/{RESULTS}"):
        result = Result.at(home.removesuffix(f"/{RESULTS}"), "train", name)
        return result if result.is_done() else None
    project = Project.at(url)
    # None stands for the latest run, or for the one run of a project of the layout before runs.
    for run_id in (None, *reversed(project.run_ids())):
        with contextlib.suppress(UserError):  # The record may be damaged, or there may be no run at all.
            found = open_run(project, run_id).results.get("train")
            if found is not None and found.is_done():
                return found
    return None


def pin_start_from(project: Project, experiment: Experiment) -> tuple[Experiment, Source | None]:
    """The configuration with `train.start_from` replaced by the very result that it names, and that result as a source.

    If it names no project, or a project without a finished training, the configuration is returned as it is, with None.
    """
    files = dependencies.outside_files("train", experiment)
    url = files.get("train.start_from")
    if url is None or url.endswith(".safetensors"):
        return experiment, None
    source = _source_of_unfinished(project, experiment, url)
    if source is None:
        result = trained_result(url)
        if result is None:
            return experiment, None
        source = Source(result.folder, f"train/{result.id}")
    return _with_start_from(experiment, source.url), source


def _with_start_from(experiment: Experiment, url: str) -> Experiment:
    train = experiment.train.model_copy(update={"start_from": url})
    return experiment.model_copy(update={"train": train})


def _source_of_unfinished(project: Project, experiment: Experiment, url: str) -> Source | None:
    """What the latest run's training starts from, if that run has this configuration and its training is not finished.

    The same command then goes on with that training, whatever has been trained since in the project at `url`. In any
    other case it is None.
    """
    latest = project.latest_id()
    try:
        run = None if latest is None else Run.load(project, latest)
    except UserError:
        return None
    if run is None or "train" not in run.results or run.results["train"].is_done():
        return None
    source = run.sources["train"].get("train.start_from")
    if source is None or not source.url.startswith(urls.join(url, RESULTS, "train") + "/"):
        return None
    return source if run.experiment.to_yaml() == _with_start_from(experiment, source.url).to_yaml() else None


def no_training(start_from: str) -> str:
    """The line for the user whose `train.start_from` names neither a file nor a project with a finished training."""
    return (
        f"train.start_from = {start_from}: no project with a finished training; name one, a .safetensors file, "
        f"{ANIMALS} or {RANDOM}"
    )
