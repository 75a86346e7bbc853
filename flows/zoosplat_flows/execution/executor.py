"""Runs the stages of a run where a runner puts them, each as soon as what it reads is done.

`zoosplat run` uses it as it is; the Prefect flow gives every stage a task of its own and uses the parts.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Protocol

from zoosplat.errors import Passing, UserError
from zoosplat.stages import runs
from zoosplat.stages.registry import PIPELINE, STAGES
from zoosplat.stages.runs import Run
from zoosplat.storage import objects
from zoosplat_flows.execution.recorder import Event, Listener, Recorder

RETRIES = 2
RETRY_DELAY_S = 5.0


class Interrupted(Exception):
    """The stage was stopped because its pipeline ends; trying again would be wrong."""


class Exhausted(RuntimeError):
    """Shards failed although they were tried again: another try of the stage would only repeat that."""


class Failed(RuntimeError):
    """One or more stages failed for good; a line or more for each."""


class Log(Protocol):
    """Takes a line that a stage has printed, where it comes from, and when (ISO 8601; default: now)."""

    def __call__(self, line: str, source: str = "", at: str = "", /) -> None: ...


class Progress(Protocol):
    """Takes frames or steps done, their total and a message."""

    def __call__(self, done: int, total: int, message: str, /) -> None: ...


class Runner(Protocol):
    """Where stages run: see `zoosplat_flows.runners`. Leaving its `with` block ends what still runs."""

    def run(self, stage: str, run: Run, *, workers: int | None, progress: Progress, log: Log) -> None: ...

    def stop(self) -> None: ...


def select(from_stage: str | None = None, until_stage: str | None = None) -> list[str]:
    """The stages from one to another, both included, in the order of the pipeline.

    Raises:
        UserError: no such stage, or the wrong way round.
    """
    names = [spec.name for spec in PIPELINE]
    for name in (from_stage, until_stage):
        if name is not None and name not in names:
            raise UserError(f"there is no stage {name}; the stages are {', '.join(names)}")
    first = names.index(from_stage) if from_stage else 0
    last = names.index(until_stage) if until_stage else len(names) - 1
    if last < first:
        raise UserError(f"stage {until_stage} comes before {from_stage}; the stages are {', '.join(names)}")
    return names[first : last + 1]


def worth_retrying(error: BaseException) -> bool:
    """Whether another try of a stage may help: not when the input is wrong or the pipeline ends."""
    if isinstance(error, Passing):
        return True
    return not isinstance(error, UserError | Interrupted | Exhausted)


def state_before(run: Run, stage: str) -> str | None:
    """`skipped` or `reused` where the result of a stage is there already; None where it has to be made."""
    result = run.result(stage)
    if not result.is_done():
        return None
    return "reused" if result.reused else "skipped"


def attempt(stage: str, run: Run, runner: Runner, workers: int | None, tell: Listener, log: Log) -> str:
    """One try of a stage: makes its result unless it is there.

    Returns:
        `done`, `skipped`, `reused`, or `shared` where another run has computed it meanwhile.

    Raises:
        UserError: bad input or configuration.
        Interrupted: the pipeline ends.
        RuntimeError: anything else, with the last lines that the stage printed.
    """
    tell(Event(stage, "started"))
    state = state_before(run, stage)
    if state is None:
        runner.run(stage, run, workers=workers, progress=lambda *of: tell(Event(stage, "running", *of)), log=log)
        mark = run.result(stage).mark()
        if mark is None:
            raise RuntimeError(f"{stage}: ended without its success mark in {run.result(stage).folder}")
        state = "done" if mark.get("run") == run.id else "shared"
    return state


def execute(
    run: Run, stages: list[str], runner: Runner, workers: int | None, recorder: Recorder, tell: Listener
) -> dict[str, str]:
    """Run stages of a run, each in a thread, and wait for all.

    Args:
        run: whose results are made.
        stages: names, in the order of the pipeline.
        runner: where they run.
        workers: processes a stage; None: a core each.
        recorder: keeps what they print.
        tell: told what happens to each.

    Returns:
        What became of each stage: see `attempt`.

    Raises:
        Failed: with what each failing stage said.
        UserError: the same, where all of them were the user's to mend.
    """
    ending = threading.Event()
    futures: dict[str, Future[str]] = {}
    pool = ThreadPoolExecutor(len(stages), thread_name_prefix="stage")
    try:
        for stage in stages:
            reads = [futures[name] for name in STAGES[stage].reads if name in futures]
            futures[stage] = pool.submit(_stage, stage, run, runner, workers, recorder, tell, reads, ending)
        _wait(futures)
    finally:
        ending.set()
        runner.stop()
        pool.shutdown(wait=True, cancel_futures=True)
    failed = {stage: error for stage, future in futures.items() if (error := future.exception()) is not None}
    causes = [error for error in failed.values() if not isinstance(error, _Blocked)]
    if causes:
        text = "\n".join(str(error) for error in causes)
        raise (UserError if all(isinstance(error, UserError) for error in causes) else Failed)(text)
    return {stage: future.result() for stage, future in futures.items()}


def _wait(futures: dict[str, Future[str]]) -> None:
    """Until all have ended; in steps, since a wait without an end does not notice Ctrl-C on every system."""
    while wait(futures.values(), timeout=0.5).not_done:
        pass


class _Blocked(Exception):
    """A stage that was not begun, for one that it reads has failed."""


def _stage(
    stage: str,
    run: Run,
    runner: Runner,
    workers: int | None,
    recorder: Recorder,
    tell: Listener,
    reads: list[Future[str]],
    ending: threading.Event,
) -> str:
    for future in reads:
        if future.exception() is not None:
            tell(Event(stage, "blocked"))
            raise _Blocked(stage)

    def log(line: str, source: str = "", at: str = "") -> None:
        recorder.log(stage, line, source, at)

    for tries in range(RETRIES + 1):
        try:
            state = attempt(stage, run, runner, workers, tell, log)
        except Interrupted:
            tell(Event(stage, "stopped"))
            raise
        except Exception as error:
            again = tries < RETRIES and worth_retrying(error)
            tell(Event(stage, "retrying" if again else "failed", message=str(error)))
            if not again or ending.wait(RETRY_DELAY_S):
                raise
        else:
            tell(Event(stage, state))
            return state
    raise AssertionError


def report_key(run: Run) -> list[str]:
    """What a run's report shows: it is built again when this has changed."""
    from importlib.metadata import version

    return [version("zoosplat"), *(f"{stage}/{result.id}" for stage, result in run.results.items() if result.is_done())]


def make_report(run: Run, recorder: Recorder, tell: Listener) -> str:
    """The report page of what is done, unless it is there already. Returns its URL."""
    key, url = report_key(run), run.path("report", "index.html")
    tell(Event("report", "started"))
    if recorder.get("report") == key and objects.exists(url):
        tell(Event("report", "skipped"))
        return url
    from zoosplat_flows.report.page import build_report

    try:
        build_report(run, "done")
    except Exception as error:
        tell(Event("report", "failed", message=str(error)))
        raise
    recorder.set("report", key)
    runs.link_latest(run)
    tell(Event("report", "done"))
    return url


def warnings_of(run: Run) -> list[str]:
    """What the stages warn of, a line each, with the stage's name."""
    found = []
    for stage in run.results:
        for warning in (run.read_mark(stage) or {}).get("warnings", ()):
            found.append(f"{stage}: {warning}")
    return found
