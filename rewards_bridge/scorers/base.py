"""What every scorer is: loaded once, then images, prompts and metadata in, scores out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class Scores:
    """The verdict on one batch: score f32[B] is optimised, each raw f32[B] is logged, reasons is one text an image.

    details: what a scorer saw, for those who look at single images: one JSON text an image, or none at all.
    """

    score: np.ndarray
    raw: dict[str, np.ndarray]
    reasons: list[str]
    details: list[str] = field(default_factory=list)


class Scorer(Protocol):
    """A judge. Order is kept: entry b of everything returned belongs to image b.

    One that cannot score every prompt also has `problem(prompt, metadata) -> str`: what keeps it from scoring this one,
    "" if nothing does. One that scores some prompts otherwise than one may think, such as by their beginning alone,
    also has `note(prompt, metadata) -> str`: in what, "" if in nothing. Both are asked about all prompts before
    training starts; notes become warnings, those of the same text together.
    """

    def score(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[dict]) -> Scores:
        """Judge images u8[B,H,W,3] (RGB) of these prompts; every number is finite, "" is a reason not given."""
        ...


def cut_text(tokens: int) -> str:
    """Return what a scorer's note says of a prompt with more than the tokens that it reads."""
    return f"more than the {tokens} tokens that it reads, the rest of which has no effect"


def check_batch(scorer: str, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[dict]) -> None:
    """Raise ValueError unless images are uint8[B,H,W,3], B at least 1, with one prompt and one metadata entry each."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape:
        raise ValueError(
            f"scorer {scorer!r} wants images uint8[B, H, W, 3], none of them empty; "
            f"found {images.dtype}{list(images.shape)}"
        )
    if not len(images) == len(prompts) == len(metadata):
        raise ValueError(
            f"scorer {scorer!r} wants one prompt and one metadata entry an image; "
            f"found {len(images)} images, {len(prompts)} prompts, {len(metadata)} metadata entries"
        )
