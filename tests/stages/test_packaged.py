"""Files of the package that results depend on: another file is another version of its stage."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from zoosplat.stages.registry import STAGES

SERVICES = Path(__file__).parents[2] / "services"


@pytest.mark.parametrize(
    ("stage", "version", "file", "begins"),
    [
        ("train", 5, "train/zoosplat_train/animals.safetensors", "64f27384ca541481"),
        ("segment", 1, "segment/zoosplat_segment/masks.safetensors", "d5b48ec2cf3dd41b"),
        ("embedding", 1, "embedding/zoosplat_embedding/animals.npz", "2a0fc900e5ca142d"),
    ],
)
def test_another_file_needs_another_version(stage: str, version: int, file: str, begins: str) -> None:
    """Where this fails, raise the version of the stage, so that old results are not taken for those of the new file."""
    content = hashlib.sha256((SERVICES / file).read_bytes()).hexdigest()
    assert (STAGES[stage].version, content[:16]) == (version, begins)
