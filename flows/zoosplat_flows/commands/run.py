"""`zoosplat run` and `zoosplat demo`: check the project's place, run the stages and show their progress."""

from __future__ import annotations

import importlib.resources
import os
import signal
import threading
import time
import tomllib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from zoosplat.config.experiment import Experiment
from zoosplat.config.load import read_config
from zoosplat.errors import UserError
from zoosplat.stages.begin import begun, check_forced
from zoosplat.stages.runs import Project, Run
from zoosplat.storage import objects, urls
from zoosplat.storage.errors import as_user_error
from zoosplat_flows.execution.executor import Failed, execute, make_report, select, warnings_of
from zoosplat_flows.execution.recorder import ENDED, Event, recording
from zoosplat_flows.runners.local import Processes

ANSWER_WITHIN_S = 25.0
PLAIN_EVERY_S = 15.0
STOP_WITHIN_S = 3.5  # for the stages to end, after Ctrl-C or SIGTERM
STOPPED = "zoosplat: stopped; finished work is kept, the same command goes on from here"
PREFECT = {
    # The command shows progress and failures itself; Prefect's log would print each failure several times over.
    "PREFECT_LOGGING_LEVEL": "CRITICAL",
    "PREFECT_LOGGING_INTERNAL_LEVEL": "CRITICAL",
    # A server that is started again is back in half a minute; for one that is not, the default waits minutes.
    "PREFECT_CLIENT_MAX_RETRIES": "4",
}
WORDS = {
    "done": "[green]done",
    "skipped": "[dim]skipped, was done",
    "reused": "[green]reused",
    "shared": "[green]done by another run",
    "blocked": "[dim]not begun",
    "stopped": "[yellow]stopped",
    "failed": "[red]failed",
    "retrying": "[yellow]failed, trying again",
    "started": "",
}


def check_place(url: str) -> None:
    """Raise UserError, within half a minute, unless files can be written at a URL and read back."""
    found: list[BaseException] = []
    probe = urls.join(url, f".probe-{os.getpid()}-{time.time_ns()}")

    def attempt() -> None:
        try:
            objects.write_bytes(probe, b"zoosplat")
            if objects.read_bytes(probe) != b"zoosplat":
                raise UserError(f"{url}: what is written there reads back differently; use another place")
            objects.delete(probe)
        except BaseException as error:
            found.append(error)

    # In a thread that may be left behind: a server that accepts connections and is silent costs minutes of retries.
    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(ANSWER_WITHIN_S)
    if thread.is_alive():
        where = os.environ.get("AWS_ENDPOINT_URL", "the S3 endpoint") if urls.is_s3(url) else "the file system"
        raise UserError(f"{url}: {where} does not answer; start the server or correct AWS_ENDPOINT_URL")
    if found:
        known = found[0] if isinstance(found[0], UserError) else as_user_error(found[0], url)
        if known is None and isinstance(found[0], OSError):
            known = UserError(f"{url}: cannot be written ({found[0]}); use another place")
        raise known or found[0]


class Display:
    """Progress of a pipeline: a bar a stage on a terminal, otherwise lines."""

    def __init__(self, stages: list[str]) -> None:
        self.console = Console()
        self.lock = threading.Lock()
        self.began: dict[str, float] = {}
        self.printed: dict[str, float] = {}
        columns = (
            TextColumn("{task.description:<16}"),
            BarColumn(bar_width=32),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
        )
        self.progress = Progress(*columns, console=self.console, disable=not self.console.is_terminal)
        self.bars: dict[str, TaskID] = {
            stage: self.progress.add_task(stage, total=None, start=False, note="[dim]waiting") for stage in stages
        }

    def __call__(self, event: Event) -> None:
        with self.lock:
            if event.state == "started":
                self.began.setdefault(event.stage, time.monotonic())
            (self._bar if self.console.is_terminal else self._line)(event)

    def _bar(self, event: Event) -> None:
        bar = self.bars[event.stage]
        if event.state == "running":
            self.progress.update(bar, completed=event.done, total=event.total, note=escape(event.message))
            return
        if event.state == "started":
            self.progress.start_task(bar)
        elif event.state in ("done", "skipped", "reused", "shared"):
            total = self.progress.tasks[bar].total or 1
            self.progress.update(bar, completed=total, total=total)
            self.progress.stop_task(bar)
        elif event.state in ENDED:
            self.progress.stop_task(bar)
        self.progress.update(bar, note=WORDS[event.state])

    def _line(self, event: Event) -> None:
        now = time.monotonic()
        if event.state == "running":
            if now - max(self.printed.get(event.stage, 0.0), self.began.get(event.stage, now)) > PLAIN_EVERY_S:
                self.printed[event.stage] = now
                typer.echo(f"{event.stage}: {event.done}/{event.total} {event.message}".rstrip())
        elif event.state == "started":
            typer.echo(f"{event.stage}: started")
        else:
            reason = event.message.splitlines()[-1] if event.state == "retrying" and event.message else ""
            text = WORDS[event.state].partition("]")[2]
            seconds = now - self.began.get(event.stage, now)
            typer.echo(f"{event.stage}: {text} ({seconds:.1f} s) {reason}".rstrip())


def headline(run: Run) -> list[str]:
    """The means of the held-out and the observed cameras, a line each; none before evaluation."""
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
def _prompt_stop(progress: Progress) -> Iterator[None]:
    """Let Ctrl-C, and the signal by which schedulers end a program, stop the stages and then the command, soon.

    The interrupt, raised in the main thread, ends the stages; what still hangs after that is left behind.
    """

    def leave() -> None:
        progress.stop()  # gives the terminal its cursor back
        typer.echo(STOPPED, err=True)
        os._exit(130)

    def interrupt(number: int, frame: object) -> None:
        for each in before:
            signal.signal(each, signal.SIG_IGN)  # a second one must not break into the clearing up
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


def prefect_server() -> bool:
    """Whether a Prefect server is named, by PREFECT_API_URL or by Prefect's active profile; does not import Prefect."""
    if os.environ.get("PREFECT_API_URL"):
        return True
    home = Path(os.environ.get("PREFECT_HOME", Path.home() / ".prefect"))
    path = Path(os.environ.get("PREFECT_PROFILES_PATH", home / "profiles.toml"))
    with suppress(OSError, tomllib.TOMLDecodeError):
        profiles = tomllib.loads(path.read_text())
        active = os.environ.get("PREFECT_PROFILE", profiles.get("active", ""))
        return bool(profiles.get("profiles", {}).get(active, {}).get("PREFECT_API_URL"))
    return False


def _perform(run: Run, stages: list[str], workers: int | None, display: Display) -> str:
    """Run the stages here, and build the report. Its URL."""
    with recording(run, stages) as recorder:

        def tell(event: Event) -> None:
            recorder(event)
            display(event)

        with Processes() as processes:
            execute(run, stages, processes, workers, recorder, tell)
        return make_report(run, recorder, tell)


def _perform_with_prefect(run: Run, stages: list[str], workers: int | None, display: Display) -> str:
    """The same as a flow run of the server that is named. URL of the report."""
    for key, value in PREFECT.items():
        os.environ.setdefault(key, value)
    with Console(stderr=True).status("connecting to Prefect"):
        import httpx

        from zoosplat_flows.pipeline import listening, pipeline
    try:
        with listening(display):
            results = pipeline(run.project.url, stages[0], stages[-1], workers=workers, run=run.id)
    except httpx.HTTPError as error:
        what = f"the Prefect server cannot be reached ({error}); check PREFECT_API_URL"
        raise Failed(f"{what}; without it, and without a Prefect profile that names one, runs need no server") from None
    return results["report"]


def run(
    url: str,
    experiment: Experiment,
    from_stage: str | None,
    until_stage: str | None,
    force: list[str],
    workers: int | None,
) -> None:
    """Check everything, begin a run of the configuration in the project, and run its stages."""
    stages = select(from_stage, until_stage)
    check_forced(force, stages)
    project = Project.at(url)
    check_place(project.url)
    display = Display([*stages, "report"])
    perform = _perform_with_prefect if prefect_server() else _perform
    try:
        with _prompt_stop(display.progress), ExitStack() as alive:
            with Console(stderr=True).status("checking") as status:

                def hashing(file: str) -> None:
                    # Once a file: hours of video take a while.
                    status.update(f"reading {escape(file)}, whose content is part of the results' ids")

                begun_run = alive.enter_context(begun(project, experiment, stages, force, hashing))
            with display.progress:
                report = perform(begun_run, stages, workers, display)
    except KeyboardInterrupt:
        typer.echo(STOPPED, err=True)
        raise typer.Exit(130) from None
    except Failed as error:
        typer.echo(f"zoosplat: {error}\nzoosplat: finished work is kept; the same command tries again", err=True)
        raise typer.Exit(1) from None
    for warning in warnings_of(begun_run):
        typer.echo(f"warning: {warning}", err=True)
    for line in headline(begun_run):
        typer.echo(line)
    typer.echo(f"report: {report}")


def demo(url: str, frames: int, overrides: list[str], workers: int | None) -> None:
    """Make the synthetic recording, in the project or in ./demo for one on S3, and run demo.yaml on it."""
    check_place(urls.normalize(url))
    folder = (Path("demo") if urls.is_s3(url) else Path(urls.normalize(url))) / "recording"
    marker = folder / "frames.txt"  # written last: a recording that was cut short has none
    if not marker.exists() or marker.read_text() != str(frames):
        from zoosplat.synthetic.mouse import make_recording

        marker.unlink(missing_ok=True)
        with Console(stderr=True).status(f"filming {frames} frames of a synthetic animal"):
            make_recording(folder, n_frames=frames)
        marker.write_text(str(frames))
    with importlib.resources.as_file(importlib.resources.files("zoosplat_flows") / "demo.yaml") as config:
        experiment = read_config(str(config), [f"data.directory={folder.absolute()}", *overrides])
    run(url, experiment, None, None, [], workers)
