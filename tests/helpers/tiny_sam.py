"""Folders with weights of SAM 2 and SAM 3: random, of the true classes and tiny, so that they need no download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

EDGE, WIDTH = 128, 32  # pixels of a model's input, and channels


def _decoder() -> dict[str, Any]:
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2, "iou_head_depth": 2, "iou_head_hidden_dim": 16}
    return {"hidden_size": WIDTH, "mlp_dim": WIDTH, **heads}


def _prompts() -> dict[str, Any]:
    return {"hidden_size": WIDTH, "image_size": EDGE, "patch_size": 16, "mask_input_channels": 4}


def _sam3_vision() -> dict[str, Any]:
    backbone = {"model_type": "sam3_vit_model", "hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2}
    backbone |= {"num_attention_heads": 2, "image_size": EDGE, "patch_size": 16, "pretrain_image_size": EDGE}
    backbone |= {"window_size": 4, "global_attn_indexes": [1]}
    sizes = [[32, 32], [16, 16], [8, 8]]
    return {"backbone_config": backbone, "fpn_hidden_size": WIDTH, "backbone_feature_sizes": sizes}


def _save(folder: Path, model: Any, processor: Any) -> Path:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _processing(kind: Any) -> Any:
    return kind(size={"height": EDGE, "width": EDGE}, mask_size={"height": EDGE // 4, "width": EDGE // 4})


def make_sam2(folder: Path, seed: int = 0) -> Path:
    """A folder of `Sam2Model`."""
    import transformers as t

    torch.manual_seed(seed)
    # A block that pools, the first of each stage, cannot look at the whole picture.
    backbone = {"model_type": "sam2_hiera_det_model", "hidden_size": 8, "image_size": [EDGE, EDGE]}
    backbone |= {"blocks_per_stage": [1, 1, 2, 1], "global_attention_blocks": [3]}
    backbone |= {"embed_dim_per_stage": [8, 16, 32, 64], "num_attention_heads_per_stage": [1, 1, 2, 2]}
    backbone |= {"window_size_per_stage": [8, 8, 8, 8], "window_positional_embedding_background_size": [2, 2]}
    vision = {"backbone_config": backbone, "backbone_channel_list": [64, 32, 16, 8], "fpn_hidden_size": WIDTH}
    vision |= {"backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]]}
    config = t.Sam2Config(vision_config=vision, prompt_encoder_config=_prompts(), mask_decoder_config=_decoder())
    return _save(folder, t.Sam2Model(config), t.Sam2Processor(_processing(t.Sam2ImageProcessor)))


def make_sam3_tracker(folder: Path, seed: int = 0) -> Path:
    """A folder of `Sam3TrackerModel`."""
    import transformers as t

    torch.manual_seed(seed)
    config = t.Sam3TrackerConfig(
        vision_config=_sam3_vision(), prompt_encoder_config=_prompts(), mask_decoder_config=_decoder()
    )
    return _save(folder, t.Sam3TrackerModel(config), t.Sam3TrackerProcessor(_processing(t.Sam3ImageProcessor)))


def make_sam3(folder: Path, seed: int = 0) -> Path:
    """A folder of `Sam3Model`, which takes texts of the letters a to z."""
    import transformers as t

    torch.manual_seed(seed)
    letters = [chr(ord("a") + i) for i in range(26)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    layers = {"hidden_size": WIDTH, "num_attention_heads": 2}
    transformer = {**layers, "num_layers": 1, "intermediate_size": 64}
    text = {**layers, "num_hidden_layers": 1, "intermediate_size": 64, "projection_dim": WIDTH}
    text |= {"vocab_size": len(words), "max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 1}
    config = t.Sam3Config(
        vision_config=_sam3_vision(),
        text_config={"model_type": "clip_text_model", **text},
        geometry_encoder_config=transformer,
        detr_encoder_config=transformer,
        detr_decoder_config={**transformer, "num_queries": 5},
        mask_decoder_config=layers,
    )
    tokenizer = t.CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])
    return _save(folder, t.Sam3Model(config), t.Sam3Processor(_processing(t.Sam3ImageProcessor), tokenizer))
