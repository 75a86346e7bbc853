"""Types of the values of a configuration: what each accepts, and in which words it refuses anything else."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

MAX_INT = 2**31 - 1  # The largest integer that a key takes: the largest of int32, in which arrays count.
DEVICE_DESCRIPTION = "where to compute; auto: a GPU where there is one"


def check_printable(value: str) -> str:
    """The text itself. Raises ValueError where it has a line break or another control character."""
    if not value.isprintable():
        raise ValueError("must be one line of text without control characters")
    return value


def _check_inside(value: str) -> str:
    """The name itself. Raises ValueError where it leads out of its folder, also by fsspec's URL chains (`a::b`)."""
    if value.startswith(("/", "\\", "~")) or "::" in value or ":/" in value or ".." in re.split(r"[/\\]", value):
        raise ValueError("must be a file inside data.directory: a relative path without '..'")
    return value


def check_location(value: str) -> str:
    """The path or URL itself. Raises ValueError where it is empty or climbs with '..' or with fsspec's URL chains."""
    if not value or "::" in value or ".." in re.split(r"[/\\]", value):
        raise ValueError("must be a path below data.directory, or a whole path or URL, without '..' and '::'")
    return check_printable(value)


Text = Annotated[str, Field(strict=True, min_length=1), AfterValidator(check_printable)]
RecordingFile = Annotated[Text, AfterValidator(_check_inside)]
Count = Annotated[int, Field(strict=True, ge=1, le=MAX_INT)]
Index = Annotated[int, Field(strict=True, ge=0, le=MAX_INT)]
Real = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
IndexRange = tuple[Index, Index]
Device = Literal["auto", "cpu", "cuda"]
