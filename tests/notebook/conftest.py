"""What the tests of the notebook interface share."""

from __future__ import annotations

from pathlib import Path

import pytest

import zoosplat
from zoosplat.notebook.project import ProjectReader


@pytest.fixture(scope="session")
def p(whole_project: Path) -> ProjectReader:
    """A small finished project."""
    return zoosplat.open(str(whole_project))
