"""The keys of an experiment that fit a kind of GPU: a file for each profile, which `--profile` and the chart name."""

from __future__ import annotations

import json
from importlib import resources

from zoosplat.config.serialization import parse_yaml
from zoosplat.errors import UserError
from zoosplat.stages.memory import GPU_PROFILES


def profile_overrides(name: str) -> list[str]:
    """The keys that a profile sets, each as `KEY=VALUE`, the form of the option `--set`.

    Args:
        name: cpu, or one of `zoosplat.stages.memory.GPU_PROFILES`.

    Raises:
        UserError: there is no such profile.
    """
    try:
        text = (resources.files(__name__) / f"{name}.yaml").read_text()
    except OSError:
        raise UserError(f"profile {name}: choose one of cpu, {', '.join(GPU_PROFILES)}") from None
    return [f"{key}={json.dumps(value)}" for key, value in parse_yaml(text).items()]
