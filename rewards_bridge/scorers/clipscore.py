"""CLIP score: the similarity of image and prompt by CLIP ViT-L/14."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rewards_bridge.scorers.base import Scores, check_batch
from rewards_bridge.scorers.clip_files import Source
from rewards_bridge.scorers.clip_model import load_clip

MODEL = "openai/clip-vit-large-patch14"
SCALE = 100.0


class ClipScoreScorer:
    """Scores images by CLIP: raw "clipscore" = exp(logit_scale) * cos(image, prompt), score = raw / 100.

    The published exp(logit_scale) is 100 to five digits, so raw is 100 * cos and score is cos. Unlike the CLIPScore of
    the paper below, it is not clipped at 0, has no factor 2.5, and does not prefix the prompt with "A photo depicts".
    model: hub name or folder of transformers, with its tokenizer and preprocessor_config.json, or a folder of open_clip
    such as timm's vit_large_patch14_clip_224.openai. device: cpu, cuda:0, ...; dtype: float32, float16 or bfloat16;
    batch_size: images at a time. Raises UsageError for files that are missing or belong to another model, and for
    invalid options.

    Source: Radford et al. 2021, section 2.3; compare Hessel et al. 2021, "CLIPScore".
    """

    def __init__(
        self,
        model: str = MODEL,
        device: str = "cpu",
        dtype: str = "float32",
        batch_size: int = 32,
    ) -> None:
        source = Source("clipscore", "model", model, MODEL)
        self.clip = load_clip(source, source, device, dtype, batch_size)

    def score(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[dict]) -> Scores:
        """Score images u8[B,H,W,3] of any size for their prompts; ValueError for a batch of another form."""
        check_batch("clipscore", images, prompts, metadata)
        raw = self.clip.logits(images, prompts)
        return Scores(score=raw / np.float32(SCALE), raw={"clipscore": raw}, reasons=[""] * len(raw))

    def note(self, prompt: str, metadata: Mapping[str, Any]) -> str:
        """Return a note if the prompt is longer than the model reads; otherwise ""."""
        return self.clip.cut(prompt)
