"""gsplat's CUDA kernels, compiled once an environment with NVIDIA's compiler from PyPI: no CUDA toolkit is needed.

They are put where gsplat looks before it looks for a toolkit, `gsplat/csrc.py`. The cache of torch's extensions would
not do: without nvcc gsplat never looks there.

The GPU image runs this file as it is (`python kernels.py 8.0 9.0`), beside `zoosplat/errors.py`, `zoosplat/machine.py`
and nothing else of zoosplat.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from zoosplat.errors import UserError
from zoosplat.machine import physical_memory_bytes, usable_cores

FIRST_CUDA = 13  # PyPI's package of an earlier compiler has no nvcc
JOB_BYTES = 3 << 30  # of memory, that a compiler process takes
LOOK_S, TELL_S = 1.0, 15.0
LOG = "zoosplat-kernels.log"
NAME = "gsplat_cuda"
Progress = Callable[[str], None]


def compiler_packages(cuda: str) -> list[str]:
    """What nvcc and its parts are called on PyPI, for torch's CUDA version ("13.0")."""
    of_release = [f"{name}=={cuda}.*" for name in ("nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-nvvm")]
    return [*of_release, f"nvidia-cuda-cccl=={cuda.split('.')[0]}.*"]


def build(archs: Sequence[str], progress: Progress) -> None:
    """Compile the kernels for some compute capabilities ("9.0") and put them into the environment's gsplat.

    Minutes; `progress` is told what is going on, in a line each time, and in the end an empty one.

    Raises:
        UserError: torch, gsplat, a compiler or the permission to write is missing, or the sources do not compile.
    """
    gsplat = _folder_of_gsplat()
    cuda = _cuda_of_torch()
    if not os.access(gsplat, os.W_OK):
        raise UserError(f"{gsplat}: gsplat's kernels are put there and it cannot be written; use a virtual environment")
    _check_host_compiler()
    (gsplat / "csrc.py").unlink(missing_ok=True)  # of another GPU: gsplat would be content with it
    with tempfile.TemporaryDirectory(prefix="zoosplat-kernels-") as folder:
        home = _toolkit(cuda)
        if home is None:
            progress(f"fetching NVIDIA's compiler for CUDA {cuda}")
        try:
            home = home or _fetched(cuda, Path(folder) / "compiler")
            library = _compiled(gsplat, home, archs, Path(folder), progress)
        finally:
            progress("")
        shutil.copy(library, gsplat / f".{NAME}.so")
    # csrc.py last: gsplat fails on one that has nothing to import, and must not see half a library.
    (gsplat / f".{NAME}.so").replace(gsplat / f"{NAME}.so")
    (gsplat / "csrc.py").write_text(f"import torch\nfrom gsplat.{NAME} import *\n")
    done = subprocess.run([sys.executable, "-c", "import gsplat.csrc"], capture_output=True, text=True)
    if done.returncode != 0:
        (gsplat / "csrc.py").unlink()
        raise UserError(f"gsplat's kernels were compiled and do not load: {_last_line(done.stderr)}")


def _folder_of_gsplat() -> Path:
    spec = importlib.util.find_spec("gsplat")
    if spec is None or spec.origin is None:
        raise UserError("gsplat is not installed: pip install 'zoosplat[train]'")
    return Path(spec.origin).parent


def _cuda_of_torch() -> str:
    try:
        import torch
    except (ImportError, OSError) as error:
        raise UserError(f"torch: {error}; pip install 'zoosplat[train]'") from None
    if torch.version.cuda is None:
        raise UserError(f"torch {torch.__version__} is built without CUDA: install one that is built for your GPU")
    return torch.version.cuda


def _check_host_compiler() -> None:
    """nvcc leaves the C++ to the machine's own compiler."""
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        raise UserError("gsplat's kernels need a C++ compiler: apt-get install g++, or what your system calls it")
    if not header.is_file():
        raise UserError(f"gsplat's kernels need Python's headers ({header}): apt-get install python3-dev")


def _toolkit(cuda: str) -> Path | None:
    """CUDA_HOME of a toolkit that is here and that torch builds with: of the same major version."""
    from torch.utils.cpp_extension import CUDA_HOME

    nvcc = Path(CUDA_HOME or "/") / "bin" / "nvcc"
    if not nvcc.is_file():
        return None
    found = re.search(r"release (\d+)\.", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout)
    return nvcc.parents[1] if found and found[1] == cuda.split(".")[0] else None


def _fetched(cuda: str, folder: Path) -> Path:
    """CUDA_HOME made of NVIDIA's packages and of what is there with torch: headers and the runtime."""
    major = cuda.split(".")[0]
    if int(major) < FIRST_CUDA:
        raise UserError(
            f"torch is built for CUDA {cuda}, whose compiler is not on PyPI: install a torch for CUDA {FIRST_CUDA} or "
            f"later, or the CUDA toolkit {cuda} (and set CUDA_HOME)"
        )
    install = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    if importlib.util.find_spec("pip") is None:
        uv = shutil.which("uv")
        if uv is None:
            raise UserError(
                f"NVIDIA's compiler is fetched with pip or uv, and neither is here: run {sys.executable} -m ensurepip"
            )
        install = [uv, "pip", "install", "-q", "--python", sys.executable]
    command = [*install, "--no-deps", "--target", str(folder), *compiler_packages(cuda)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise UserError(f"NVIDIA's compiler for CUDA {cuda} cannot be fetched: {_last_line(done.stderr)}")
    home = folder / "nvidia" / f"cu{major}"
    with_torch = Path(sysconfig.get_path("purelib")) / "nvidia" / f"cu{major}"
    for part in ("include", "lib"):
        for source in (with_torch / part).rglob("*"):
            link = home / source.relative_to(with_torch)
            if not source.is_dir() and not link.exists():
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(source)
    (home / "lib64").symlink_to("lib")
    if not (home / "lib" / "libcudart.so").exists():
        (home / "lib" / "libcudart.so").symlink_to(f"libcudart.so.{major}")
    return home


def _compiled(gsplat: Path, home: Path, archs: Sequence[str], folder: Path, progress: Progress) -> Path:
    """The library, compiled by gsplat's own import."""
    jobs = max(1, min(usable_cores(), physical_memory_bytes() // JOB_BYTES))
    kernels = folder / "kernels"
    environment = {
        "MAX_JOBS": str(jobs),
        **os.environ,
        "CUDA_HOME": str(home),
        "TORCH_CUDA_ARCH_LIST": ";".join(archs),
        "TORCH_EXTENSIONS_DIR": str(kernels),
        # ninja came with gsplat
        "PATH": os.pathsep.join([str(home / "bin"), str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
    }
    sources = 1 + sum(len(list((gsplat / "cuda" / "csrc").glob(pattern))) for pattern in ("*.cu", "*.cpp"))
    log = Path(tempfile.gettempdir()) / LOG
    began = told = time.monotonic()
    before = -1
    program = "import gsplat.cuda._backend as b; assert b._C is not None"
    with log.open("w") as out:
        running = subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=out, stderr=out)
        try:
            while running.poll() is None:
                done = len(list(kernels.rglob("*.o")))
                if done != before or time.monotonic() - told > TELL_S:
                    before, told = done, time.monotonic()
                    files = f"{done} of {sources} files, {told - began:.0f} s"
                    progress(f"compiling gsplat's kernels for {', '.join(archs)}: {files}")
                time.sleep(LOOK_S)
        finally:
            running.terminate()
    found = list(kernels.rglob(f"{NAME}.so"))
    if running.returncode != 0 or not found:
        text = log.read_text()
        errors = [line for line in text.splitlines() if re.search(r"\berror\b", line, re.IGNORECASE)]
        reason = errors[0].strip() if errors else _last_line(text)
        raise UserError(f"gsplat's kernels do not compile: {reason}; see {log}")
    log.unlink()
    return found[0]


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no reason given"])[-1]


def show(line: str) -> None:
    """Print what is going on: on a terminal over the line before, which an empty one wipes out."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
    elif line:
        print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        build(sys.argv[1:], show)
    except UserError as error:
        raise SystemExit(f"kernels: {error}") from None
