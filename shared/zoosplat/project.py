"""Where each group, file and mark of an experiment lives, and which of them are complete."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

import zarr

from zoosplat import stores
from zoosplat.config import Experiment
from zoosplat.errors import UserError
from zoosplat.pipeline import STAGES, StageSpec

Mark = dict[str, Any]
OTHERS = {"pose_splatter": "dynamic", "dynamic": "model"}  # sections that are of no use to a trainer


def settings_of(spec: StageSpec, experiment: Experiment) -> dict[str, Any]:
    """The part of a configuration that determines a stage's result, as plain JSON values."""
    whole = experiment.model_dump(mode="json")
    chosen: dict[str, Any] = {}
    for key in spec.config:
        value: Any = whole
        for part in key.lstrip("-").split("."):
            value = value[part]
        if key.startswith("-"):
            section, leaf = key[1:].split(".")
            chosen[section] = {k: v for k, v in chosen[section].items() if k != leaf}
        else:
            chosen[key] = value
    # What the other trainer would be told decides nothing.
    chosen.pop(OTHERS[experiment.train.method], None)
    return chosen


def digest_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Project:
    """An experiment's folder or S3 prefix.

    Layout: `experiment.yaml`, the groups and folders that the stages write (see `zoosplat.pipeline`),
    `report/`, and `_marks/` with a plan, shard marks and one success mark a stage.
    """

    url: str
    _opened: dict[str, zarr.Group] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def at(cls, url: str) -> Project:
        return cls(stores.normalize(url))

    def path(self, *parts: str) -> str:
        return stores.join(self.url, *parts)

    # -- configuration ------------------------------------------------------------------------------------------
    def read_experiment(self) -> Experiment:
        """Raises UserError when the project holds no experiment.yaml."""
        try:
            text = stores.read_bytes(self.path("experiment.yaml")).decode()
        except FileNotFoundError:
            raise UserError(f"{self.url}: no experiment.yaml; start with `zoosplat run CONFIG --project URL`") from None
        except UnicodeDecodeError:
            raise UserError(f"{self.path('experiment.yaml')}: not text in UTF-8; write it again") from None
        try:
            return Experiment.from_yaml(text)
        except UserError as error:
            where = self.path("experiment.yaml")
            raise UserError("\n".join(f"{where}: {line}" for line in str(error).splitlines())) from None

    def write_experiment(self, experiment: Experiment) -> None:
        stores.write_bytes(self.path("experiment.yaml"), experiment.to_yaml().encode())

    # -- marks --------------------------------------------------------------------------------------------------
    def mark_url(self, stage: str) -> str:
        return self.path("_marks", f"{stage}.json")

    def plan_url(self, stage: str) -> str:
        return self.path("_marks", stage, "plan.json")

    def shard_mark_url(self, stage: str, index: int, count: int) -> str:
        return self.path("_marks", stage, f"shard-{index:05d}-of-{count:05d}.json")

    def lock_url(self, stage: str) -> str:
        return self.path("_marks", f"{stage}.lock")

    def read_mark(self, stage: str) -> Mark | None:
        """A stage's success mark: the last thing it writes."""
        return stores.read_json(self.mark_url(stage))

    # -- groups -------------------------------------------------------------------------------------------------
    def output_url(self, stage: str) -> str:
        """Where a stage writes."""
        return self.path(STAGES[stage].writes)

    def input_url(self, stage: str, experiment: Experiment | None = None) -> str:
        """Where a finished stage's output can be read: here, or in the project it is reused from.

        Args:
            stage: the stage that wrote it.
            experiment: when given, the output must have been made with this configuration.

        Raises:
            UserError: the stage has not finished, or its configuration has changed since.
        """
        mark = self.read_mark(stage)
        spec = STAGES[stage]
        if mark is None:
            raise UserError(f"{self.output_url(stage)} is not complete; run stage {stage} first")
        if experiment is not None:
            now = json.loads(json.dumps(settings_of(spec, experiment)))
            changed = sorted(k for k in now if now[k] != mark["settings"].get(k, now))
            if changed or mark["version"] != spec.version:
                what = ", ".join(changed) or "the version of the stage"
                raise UserError(f"{self.output_url(stage)} was made before {what} changed; run stage {stage} again")
            for name, digest in mark.get("inputs", {}).items():
                if (self.read_mark(name) or {}).get("digest") != digest:
                    raise UserError(
                        f"{self.output_url(stage)} was made from another {STAGES[name].writes}; run stage {stage} again"
                    )
        return stores.normalize(str(mark.get("location") or self.output_url(stage)))

    def open_input(self, stage: str, experiment: Experiment | None = None) -> zarr.Group:
        """A finished stage's zarr group, for reading. Raises UserError as `input_url`."""
        if stage not in self._opened:
            url = self.input_url(stage, experiment)
            try:
                self._opened[stage] = stores.open_group(url)
            except FileNotFoundError:
                raise UserError(f"{url}: gone, though its mark is there; run stage {stage} with --force") from None
        return self._opened[stage]
