"""HPS v2: how well people would like an image for its prompt, by a CLIP ViT-H/14 trained on their rankings.

The published files have open_clip's names; a table brings them to those of transformers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import CLIPModel
from transformers.utils import cached_file

from rewards_bridge.scorers.base import Scores, check_batch
from rewards_bridge.scorers.clip_model import (
    PROCESSOR_FILES,
    Clip,
    Pixels,
    Source,
    has_tokenizer,
    image_side,
    load_config,
    load_model,
    load_tensors,
    load_tokenizer,
    model_from_tensors,
)

MODEL = "xswu/HPSv2"
FILE = "HPS_v2_compressed.pt"
PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
SCALE = 100.0
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

OUTSIDE = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection": "text_projection.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "visual.proj": "visual_projection.weight",
}
"""open_clip's name -> transformers', of all that is not in a block."""
TRANSPOSED = ("text_projection", "visual.proj")
TOWERS = {
    "visual.transformer.resblocks.": "vision_model.encoder.layers.",
    "transformer.resblocks.": "text_model.encoder.layers.",
}
MODULES = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
"""Within a block, each with a weight and a bias."""
PACKED = {"attn.in_proj_weight": "weight", "attn.in_proj_bias": "bias"}
"""Within a block: query, key and value one above the other."""


class HpsV2Scorer:
    """Scores images by HPS v2: raw "hpsv2" = exp(logit_scale) * cos(image, prompt), score = raw / 100.

    The published exp(logit_scale) is about 100, so score is about the cosine, which is what the hpsv2 package returns.
    Only that package also straightens curly quotes and resolves HTML entities in the prompt.

    model: hub name or folder with the file, the file itself (.pt or .safetensors, open_clip's names), or a folder in
    the format of transformers. file: which one, HPS_v2_compressed.pt or HPS_v2.1_compressed.pt. processor: where the
    tokenizer and, for open_clip's names, the config.json of the architecture are; empty: the model's own if it is a
    folder of transformers with a tokenizer, otherwise laion/CLIP-ViT-H-14-laion2B-s32B-b79K. antialias: as torchvision
    0.17 and newer do it under the hpsv2 package; older ones did not smooth, and give other scores. device: cpu, cuda:0,
    ...; dtype: float32, float16 or bfloat16; batch_size: images at a time. Raises UsageError for files that are missing
    or another model's and for options that cannot be.

    Source: Wu et al. 2023, "Human Preference Score v2" (arXiv 2306.09341), and its package hpsv2 1.2.0.
    """

    def __init__(
        self,
        model: str = MODEL,
        file: str = FILE,
        processor: str = "",
        antialias: bool = True,
        device: str = "cpu",
        dtype: str = "float32",
        batch_size: int = 32,
    ) -> None:
        weights = Source("hpsv2", "model", model, MODEL, (file,))
        path = _find(weights, file)
        own = path is None and has_tokenizer(weights)
        place = processor or (model if own else PROCESSOR)
        side = Source("hpsv2", "processor", place, PROCESSOR, PROCESSOR_FILES)
        loaded = load_model(weights) if path is None else _load_open_clip(weights, path, side)
        pixels = letterbox(image_side(loaded), antialias)
        self.clip = Clip("hpsv2", loaded, load_tokenizer(side), pixels, device, dtype, batch_size)

    def score(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[dict]) -> Scores:
        """Judge images u8[B,H,W,3] of any size for their prompts; ValueError for a batch of another form."""
        check_batch("hpsv2", images, prompts, metadata)
        raw = self.clip.logits(images, prompts)
        return Scores(score=raw / np.float32(SCALE), raw={"hpsv2": raw}, reasons=[""] * len(raw))


def letterbox(side: int, antialias: bool) -> Pixels:
    """What HPS v2 does to images: the longest edge to `side`, bicubic; centred on black, a square; normalised.

    The resizing is done in floating point and not cut off at black and white, as in the hpsv2 package.
    """
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]

    def pixels(images: np.ndarray) -> torch.Tensor:
        planes = torch.tensor(images).permute(0, 3, 1, 2).float() / 255
        scale = side / max(planes.shape[2:])
        height, width = (max(1, round(edge * scale)) for edge in planes.shape[2:])
        if scale != 1:
            planes = torch.nn.functional.interpolate(
                planes, (height, width), mode="bicubic", align_corners=False, antialias=antialias
            )
        left, top = (side - width) // 2, (side - height) // 2
        padding = (left, side - width - left, top, side - height - top)
        return (torch.nn.functional.pad(planes, padding) - mean) / std

    return pixels


def convert(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A CLIP's tensors from open_clip's names and layouts to those of transformers.

    What is in no table keeps its name, so that it is found to be too much when the model is filled.
    """
    converted: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        for target, value in _convert_one(name, tensor):
            converted[target] = value
    return converted


def _convert_one(name: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    if name in OUTSIDE:
        return [(OUTSIDE[name], tensor.T if name in TRANSPOSED else tensor)]
    for prefix, target in TOWERS.items():
        number, _, inner = name.removeprefix(prefix).partition(".")
        if not name.startswith(prefix) or not number.isdecimal():
            continue
        block = f"{target}{number}."
        if inner in PACKED and tensor.shape[0] % 3 == 0:
            names = (f"{block}self_attn.{letter}_proj.{PACKED[inner]}" for letter in "qkv")
            return list(zip(names, tensor.chunk(3), strict=True))
        module, _, kind = inner.rpartition(".")
        if module in MODULES and kind in ("weight", "bias"):
            return [(f"{block}{MODULES[module]}.{kind}", tensor)]
    return [(name, tensor)]


def _find(source: Source, file: str) -> Path | None:
    """The file of open_clip's names; None if the place is a folder of transformers."""
    if source.path.is_file():
        return source.path
    if source.has(file):
        return source.path / file
    if source.has("config.json"):
        return None
    with source.reading(file):
        if source.is_local:
            raise FileNotFoundError(f"neither {file} nor a config.json of transformers")
        return Path(str(cached_file(source.place, file)))


def _load_open_clip(weights: Source, path: Path, processor: Source) -> CLIPModel:
    tensors = convert(load_tensors(weights, path))
    return model_from_tensors(weights, load_config(processor), tensors)
