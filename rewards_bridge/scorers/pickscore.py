"""PickScore: human preference for an image given its prompt, by a CLIP ViT-H/14 trained on human choices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rewards_bridge.scorers.base import Scores, check_batch
from rewards_bridge.scorers.clip_files import PROCESSOR_FILES, Source
from rewards_bridge.scorers.clip_model import load_clip
from rewards_bridge.scorers.clip_open import is_open_clip
from rewards_bridge.scorers.clip_transformers import has_tokenizer

MODEL = "yuvalkirstain/PickScore_v1"
PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
SCALE = 26.0
"""Approximately the raw score of a very good image."""


class PickScoreScorer:
    """Scores images by PickScore: raw "pickscore" = exp(logit_scale) * cos(image, prompt), score = raw / 26.

    model: hub name or folder of transformers, or a folder of open_clip. processor: place of the tokenizer and
    preprocessor_config.json; empty: the model's own folder if it has both or is one of open_clip, otherwise
    laion/CLIP-ViT-H-14-laion2B-s32B-b79K, with which the model was trained. device: cpu, cuda:0, ...; dtype: float32,
    float16 or bfloat16; batch_size: images at a time. Raises UsageError for files that are missing or belong to another
    model, and for invalid options.

    Source: Kirstain et al. 2023, "Pick-a-Pic: An Open Dataset of User Preferences for Text-to-Image Generation".
    """

    def __init__(
        self,
        model: str = MODEL,
        processor: str = "",
        device: str = "cpu",
        dtype: str = "float32",
        batch_size: int = 32,
    ) -> None:
        weights = Source("pickscore", "model", model, MODEL)
        own = is_open_clip(weights) or (has_tokenizer(weights) and weights.has("preprocessor_config.json"))
        place = processor or (model if own else PROCESSOR)
        files = Source("pickscore", "processor", place, PROCESSOR, PROCESSOR_FILES)
        self.clip = load_clip(weights, files, device, dtype, batch_size)

    def score(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[dict]) -> Scores:
        """Score images u8[B,H,W,3] of any size for their prompts; ValueError for a batch of another form."""
        check_batch("pickscore", images, prompts, metadata)
        raw = self.clip.logits(images, prompts)
        return Scores(score=raw / np.float32(SCALE), raw={"pickscore": raw}, reasons=[""] * len(raw))

    def note(self, prompt: str, metadata: Mapping[str, Any]) -> str:
        """Return a note if the prompt is longer than the model reads; otherwise ""."""
        return self.clip.cut(prompt)
