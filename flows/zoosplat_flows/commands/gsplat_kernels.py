"""Compiles gsplat's CUDA kernels, once for each environment, with NVIDIA's compiler from PyPI instead of a toolkit.

The kernels are put into `gsplat/csrc.py`, where gsplat looks for them first. The cache of torch's extensions would not
do, since gsplat does not look there without nvcc.

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

FIRST_CUDA = 13  # the first major version whose compiler packages on PyPI hold nvcc
JOB_BYTES = 3 << 30  # memory that one compiler process takes
POLL_S = 1.0  # seconds between looks at the compilation
REPORT_EVERY_S = 15.0  # seconds between messages while no file is finished
LOG = "zoosplat-kernels.log"  # what the compiler prints, in the system's folder of temporary files
NAME = "gsplat_cuda"  # name of the compiled library
Report = Callable[[str], None]  # takes a message of a line; an empty one ends the messages


def compiler_packages(cuda: str) -> list[str]:
    """Names and versions of nvcc and its parts on PyPI, for torch's CUDA version such as "13.0"."""
    same_release = [f"{name}=={cuda}.*" for name in ("nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-nvvm")]
    return [*same_release, f"nvidia-cuda-cccl=={cuda.split('.')[0]}.*"]


def build_kernels(archs: Sequence[str], report: Report) -> None:
    """Compile the kernels and put them into the environment's gsplat, which takes minutes.

    Args:
        archs: compute capabilities of the GPUs, such as "9.0".
        report: called with messages of what is going on.

    Raises:
        UserError: torch, gsplat, a compiler or the permission to write is missing, or the sources do not compile.
    """
    gsplat = _gsplat_folder()
    cuda = _torch_cuda_version()
    if not os.access(gsplat, os.W_OK):
        raise UserError(f"{gsplat}: gsplat's kernels are put there and it cannot be written; use a virtual environment")
    _check_host_compiler()
    (gsplat / "csrc.py").unlink(missing_ok=True)  # it may be of another GPU, and gsplat would use it
    with tempfile.TemporaryDirectory(prefix="zoosplat-kernels-") as folder:
        home = _find_toolkit(cuda)
        if home is None:
            report(f"fetching NVIDIA's compiler for CUDA {cuda}")
        try:
            home = home or _fetch_compiler(cuda, Path(folder) / "compiler")
            library = _compile(gsplat, home, archs, Path(folder), report)
        finally:
            report("")
        shutil.copy(library, gsplat / f".{NAME}.so")
    # csrc.py comes last: gsplat fails on a csrc.py whose library is missing, and must not see half a library.
    (gsplat / f".{NAME}.so").replace(gsplat / f"{NAME}.so")
    (gsplat / "csrc.py").write_text(f"import torch\nfrom gsplat.{NAME} import *\n")
    done = subprocess.run([sys.executable, "-c", "import gsplat.csrc"], capture_output=True, text=True)
    if done.returncode != 0:
        (gsplat / "csrc.py").unlink()
        raise UserError(f"gsplat's kernels were compiled and do not load: {_last_line(done.stderr)}")


def _gsplat_folder() -> Path:
    spec = importlib.util.find_spec("gsplat")
    if spec is None or spec.origin is None:
        raise UserError("gsplat is not installed: pip install 'zoosplat[train]'")
    return Path(spec.origin).parent


def _torch_cuda_version() -> str:
    try:
        import torch
    except (ImportError, OSError) as error:
        raise UserError(f"torch: {error}; pip install 'zoosplat[train]'") from None
    if torch.version.cuda is None:
        raise UserError(f"torch {torch.__version__} is built without CUDA: install one that is built for your GPU")
    return torch.version.cuda


def _check_host_compiler() -> None:
    """Raise UserError unless there are a C++ compiler, which nvcc uses, and Python's headers."""
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        raise UserError("gsplat's kernels need a C++ compiler: apt-get install g++, or what your system calls it")
    if not header.is_file():
        raise UserError(f"gsplat's kernels need Python's headers ({header}): apt-get install python3-dev")


def _find_toolkit(cuda: str) -> Path | None:
    """CUDA_HOME of an installed toolkit of the same major version, which torch can build with; None: there is none."""
    from torch.utils.cpp_extension import CUDA_HOME

    nvcc = Path(CUDA_HOME or "/") / "bin" / "nvcc"
    if not nvcc.is_file():
        return None
    found = re.search(r"release (\d+)\.", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout)
    return nvcc.parents[1] if found and found[1] == cuda.split(".")[0] else None


def _fetch_compiler(cuda: str, folder: Path) -> Path:
    """Make a CUDA_HOME of NVIDIA's packages and the headers and libraries that came with torch. Returns its path."""
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


def _compile(gsplat: Path, home: Path, archs: Sequence[str], folder: Path, report: Report) -> Path:
    """Let gsplat's own import compile the library. Returns its path."""
    jobs = max(1, min(usable_cores(), physical_memory_bytes() // JOB_BYTES))
    kernels = folder / "kernels"
    environment = {
        "MAX_JOBS": str(jobs),
        **os.environ,
        "CUDA_HOME": str(home),
        "TORCH_CUDA_ARCH_LIST": ";".join(archs),
        "TORCH_EXTENSIONS_DIR": str(kernels),
        # ninja, which came with gsplat, lies beside Python.
        "PATH": os.pathsep.join([str(home / "bin"), str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
    }
    sources = 1 + sum(len(list((gsplat / "cuda" / "csrc").glob(pattern))) for pattern in ("*.cu", "*.cpp"))
    log = Path(tempfile.gettempdir()) / LOG
    began = last_report = time.monotonic()
    before = -1
    program = "import gsplat.cuda._backend as b; assert b._C is not None"
    with log.open("w") as out:
        running = subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=out, stderr=out)
        try:
            while running.poll() is None:
                done = len(list(kernels.rglob("*.o")))
                if done != before or time.monotonic() - last_report > REPORT_EVERY_S:
                    before, last_report = done, time.monotonic()
                    files = f"{done} of {sources} files, {last_report - began:.0f} s"
                    report(f"compiling gsplat's kernels for {', '.join(archs)}: {files}")
                time.sleep(POLL_S)
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


def show_progress(line: str) -> None:
    """Print a message to stderr; on a terminal it replaces the message before, and an empty one clears the line."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
    elif line:
        print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        build_kernels(sys.argv[1:], show_progress)
    except UserError as error:
        raise SystemExit(f"kernels: {error}") from None
