"""HPS v2: human preference for an image given its prompt, by a CLIP ViT-H/14 trained on human rankings.

The published files are in the format of open_clip's ViT-H-14 and are read with open_clip.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rewards_bridge.scorers import clip_open
from rewards_bridge.scorers.base import Scores, check_batch
from rewards_bridge.scorers.clip_files import PROCESSOR_FILES, Source
from rewards_bridge.scorers.clip_model import Clip, Pixels, Towers
from rewards_bridge.scorers.clip_transformers import TransformersTowers, has_tokenizer, load_model, load_tokenizer
from rewards_bridge.scorers.torch_models import cached_file

MODEL = "xswu/HPSv2"
FILE = "HPS_v2_compressed.pt"
ARCHITECTURE = "ViT-H-14"
PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
SCALE = 100.0
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


class HpsV2Scorer:
    """Scores images by HPS v2: raw "hpsv2" = exp(logit_scale) * cos(image, prompt), score = raw / 100.

    The published exp(logit_scale) is about 100, so score is about the cosine, which is what the hpsv2 package returns.

    model: hub name or folder with the file, the file itself (.pt or .safetensors, open_clip's names), or a folder in
    the format of open_clip or transformers. file: which one, HPS_v2_compressed.pt or HPS_v2.1_compressed.pt. processor:
    place of another tokenizer; empty: the model's own if its folder has one, otherwise open_clip's (for a folder of
    transformers that of laion/CLIP-ViT-H-14-laion2B-s32B-b79K). The architecture of a file is open_clip's ViT-H-14
    unless there is an open_clip_config.json beside it or in processor. antialias: smooth when downscaling, as the hpsv2
    package does with torchvision 0.17 and newer; older versions do not, and give other scores. device: cpu, cuda:0,
    ...; dtype: float32, float16 or bfloat16; batch_size: images at a time. Raises UsageError for files that are missing
    or belong to another model, and for invalid options.

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
        named = Source("hpsv2", "processor", processor, PROCESSOR, PROCESSOR_FILES) if processor else None
        towers = _load(weights, file, named)
        self.clip = Clip("hpsv2", towers, letterbox(towers.side, antialias), device, dtype, batch_size)

    def score(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[dict]) -> Scores:
        """Score images u8[B,H,W,3] of any size for their prompts; ValueError for a batch of another form."""
        check_batch("hpsv2", images, prompts, metadata)
        raw = self.clip.logits(images, prompts)
        return Scores(score=raw / np.float32(SCALE), raw={"hpsv2": raw}, reasons=[""] * len(raw))

    def note(self, prompt: str, metadata: Mapping[str, Any]) -> str:
        """Return a note if the prompt is longer than the model reads; otherwise ""."""
        return self.clip.cut(prompt)


def letterbox(side: int, antialias: bool) -> Pixels:
    """Return the preprocessing of HPS v2: resize the longest edge to `side`, bicubic; pad to a black square; normalise.

    Resizing is done in floating point and not clipped to black and white, as in the hpsv2 package.
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


def _load(weights: Source, file: str, processor: Source | None) -> Towers:
    path = _find(weights, file)
    if path is not None:
        return clip_open.load_file(weights, path, ARCHITECTURE, processor)
    if clip_open.is_open_clip(weights):
        return clip_open.load_folder(weights, processor)[0]
    published = Source("hpsv2", "processor", PROCESSOR, PROCESSOR, PROCESSOR_FILES)
    own = weights if has_tokenizer(weights) else published
    return TransformersTowers(load_model(weights), load_tokenizer(processor or own))


def _find(source: Source, file: str) -> Path | None:
    """Return the file with open_clip's names, or None if the place is a folder with a configuration of a library."""
    if source.path.is_file():
        return source.path
    if source.has(file):
        return source.path / file
    if source.has("config.json") or source.has(clip_open.CONFIG):
        return None
    with source.reading(file):
        if source.is_local:
            raise FileNotFoundError(f"neither {file} nor a config.json")
        return Path(str(cached_file(source.place, file)))
