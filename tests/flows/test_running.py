"""`zoosplat run` itself: which way it takes, what it says at its end, what it costs where nothing is to be done."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from zoosplat.stages.lookup import open_run
from zoosplat.stages.projects import Project
from zoosplat_flows.commands.run import is_prefect_server_named

if TYPE_CHECKING:
    from tests.conftest import Recording, Stages

PROFILES = """
active = "lab"
[profiles.ephemeral]
PREFECT_SERVER_ALLOW_EPHEMERAL_MODE = "true"
[profiles.lab]
PREFECT_API_URL = "http://prefect.lab/api"
"""


@pytest.fixture
def prefect_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home of Prefect, and no variable that names a server."""
    for name in ("PREFECT_API_URL", "PREFECT_PROFILE", "PREFECT_PROFILES_PATH"):
        monkeypatch.delenv(name, raising=False)
    home = tmp_path / "prefect"
    home.mkdir()
    monkeypatch.setenv("PREFECT_HOME", str(home))
    return home


def test_a_server_is_used_only_where_one_is_named(prefect_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_prefect_server_named()
    (prefect_home / "profiles.toml").write_text(PROFILES)
    assert is_prefect_server_named()
    monkeypatch.setenv("PREFECT_PROFILE", "ephemeral")
    assert not is_prefect_server_named()
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:4200/api")
    assert is_prefect_server_named()
    monkeypatch.delenv("PREFECT_API_URL")
    (prefect_home / "profiles.toml").write_text("not [ TOML")
    assert not is_prefect_server_named()


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`zoosplat` with these arguments; its last line of output are the packages that it has imported."""
    code = (
        "import sys\n"
        "from zoosplat_flows.cli.app import app\n"
        "try:\n"
        "    app()\n"
        "finally:\n"
        "    print(sorted({name.partition('.')[0] for name in sys.modules}))\n"
    )
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture
def preprocessed(recording: Recording, stages: Stages, tmp_path: Path) -> tuple[str, str]:
    """A configuration, and a project in which the stages before the model are done; camera 1 is black at times."""
    config = Path(recording.write_project(tmp_path / "config")) / "tested.yaml"
    project = str(tmp_path / "project")
    for stage in ("ingest", "center_rotation", "crop", "pack"):
        outcome = stages(stage, project, "--config", str(config))
        assert (outcome.status, outcome.err) == (0, "")
    return str(config), project


def test_what_is_done_costs_neither_processes_nor_heavy_imports(
    preprocessed: tuple[str, str], prefect_home: Path
) -> None:
    """A database that another version of Prefect has migrated is not even looked at."""
    config, project = preprocessed
    (prefect_home / "prefect.db").write_bytes(b"of another version")
    arguments = ("run", config, "--project", project, "--until", "pack")
    first = _run(*arguments)
    assert first.returncode == 0, first.stderr
    assert "skipped, was done" in first.stdout
    again = _run(*arguments)
    assert again.returncode == 0, again.stderr
    packages = set(json.loads(again.stdout.splitlines()[-1].replace("'", '"')))
    assert not packages & {"torch", "prefect", "cv2", "av", "scipy", "matplotlib", "jinja2", "sklearn", "h5py"}
    assert [path.name for path in prefect_home.iterdir()] == ["prefect.db"]
    assert (prefect_home / "prefect.db").read_bytes() == b"of another version"
    # It was the same run, and its report is not built again.
    assert len(Project.at(project).run_ids()) == 1
    assert "report: skipped" in again.stdout


def test_warnings_of_stages_are_printed_at_the_end(preprocessed: tuple[str, str]) -> None:
    config, project = preprocessed
    mark_url = open_run(Project.at(project)).result("crop").file("done.json")
    mark = json.loads(Path(mark_url).read_text())
    Path(mark_url).write_text(json.dumps({**mark, "warnings": ["the animal [sic] touches the edge"]}))
    done = _run("run", config, "--project", project, "--until", "pack")
    assert "warning: crop: the animal [sic] touches the edge" in done.stderr.splitlines()
