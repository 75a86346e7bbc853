"""The folder PROJECT/latest: the results of the latest run under their plain names, on local disks."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

from zoosplat.stages.projects import LATEST_LINKS
from zoosplat.stages.registry import STAGES
from zoosplat.stages.runs import CONFIG, LOGS, REPORT, Run
from zoosplat.storage import urls


def link_latest(run: Run) -> None:
    """Point PROJECT/latest/ to the finished results of a run, if it is the project's latest run and on a local disk.

    Only symbolic links are made, replaced or removed; anything else in that folder is left as it is.
    """
    project = run.project
    if urls.is_s3(project.url) or project.latest_id() != run.id:
        return
    folder = Path(project.path(LATEST_LINKS))
    targets = {name: run.path(name) for name in (REPORT, LOGS, CONFIG)}
    for stage, result in run.results.items():
        if result.is_done():
            for name in (STAGES[stage].writes, *STAGES[stage].also):
                targets[name] = urls.join(result.data_folder, name)
    # Without the links a run is still good: the file system may have none, or another process may be writing them.
    with contextlib.suppress(OSError, NotImplementedError):
        folder.mkdir(exist_ok=True)
        here = os.path.realpath(folder)
        there = {name for name, target in targets.items() if os.path.exists(target)}
        for name in there:
            with contextlib.suppress(FileNotFoundError):
                _replace_link(folder / name, os.path.relpath(os.path.realpath(targets[name]), here))
        for entry in folder.iterdir():
            if entry.is_symlink() and entry.name not in there:
                entry.unlink(missing_ok=True)


def _replace_link(link: Path, target: str) -> None:
    if link.is_symlink() and os.readlink(link) == target:
        return
    if link.exists() and not link.is_symlink():
        return
    new = link.with_name(f".{link.name}.{secrets.token_hex(4)}")
    new.symlink_to(target)
    new.replace(link)
