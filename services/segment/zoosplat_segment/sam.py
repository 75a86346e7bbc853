"""Masks by SAM 2 or SAM 3, prompted by what is known of the animal's place: nobody clicks.

The models are those of the package `transformers`. They look at one window of one picture at a time, so memory does not
grow with the recording, and every frame stands for itself, as with the network of this package. SAM's video models
would carry the masks of one frame to the next; here the hull says in each frame anew where the animal is.
"""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from dataclasses import dataclass
from threading import Lock
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from zoosplat.config.sections import Segment
from zoosplat.errors import UserError
from zoosplat.stages.sam_weights import SAM2_TYPES, check_kind

U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]
LONGEST = 1024  # pixels; longest edge of a window, near to that of the models' input
POINTS = 3  # points inside the animal that are prompts
SURE = 0.5  # value of a hint from which the animal is there, or less where the whole hint is lower
SHARE = 0.75  # of the largest value of a low hint
FAINT = 0.25  # a hint whose largest value is lower says that there is no animal
LEAST_PIECE = 0.05  # area of a piece of a hint that counts, of the largest piece
MARGIN = 0.04  # added to each side of the box, of its longer edge


@dataclass(frozen=True)
class Prompt:
    """Where the animal is in a window, in its pixels.

    Attributes:
        box: first and last x, y of the animal, with a margin: x0, y0, x1, y1.
        points: x, y inside the animal.
    """

    box: tuple[float, float, float, float]
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True, eq=False)
class Embedding:
    """What a model has seen in a picture of h x w pixels; prompts are answered from it."""

    features: Any
    height: int
    width: int


class Sam(ABC):
    """A model that answers prompts, for several threads."""

    _lock = Lock()

    @abstractmethod
    def embed(self, picture: U8) -> Embedding:
        """Look at an RGB picture [h, w, 3]."""

    def masks(self, pictures: Tensor, hints: Tensor, seen: dict[int, Embedding]) -> Tensor:
        """Masks [n, h, w], 0 to 1, in pictures.

        Args:
            pictures: [n, 3, h, w] RGB, 0 to 255.
            hints: [n, h, w] 0 to 1, where the animal is in each.
            seen: what was seen in these pictures before; what is seen now is added.
        """
        # One at a time, whoever asks: memory is that of one window.
        with self._lock:
            for i in range(len(pictures)):
                if i not in seen:
                    seen[i] = self.embed(pictures[i].byte().permute(1, 2, 0).cpu().numpy())
            return torch.stack([self.mask(seen[i], hint) for i, hint in enumerate(hints)])

    def mask(self, embedding: Embedding, hint: Tensor) -> Tensor:
        """The mask [h, w], 0 to 1, of the animal that a hint [h, w], 0 to 1, shows; 0 where it shows none."""
        prompt = make_prompt(hint.float().cpu().numpy())
        if prompt is None:
            return torch.zeros_like(hint)
        logits = self._answer(embedding, prompt, hint).float()[None, None]
        size = embedding.height, embedding.width
        return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)[0, 0].sigmoid()

    @abstractmethod
    def _answer(self, embedding: Embedding, prompt: Prompt, hint: Tensor) -> Tensor:
        """Logits of the mask at the model's resolution [h', w'], which covers the whole picture."""


class _Prompted(Sam):
    """`Sam2Model` or `Sam3TrackerModel`: a box and points are the prompt."""

    def __init__(self, model: Any, processor: Any, device: torch.device) -> None:
        self._model, self._processor, self._device = model, processor, device

    def embed(self, picture: U8) -> Embedding:
        pixels = self._processor(images=picture, return_tensors="pt")["pixel_values"].to(self._device)
        with _precision(self._device):
            return Embedding(self._model.get_image_embeddings(pixels), *picture.shape[:2])

    def _answer(self, embedding: Embedding, prompt: Prompt, hint: Tensor) -> Tensor:
        inputs = self._processor(
            original_sizes=[[embedding.height, embedding.width]],
            input_boxes=[[list(prompt.box)]],
            input_points=[[[list(point) for point in prompt.points]]],
            input_labels=[[[1] * len(prompt.points)]],
            return_tensors="pt",
        ).to(self._device)
        prompts = {key: inputs[key] for key in ("input_boxes", "input_points", "input_labels")}
        with _precision(self._device):
            out = self._model(image_embeddings=embedding.features, multimask_output=False, **prompts)
        logits: Tensor = out.pred_masks[0, 0, 0]
        return logits


class _Texted(Sam):
    """`Sam3Model`: a text and a box are the prompt; of all that they find, what fits the hint is the animal."""

    def __init__(self, model: Any, processor: Any, text: str, device: torch.device) -> None:
        self._model, self._processor, self._text, self._device = model, processor, text, device

    def embed(self, picture: U8) -> Embedding:
        pixels = self._processor(images=picture, return_tensors="pt")["pixel_values"].to(self._device)
        with _precision(self._device):
            return Embedding(self._model.get_vision_features(pixels), *picture.shape[:2])

    def _answer(self, embedding: Embedding, prompt: Prompt, hint: Tensor) -> Tensor:
        inputs = self._processor(
            text=[self._text],
            original_sizes=[[embedding.height, embedding.width]],
            input_boxes=[[list(prompt.box)]],
            return_tensors="pt",
        ).to(self._device)
        prompts = {key: inputs[key] for key in ("input_ids", "attention_mask", "input_boxes", "input_boxes_labels")}
        with _precision(self._device):
            out = self._model(vision_embeds=embedding.features, **prompts)
        found = out.pred_masks[0].float()
        score = out.pred_logits[0].float().sigmoid()
        small = F.interpolate(hint[None, None].float(), size=found.shape[1:], mode="area")[0, 0]
        there = found.sigmoid()
        overlap = torch.minimum(there, small).sum((1, 2)) / torch.maximum(there, small).sum((1, 2)).clamp_min(1e-6)
        best: Tensor = found[(score * overlap).argmax()]
        return best


def _precision(device: torch.device) -> torch.autocast:
    """bfloat16 on a GPU, as the models' own code has it."""
    return torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda")


def make_prompt(hint: F32) -> Prompt | None:
    """A box round what a hint [h, w], 0 to 1, shows, and points far inside it; None where it shows nothing."""
    if hint.max() < FAINT:
        return None
    there = (hint >= min(SURE, SHARE * float(hint.max()))).astype(np.uint8)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(there)
    areas = stats[1:count, cv2.CC_STAT_AREA]
    kept = np.isin(labels, 1 + np.flatnonzero(areas >= LEAST_PIECE * areas.max()))
    rows, columns = np.nonzero(kept)
    low, high = np.array([columns.min(), rows.min()]), np.array([columns.max(), rows.max()])
    margin = MARGIN * (high - low + 1).max()
    last = np.array(hint.shape[::-1]) - 1
    x0, y0, x1, y1 = (float(v) for v in (*np.maximum(low - margin, 0), *np.minimum(high + margin, last)))
    return Prompt((x0, y0, x1, y1), _points_inside(labels == 1 + int(areas.argmax())))


def _points_inside(piece: npt.NDArray[np.bool_]) -> tuple[tuple[float, float], ...]:
    """The point farthest from the border of a piece [h, w], and others far inside that lie far from those before."""
    framed = cv2.copyMakeBorder(piece.astype(np.uint8), 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=(0,))
    depth = np.asarray(cv2.distanceTransform(framed, cv2.DIST_L2, 5))[1:-1, 1:-1]
    chosen = [np.unravel_index(int(depth.argmax()), depth.shape)]
    places = np.argwhere(depth >= depth.max() / 2)
    while len(chosen) < min(POINTS, len(places)):
        distance = np.linalg.norm(places[:, None] - np.array(chosen)[None], axis=-1).min(1)
        farthest = places[int(distance.argmax())]
        chosen.append((farthest[0], farthest[1]))
    return tuple((float(x), float(y)) for y, x in chosen)


# -- loading ------------------------------------------------------------------------------------------------------
def check_installed() -> None:
    """Raise UserError unless the packages are there that `segment.method: sam` needs."""
    for package in ("transformers", "torchvision"):
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"segment.method = sam: the package {package} is not installed; install zoosplat[sam], or choose "
                "segment.method: network, which needs no more than the package has"
            )


def load_sam(settings: Segment, device: torch.device) -> Sam:
    """The model that `segment.sam_weights` names. Only .safetensors are read, and no code comes with weights.

    Raises:
        UserError: a package is missing, or the weights are not there, not whole, or of a model that cannot be used so.
    """
    check_installed()
    import transformers

    models: Any = transformers
    weights, text = settings.sam_weights, settings.sam_prompt
    try:
        kind = models.AutoConfig.from_pretrained(weights, trust_remote_code=False).model_type
        check_kind(weights, kind, text)
        if text is not None:
            model_class, processor_class = models.Sam3Model, models.Sam3Processor
        elif kind in SAM2_TYPES:
            model_class, processor_class = models.Sam2Model, models.Sam2Processor
        else:
            model_class, processor_class = models.Sam3TrackerModel, models.Sam3TrackerProcessor
        model, told = model_class.from_pretrained(weights, use_safetensors=True, output_loading_info=True)
        # The package would make up tensors that the file does not hold.
        if told["missing_keys"]:
            raise ValueError(f"{len(told['missing_keys'])} tensors are missing, such as {min(told['missing_keys'])}")
        processor = processor_class.from_pretrained(weights)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"segment.sam_weights = {weights}: cannot be loaded ({' '.join(str(error).split())}); give a folder with "
            "config.json, .safetensors and the processor's files, or a name at the hub that this machine can reach"
        ) from None
    model = model.eval().to(device)
    return _Prompted(model, processor, device) if text is None else _Texted(model, processor, text, device)
