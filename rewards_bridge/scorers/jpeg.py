"""JPEG size as a reward: it needs no model, so it is the fastest check that a training run learns at all."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from rewards_bridge.errors import UsageError
from rewards_bridge.scorers.base import Scores, check_batch

QUALITY = 95


class JpegScorer:
    """Scores how well an image compresses: score = -raw / scale, or +raw / scale if incompressible.

    raw "jpeg_kilobytes" is the size of the image as a JPEG of Pillow with quality 95, in units of 1000 bytes. Raises
    UsageError for a scale that is not above 0.

    Source: Black et al. 2023, "Training Diffusion Models with Reinforcement Learning" (arXiv 2305.13301), section 5.
    """

    def __init__(self, incompressible: bool = False, scale: float = 1.0) -> None:
        if not (math.isfinite(scale) and scale > 0):
            raise UsageError(f"scorer 'jpeg': scale={scale}: expected the kilobytes for a score of 1, above 0")
        self._factor = 1 / scale if incompressible else -1 / scale

    def score(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[dict]) -> Scores:
        """Score images u8[B,H,W,3]; prompts and metadata are only counted. ValueError for a batch of another form."""
        check_batch("jpeg", images, prompts, metadata)
        raw = np.array([_kilobytes(image) for image in images], dtype=np.float32)
        score = (raw * self._factor).astype(np.float32)
        return Scores(score=score, raw={"jpeg_kilobytes": raw}, reasons=[""] * len(raw))


def _kilobytes(image: np.ndarray) -> float:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=QUALITY)
    return buffer.tell() / 1000
