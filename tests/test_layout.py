"""The tree keeps its promises: who may import whom, and what is packaged."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SERVICES = {p.name: p for p in (ROOT / "services").glob("*/zoosplat_*") if p.is_dir()}
CPU_STAGES = {"zoosplat_ingest", "zoosplat_center_rotation", "zoosplat_crop", "zoosplat_pack", "zoosplat_embedding"}
HEAVY = {"torch", "gsplat", "prefect", "torchmetrics", "torchvision"}


def imports(folder: Path) -> dict[Path, set[str]]:
    """Top-level names that each file below a folder imports, anywhere in it."""
    found: dict[Path, set[str]] = {}
    for path in folder.rglob("*.py"):
        names: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module.split(".")[0])
        found[path] = names
    return found


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_services_import_no_other_service(name: str) -> None:
    for path, names in imports(SERVICES[name]).items():
        assert not names & (set(SERVICES) - {name}) | (names & {"zoosplat_flows"}), path


def test_shared_imports_no_service_and_no_flow() -> None:
    for path, names in imports(ROOT / "shared").items():
        assert not names & (set(SERVICES) | {"zoosplat_flows", "prefect"}), path


def test_only_the_model_imports_torch_in_shared() -> None:
    for path, names in imports(ROOT / "shared" / "zoosplat").items():
        assert not names & (HEAVY | {"zoosplat_model"}), path


@pytest.mark.parametrize("name", sorted(CPU_STAGES))
def test_cpu_stages_import_no_torch(name: str) -> None:
    for path, names in imports(SERVICES[name]).items():
        assert not names & (HEAVY | {"zoosplat_model"}), path


def test_every_package_is_packaged() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = set(project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"])
    there = {
        p.parent.relative_to(ROOT).as_posix()
        for top in ("shared", "flows", "services")
        for p in (ROOT / top).rglob("__init__.py")
    }
    roots = {p for p in there if Path(p).parent.as_posix() not in there}
    assert packages == roots
    for name in SERVICES:
        assert name.removeprefix("zoosplat_") in project["project"]["optional-dependencies"]
