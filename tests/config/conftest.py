"""Configurations that the tests of the configuration begin with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def native_config(**changes: Any) -> dict[str, Any]:
    """A raw configuration of six cameras, with `section__key=value` changed."""
    raw: dict[str, Any] = {
        "data": {
            "directory": "rec",
            "videos": [f"videos/{i}.mp4" for i in range(6)],
            "masks": [f"masks/{i}.mp4" for i in range(6)],
            "calibration": "camera_params.h5",
            "image_width": 1152,
            "image_height": 1024,
        },
        "center_rotation": {"ell": 0.25},
        "crop": {"ell": 0.22},
    }
    for key, value in changes.items():
        *sections, leaf = key.split("__")
        target = raw
        for section in sections:
            target = target.setdefault(section, {})
        target[leaf] = value
    return raw


@pytest.fixture(scope="session")
def native() -> Callable[..., dict[str, Any]]:
    """`native_config`, for tests, which cannot import this module."""
    return native_config


def write_config(folder: Path, text: str, name: str = "c.yaml") -> str:
    (folder / name).write_text(text)
    return str(folder / name)


@pytest.fixture(scope="session")
def write() -> Callable[..., str]:
    """`write_config`, for tests, which cannot import this module."""
    return write_config
