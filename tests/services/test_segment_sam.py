"""SAM 2 and SAM 3 as `segment.method: sam`, with random weights of the true classes: no others can be had here."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_sam
import torch
from torch.nn import functional as F

from zoosplat.config.sections import Segment
from zoosplat.errors import UserError
from zoosplat_segment import sam
from zoosplat_segment.sam import load_sam, make_prompt

CPU = torch.device("cpu")
MAKERS = {"sam2": tiny_sam.make_sam2, "sam3_tracker": tiny_sam.make_sam3_tracker, "sam3": tiny_sam.make_sam3}
needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed: zoosplat[sam]"
)


def settings(weights: Any, text: str | None = None) -> Segment:
    return Segment(method="sam", sam_weights=str(weights), sam_prompt=text)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = MAKERS[kind](tmp_path_factory.mktemp(kind))
        return made[kind]

    return folder


def blob(x0: int, x1: int, y0: int, y1: int, value: float = 1.0) -> Any:
    hint = np.zeros((60, 90), np.float32)
    hint[y0:y1, x0:x1] = value
    return hint


# -- prompts ------------------------------------------------------------------------------------------------------
def test_a_box_with_a_margin_and_points_far_inside() -> None:
    prompt = make_prompt(blob(20, 70, 10, 30))
    assert prompt is not None
    assert prompt.box == pytest.approx((18, 8, 71, 31))
    assert len(prompt.points) == 3
    assert all(24 <= x <= 65 and 14 <= y <= 25 for x, y in prompt.points)
    xs = sorted(x for x, _ in prompt.points)
    assert min(np.diff(xs)) > 10


def test_the_box_holds_a_tail_that_is_cut_off_but_no_specks_and_ends_at_the_window() -> None:
    hint = np.maximum(blob(0, 40, 10, 40), blob(50, 80, 20, 24))
    hint[55, 85] = 1
    prompt = make_prompt(hint)
    assert prompt is not None
    assert prompt.box[0] == 0
    assert prompt.box[2] == pytest.approx(79 + 0.04 * 80)
    assert all(x < 40 for x, _ in prompt.points)


def test_low_hints() -> None:
    assert make_prompt(blob(20, 70, 10, 30, 0.2)) is None
    prompt = make_prompt(blob(20, 70, 10, 30, 0.4))
    assert prompt is not None
    assert prompt.box == pytest.approx((18, 8, 71, 31))


# -- answers ------------------------------------------------------------------------------------------------------
@needs_transformers
@pytest.mark.parametrize("kind", ["sam2", "sam3_tracker"])
def test_the_mask_is_what_the_model_and_its_processor_answer(folders: Callable[[str], Path], kind: str) -> None:
    """Asked in one call, as the models' documentation shows it."""
    import transformers

    picture = np.random.default_rng(0).integers(0, 255, (60, 90, 3)).astype(np.uint8)
    hint = blob(20, 70, 10, 30)
    model = load_sam(settings(folders(kind)), CPU)
    with torch.inference_mode():
        found = model.mask(model.embed(picture), torch.from_numpy(hint))
    classes = {"sam2": ("Sam2Model", "Sam2Processor"), "sam3_tracker": ("Sam3TrackerModel", "Sam3TrackerProcessor")}
    model_class, processor_class = (getattr(transformers, name) for name in classes[kind])
    processor = processor_class.from_pretrained(folders(kind))
    prompt = make_prompt(hint)
    assert prompt is not None
    points = [[[list(point) for point in prompt.points]]]
    inputs = processor(
        images=picture, input_boxes=[[list(prompt.box)]], input_points=points, input_labels=[[[1, 1, 1]]],
        return_tensors="pt",
    )  # fmt: skip
    with torch.inference_mode():
        out = model_class.from_pretrained(folders(kind)).eval()(**inputs, multimask_output=False)
    (expected,) = processor.post_process_masks(out.pred_masks, inputs["original_sizes"], binarize=False)
    np.testing.assert_allclose(found, expected[0, 0].sigmoid(), atol=1e-6)
    assert found.shape == (60, 90)
    assert (model.mask(model.embed(picture), torch.zeros(60, 90)) == 0).all()


@needs_transformers
def test_of_what_a_text_finds_the_one_that_fits_the_hint(folders: Callable[[str], Path]) -> None:
    """Its outputs are replaced by three animals, of which the surest is not where the hint is."""
    model = load_sam(settings(folders("sam3"), "mouse"), CPU)
    assert isinstance(model, sam._Texted)
    picture = np.zeros((60, 90, 3), np.uint8)
    hint = torch.from_numpy(blob(20, 70, 10, 30))
    with torch.inference_mode():
        embedding = model.embed(picture)
        assert model.mask(embedding, hint).shape == (60, 90)
        inner = model._model

        class Answers:
            def __call__(self, **inputs: Any) -> Any:
                out = inner(**inputs)
                places = [blob(75, 90, 40, 60), blob(20, 70, 10, 30), blob(20, 70, 10, 30)]
                masks = torch.stack([torch.from_numpy(16 * place - 8) for place in places])
                out.pred_masks = F.interpolate(masks[None], size=(32, 32), mode="area")
                out.pred_logits = torch.tensor([[3.0, 1.0, -2.0]])
                assert inputs["input_ids"].shape == (1, 32)
                return out

        model._model = Answers()
        found = model.mask(embedding, hint)
    assert (found[12:28, 24:66] > 0.9).all()
    assert (found[42:, 77:] < 0.1).all()


# -- weights ------------------------------------------------------------------------------------------------------
@needs_transformers
def test_weights_that_cannot_be_used(folders: Callable[[str], Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    broken = shutil.copytree(folders("sam2"), tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if not k.startswith("mask_decoder")}, broken / "model.safetensors")
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    shutil.copy(folders("sam2") / "config.json", pickled)
    torch.save(tensors, pickled / "pytorch_model.bin")
    for folder, text, line in (
        (broken, None, "tensors are missing, such as mask_decoder."),
        (pickled, None, "cannot be loaded ("),
        (folders("sam3"), None, "are of a model sam3, which needs a text; set segment.sam_prompt"),
        (folders("sam2"), "mouse", "are of a model sam2, which takes no text; leave it out"),
    ):
        with pytest.raises(UserError) as caught:
            load_sam(settings(folder, text), CPU)
        (found,) = str(caught.value).splitlines()
        assert f"segment.sam_weights = {folder}" in found
        assert line in found


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"segment.method = sam: the package transformers is not installed; install zoo"
    ):
        load_sam(settings("facebook/sam2.1-hiera-large"), CPU)
