"""`zoosplat run`: checks the project, runs the stages and shows their progress."""

from __future__ import annotations

import os
import signal
import threading
import tomllib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import typer
from rich.console import Console
from rich.markup import escape

from zoosplat.config.experiment import Experiment
from zoosplat.stages.begin import begin_run, check_forced
from zoosplat.stages.projects import Project
from zoosplat.stages.runs import Run
from zoosplat_flows.commands.run_display import RunDisplay
from zoosplat_flows.commands.storage_probe import check_writable
from zoosplat_flows.execution.executor import StagesFailed, execute_stages, select_stages
from zoosplat_flows.execution.recorder import StageEvent, keep_record
from zoosplat_flows.execution.stage_states import stage_warnings
from zoosplat_flows.messages import STOPPED
from zoosplat_flows.report.refresh import ensure_report
from zoosplat_flows.runners.local import LocalRunner

STOP_WITHIN_S = 3.5  # seconds for the stages to end after Ctrl-C or SIGTERM
INTERRUPTED_STATUS = 130  # exit status of a command that Ctrl-C has stopped: 128 + SIGINT
PREFECT_SETTINGS = {
    # The command shows progress and failures itself; Prefect's log would print each failure several times over.
    "PREFECT_LOGGING_LEVEL": "CRITICAL",
    "PREFECT_LOGGING_INTERNAL_LEVEL": "CRITICAL",
    # A server that is restarted is back within half a minute. With the default the command would wait minutes for a
    # server that does not come back.
    "PREFECT_CLIENT_MAX_RETRIES": "4",
}


def summarize_metrics(run: Run) -> list[str]:
    """The mean metrics of the held-out and of the observed cameras, a line each; no line before the evaluation."""
    mark = run.read_mark("evaluate")
    if mark is None:
        return []
    split = run.experiment.evaluate.split
    return [
        f"{group.replace('_', '-')} views, {split} frames: "
        + ", ".join(f"{name} {value:.3f}" for name, value in mark["figures"][group].items() if value is not None)
        for group in ("held_out", "observed")
        if group in mark["figures"]
    ]


@contextmanager
def _stopping_promptly(display: RunDisplay) -> Iterator[None]:
    """While the block runs, let Ctrl-C and SIGTERM stop the stages and then the command within `STOP_WITHIN_S`.

    KeyboardInterrupt, raised in the main thread, ends the stages. Where something hangs, the process ends without it.
    """

    def leave() -> None:
        display.progress.stop()  # gives the terminal its cursor back
        typer.echo(STOPPED, err=True)
        os._exit(INTERRUPTED_STATUS)

    def interrupt(number: int, frame: object) -> None:
        for each in before:
            signal.signal(each, signal.SIG_IGN)  # a second signal must not disturb the clearing up
        timer = threading.Timer(STOP_WITHIN_S, leave)
        timer.daemon = True
        timer.start()
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def is_prefect_server_named() -> bool:
    """Whether PREFECT_API_URL or Prefect's active profile names a server. Prefect itself takes seconds to import."""
    if os.environ.get("PREFECT_API_URL"):
        return True
    home = Path(os.environ.get("PREFECT_HOME", Path.home() / ".prefect"))
    path = Path(os.environ.get("PREFECT_PROFILES_PATH", home / "profiles.toml"))
    with suppress(OSError, tomllib.TOMLDecodeError):
        profiles = tomllib.loads(path.read_text())
        active = os.environ.get("PREFECT_PROFILE", profiles.get("active", ""))
        return bool(profiles.get("profiles", {}).get(active, {}).get("PREFECT_API_URL"))
    return False


def _execute(run: Run, stages: list[str], workers: int | None, display: RunDisplay) -> str:
    """Run the stages in this process, and build the report. Returns the report's URL."""
    with keep_record(run, stages) as recorder:

        def tell(event: StageEvent) -> None:
            recorder(event)
            display(event)

        with LocalRunner() as processes:
            execute_stages(run, stages, processes, workers, recorder, tell)
        return ensure_report(run, recorder, tell)


def _execute_with_prefect(run: Run, stages: list[str], workers: int | None, display: RunDisplay) -> str:
    """Run the stages as a flow run of the named Prefect server, and build the report. Returns the report's URL."""
    for key, value in PREFECT_SETTINGS.items():
        os.environ.setdefault(key, value)
    with Console(stderr=True).status("connecting to Prefect"):
        import httpx

        from zoosplat_flows.pipeline import listening, pipeline
    try:
        with listening(display):
            results = pipeline(run.project.url, stages[0], stages[-1], workers=workers, run=run.id)
    except httpx.HTTPError as error:
        what = f"the Prefect server cannot be reached ({error}); check PREFECT_API_URL"
        raise StagesFailed(
            f"{what}; without it, and without a Prefect profile that names one, runs need no server"
        ) from None
    return results["report"]


def run_stages(
    url: str,
    experiment: Experiment,
    from_stage: str | None,
    until_stage: str | None,
    force: list[str],
    workers: int | None,
) -> Run:
    """Check everything, begin a run of the configuration in a project, and run its stages.

    Args:
        url: path or URL of the project.
        experiment: the configuration.
        from_stage: first stage to run; None: the first of the pipeline.
        until_stage: last stage to run; None: the last of the pipeline.
        force: stages whose results are made again.
        workers: processes for the shards of a stage; None: one for each core.

    Returns:
        The run, whose stages are done.

    Raises:
        UserError: bad input or configuration.
        typer.Exit: the run was stopped (status 130), or stages failed (status 1); the reason is printed.
    """
    stages = select_stages(experiment, from_stage, until_stage)
    check_forced(experiment, force, stages)
    project = Project.at(url)
    check_writable(project.url)
    display = RunDisplay([*stages, "report"])
    execute = _execute_with_prefect if is_prefect_server_named() else _execute
    try:
        with _stopping_promptly(display), ExitStack() as alive:
            with Console(stderr=True).status("checking") as status:

                def hashing(file: str) -> None:
                    # Called once for each file: hashing hours of video takes a while.
                    status.update(f"reading {escape(file)}, whose content is part of the results' ids")

                begun_run = alive.enter_context(begin_run(project, experiment, stages, force, hashing))
            with display.progress:
                report = execute(begun_run, stages, workers, display)
    except KeyboardInterrupt:
        typer.echo(STOPPED, err=True)
        raise typer.Exit(INTERRUPTED_STATUS) from None
    except StagesFailed as error:
        typer.echo(f"zoosplat: {error}\nzoosplat: finished work is kept; the same command tries again", err=True)
        raise typer.Exit(1) from None
    for warning in stage_warnings(begun_run):
        typer.echo(f"warning: {warning}", err=True)
    for line in summarize_metrics(begun_run):
        typer.echo(line)
    typer.echo(f"report: {report}")
    return begun_run
