"""The settings of the Kubernetes runner: one file, which the Helm chart writes from its `runner` and `profiles`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from zoosplat.config.experiment import Experiment
from zoosplat.config.serialization import dump, parse_yaml
from zoosplat.errors import UserError
from zoosplat.stages.memory import gpu_gib

SETTINGS_VARIABLE = "ZOOSPLAT_SETTINGS"
SETTINGS_FILE = "/etc/zoosplat/settings.yaml"


def quantity(text: str) -> float:
    """An amount as Kubernetes writes it: `500m` -> 0.5, `16Gi` -> 2^34. Raises ValueError."""
    from kubernetes.utils import parse_quantity

    return float(parse_quantity(text))  # type: ignore[no-untyped-call]


def _quantity(value: str) -> str:
    try:
        if quantity(value) > 0:
            return value
    except ValueError:
        pass
    raise ValueError("must be an amount as Kubernetes writes it, such as 4, 500m or 16Gi")


def _given(values: dict[str, Any]) -> dict[str, Any]:
    """Without nulls: they take out a value of the chart, and are there after `helm upgrade --reuse-values`."""
    return {key: value for key, value in values.items() if value is not None}


Quantity = Annotated[str, AfterValidator(_quantity)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", max_length=253)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Images(_Section):
    registry: str = "localhost"
    tag: str = "dev"
    pullPolicy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"


class S3(_Section):
    """Where projects lie. Without a secret, pods get their credentials by way of their service account."""

    secretName: Name | None = None
    endpoint: str | None = None
    region: str = "us-east-1"


class Toleration(_Section):
    key: str | None = None
    operator: Literal["Exists", "Equal"] = "Equal"
    value: str | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None


class Amounts(_Section):
    cpu: Quantity
    memory: Quantity


class Resources(_Section):
    requests: Amounts = Amounts(cpu="1", memory="2Gi")
    limits: Amounts = Amounts(cpu="2", memory="4Gi")


class Cpu(_Section):
    """Pods of stages that need no GPU, and of the steps before and after shards."""

    parallelism: Annotated[int, Field(ge=1)] = 50
    resources: Resources = Resources()
    nodeSelector: dict[str, str] = {}
    tolerations: tuple[Toleration, ...] = ()
    backoffLimitPerIndex: Annotated[int, Field(ge=0)] = 2


class Profile(_Section):
    """A kind of GPU node, and what of an experiment is changed to use it well."""

    nodeSelector: dict[str, str]
    tolerations: tuple[Toleration, ...] = ()
    gpus: Annotated[int, Field(ge=1)] = 1
    cpu: Quantity
    memory: Quantity
    config: Annotated[dict[str, Any], AfterValidator(_given)] = {}


# Named by the memory of one GPU, which `auto` goes by.
ProfileName = Annotated[str, Field(pattern=r"^[1-9][0-9]*gb$")]


class Settings(_Section):
    namespace: Name
    images: Images = Images()
    s3: S3 = S3()
    serviceAccount: Name = "default"
    cpu: Cpu = Cpu()
    profiles: dict[ProfileName, Profile] = {}
    hostNetwork: bool = False

    @classmethod
    def read(cls, path: str | None = None) -> Settings:
        """Read a file; None: the one that $ZOOSPLAT_SETTINGS names, or /etc/zoosplat/settings.yaml.

        Raises:
            UserError: no such file, or a line for each unknown key or bad value.
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
            raise UserError("\n".join(_lines(path, error))) from None

    def profile(self, name: str) -> Profile:
        """Raises UserError for a name that is not in the table."""
        if name not in self.profiles:
            known = ", ".join(self.ordered()) or "none"
            raise UserError(f"profile {name}: is not in the settings; there are {known}, and auto")
        return self.profiles[name]

    def ordered(self) -> list[str]:
        """Names of the profiles, the smallest GPU first."""
        return sorted(self.profiles, key=gpu_gib)


def _lines(path: str, error: ValidationError) -> list[str]:
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
    """An experiment with a profile's dotted keys set. Raises UserError naming the profile and the key."""
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
