"""The settings of the Kubernetes runner: a file that the Helm chart writes from its values `runner` and `profiles`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from zoosplat.config.experiment import Experiment
from zoosplat.config.serialization import dump, parse_yaml
from zoosplat.errors import UserError
from zoosplat.stages.memory import profile_gib

SETTINGS_VARIABLE = "ZOOSPLAT_SETTINGS"  # environment variable that names the file of the settings
SETTINGS_FILE = "/etc/zoosplat/settings.yaml"  # where the chart mounts it


def parse_quantity(text: str) -> float:
    """An amount as Kubernetes writes it: `500m` -> 0.5, `16Gi` -> 2^34. Raises ValueError."""
    from kubernetes import utils

    return float(utils.parse_quantity(text))  # type: ignore[no-untyped-call]


def _check_quantity(value: str) -> str:
    try:
        if parse_quantity(value) > 0:
            return value
    except ValueError:
        pass
    raise ValueError("must be an amount as Kubernetes writes it, such as 4, 500m or 16Gi")


def _without_nulls(values: dict[str, Any]) -> dict[str, Any]:
    """Drop keys whose value is null: with null a user takes out a key of the chart, and Helm may keep the null."""
    return {key: value for key, value in values.items() if value is not None}


Quantity = Annotated[str, AfterValidator(_check_quantity)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", max_length=253)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Images(_Section):
    """Where the images of the stages come from: see `zoosplat_flows.runners.images.image_name`."""

    registry: str = "localhost"
    tag: str = "dev"
    pullPolicy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"


class S3(_Section):
    """The S3 server that holds the projects. Without a secret, pods get credentials from their service account."""

    secretName: Name | None = None
    endpoint: str | None = None
    region: str = "us-east-1"


class Toleration(_Section):
    """A toleration of pods, as in Kubernetes' PodSpec."""

    key: str | None = None
    operator: Literal["Exists", "Equal"] = "Equal"
    value: str | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None


class Amounts(_Section):
    """Amounts of cpu and memory as Kubernetes writes them."""

    cpu: Quantity
    memory: Quantity


class Resources(_Section):
    """What a pod of a CPU stage asks for, and the most that it may use."""

    requests: Amounts = Amounts(cpu="1", memory="2Gi")
    limits: Amounts = Amounts(cpu="2", memory="4Gi")


class Cpu(_Section):
    """How stages that need no GPU run: the pods of their shards, and of the steps before and after the shards."""

    parallelism: Annotated[int, Field(ge=1)] = 50
    resources: Resources = Resources()
    nodeSelector: dict[str, str] = {}
    tolerations: tuple[Toleration, ...] = ()
    backoffLimitPerIndex: Annotated[int, Field(ge=0)] = 2


class Profile(_Section):
    """A kind of GPU node: its labels, what a pod gets of it, and the keys of an experiment that are set for it."""

    nodeSelector: dict[str, str]
    tolerations: tuple[Toleration, ...] = ()
    gpus: Annotated[int, Field(ge=1)] = 1
    cpu: Quantity
    memory: Quantity
    config: Annotated[dict[str, Any], AfterValidator(_without_nulls)] = {}


# A profile is named by the memory of one GPU in GB, by which the profile `auto` chooses.
ProfileName = Annotated[str, Field(pattern=r"^[1-9][0-9]*gb$")]


class ClusterSettings(_Section):
    """All settings of the Kubernetes runner, with the keys of the file."""

    namespace: Name
    images: Images = Images()
    s3: S3 = S3()
    serviceAccount: Name = "default"
    cpu: Cpu = Cpu()
    profiles: dict[ProfileName, Profile] = {}
    hostNetwork: bool = False

    @classmethod
    def read(cls, path: str | None = None) -> ClusterSettings:
        """Read the settings from a file.

        Args:
            path: the file; None: the one that $ZOOSPLAT_SETTINGS names, or /etc/zoosplat/settings.yaml.

        Raises:
            UserError: there is no such file, or it has unknown keys or bad values: a line for each.
        """
        path = path or os.environ.get(SETTINGS_VARIABLE, SETTINGS_FILE)
        try:
            text = Path(path).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"{path}: the settings of the Kubernetes runner cannot be read ({error}); set {SETTINGS_VARIABLE}"
            ) from None
        try:
            return cls.model_validate(parse_yaml(text))
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        except ValidationError as error:
            raise UserError("\n".join(_problem_lines(path, error))) from None

    def profile(self, name: str) -> Profile:
        """The profile of a name. Raises UserError for a name that the settings do not have."""
        if name not in self.profiles:
            known = ", ".join(self.ordered()) or "none"
            raise UserError(f"profile {name}: is not in the settings; there are {known}, and auto")
        return self.profiles[name]

    def ordered(self) -> list[str]:
        """Names of the profiles, the smallest GPU first."""
        return sorted(self.profiles, key=profile_gib)


def _problem_lines(path: str, error: ValidationError) -> list[str]:
    lines = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"] if part != "[key]") or "the file"
        text = problem["msg"].removeprefix("Value error, ")
        lines.append(
            f"{path}: {key}: is no such key; correct or remove it"
            if problem["type"] == "extra_forbidden"
            else f"{path}: {key}: {text[:1].lower()}{text[1:]}"
        )
    return lines


def overlay(experiment: Experiment, profile: str, changes: dict[str, Any]) -> Experiment:
    """A copy of an experiment with a profile's dotted keys set.

    Args:
        experiment: the experiment.
        profile: name of the profile, for error messages.
        changes: dotted key -> value, such as `train.lr` -> 1e-4.

    Raises:
        UserError: a key or value does not fit; a line for each, which names the profile and the key.
    """
    raw = experiment.model_dump(mode="json")
    for key, value in changes.items():
        *sections, leaf = key.split(".")
        inner = raw
        for section in sections:
            inner = inner.get(section)  # type: ignore[assignment]
            if not isinstance(inner, dict):
                raise UserError(f"profiles.{profile}.config: {key}: there is no section {section}")
        inner[leaf] = value
    try:
        return Experiment.from_yaml(dump(raw, default_flow_style=False))
    except UserError as error:
        where = f"profiles.{profile}.config"
        raise UserError("\n".join(f"{where}: {line}" for line in str(error).splitlines())) from None
