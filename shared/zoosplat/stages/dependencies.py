"""The settings and the outside files that the result of a stage depends on.

The keys of the configuration declare it themselves, see `zoosplat.config.effect.Effect`. The ids of results are made
from what the functions here return.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from functools import cache
from typing import Any

from pydantic import BaseModel

from zoosplat.config.effect import Condition, Effect
from zoosplat.config.experiment import Experiment
from zoosplat.stages.registry import has_stage
from zoosplat.stages.sam_weights import list_weights
from zoosplat.storage import urls


@cache
def declared_effects() -> dict[str, Effect]:
    """The effect that each key declares, by its dotted name. Raises TypeError for a key without a declaration."""

    def walk(section: Any, prefix: str) -> Iterator[tuple[str, Effect]]:
        for name, field in section.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                yield from walk(field.annotation, f"{prefix}{name}.")
                continue
            own = next((mark for mark in field.metadata if isinstance(mark, Effect)), section.effect)
            if own is None:
                raise TypeError(f"{prefix}{name} does not declare which results it determines: see Effect")
            yield prefix + name, own

    return dict(walk(Experiment, ""))


def settings_of(stage: str, experiment: Experiment) -> dict[str, Any]:
    """The part of a configuration that determines a stage's result: dotted keys and their JSON values.

    A key that names outside files is absent (see `outside_files`), unless the names of the files matter too. A key that
    nothing looks at in this experiment is absent as well, such as `dynamic.views` if a network is trained. Of a stage
    that the experiment does not have there are none.
    """
    plain = experiment.model_dump(mode="json")
    chosen: dict[str, Any] = {}
    for key, effect in _effects_on(stage, experiment, plain):
        value = _value_at(plain, key)
        if not _names_files(effect, value):
            chosen[key] = value
        elif effect.file_names_matter:
            chosen[key] = [posixpath.basename(name) for _, name in _named_files(key, value)]
    return chosen


def outside_files(stage: str, experiment: Experiment) -> dict[str, str]:
    """The files outside the project whose contents determine a stage's result: key of the configuration -> whole URL.

    In a list, the key has an index: `data.masks[2]`. The URL of `train.start_from` may be another project. The files of
    a D-NeRF scene are found by reading its transforms; their keys are `data.directory/` and the path in it. So are
    those of a folder of weights, by their names.

    Raises:
        UserError: a D-NeRF scene is not there or cannot be read, or a URL is of an unknown kind.
    """
    plain = experiment.model_dump(mode="json")
    found: dict[str, str] = {}
    for key, effect in _effects_on(stage, experiment, plain):
        value = _value_at(plain, key)
        if not _names_files(effect, value):
            continue
        if key == "data.directory":
            # The import is here, because it takes half a second and only D-NeRF scenes need it.
            from zoosplat.recording.sources import open_source

            folder = urls.normalize(value)
            found |= {f"{key}/{url.removeprefix(folder + '/')}": url for url in open_source(experiment).list_files()}
        elif key == "segment.sam_weights":
            # A folder that is not there stands for itself, and is reported as missing.
            folder = urls.normalize(value)
            names = list_weights(folder)
            found |= {f"{key}/{name}": urls.join(folder, name) for name in names} or {key: folder}
        else:
            url_of = experiment.data.url if key.startswith("data.") else urls.normalize
            found |= {place: url_of(name) for place, name in _named_files(key, value)}
    return found


def _effects_on(stage: str, experiment: Experiment, plain: dict[str, Any]) -> Iterator[tuple[str, Effect]]:
    if not has_stage(stage, experiment):
        return
    for key, effect in declared_effects().items():
        if stage not in effect.stages or (effect.only_if is not None and not _holds(effect.only_if, plain)):
            continue
        if _value_at(plain, key) not in effect.neutral:
            yield key, effect


def _holds(condition: Condition, plain: dict[str, Any]) -> bool:
    return bool(_value_at(plain, condition.key) == condition.value)


def _names_files(effect: Effect, value: Any) -> bool:
    return effect.names_files is not None and effect.names_files(value)


def _value_at(plain: dict[str, Any], key: str) -> Any:
    value: Any = plain
    for part in key.split("."):
        value = value[part]
    return value


def _named_files(key: str, value: str | list[str]) -> list[tuple[str, str]]:
    """The key and name of each file of a key that names one file, or a list of them."""
    return [(key, value)] if isinstance(value, str) else [(f"{key}[{i}]", name) for i, name in enumerate(value)]
