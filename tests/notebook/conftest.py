"""What the tests of the notebook interface share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from made_masks import run_with_made_masks

import zoosplat
from zoosplat.notebook.project import ProjectReader

if TYPE_CHECKING:
    from tests.conftest import Recording


@pytest.fixture(scope="session")
def p(whole_project: Path) -> ProjectReader:
    """A small finished project."""
    return zoosplat.open(str(whole_project))


@pytest.fixture(scope="session")
def project_of_made_masks(recording: Recording, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose masks are those of stage segment, done up to stage ingest."""
    return Path(run_with_made_masks(recording, tmp_path_factory.mktemp("made") / "project").project.url)
