"""Folders with weights of SAM 2 and SAM 3, as `segment.sam_weights` may name one."""

from __future__ import annotations

import json
import os

from zoosplat.errors import UserError
from zoosplat.storage import urls

# `model_type` in config.json: of SAM 2; of weights that answer boxes and points, and of those that answer texts.
SAM2_TYPES = ("sam2", "sam2_video")
BOX_TYPES = (*SAM2_TYPES, "sam3_tracker", "sam3_tracker_video", "sam3_video")
TEXT_TYPES = ("sam3", "sam3_video")
# Files of a folder that are read. Others, such as the .pt of the models' own program, do not matter.
READ_ENDINGS = (".json", ".safetensors", ".txt")


def list_weights(folder: str) -> list[str]:
    """The files of a folder that are read, by their names; none where there is no such folder of this machine."""
    if urls.is_s3(folder):
        return []
    urls.check_local(folder)
    if not os.path.isdir(folder):
        return []
    return sorted(name for name in os.listdir(folder) if name.endswith(READ_ENDINGS))


def check_weights_folder(folder: str, text: str | None) -> None:
    """Check a folder of weights by its names and its config.json.

    Args:
        folder: local path.
        text: `segment.sam_prompt`.

    Raises:
        UserError: the folder is not there, is not whole, or is of a model that cannot be used so.
    """
    label = f"segment.sam_weights = {folder}"
    if urls.is_s3(folder):
        raise UserError(f"{label}: transformers reads folders of a file system; copy it, and name the copy")
    names = list_weights(folder)
    if not names:
        raise UserError(f"{label}: no folder with weights; check segment.sam_weights")
    if "config.json" not in names:
        raise UserError(f"{label}: has no config.json; copy the whole folder of the model")
    if not any(name.endswith(".safetensors") for name in names):
        raise UserError(f"{label}: has no .safetensors; other weights are not read, because they may run code")
    try:
        with open(os.path.join(folder, "config.json"), "rb") as file:
            kind = json.load(file).get("model_type")
    except (OSError, ValueError, AttributeError):
        raise UserError(f"{label}: its config.json is damaged; copy it again") from None
    check_kind(folder, str(kind), text)


def check_kind(weights: str, kind: str, text: str | None) -> None:
    """Raise UserError unless weights of a kind (`model_type`) can be used, with a text or without."""
    if kind not in (*BOX_TYPES, *TEXT_TYPES):
        raise UserError(f"segment.sam_weights = {weights}: are of a model {kind}; give those of SAM 2 or SAM 3")
    if text is None and kind not in BOX_TYPES:
        raise UserError(
            f"segment.sam_weights = {weights}: are of a model {kind}, which needs a text; set segment.sam_prompt, such "
            "as mouse"
        )
    if text is not None and kind not in TEXT_TYPES:
        raise UserError(
            f"segment.sam_prompt = {text}: segment.sam_weights = {weights} are of a model {kind}, which takes no text; "
            f"leave it out, or give weights of SAM 3 ({' or '.join(TEXT_TYPES)})"
        )
