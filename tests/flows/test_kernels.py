"""Building gsplat's kernels: what is fetched and where it is put, and a line for each thing that can be missing."""

from __future__ import annotations

import importlib.util
import os
import platform
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from zoosplat.errors import UserError
from zoosplat_flows.cli.app import app
from zoosplat_flows.commands import doctor, gsplat_kernels
from zoosplat_model.rasterize import gsplat_cuda


@pytest.fixture
def gsplat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A gsplat whose kernels are one line of C, compiled by its import as the real one's are."""
    folder = tmp_path / "site" / "gsplat"
    (folder / "cuda" / "csrc").mkdir(parents=True)
    (folder / "cuda" / "csrc" / "a.cu").touch()
    (folder / "__init__.py").touch()
    (folder / "cuda" / "__init__.py").touch()
    (folder / "cuda" / "_backend.py").write_text(
        "import os, pathlib, subprocess, sysconfig\n"
        "assert not pathlib.Path(__file__).parents[1].joinpath('csrc.py').exists()\n"
        "place = pathlib.Path(os.environ['TORCH_EXTENSIONS_DIR']) / 'py' / 'gsplat_cuda'\n"
        "place.mkdir(parents=True)\n"
        "(place / 'a.c').write_text('''#include <Python.h>\n"
        'static struct PyModuleDef d = {PyModuleDef_HEAD_INIT, "gsplat_cuda", 0, -1, 0};\n'
        "PyMODINIT_FUNC PyInit_gsplat_cuda(void) {\n"
        "PyObject* m = PyModule_Create(&d);\n"
        "PyModule_AddStringConstant(m, \"archs\", \"%s\"); return m; }''' % os.environ['TORCH_CUDA_ARCH_LIST'])\n"
        "if os.environ.get('SPOILT'): raise SystemExit('a.cu(3): error: no such thing\\ntwo errors')\n"
        "subprocess.run(['gcc', '-shared', '-fPIC', '-I' + sysconfig.get_path('include'), str(place / 'a.c'), '-o',\n"
        "                str(place / 'gsplat_cuda.so')], check=True)\n"
        "_C = True\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setattr(gsplat_kernels, "_gsplat_folder", lambda: folder)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(gsplat_kernels, "_find_toolkit", lambda cuda: tmp_path)
    monkeypatch.setattr(gsplat_kernels, "LOG", f"{tmp_path.name}.log")
    return folder


def test_kernels_are_compiled_put_where_gsplat_looks_and_load(gsplat: Path) -> None:
    told: list[str] = []
    (gsplat / "csrc.py").write_text("archs = 'of another GPU'\n")
    gsplat_kernels.build_kernels(["8.0", "9.0"], told.append)
    assert told[0] == "compiling gsplat's kernels for 8.0, 9.0: 0 of 2 files, 0 s"
    program = "from gsplat import csrc; print(csrc.archs)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "8.0;9.0\n"
    assert sorted(p.name for p in gsplat.iterdir() if not p.is_dir()) == ["__init__.py", "csrc.py", "gsplat_cuda.so"]


def test_kernels_that_do_not_compile_leave_nothing(gsplat: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPOILT", "1")
    with pytest.raises(UserError, match=r"do not compile: a\.cu\(3\): error: no such thing; see .*\.log$"):
        gsplat_kernels.build_kernels(["9.0"], lambda _: None)
    assert not (gsplat / "csrc.py").exists()


@pytest.mark.usefixtures("gsplat")
def test_what_is_missing_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def message() -> str:
        with pytest.raises(UserError) as error:
            gsplat_kernels.build_kernels(["9.0"], lambda _: None)
        assert "\n" not in str(error.value)
        return str(error.value)

    with monkeypatch.context() as m:
        m.setenv("CXX", "no-such-compiler")
        assert "apt-get install g++" in message()
    with monkeypatch.context() as m:
        m.setattr(torch.version, "cuda", None)
        assert "built without CUDA" in message()
    monkeypatch.setattr(gsplat_kernels, "_find_toolkit", lambda cuda: None)
    with monkeypatch.context() as m:
        m.setattr(torch.version, "cuda", "12.8")
        assert "not on PyPI: install a torch for CUDA 13 or later, or the CUDA toolkit 12.8" in message()
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert "NVIDIA's compiler for CUDA 13.0 cannot be fetched" in message()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", "/usr/bin")
    assert "neither is here: run /bin/false -m ensurepip" in message()


def test_the_compiler_is_that_of_torch() -> None:
    assert gsplat_kernels.compiler_packages("13.2") == [
        "nvidia-cuda-nvcc==13.2.*",
        "nvidia-cuda-crt==13.2.*",
        "nvidia-nvvm==13.2.*",
        "nvidia-cuda-cccl==13.*",
    ]


def test_doctor_builds_for_the_cards_that_are_here(monkeypatch: pytest.MonkeyPatch) -> None:
    done = CliRunner().invoke(app, ["doctor", "--build-kernels"])
    if not torch.cuda.is_available():
        assert done.exit_code == 2
        assert "no GPU that torch can use" in done.output
    built: list[list[str]] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: [(12, 0), (9, 0), (9, 0)][i])
    monkeypatch.setattr(gsplat_kernels, "build_kernels", lambda archs, report: built.append(archs))
    monkeypatch.setattr(doctor, "_why_kernels_fail", lambda: "they are not compiled")
    doctor.compile_kernels()
    assert built == [["9.0", "12.0"]]
    finding = doctor._gsplat()
    assert finding.state == "problem"
    assert finding.text.endswith("no kernels: they are not compiled; run `zoosplat doctor --build-kernels`")
    monkeypatch.setattr(doctor, "_why_kernels_fail", lambda: None)
    doctor.compile_kernels()
    assert len(built) == 1
    assert doctor._gsplat().text.endswith("kernels run")


def test_doctor_and_the_package_allow_the_same_pythons(monkeypatch: pytest.MonkeyPatch) -> None:
    pyproject = Path(__file__).resolve().parents[2] / "pyproject.toml"
    allowed = tomllib.loads(pyproject.read_text())["project"]["requires-python"]
    assert allowed == ">=3.11"
    assert doctor._python().state == "ok"
    for version in ("3.11.0", "3.12.9", "3.13.0", "3.14.0rc1"):
        monkeypatch.setattr(platform, "python_version", lambda version=version: version)
        assert doctor._python().state == "ok", version
    monkeypatch.setattr(platform, "python_version", lambda: "3.10.14")
    assert doctor._python().state == "broken"
    assert doctor._python().text.endswith(f"; install Python {allowed}")


def test_training_without_kernels_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    class Backend:
        _C = None

    monkeypatch.setitem(sys.modules, "gsplat", Backend())
    monkeypatch.setitem(sys.modules, "gsplat.cuda", Backend())
    monkeypatch.setitem(sys.modules, "gsplat.cuda._backend", Backend())
    with pytest.raises(
        UserError, match="not compiled: run `zoosplat doctor --build-kernels` on this machine, or set tr"
    ):
        gsplat_cuda.load()

    class Failing:
        def __getattr__(self, name: str) -> object:
            raise RuntimeError("Error building extension 'gsplat_cuda'\nmany lines")

    monkeypatch.setitem(sys.modules, "gsplat.cuda._backend", Failing())
    with pytest.raises(UserError, match="cannot be had: Error building extension 'gsplat_cuda'; run `zoosplat doctor"):
        gsplat_cuda.load()
