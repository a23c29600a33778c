"""Sizes of a Mask2Former with a Swin backbone: those of GenEval's detector, or those inferred from tensor shapes.

Source: mmdetection 2.x, configs/mask2former/mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from rewards_bridge.scorers.torch_models import Mask2FormerConfig, SwinConfig

_SWIN_SMALL: dict[str, Any] = {
    "image_size": 224,
    "embed_dim": 96,
    "depths": [2, 2, 18, 2],
    "num_heads": [3, 6, 12, 24],
    "window_size": 7,
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}
_COCO_INSTANCE: dict[str, Any] = {
    "num_labels": 80,
    "num_queries": 100,
    "feature_size": 256,
    "mask_feature_size": 256,
    "hidden_dim": 256,
    "encoder_layers": 6,
    "encoder_feedforward_dim": 1024,
    "decoder_layers": 10,  # one more than in mmdetection, since the first prediction is made before any layer
    "dim_feedforward": 2048,
    "num_attention_heads": 8,
}
_LEVELS, _POINTS = 3, 4
"""Feature maps that the pixel decoder reads, and sampling points per head in each of them."""


def swin_small_coco() -> Mask2FormerConfig:
    """Return the configuration of GenEval's detector: Swin-S, 100 queries, the 80 classes of COCO, "no object" last."""
    return Mask2FormerConfig(backbone_config=SwinConfig(**_SWIN_SMALL), **_COCO_INSTANCE)


def read_sizes(tensors: Mapping[str, Tensor]) -> Mask2FormerConfig:
    """Return the configuration that fits an mmdetection checkpoint's tensors, with the 80 classes of COCO.

    Assumes that the decoder has as many heads as the pixel decoder, as in all published configurations. If tensors that
    determine the sizes are missing, return the configuration of GenEval's detector, so that `convert` reports them.
    """
    try:
        swin, rest = _backbone_sizes(tensors), _head_sizes(tensors)
    except (KeyError, IndexError):
        return swin_small_coco()
    return Mask2FormerConfig(backbone_config=SwinConfig(**_SWIN_SMALL | swin), **_COCO_INSTANCE | rest)


def _backbone_sizes(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    stages = range(_count(tensors, r"backbone\.stages\.(\d+)\."))
    tables = [tensors[f"backbone.stages.{i}.blocks.0.attn.w_msa.relative_position_bias_table"].shape for i in stages]
    return {
        "embed_dim": tensors["backbone.patch_embed.projection.weight"].shape[0],
        "depths": [_count(tensors, rf"backbone\.stages\.{i}\.blocks\.(\d+)\.") for i in stages],
        "num_heads": [heads for _, heads in tables],
        "window_size": (math.isqrt(tables[0][0]) + 1) // 2,
    }


def _head_sizes(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    pixel, decoder = "panoptic_head.pixel_decoder", "panoptic_head.transformer_decoder"
    queries, width = tensors["panoptic_head.query_embed.weight"].shape
    attention = _either(tensors, f"{pixel}.encoder.layers.0.", ("attentions.0", "self_attn"), ".attention_weights.bias")
    return {
        "num_queries": queries,
        "hidden_dim": width,
        "feature_size": tensors[f"{pixel}.input_convs.0.conv.weight"].shape[0],
        "mask_feature_size": tensors[f"{pixel}.mask_feature.weight"].shape[0],
        "encoder_layers": _count(tensors, rf"{re.escape(pixel)}\.encoder\.layers\.(\d+)\."),
        "encoder_feedforward_dim": _feedforward(tensors, f"{pixel}.encoder.layers.0."),
        "decoder_layers": _count(tensors, rf"{re.escape(decoder)}\.layers\.(\d+)\.") + 1,
        "dim_feedforward": _feedforward(tensors, f"{decoder}.layers.0."),
        "num_attention_heads": attention.shape[0] // (_LEVELS * _POINTS),
    }


def _feedforward(tensors: Mapping[str, Tensor], layer: str) -> int:
    return _either(tensors, layer, ("ffns.0", "ffn"), ".layers.0.0.weight").shape[0]


def _either(tensors: Mapping[str, Tensor], start: str, middles: tuple[str, str], end: str) -> Tensor:
    """Return the tensor by its name in mmdetection 2.x or 3.x."""
    older, newer = (f"{start}{middle}{end}" for middle in middles)
    return tensors[older] if older in tensors else tensors[newer]


def _count(tensors: Mapping[str, Tensor], pattern: str) -> int:
    """Return the number of distinct values of the pattern's group among the names."""
    return len({match[1] for name in tensors if (match := re.match(pattern, name))})
