"""The interface of scorers: loaded once; then images, prompts and metadata in, scores out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class Scores:
    """The result for one batch: score f32[B] is optimised, each raw f32[B] is logged, reasons is one text per image.

    details: what the scorer saw, for inspecting single images: one JSON text per image, or an empty list.
    """

    score: np.ndarray
    raw: dict[str, np.ndarray]
    reasons: list[str]
    details: list[str] = field(default_factory=list)


class Scorer(Protocol):
    """A scorer. Order is preserved: entry b of everything returned belongs to image b.

    A scorer that cannot score every prompt also has `problem(prompt, metadata) -> str`: why it cannot score this one,
    or "". A scorer that treats some prompts unexpectedly, e.g. reads only their beginning, also has
    `note(prompt, metadata) -> str`: what is unexpected, or "". Both are called for all prompts before training starts;
    notes become warnings, with equal texts merged.
    """

    def score(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[dict]) -> Scores:
        """Score images u8[B,H,W,3] (RGB) of these prompts; all numbers must be finite, and a reason may be ""."""
        ...


def cut_text(tokens: int) -> str:
    """Return a scorer's note on a prompt that has more tokens than it reads."""
    return f"more than the {tokens} tokens that it reads; the rest has no effect"


def check_batch(scorer: str, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[dict]) -> None:
    """Raise ValueError unless images are uint8[B,H,W,3], B at least 1, with one prompt and one metadata entry each."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape:
        raise ValueError(
            f"scorer {scorer!r} expects images uint8[B, H, W, 3], none of them empty; "
            f"found {images.dtype}{list(images.shape)}"
        )
    if not len(images) == len(prompts) == len(metadata):
        raise ValueError(
            f"scorer {scorer!r} expects one prompt and one metadata entry per image; "
            f"found {len(images)} images, {len(prompts)} prompts, {len(metadata)} metadata entries"
        )
