"""`zoosplat doctor`: says what this machine has and lacks, a line each."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

from packaging.specifiers import SpecifierSet
from rich.console import Console
from rich.markup import escape

from zoosplat.errors import UserError
from zoosplat.machine import physical_memory_bytes, usable_cores
from zoosplat_flows.commands import gsplat_kernels
from zoosplat_flows.formatting import format_memory

PROBE_TIMEOUT_S = 60  # seconds that the probe below may take
# A program that runs gsplat's kernels. Where a CUDA toolkit exists, gsplat compiles missing kernels as soon as they are
# used. So the program first makes sure that they lie in gsplat's folder or in the cache of torch's extensions.
PROBE = """
import pathlib, torch, gsplat
from torch.utils.cpp_extension import _get_build_directory
try:
    import gsplat.csrc
except ModuleNotFoundError:
    if not pathlib.Path(_get_build_directory("gsplat_cuda", False), "gsplat_cuda.so").exists():
        raise SystemExit("they are not compiled")
gsplat.quat_scale_to_covar_preci(torch.ones(1, 4, device="cuda"), torch.ones(1, 3, device="cuda"))
torch.cuda.synchronize()
"""


@dataclass(frozen=True)
class Finding:
    """What was found of one thing.

    Attributes:
        what: the thing, in a word.
        state: ok, problem (something optional is missing) or broken (no run can succeed).
        text: what was found, and what to do about it.
    """

    what: str
    state: str
    text: str


def print_findings(project: str | None) -> bool:
    """Examine this machine and print the findings. Returns whether everything works that every run needs.

    Args:
        project: path or URL that must be readable and writable; None: none is examined.
    """
    console = Console()
    fine = True
    colours = {"ok": "green", "problem": "yellow", "broken": "red"}
    for finding in findings(project):
        fine = fine and finding.state != "broken"
        state = f"[{colours[finding.state]}]{finding.state:<8}[/]"
        console.print(f"{state} {finding.what:<12} {escape(finding.text)}", soft_wrap=True)
    return fine


def findings(project: str | None) -> Iterator[Finding]:
    """Examine one thing after the other; a project for whether it can be read and written."""
    yield _python()
    yield from _torch()
    yield _video()
    yield _package("prefect", "flows", required=True)
    yield _package("opencv", "video", required=True, distribution="opencv-python-headless")
    if project is None and os.environ.get("AWS_ENDPOINT_URL"):
        yield _endpoint(os.environ["AWS_ENDPOINT_URL"])
    if project is not None:
        yield _project(project)


def _python() -> Finding:
    version = platform.python_version()
    text = f"{version}, {usable_cores()} cores, {format_memory(physical_memory_bytes())} memory"
    try:
        allowed = importlib.metadata.metadata("zoosplat")["Requires-Python"]
    except importlib.metadata.PackageNotFoundError:
        return Finding("python", "problem", f"{text}; zoosplat is not installed in it: pip install 'zoosplat[all]'")
    if SpecifierSet(allowed).contains(version, prereleases=True):
        return Finding("python", "ok", text)
    return Finding("python", "broken", f"{text}; install Python {allowed}")


def _package(module: str, extra: str, *, required: bool, distribution: str | None = None) -> Finding:
    try:
        return Finding(module, "ok", importlib.metadata.version(distribution or module))
    except importlib.metadata.PackageNotFoundError:
        return Finding(module, "broken" if required else "problem", f"missing; pip install 'zoosplat[{extra}]'")


def _torch() -> Iterator[Finding]:
    try:
        import torch
    except (ImportError, OSError) as error:
        yield Finding("torch", "problem", f"{error}; training needs it here: pip install 'zoosplat[all]'")
        return
    yield Finding("torch", "ok", f"{torch.__version__}, built for CUDA {torch.version.cuda or 'no GPU'}")
    if not torch.cuda.is_available():
        driver = os.path.exists("/proc/driver/nvidia/version")
        hint = "a driver is there: install a torch built for it" if driver else "training works on the CPU, slowly"
        yield Finding("gpu", "problem" if driver else "ok", f"none found; {hint}")
        yield Finding("rasteriser", "ok", "the CPU one; gsplat's kernels need a GPU")
        return
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        yield Finding(
            "gpu", "ok", f"{torch.cuda.get_device_name(i)}, {format_memory(free)} of {format_memory(total)} free"
        )
    yield _gsplat()


def _gsplat() -> Finding:
    missing = _package("gsplat", "train", required=False)
    if missing.state != "ok":
        return missing
    reason = _why_kernels_fail()
    if reason is None:
        return Finding("gsplat", "ok", f"{missing.text}, kernels run")
    return Finding("gsplat", "problem", f"{missing.text}, no kernels: {reason}; run `zoosplat doctor --build-kernels`")


def _why_kernels_fail() -> str | None:
    """Why gsplat's kernels do not run on the GPU; None where they do. Another process tries it and compiles nothing."""
    try:
        done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=PROBE_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return f"no answer in {PROBE_TIMEOUT_S} s"
    return None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["they do not load"])[-1]


def compile_kernels() -> None:
    """Compile gsplat's kernels for the GPUs of this machine, unless they run already.

    Raises:
        UserError: there is no GPU, or the kernels cannot be compiled.
    """
    try:
        import torch
    except (ImportError, OSError) as error:
        raise UserError(f"torch: {error}; pip install 'zoosplat[train]'") from None
    capabilities = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    if not capabilities:
        raise UserError("no GPU that torch can use: gsplat's kernels are compiled on the machine that has one")
    if _why_kernels_fail() is None:
        return
    began = time.monotonic()
    gsplat_kernels.build_kernels(
        [f"{major}.{minor}" for major, minor in sorted(capabilities)], gsplat_kernels.show_progress
    )
    gsplat_kernels.show_progress(f"gsplat's kernels compiled in {time.monotonic() - began:.0f} s")
    if sys.stderr.isatty():
        print(file=sys.stderr)


def _video() -> Finding:
    try:
        import av
    except (ImportError, OSError) as error:
        return Finding("video", "broken", f"{error}; pip install 'zoosplat[video]'")
    version = ".".join(map(str, av.library_versions["libavcodec"]))
    lacking = [c for c in ("h264", "hevc") if c not in av.codecs_available]
    if lacking:
        text = f"PyAV {av.__version__} cannot decode {', '.join(lacking)}; install its wheel"
        return Finding("video", "problem", text)
    encoder = "" if "libx264" in av.codecs_available else ", no libx264: films are not written"
    return Finding("video", "problem" if encoder else "ok", f"PyAV {av.__version__}, libavcodec {version}{encoder}")


def _project(url: str) -> Finding:
    from zoosplat.storage import urls
    from zoosplat_flows.commands.storage_probe import check_writable

    what = "S3" if urls.is_s3(url) else "project"
    try:
        check_writable(urls.normalize(url))
    except UserError as error:
        return Finding(what, "broken", str(error))
    return Finding(what, "ok", f"{url} can be read and written")


def _endpoint(endpoint: str) -> Finding:
    import urllib.error
    import urllib.request

    try:
        urllib.request.urlopen(endpoint, timeout=10).close()
    except urllib.error.HTTPError:
        pass  # the server answers: it refuses anonymous requests
    except (OSError, ValueError) as error:
        return Finding("S3", "broken", f"{endpoint}: {error}; start the server or correct AWS_ENDPOINT_URL")
    return Finding("S3", "ok", f"{endpoint} answers; `zoosplat doctor s3://bucket/prefix` checks a bucket")
