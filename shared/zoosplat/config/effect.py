"""Sections of the configuration, and how their keys declare which results they determine.

`zoosplat.stages.dependencies` reads the declarations; the identity of a result comes from them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict

StageName = Literal[
    "segment", "ingest", "center_rotation", "crop", "pack", "train", "evaluate", "render", "features", "embedding"
]


@dataclass(frozen=True)
class Condition:
    """A choice that an experiment has made: the key, such as `train.method`, has the value."""

    key: str
    value: str


@dataclass(frozen=True)
class Effect:
    """What a key determines. A section declares an effect for all its keys, and a key may declare one of its own.

    Attributes:
        stages: The stages whose results the key determines. Later stages follow, because they read those results. A
            stage that an experiment does not have, such as segment where the masks are files, has no result.
        only_if: The choice without which nothing looks at the key. None means that something always does.
        names_files: Tells whether a value of the key names files outside the project. The content of such files then
            determines the result, and the folder that they lie in does not. None means that no value names files.
        file_names_matter: Whether the files' own names, without their folders, determine the result as well.
        neutral: Values with which nothing looks at the key. A key that is added to a section has its default here, so
            that results of configurations without it keep their ids.
    """

    stages: tuple[StageName, ...]
    only_if: Condition | None = None
    names_files: Callable[[Any], bool] | None = None
    file_names_matter: bool = False
    neutral: tuple[Any, ...] = ()


NO_EFFECT = Effect(())


class Section(BaseModel):
    """A section of the configuration: frozen, and without other keys than it declares."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    effect: ClassVar[Effect | None] = None  # That of the section's keys; None: each key declares its own.
