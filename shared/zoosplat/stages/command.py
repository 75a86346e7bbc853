"""The command line of a service: `python -m zoosplat_<stage> --project URL`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from zoosplat.config.load import load_config
from zoosplat.errors import TransientError, UserError
from zoosplat.machine import usable_cores
from zoosplat.stages import runner
from zoosplat.stages.begin import begin_run, check_layout
from zoosplat.stages.contract import Context, Stage, StageProgress
from zoosplat.stages.lookup import open_run
from zoosplat.stages.projects import Project
from zoosplat.stages.runs import Run
from zoosplat.stages.steps import finish, prepare, read_plan, run_shard
from zoosplat.storage.errors import as_user_error

PROGRESS_S = 0.3  # Seconds between two lines of progress.


def parse_shard(text: str) -> tuple[int, int]:
    """`"3/18"` -> (3, 18): shard 3 (from 0) of 18. Raises UserError."""
    try:
        index, count = (int(part) for part in text.split("/"))
    except ValueError:
        raise UserError(f"--shard {text}: expected INDEX/COUNT, such as 3/18") from None
    if not 0 <= index < count:
        raise UserError(f"--shard {text}: the index goes from 0 to {count - 1}")
    return index, count


class _JsonLines:
    """Reports progress as JSON lines, at most one every PROGRESS_S seconds and one at the end."""

    def __init__(self, stage: str) -> None:
        self.stage, self.last = stage, 0.0

    def __call__(self, done: int, total: int, message: str = "") -> None:
        now = time.monotonic()
        if done >= total or now - self.last > PROGRESS_S:
            self.last = now
            event = {"event": "progress", "stage": self.stage, "done": done, "total": total, "message": message}
            print(json.dumps(event), flush=True)


@contextmanager
def terminal_progress(stage: str) -> Iterator[Callable[[int, int, str], None]]:
    """Yield a function that shows progress: as a bar on a terminal, otherwise as JSON lines."""
    if not sys.stdout.isatty():
        yield _JsonLines(stage)
        return
    from rich.progress import Progress as ProgressBar
    from rich.progress import TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (*ProgressBar.get_default_columns()[:-1], TimeElapsedColumn(), TimeRemainingColumn())
    with ProgressBar(*columns, TextColumn("{task.fields[message]}")) as bar:
        task = bar.add_task(stage, total=None, message="")

        def show(done: int, total: int, message: str = "") -> None:
            bar.update(task, completed=done, total=total, message=message)

        yield show


def service_parser(stage: str, description: str | None = None) -> argparse.ArgumentParser:
    """The parser of the options that every service has."""
    parser = argparse.ArgumentParser(prog=f"python -m zoosplat_{stage}", description=description)
    parser.add_argument("--project", required=True, metavar="URL", help="folder or s3://bucket/prefix")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--run", metavar="ID", help="run to work for (default: the project's latest)")
    which.add_argument("--config", metavar="FILE", help="begin a run with this configuration")
    parser.add_argument("--workers", type=int, default=usable_cores(), help="processes (default: cores)")
    parser.add_argument("--force", action="store_true", help="begin a run with a new result of this stage")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--prepare", action="store_true", help="only check the input and write the plan")
    only.add_argument("--shard", metavar="I/N", help="only shard I (from 0) of the plan's N")
    only.add_argument("--finish", action="store_true", help="only the last step, after all shards")
    return parser


def select_run(stage: str, args: argparse.Namespace) -> Run:
    """The run that the options name. With --config or --force a run is begun, unless one of the newest is the same.

    Raises:
        UserError: no such run, or the configuration or a file that it names cannot be read.
    """
    project = Project.at(args.project)
    check_layout(project)
    if args.config is None and not args.force:
        return open_run(project, args.run)
    experiment = load_config(args.config).experiment if args.config else open_run(project, args.run).experiment
    with begin_run(project, experiment, [stage], [stage] if args.force else []) as run:
        return run


def _run_command(stage: Stage, args: argparse.Namespace, progress: StageProgress) -> None:
    run = select_run(stage.name, args)
    if not (args.prepare or args.shard or args.finish):
        runner.run_stage(stage, run, workers=max(1, args.workers), progress=progress)
        return
    ctx, result = Context(run, progress), run.result(stage.name)
    if args.prepare:
        plan = prepare(stage, ctx)
        if plan is not None:
            print(json.dumps({"event": "plan", "stage": stage.name, "shards": plan.n_shards}), flush=True)
    elif not result.is_done():
        plan = read_plan(stage, ctx)
        if args.finish:
            finish(stage, ctx, plan)
            return
        index, count = parse_shard(args.shard)
        if count != plan.n_shards:
            raise UserError(f"--shard {args.shard}: the plan has {plan.n_shards} shards")
        run_shard(stage, ctx, index, plan)


def main(stage: Stage, argv: list[str] | None = None) -> int:
    """Entry point of a service.

    Returns:
        The exit status: 0 if the work is done or was skipped; 2 for bad input or configuration, with one line on
        standard error; 1 for anything that another try may mend. If the storage does not answer or a process was
        killed, that is one line too.
    """
    args = service_parser(stage.name, stage.__doc__).parse_args(argv)
    try:
        with terminal_progress(stage.name) as progress:
            _run_command(stage, args, progress)
    except Exception as error:
        return report_failure(stage.name, error, args.project)
    return 0


def report_failure(stage: str, error: Exception, url: str) -> int:
    """Print in one line what went wrong, and return the exit status. Raises the error if it is not one for the user."""
    known = error if isinstance(error, UserError) else as_user_error(error, url)
    if known is None:
        raise error
    lines = [*str(known).splitlines(), *getattr(known, "__notes__", ())]
    print(f"zoosplat {stage}: {'; '.join(lines)}", file=sys.stderr, flush=True)
    return 1 if isinstance(known, TransientError) else 2
