"""What every scorer is: loaded once, then images, prompts and metadata in, scores out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class Scores:
    """The verdict on one batch: score f32[B] is optimised, each raw f32[B] is logged, reasons is one text an image."""

    score: np.ndarray
    raw: dict[str, np.ndarray]
    reasons: list[str]


class Scorer(Protocol):
    """A judge. Order is kept: entry b of everything returned belongs to image b."""

    def score(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[dict]) -> Scores:
        """Judge images u8[B,H,W,3] (RGB) of these prompts; every number is finite, "" is a reason not given."""
        ...
