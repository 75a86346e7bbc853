"""Turns a lack of GPU memory in a stage into one clear line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from zoosplat.errors import UserError
from zoosplat.stages.memory import CUDA_CONTEXT_BYTES, GIB, measured_sizes, training_memory
from zoosplat.stages.memory_advice import suggest_smaller
from zoosplat.stages.runs import Run


@contextmanager
def out_of_memory(run: Run, stage: str) -> Iterator[None]:
    """Turn a lack of GPU memory in a stage into a UserError.

    Its text says what memory is predicted, how much there is, and which key to change.
    """
    try:
        yield
    except Exception as error:
        if not _is_memory(error):
            raise
        raise UserError(_explain(run, stage)) from error


def _is_memory(error: BaseException) -> bool:
    # A failure while a CUDA graph is captured causes further errors; cuBLAS and cuDNN have texts of their own.
    seen: BaseException | None = error
    while seen is not None:
        text = str(seen)
        if isinstance(seen, torch.OutOfMemoryError) or "CUDA error: out of memory" in text or "ALLOC_FAILED" in text:
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _explain(run: Run, stage: str) -> str:
    experiment, sizes = run.experiment, measured_sizes(run)
    parts = training_memory(experiment, sizes)
    largest = [f"{name} {size / GIB:.1f}" for name, size in list(parts.items())[:-4:-1]]
    words = f"training is predicted to need {sum(parts.values()) / GIB:.1f} GiB ({', '.join(largest)})"
    room = 0.0
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        allowed = torch.cuda.get_per_process_memory_fraction() * total
        room = min(allowed, free + torch.cuda.memory_reserved()) + CUDA_CONTEXT_BYTES
        words += f", {room / GIB:.1f} GiB of the GPU's {total / GIB:.1f} can be used"
    if stage == "train":
        smaller = suggest_smaller(experiment, room, sizes)
        return f"out of GPU memory: {words}; {smaller} or use a larger GPU; checkpoints are kept"
    less = "lower render.width and render.height" if stage == "render" else "let nothing else use the GPU"
    return f"out of GPU memory: {words}, and {stage} less; {less}, or set {stage}.device to cpu; the model is kept"
