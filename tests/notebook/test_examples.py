"""The examples in the docstrings of `zoosplat.open` and of what it returns."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest

import zoosplat
from zoosplat.notebook.project import ProjectReader

NEED_NONE = ("url", "run_id")
PUBLIC = {name: value for name, value in vars(ProjectReader).items() if not name.startswith("_")}
DOCUMENTED = {"open": zoosplat.open, **{name: value for name, value in PUBLIC.items() if name not in NEED_NONE}}


@pytest.mark.parametrize("name", DOCUMENTED)
def test_example(name: str, whole_project: Path, project_of_made_masks: Path) -> None:
    project = str(project_of_made_masks if name == "segments" else whole_project)
    names = {"p": zoosplat.open(project), "PROJECT": project}
    example = doctest.DocTestParser().get_doctest(DOCUMENTED[name].__doc__ or "", names, name, None, None)
    assert example.examples
    report: list[str] = []
    doctest.DocTestRunner(verbose=False).run(example, out=report.append)
    assert report == []
