"""Load Mask2Former weights: mmdetection's, converted to the names of transformers, and those of the Hub.

Both libraries contain the same network. Besides names, three things differ: queries, keys and values, packed into one
matrix in mmdetection, are three in transformers (except in the decoder's cross-attention); the inputs of Swin's patch
merging have another order; and tensors that are used only in training, or never, are in only one of the files. RULES
covers all of this, for mmdetection 2.x and 3.x; a name or shape that it does not cover is an error.

Source: Cheng et al. 2022, "Masked-attention Mask Transformer for Universal Image Segmentation"; Liu et al. 2021, "Swin
Transformer".
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from rewards_bridge.errors import UsageError
from rewards_bridge.scorers.mask2former_sizes import read_sizes
from rewards_bridge.scorers.torch_models import (
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    PreTrainedModel,
)

SUFFIXES = (".pth", ".pt", ".safetensors")
UNUSED = (
    re.compile(r"criterion\.empty_weight"),  # part of the loss
    re.compile(r"model\.pixel_level_module\.encoder\.swin\.layernorm\.(weight|bias)"),  # its output is unused
)
"""Tensors of the transformers model that no mmdetection file contains; its outputs do not depend on them."""


# ---------------------------------------------------------------- the rules


def _copy(tensor: Tensor) -> tuple[Tensor, ...]:
    return (tensor,)


def _thirds(tensor: Tensor) -> tuple[Tensor, ...]:
    """Split packed rows [3D, ...] into those of queries, keys and values, [D, ...] each."""
    return tensor.tensor_split(3) if tensor.ndim else (tensor,) * 3


def _merging_order(tensor: Tensor) -> tuple[Tensor, ...]:
    """Reorder the last axis from (channel, row, column) of a 2x2 patch to (column, row, channel)."""
    if not tensor.ndim or tensor.shape[-1] % 4:
        return (tensor,)  # a wrong shape, which the comparison of shapes will report
    return (tensor.unflatten(-1, (-1, 2, 2)).transpose(-3, -1).flatten(-3),)


class Rule(NamedTuple):
    """How to rename and convert tensors of one kind.

    In the names, {i} and {j} are numbers, {p} is weight or bias, {word} is any single word, and (?:a|b) is the name in
    mmdetection 2.x or 3.x. A target with {qkv} stands for three, with q, k and v. Without a target, the tensor is
    dropped.
    """

    source: str
    target: str
    change: Callable[[Tensor], tuple[Tensor, ...]] = _copy


_FROM_BLOCK, _TO_BLOCK = "backbone.stages.{i}.blocks.{j}.", "swin.encoder.layers.{i}.blocks.{j}."
_BACKBONE = (
    Rule("backbone.patch_embed.projection.{p}", "swin.embeddings.patch_embeddings.projection.{p}"),
    Rule("backbone.patch_embed.norm.{p}", "swin.embeddings.norm.{p}"),
    Rule(_FROM_BLOCK + "norm1.{p}", _TO_BLOCK + "layernorm_before.{p}"),
    Rule(_FROM_BLOCK + "norm2.{p}", _TO_BLOCK + "layernorm_after.{p}"),
    Rule(
        _FROM_BLOCK + "attn.w_msa.relative_position_bias_table",
        _TO_BLOCK + "attention.relative_position_bias.relative_position_bias_table",
    ),
    Rule(_FROM_BLOCK + "attn.w_msa.relative_position_index", ""),  # follows from the window's size
    Rule(_FROM_BLOCK + "attn.w_msa.qkv.{p}", _TO_BLOCK + "attention.{qkv}_proj.{p}", _thirds),
    Rule(_FROM_BLOCK + "attn.w_msa.proj.{p}", _TO_BLOCK + "attention.o_proj.{p}"),
    Rule(_FROM_BLOCK + "ffn.layers.0.0.{p}", _TO_BLOCK + "mlp.fc1.{p}"),
    Rule(_FROM_BLOCK + "ffn.layers.1.{p}", _TO_BLOCK + "mlp.fc2.{p}"),
    Rule("backbone.stages.{i}.downsample.norm.{p}", "swin.encoder.layers.{i}.downsample.norm.{p}", _merging_order),
    Rule(
        "backbone.stages.{i}.downsample.reduction.weight",
        "swin.encoder.layers.{i}.downsample.reduction.weight",
        _merging_order,
    ),
    *(Rule(f"backbone.norm{i}.{{p}}", f"hidden_states_norms.stage{i + 1}.{{p}}") for i in range(4)),
)

_FROM_PIXEL, _TO_PIXEL = "panoptic_head.pixel_decoder.encoder.layers.{i}.", "encoder.layers.{i}."
_PIXEL_DECODER = (
    Rule("panoptic_head.pixel_decoder.input_convs.{i}.conv.{p}", "input_projections.{i}.0.{p}"),
    Rule("panoptic_head.pixel_decoder.input_convs.{i}.gn.{p}", "input_projections.{i}.1.{p}"),
    Rule("panoptic_head.pixel_decoder.level_encoding.weight", "level_embed"),
    Rule(_FROM_PIXEL + "(?:attentions.0|self_attn).{word}.{p}", _TO_PIXEL + "self_attn.{word}.{p}"),
    Rule(_FROM_PIXEL + "(?:ffns.0|ffn).layers.0.0.{p}", _TO_PIXEL + "fc1.{p}"),
    Rule(_FROM_PIXEL + "(?:ffns.0|ffn).layers.1.{p}", _TO_PIXEL + "fc2.{p}"),
    Rule(_FROM_PIXEL + "norms.0.{p}", _TO_PIXEL + "self_attn_layer_norm.{p}"),
    Rule(_FROM_PIXEL + "norms.1.{p}", _TO_PIXEL + "final_layer_norm.{p}"),
    Rule("panoptic_head.pixel_decoder.lateral_convs.0.conv.weight", "adapter_1.0.weight"),
    Rule("panoptic_head.pixel_decoder.lateral_convs.0.gn.{p}", "adapter_1.1.{p}"),
    Rule("panoptic_head.pixel_decoder.output_convs.0.conv.weight", "layer_1.0.weight"),
    Rule("panoptic_head.pixel_decoder.output_convs.0.gn.{p}", "layer_1.1.{p}"),
    Rule("panoptic_head.pixel_decoder.mask_feature.{p}", "mask_projection.{p}"),
)

_FROM_LAYER, _TO_LAYER = "panoptic_head.transformer_decoder.layers.{i}.", "decoder.layers.{i}."
_QUERIES = (
    Rule(_FROM_LAYER + "(?:attentions.0|cross_attn).attn.in_proj_{p}", _TO_LAYER + "cross_attn.in_proj_{p}"),
    Rule(_FROM_LAYER + "(?:attentions.0|cross_attn).attn.out_proj.{p}", _TO_LAYER + "cross_attn.out_proj.{p}"),
    Rule(_FROM_LAYER + "(?:attentions.1|self_attn).attn.in_proj_{p}", _TO_LAYER + "self_attn.{qkv}_proj.{p}", _thirds),
    Rule(_FROM_LAYER + "(?:attentions.1|self_attn).attn.out_proj.{p}", _TO_LAYER + "self_attn.out_proj.{p}"),
    Rule(_FROM_LAYER + "(?:ffns.0|ffn).layers.0.0.{p}", _TO_LAYER + "fc1.{p}"),
    Rule(_FROM_LAYER + "(?:ffns.0|ffn).layers.1.{p}", _TO_LAYER + "fc2.{p}"),
    Rule(_FROM_LAYER + "norms.0.{p}", _TO_LAYER + "cross_attn_layer_norm.{p}"),
    Rule(_FROM_LAYER + "norms.1.{p}", _TO_LAYER + "self_attn_layer_norm.{p}"),
    Rule(_FROM_LAYER + "norms.2.{p}", _TO_LAYER + "final_layer_norm.{p}"),
    Rule("panoptic_head.transformer_decoder.post_norm.{p}", "decoder.layernorm.{p}"),
    Rule("panoptic_head.query_embed.weight", "queries_embedder.weight"),
    Rule("panoptic_head.query_feat.weight", "queries_features.weight"),
    Rule("panoptic_head.level_embed.weight", "level_embed.weight"),
    Rule("panoptic_head.mask_embed.0.{p}", "decoder.mask_predictor.mask_embedder.0.0.{p}"),
    Rule("panoptic_head.mask_embed.2.{p}", "decoder.mask_predictor.mask_embedder.1.0.{p}"),
    Rule("panoptic_head.mask_embed.4.{p}", "decoder.mask_predictor.mask_embedder.2.0.{p}"),
)


def _below(prefix: str, rules: Iterable[Rule]) -> Iterator[Rule]:
    return (rule._replace(target=rule.target and prefix + rule.target) for rule in rules)


RULES = (
    *_below("model.pixel_level_module.encoder.", _BACKBONE),
    *_below("model.pixel_level_module.decoder.", _PIXEL_DECODER),
    *_below("model.transformer_module.", _QUERIES),
    Rule("panoptic_head.cls_embed.{p}", "class_predictor.{p}"),
)

_TOKENS = {"{i}": r"(?P<i>\d+)", "{j}": r"(?P<j>\d+)", "{p}": r"(?P<p>weight|bias)", "{word}": r"(?P<word>\w+)"}


def _pattern(template: str) -> re.Pattern[str]:
    text = template.replace(".", r"\.")
    for token, expression in _TOKENS.items():
        text = text.replace(token, expression)
    return re.compile(text)


_PATTERNS = tuple((_pattern(rule.source), rule) for rule in RULES)


# ---------------------------------------------------------------- conversion


def convert(source: Mapping[str, Tensor], expected: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Convert an mmdetection state dict to a transformers model; expected: the names and shapes of that model.

    Raises UsageError that lists every tensor that is left over, missing, present twice or of a wrong shape.
    """
    converted: dict[str, Tensor] = {}
    origins: dict[str, str] = {}
    problems: list[str] = []
    for name, tensor in source.items():
        parts = _apply(name, tensor)
        if parts is None or any(target not in expected for target in parts):
            problems.append(f"left over: {name} {list(tensor.shape)}")
            continue
        for target, part in parts.items():
            if target in converted:
                problems.append(f"twice: {name} and {origins[target]} are both {target}")
            converted[target], origins[target] = part, name
    for target, shape in expected.items():
        if target in converted:
            if tuple(converted[target].shape) != tuple(shape):
                shapes = f"{list(converted[target].shape)}, expected {list(shape)}"
                problems.append(f"wrong shape: {target} (from {origins[target]}) has {shapes}")
        elif not any(unused.fullmatch(target) for unused in UNUSED):
            problems.append(f"missing: {target} {list(shape)}")
    if problems:
        text = "\n  ".join(problems)
        raise UsageError(
            f"these weights are not those of this Mask2Former, {len(problems)} problem(s); use mmdetection's "
            f"mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco or a Hugging Face folder:\n  {text}"
        )
    return converted


def _apply(name: str, tensor: Tensor) -> dict[str, Tensor] | None:
    """Return the tensors by new name that the rule for this name produces; None if there is no rule."""
    for pattern, rule in _PATTERNS:
        match = pattern.fullmatch(name)
        if match and not rule.target:
            return {}
        if match:
            letters = ("q", "k", "v") if "{qkv}" in rule.target else ("",)
            targets = [rule.target.format(qkv=letter, **match.groupdict()) for letter in letters]
            return dict(zip(targets, rule.change(tensor), strict=True))
    return None


def load_mmdetection(path: str, config: Mask2FormerConfig | None = None) -> Mask2FormerForUniversalSegmentation:
    """Return the model of this configuration with the weights of an mmdetection checkpoint, in float32 on the CPU.

    Without a configuration, use the sizes of the file's tensors. Raises UsageError if the file cannot be read as plain
    tensors or does not fit the model.
    """
    tensors = read_checkpoint(path)
    model = Mask2FormerForUniversalSegmentation(config or read_sizes(tensors))
    try:
        weights = convert(tensors, {name: tensor.shape for name, tensor in model.state_dict().items()})
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    model.load_state_dict(weights, strict=False)  # convert() has checked every name
    return model


# ---------------------------------------------------------------- files

_SCALAR = np.float64(0).__reduce__()[0]
_NUMBERS: list[Any] = [
    *((_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("?", "i4", "i8", "f4", "f8")),
]
"""Types of numbers that mmcv stores beside the weights (a best score); unpickling them is safe."""


def read_checkpoint(path: str) -> dict[str, Tensor]:
    """Return the tensors of a .safetensors file or of an mmdetection .pth or .pt (bare or with a "state_dict").

    Never runs code from the file. Raises UsageError for a file that contains more than tensors, numbers and texts, with
    the command that rewrites it, and for one that is missing or damaged.
    """
    if not Path(path).is_file():
        raise UsageError(f"{path}: no such file; expected an mmdetection file, a Hugging Face folder or a Hub name")
    try:
        if path.endswith(".safetensors"):
            return load_file(path)
        with torch.serialization.safe_globals(_NUMBERS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{path}: cannot be read ({error}); download it again") from None
    except Exception as error:  # of many types, because files can be damaged in many ways
        if re.search(r"Unsupported (global|class)|add_safe_globals", str(error)):
            raise UsageError(_rewrite(path)) from None
        reason = str(error).split("WeightsUnpickler error: ")[-1].strip().splitlines()
        raise UsageError(
            f"{path}: damaged ({(reason or [type(error).__name__])[0][:200]}); download it again"
        ) from None
    tensors = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise UsageError(f"{path}: expected a state dict (tensors by name) or a dict with a 'state_dict'")
    return dict(tensors)


def _rewrite(path: str) -> str:
    new = str(Path(path).with_suffix(".safetensors"))
    program = (
        "import torch; from safetensors.torch import save_file; "
        f"content = torch.load({path!r}, map_location='cpu', weights_only=False); "
        "tensors = content.get('state_dict', content); "
        f"save_file({{name: tensor.contiguous() for name, tensor in tensors.items()}}, {new!r})"
    )
    return (
        f"{path}: it contains more than tensors, and loading it could run code, which is not done here. If you trust "
        f"the file, rewrite it once where mmdetection is installed, and use the new file:\n"
        f"  python -c {shlex.quote(program)}"
    )


def from_hub(kind: Any, name: str, purpose: str) -> Any:
    """Return kind.from_pretrained(name), from a folder or the Hub; models are in float32 and complete.

    Raises UsageError if it is missing, is damaged, or lacks weights that matter.
    """
    if not issubclass(kind, PreTrainedModel):
        return _from_pretrained(kind, name, purpose)
    model, info = _from_pretrained(
        kind, name, purpose, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
    )
    problems = [
        f"missing: {key}" for key in sorted(info["missing_keys"]) if not any(unused.fullmatch(key) for unused in UNUSED)
    ]
    problems += [
        f"wrong shape: {key} has {list(actual)}, expected {list(expected)}"
        for key, actual, expected in info["mismatched_keys"]
    ]
    if problems:
        text = "\n  ".join(problems)
        raise UsageError(f"{name}: does not contain all weights of a {kind.__name__} ({purpose}):\n  {text}")
    return model


def _from_pretrained(kind: Any, name: str, purpose: str, **options: Any) -> Any:
    try:
        return kind.from_pretrained(name, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UsageError(
            f"{name}: no {kind.__name__} ({purpose}) could be loaded; expected a folder with one or its name on the "
            f"Hugging Face Hub. {type(error).__name__}: {error}"
        ) from error
