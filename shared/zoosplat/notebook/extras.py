"""Packages that only some users of the notebook interface need."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from zoosplat.errors import UserError


@contextmanager
def needs_extra(name: str) -> Iterator[None]:
    """Report a package that is not installed as one line that names the extra which brings it.

    Args:
        name: one or more extras of pyproject.toml, separated by commas.

    Raises:
        UserError: an import inside the block found no such package.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed; pip install 'zoosplat[{name}]'") from error
