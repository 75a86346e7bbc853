"""What every zoosplat stage shares: configuration, cameras, geometry, storage and the stage contract. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zoosplat.notebook.project import ProjectReader

__version__ = "0.1.0"


def open(url: str, run: str | None = None) -> ProjectReader:
    """Open a project for reading, in a notebook or a script. Nothing is written, whatever is done with it.

    Args:
        url: of the project, a folder or `s3://bucket/prefix`; it may be one that is still being made.
        run: id of a run, or how it begins; None: the latest run.

    Raises:
        UserError: there is no such run, or the storage cannot be reached.

    >>> import zoosplat
    >>> p = zoosplat.open(PROJECT)  # "demo", or "s3://lab/mouse7"
    >>> p.tracking["centers"].dims
    ('time', 'axis')
    """
    from zoosplat.notebook.project import ProjectReader

    return ProjectReader(url, run)
