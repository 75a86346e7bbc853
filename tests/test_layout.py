"""Every list of stages and packages in the tree agrees with `zoosplat.stages.registry`.

Who may import whom is checked by import-linter, whose contracts stand in pyproject.toml.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from zoosplat.config.effect import StageName
from zoosplat.stages.registry import PIPELINE, STAGES

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = [f"zoosplat_{name}" for name in STAGES]
CPU_STAGES = [spec.name for spec in PIPELINE if not spec.gpu]
GPU_STAGES = [spec.name for spec in PIPELINE if spec.gpu]


def shell_array(path: str, name: str) -> list[str]:
    """Words of an array that a shell script assigns in one line."""
    found = re.search(rf"^{name}=\((.*)\)$", (ROOT / path).read_text(), re.MULTILINE)
    assert found is not None, path
    return found[1].split()


def contract(name: str) -> dict[str, Any]:
    """The contract of import-linter whose name begins so."""
    (found,) = (c for c in PYPROJECT["tool"]["importlinter"]["contracts"] if c["name"].startswith(name))
    return dict(found)


def test_each_stage_is_a_service() -> None:
    assert {p.name for p in (ROOT / "services").iterdir() if p.is_dir()} == set(STAGES)
    for name in STAGES:
        assert (ROOT / "services" / name / f"zoosplat_{name}" / "__main__.py").is_file()
        assert (ROOT / "services" / name / "README.md").is_file()


def test_the_configuration_knows_the_stages() -> None:
    assert get_args(StageName) == tuple(STAGES)


def test_every_package_is_packaged() -> None:
    packages = set(PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"])
    there = {
        p.parent.relative_to(ROOT).as_posix()
        for top in ("shared", "flows", "services")
        for p in (ROOT / top).rglob("__init__.py")
    }
    assert packages == {p for p in there if Path(p).parent.as_posix() not in there}


def test_each_stage_is_an_extra() -> None:
    extras = PYPROJECT["project"]["optional-dependencies"]
    assert set(STAGES) <= set(extras)
    assert extras["all"] == [f"zoosplat[{','.join([*STAGES, 'flows', 'view', 'notebook'])}]"]


def test_mypy_finds_each_stage() -> None:
    assert {f"services/{name}" for name in STAGES} <= set(PYPROJECT["tool"]["mypy"]["mypy_path"])


def test_contracts_are_about_each_stage() -> None:
    assert set(PACKAGES) <= set(PYPROJECT["tool"]["importlinter"]["root_packages"])
    assert contract("Flows stand on stages")["layers"][1].split(" | ") == PACKAGES
    assert contract("Flows start stages")["forbidden_modules"] == PACKAGES
    assert contract("Stages that use no GPU")["source_modules"] == [f"zoosplat_{name}" for name in CPU_STAGES]


def test_each_stage_has_an_image() -> None:
    assert shell_array("deploy/images/build.sh", "CPU_STAGES") == CPU_STAGES
    assert shell_array("deploy/images/build.sh", "GPU_STAGES") == GPU_STAGES
    images = [*(name.replace("_", "-") for name in STAGES), "flows"]
    assert shell_array("deploy/requirements.sh", "IMAGES") == images
    assert f"for s in {' '.join(images)}; do" in (ROOT / "docs" / "kubernetes.md").read_text()


def test_the_gpu_base_image_holds_what_its_stages_need() -> None:
    text = (ROOT / "deploy" / "images" / "gpu-base.Dockerfile").read_text()
    assert re.findall(r"--extra (\w+)", text) == GPU_STAGES


def test_each_stage_is_a_deployment() -> None:
    deployments = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
    alone = {d["name"]: d["parameters"] for d in deployments if "from_stage" in d["parameters"]}
    assert list(alone) == list(STAGES)
    for name, parameters in alone.items():
        assert (parameters["from_stage"], parameters["until_stage"]) == (name, name)


@pytest.mark.parametrize("page", ["README.md"])
def test_the_documentation_names_each_stage(page: str) -> None:
    text = (ROOT / page).read_text()
    assert [name for name in STAGES if f"`{name}`" not in text] == []
