"""Runs the stages of a run with a runner, each stage as soon as the stages that it reads are done.

`zoosplat run` calls `execute_stages`. The Prefect flow gives every stage a task of its own and uses the other functions
of this module.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor, wait

from zoosplat.config.experiment import Experiment
from zoosplat.errors import TransientError, UserError
from zoosplat.stages.registry import STAGES, pipeline_of, require_stage
from zoosplat.stages.runs import Run
from zoosplat_flows.execution.recorder import EventListener, RunRecorder, StageEvent
from zoosplat_flows.runners.protocol import Exhausted, Interrupted, Log, Runner

RETRIES = 2  # further tries of a stage that failed
RETRY_DELAY_S = 5.0  # seconds between a failure and the next try


class StagesFailed(RuntimeError):
    """One or more stages failed for good; the message has a line or more for each."""


def select_stages(experiment: Experiment, from_stage: str | None = None, until_stage: str | None = None) -> list[str]:
    """The stages of an experiment from one to another, both included, in the order of the pipeline.

    Args:
        experiment: its configuration.
        from_stage: the first stage; None: the first of the pipeline.
        until_stage: the last stage; None: the last of the pipeline.

    Raises:
        UserError: there is no such stage, the experiment does not have it, or the last one comes before the first.
    """
    names = [spec.name for spec in pipeline_of(experiment)]
    for name in (from_stage, until_stage):
        if name is not None:
            require_stage(name, experiment)
    first = names.index(from_stage) if from_stage else 0
    last = names.index(until_stage) if until_stage else len(names) - 1
    if last < first:
        raise UserError(f"stage {until_stage} comes before {from_stage}; the stages are {', '.join(names)}")
    return names[first : last + 1]


def is_worth_retrying(error: BaseException) -> bool:
    """Whether another try of a stage may help. It does not where the input is wrong or the pipeline ends."""
    if isinstance(error, TransientError):
        return True
    return not isinstance(error, UserError | Interrupted | Exhausted)


def state_before(run: Run, stage: str) -> str | None:
    """`skipped` or `reused` where the result of a stage exists already; None where it has to be made."""
    result = run.result(stage)
    if not result.is_done():
        return None
    return "reused" if result.reused else "skipped"


def attempt_stage(stage: str, run: Run, runner: Runner, workers: int | None, tell: EventListener, log: Log) -> str:
    """Try once to make the result of a stage, unless it exists already.

    Args:
        stage: name of the stage.
        run: the recorded run whose result the stage makes.
        runner: runs the stage.
        workers: processes for its shards; None: as many as the runner finds right.
        tell: called with what happens to the stage.
        log: called with every line that the stage prints.

    Returns:
        `done`, `skipped`, `reused`, or `shared` where another run has computed the result meanwhile.

    Raises:
        UserError: bad input or configuration.
        Interrupted: the pipeline ends.
        RuntimeError: any other failure, with the last lines that the stage printed.
    """
    tell(StageEvent(stage, "started"))
    state = state_before(run, stage)
    if state is not None:
        return state

    def report_progress(done: int, total: int, message: str) -> None:
        tell(StageEvent(stage, "running", done, total, message))

    runner.run(stage, run, workers=workers, progress=report_progress, log=log)
    mark = run.result(stage).mark()
    if mark is None:
        raise RuntimeError(f"{stage}: ended without its success mark in {run.result(stage).folder}")
    return "done" if mark.get("run") == run.id else "shared"


def execute_stages(
    run: Run, stages: list[str], runner: Runner, workers: int | None, recorder: RunRecorder, tell: EventListener
) -> dict[str, str]:
    """Run stages of a run, each in a thread, and wait for all.

    Args:
        run: the run whose results are made.
        stages: names of stages, in the order of the pipeline.
        runner: runs the stages.
        workers: processes for the shards of a stage; None: as many as the runner finds right.
        recorder: keeps what the stages print.
        tell: called with what happens to each stage, from any thread.

    Returns:
        What became of each stage: see `attempt_stage`.

    Raises:
        StagesFailed: stages failed; the messages of all.
        UserError: stages failed, and the user can mend all of it; the messages of all.
    """
    ending = threading.Event()
    futures: dict[str, Future[str]] = {}
    pool = ThreadPoolExecutor(len(stages), thread_name_prefix="stage")
    try:
        for stage in stages:
            reads = [futures[name] for name in STAGES[stage].reads if name in futures]
            futures[stage] = pool.submit(_run_stage, stage, run, runner, workers, recorder, tell, reads, ending)
        _wait_for_all(futures)
    finally:
        ending.set()
        runner.stop()
        pool.shutdown(wait=True, cancel_futures=True)
    failed = {stage: error for stage, future in futures.items() if (error := future.exception()) is not None}
    causes = [error for error in failed.values() if not isinstance(error, _Blocked)]
    if causes:
        text = "\n".join(str(error) for error in causes)
        raise (UserError if all(isinstance(error, UserError) for error in causes) else StagesFailed)(text)
    return {stage: future.result() for stage, future in futures.items()}


def _wait_for_all(futures: dict[str, Future[str]]) -> None:
    # In steps: on some systems Ctrl-C does not interrupt a wait without a timeout.
    while wait(futures.values(), timeout=0.5).not_done:
        pass


class _Blocked(Exception):
    """The stage was not begun, because a stage that it reads has failed."""


def _run_stage(
    stage: str,
    run: Run,
    runner: Runner,
    workers: int | None,
    recorder: RunRecorder,
    tell: EventListener,
    reads: list[Future[str]],
    ending: threading.Event,
) -> str:
    """Wait for the stages that a stage reads, then try it until it is done or another try would not help."""
    for future in reads:
        if future.exception() is not None:
            tell(StageEvent(stage, "blocked"))
            raise _Blocked(stage)

    def log(line: str, source: str = "", at: str = "") -> None:
        recorder.log(stage, line, source, at)

    for tries in range(RETRIES + 1):
        try:
            state = attempt_stage(stage, run, runner, workers, tell, log)
        except Interrupted:
            tell(StageEvent(stage, "stopped"))
            raise
        except Exception as error:
            again = tries < RETRIES and is_worth_retrying(error)
            tell(StageEvent(stage, "retrying" if again else "failed", message=str(error)))
            if not again or ending.wait(RETRY_DELAY_S):
                raise
        else:
            tell(StageEvent(stage, state))
            return state
    raise AssertionError
