"""Which device a stage computes on, and what a progress mark says about it."""

from __future__ import annotations

from typing import Any

import torch

from zoosplat.errors import UserError


def pick_device(name: str) -> torch.device:
    """The device of a setting: `auto` (CUDA where there is a usable GPU, else the CPU), `cpu`, `cuda` or `cuda:<i>`.

    Raises:
        UserError: CUDA is asked for and there is none, or the name is unknown.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device {name}: unknown; use auto, cpu, cuda or cuda:0") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device {name}: not supported; use auto, cpu, cuda or cuda:0")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {name}: no such CUDA GPU here ({torch.cuda.device_count()} found); use auto or cpu")
    return device


def device_figures(device: torch.device) -> dict[str, Any]:
    """Figures of a progress mark: the device's name and, on a GPU, the peak of the allocated memory in bytes."""
    if device.type != "cuda":
        return {"device": "cpu"}
    return {
        "device": torch.cuda.get_device_name(device),
        "peak_gpu_bytes": torch.cuda.max_memory_allocated(device),
    }
