"""The `zoosplat` command. What is slow to import (Prefect, zarr, torch) is imported by the commands that need it."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from zoosplat.errors import UserError

USER_ERROR = 2
ProjectUrl = Annotated[str, typer.Argument(metavar="URL", help="Project: a folder, or s3://bucket/prefix.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the config, such as train.lr=5e-5; repeatable."),
]
ConfigFile = Annotated[str, typer.Argument(metavar="CONFIG", help="YAML, or a JSON file of the published tool.")]
Profile = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="What a GPU allows: cpu, 12gb, 24gb, 48gb or 80gb; --set overrides its keys."),
]
RunId = Annotated[
    str | None,
    typer.Option("--run", metavar="ID", help="A run, or the beginning of its id. [dim]default: the latest[/]"),
]
Workers = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Processes a stage. [dim]default: a core each[/]")
]


def complain(message: object) -> None:
    typer.echo(f"zoosplat: {message}", err=True)


class Commands(TyperGroup):
    """Commands whose user errors are a line on stderr and exit status 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            complain(error)
            raise typer.Exit(USER_ERROR) from None


@contextmanager
def storage_errors(url: str) -> Iterator[None]:
    """Storage failures as UserError, with a line that says what to do."""
    try:
        yield
    except (UserError, typer.Exit):
        raise
    except Exception as error:
        from zoosplat.storage.errors import as_user_error

        known = as_user_error(error, url)
        if known is None:
            raise
        raise known from error


@contextmanager
def ended_by_ctrl_c() -> Iterator[None]:
    """For commands that go on until they are told to end: Ctrl-C interrupts nothing, and needs no words."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGINT, before)


app = typer.Typer(
    cls=Commands,
    name="zoosplat",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="3D reconstruction of moving animals from the videos of several cameras.\n\n"
    "Start with [bold]zoosplat doctor[/] and [bold]zoosplat demo[/].",
)
config_app = typer.Typer(cls=Commands, no_args_is_help=True, help="Show, convert and check configurations.")
cameras_app = typer.Typer(cls=Commands, no_args_is_help=True, help="Show and convert calibrations.")
cluster_app = typer.Typer(cls=Commands, no_args_is_help=True, help="Look at the Kubernetes cluster.")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(metadata.version("zoosplat"))
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    return


@app.command(rich_help_panel="Run")
def run(
    config: ConfigFile,
    project: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Where results go. [dim]default: the project_directory of a JSON config[/]"),
    ] = None,
    overrides: Overrides = None,
    profile: Profile = None,
    from_stage: Annotated[
        str | None, typer.Option("--from", metavar="STAGE", help="First stage to run; what is before must be done.")
    ] = None,
    until_stage: Annotated[str | None, typer.Option("--until", metavar="STAGE", help="Last stage to run.")] = None,
    force: Annotated[
        list[str] | None,
        typer.Option(metavar="STAGE", help="Compute this stage again, and all made from it; repeatable."),
    ] = None,
    workers: Workers = None,
) -> None:
    """Run the pipeline, ingest, center_rotation, crop, pack, train, evaluate, render, features, embedding, and report.

    What is done with the same configuration is skipped, so the same command resumes a run that was stopped.

    [bold]Examples[/]

    zoosplat run mouse.yaml --project runs/mouse

    zoosplat run mouse.yaml --project s3://lab/mouse --set train.epochs=20 --from train

    zoosplat run mouse.yaml --project runs/mouse --profile 24gb

    zoosplat run classic/config.json --until crop
    """
    from zoosplat_flows.commands import run

    loaded = _load(config, overrides, profile)
    url = project or loaded.project
    if url is None:
        raise UserError(f"{config}: say where results go with --project URL")
    for note in loaded.notes:
        typer.echo(f"note: {note}", err=True)
    with storage_errors(url):
        run.run(url, loaded.experiment, from_stage, until_stage, force or [], workers)


def _load(config: str, overrides: list[str] | None, profile: str | None) -> Any:
    from zoosplat.config.load import load_config
    from zoosplat_flows.commands.plan import profile_overrides

    with storage_errors(config):
        return load_config(config, [*(profile_overrides(profile) if profile else []), *(overrides or [])])


@app.command(rich_help_panel="Run")
def demo(
    project: Annotated[str, typer.Option(metavar="URL", help="Where results go.")] = "demo",
    frames: Annotated[int, typer.Option(min=12, metavar="N", help="Frames of the synthetic recording.")] = 120,
    overrides: Overrides = None,
    workers: Workers = None,
) -> None:
    """Make a synthetic recording of a walking animal with six cameras and run the whole pipeline on it.

    [bold]Examples[/]

    zoosplat demo

    zoosplat demo --project s3://lab/demo --frames 60
    """
    from zoosplat_flows.commands import run

    with storage_errors(project):
        run.demo(project, frames, overrides or [], workers)


@app.command(rich_help_panel="Look")
def status(project: ProjectUrl, run_id: RunId = None) -> None:
    """Which stages of a run are done, partial or missing."""
    from zoosplat.stages.runs import Project
    from zoosplat_flows.execution import status as module

    with storage_errors(project):
        module.show(Project.at(project).run(run_id))


@app.command(rich_help_panel="Look")
def runs(project: ProjectUrl) -> None:
    """List the runs of a project: what each changed against the one before, its state, and what came of it."""
    from zoosplat.stages.runs import Project
    from zoosplat_flows.execution import history

    with storage_errors(project):
        history.show(Project.at(project))


@app.command(rich_help_panel="Look")
def compare(
    project: ProjectUrl,
    first: Annotated[str, typer.Argument(metavar="RUN", help="A run, or the beginning of its id.")],
    second: Annotated[str, typer.Argument(metavar="RUN", help="Another one; the page is put into its folder.")],
) -> None:
    """Compare two runs: settings that differ, metrics, and a page with truth and both renders side by side.

    [bold]Example[/]

    zoosplat compare runs/mouse 20250317-0912 20250318-1740
    """
    from zoosplat.stages.runs import Project
    from zoosplat_flows.commands import comparison

    with storage_errors(project):
        where = Project.at(project)
        typer.echo(comparison.compare(where.run(first), where.run(second)))


@app.command(rich_help_panel="Look")
def logs(
    project: ProjectUrl,
    stage: Annotated[str | None, typer.Argument(metavar="[STAGE]", help="Only this one. [dim]default: all[/]")] = None,
    run_id: RunId = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run ends, or Ctrl-C.")] = False,
) -> None:
    """Print what the stages of a run have printed, with time and host, wherever they ran."""
    from zoosplat.stages.runs import Project
    from zoosplat_flows.commands import logs as module

    with storage_errors(project), ended_by_ctrl_c():
        module.show(Project.at(project).run(run_id), stage, follow)


@app.command(rich_help_panel="Look")
def report(project: ProjectUrl, run_id: RunId = None) -> None:
    """Build the report page of what is done: one self-contained HTML file."""
    from zoosplat.stages.runs import Project
    from zoosplat_flows.report.page import build_report

    with storage_errors(project):
        typer.echo(build_report(Project.at(project).run(run_id)))


@app.command(rich_help_panel="Keep")
def gc(
    project: ProjectUrl,
    keep_last: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Remove all but the newest N runs first. [dim]default: keep all[/]"),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be freed.")] = False,
) -> None:
    """Free the space of results that no run of the project refers to.

    Runs that are at work, the latest one, and whatever is not zoosplat's are left, and so is the data of a project of
    an earlier layout. That another project reuses a result (reuse: in its configuration, or train.start_from) is not
    seen: such a project makes the result anew, or says that it is gone.
    """
    from zoosplat.stages.runs import Project
    from zoosplat_flows.commands import collect

    with storage_errors(project):
        collect.show(Project.at(project), keep_last, dry_run)


@app.command(rich_help_panel="Keep")
def upgrade(project: ProjectUrl) -> None:
    """Adopt the results of a project of an earlier version; nothing is moved or changed.

    What was made from the files and settings of today counts as done. Anything else can still be looked at, and the
    next run makes a new result beside it.
    """
    from zoosplat.stages import legacy
    from zoosplat.stages.runs import Project

    with storage_errors(project):
        adopted, kept = legacy.upgrade(Project.at(project))
    for stage, result in adopted.results.items():
        if result.is_done():
            note = f"can be looked at, and is made again by the next run: it {kept[stage]}" if stage in kept else "done"
            typer.echo(f"{stage}: {note}")
    typer.echo(f"run: {adopted.id}")


@app.command(rich_help_panel="Run")
def embed(
    projects: Annotated[
        list[str],
        typer.Argument(metavar="URL[@RUN]...", help="Projects with stage features done; RUN: default the latest."),
    ],
    output: Annotated[str, typer.Option(metavar="URL", help="Folder or s3:// prefix for embedding.zarr and .csv.")],
) -> None:
    """Embed recordings together: one space, one map, states and neighbours across all of them.

    Settings are those of the first project. Its frames come first; embedding.csv says which recording a row is of.

    [bold]Examples[/]

    zoosplat embed runs/mouse1 runs/mouse2 --output runs/mice

    zoosplat embed s3://lab/mouse1 s3://lab/mouse2@20250317-0912 --output s3://lab/mice
    """
    from zoosplat.storage import urls

    try:
        from zoosplat_embedding.stage import CSV, embed_together
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is missing; pip install 'zoosplat[embedding]'") from None
    with storage_errors(output):
        where = urls.normalize(output)
        for warning in embed_together([_run_of(text) for text in projects], where):
            typer.echo(f"note: {warning}", err=True)
    typer.echo(urls.join(where, CSV))


def _run_of(text: str) -> Any:
    """The run that `URL` or `URL@RUN` names. A project whose own name ends so is taken for what it is."""
    from zoosplat.stages.runs import Project

    found = re.fullmatch(r"(.+)@(\d[\d-]*[0-9a-f]*)", text)
    if found is None or Project.at(text).exists():
        return Project.at(text).run()
    return Project.at(found[1]).run(found[2])


@app.command(rich_help_panel="Look")
def view(
    project: ProjectUrl,
    port: Annotated[int, typer.Option(min=1, max=65535, metavar="N", help="Or the next one that is free.")] = 8080,
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="0.0.0.0: also for other machines. There is no password.")
    ] = "localhost",
    device: Annotated[str, typer.Option(metavar="NAME", help="auto, cpu, cuda or cuda:0.")] = "auto",
    run_id: RunId = None,
) -> None:
    """Look at a project in the browser, while it runs or when it is done. Ctrl-C ends it.

    Cameras with their pictures, hull, path and Gaussians of each frame, held-out views beside their renderings, and
    the map of the embedding: a click in it goes to that frame.
    """
    with storage_errors(project), ended_by_ctrl_c():
        try:
            from zoosplat_flows.viewer import app as module
        except ModuleNotFoundError as error:
            raise UserError(f'view: {error.name} is not installed; pip install "zoosplat[view]"') from None
        module.serve(project, host, port, device, run_id)


@app.command(rich_help_panel="Look")
def doctor(
    project: Annotated[
        str | None, typer.Argument(metavar="[URL]", help="A folder or s3:// URL that must be readable and writable.")
    ] = None,
    build_kernels: Annotated[
        bool,
        typer.Option("--build-kernels", help="First compile gsplat's kernels for the GPU, without a CUDA toolkit."),
    ] = False,
) -> None:
    """Check this machine: Python, torch, GPU, rasteriser, video libraries, Prefect, S3.

    Exit status 0 unless something that every run needs is broken.
    """
    from zoosplat_flows.commands import doctor as module

    if build_kernels:
        module.build_kernels()

    raise typer.Exit(0 if module.examine(project) else 1)


@app.command(rich_help_panel="Prepare")
def plan(
    config: ConfigFile,
    project: Annotated[
        str | None, typer.Option(metavar="URL", help="Project whose crop and windows count, not the most they may be.")
    ] = None,
    overrides: Overrides = None,
    profile: Profile = None,
) -> None:
    """Predict the GPU memory of a training, and the smallest profile that has it or the key to change."""
    from zoosplat.stages.runs import Project
    from zoosplat_flows.commands import plan as module

    experiment = _load(config, overrides, profile).experiment
    with storage_errors(project or config):
        module.show(experiment, Project.at(project) if project else None)


@config_app.command("show")
def config_show(config: ConfigFile, overrides: Overrides = None) -> None:
    """Print a configuration with every key, its meaning and unit."""
    from zoosplat.config.load import load_config

    with storage_errors(config):
        loaded = load_config(config, overrides or [])
    for note in loaded.notes:
        typer.echo(f"note: {note}", err=True)
    typer.echo(loaded.experiment.describe(), nl=False)


@config_app.command("convert")
def config_convert(
    config: ConfigFile,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="YAML file to write.")],
    overrides: Overrides = None,
) -> None:
    """Write a JSON file of the published tool, or any configuration, as documented YAML."""
    from zoosplat.config.load import load_config
    from zoosplat.storage import objects

    with storage_errors(config):
        loaded = load_config(config, overrides or [])
    with storage_errors(str(out)):
        objects.write_bytes(str(out.absolute()), loaded.experiment.describe().encode())
    for note in loaded.notes:
        typer.echo(f"note: {note}", err=True)
    typer.echo(str(out))


@config_app.command("check")
def config_check(config: ConfigFile, overrides: Overrides = None) -> None:
    """Check a configuration against the recording: videos, masks, calibration, sizes. Decodes nothing."""
    from zoosplat.config.load import load_config
    from zoosplat_flows.commands import recording

    with storage_errors(config):
        loaded = load_config(config, overrides or [])
    for note in loaded.notes:
        typer.echo(f"note: {note}", err=True)
    with storage_errors(loaded.experiment.data.directory):
        recording.check(loaded.experiment)


CalibrationFormat = Annotated[str, typer.Option("--format", help="auto, hdf5, dannce, anipose or pickle.")]
CalibrationUnit = Annotated[str, typer.Option("--unit", help="Unit of the translations: auto, m or mm.")]
CalibrationFiles = Annotated[list[str], typer.Argument(metavar="IN...", help="One file, or one a camera (DANNCE).")]


@cameras_app.command("show")
def cameras_show(files: CalibrationFiles, format: CalibrationFormat = "auto", unit: CalibrationUnit = "auto") -> None:
    """Print the cameras of a calibration: focal lengths, principal points, distortion, positions in metres."""
    from zoosplat_flows.commands import recording

    with storage_errors(files[0]):
        recording.show_cameras(recording.read(files, format, unit))


@cameras_app.command("convert")
def cameras_convert(
    files: CalibrationFiles,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="HDF5 file to write.")],
    format: CalibrationFormat = "auto",
    unit: CalibrationUnit = "auto",
) -> None:
    """Write a calibration of any known format as HDF5, in metres."""
    from zoosplat.recording.calibration import write_hdf5
    from zoosplat_flows.commands import recording

    with storage_errors(files[0]):
        write_hdf5(recording.read(files, format, unit), out)
    typer.echo(str(out))


@cluster_app.command("status")
def cluster_status(
    settings: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Settings of the runner. [dim]default: $ZOOSPLAT_SETTINGS[/]"),
    ] = None,
) -> None:
    """Nodes of each profile, Jobs that have not ended, and why pods wait, in words.

    The cluster is that of $KUBECONFIG; inside a pod, its own.
    """
    from zoosplat_flows.commands import cluster
    from zoosplat_flows.runners.kubernetes.runner import Api
    from zoosplat_flows.runners.settings import Settings

    loaded = Settings.read(settings)
    cluster.show(loaded, Api(loaded.namespace))


app.add_typer(config_app, name="config", rich_help_panel="Prepare")
app.add_typer(cameras_app, name="cameras", rich_help_panel="Prepare")
app.add_typer(cluster_app, name="cluster", rich_help_panel="Look")
