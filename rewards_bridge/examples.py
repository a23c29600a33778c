"""A picture for every scorer that can be drawn without one, and what the scorer has to say of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from rewards_bridge.scorers.base import Scorer, Scores

SIDE = 224
GROUND, RED = (228, 228, 228), (214, 40, 44)


@dataclass(frozen=True)
class Example:
    """One picture with its prompt; `wanted` says what `is_right` looks for."""

    image: np.ndarray
    """u8[H,W,3]."""
    prompt: str
    wanted: str
    is_right: Callable[[Scores], bool]
    metadata: dict[str, Any] = field(default_factory=dict)
    other_prompt: str = ""
    """Scored second, where a scorer is judged by its order of two prompts."""

    def score(self, scorer: Scorer) -> Scores:
        """The scorer's own verdict on the picture for the prompt, and for the other one if there is one."""
        prompts = [self.prompt, self.other_prompt] if self.other_prompt else [self.prompt]
        return scorer.score(np.stack([self.image] * len(prompts)), prompts, [self.metadata] * len(prompts))


def red_circle() -> np.ndarray:
    """A red circle on light grey: u8[224,224,3]."""
    y, x = np.mgrid[:SIDE, :SIDE] - (SIDE - 1) / 2
    return np.where((x * x + y * y <= 60**2)[:, :, None], RED, GROUND).astype(np.uint8)


def word(text: str) -> np.ndarray:
    """A word in black on white: u8[224,224,3]."""
    image = Image.new("RGB", (SIDE, SIDE), "white")
    ImageDraw.Draw(image).text((SIDE / 2, SIDE / 2), text, "black", ImageFont.load_default(size=48), anchor="mm")
    return np.asarray(image)


def _near(name: str, value: float, tolerance: float) -> Callable[[Scores], bool]:
    return lambda scores: abs(float(scores.raw[name][0]) - value) <= tolerance


def _between(name: str, low: float, high: float) -> Callable[[Scores], bool]:
    return lambda scores: low <= float(scores.raw[name][0]) <= high


def _prefers_the_first(scores: Scores) -> bool:
    return float(scores.score[0]) > float(scores.score[1])


def example(scorer: str) -> Example | None:
    """The example for a known scorer, None for another."""
    circle, prompt = red_circle(), "a photo of a red circle"
    circle_metadata = {"tag": "colors", "include": [{"class": "circle", "count": 1, "color": "red"}]}
    bench_metadata = {"tag": "single_object", "include": [{"class": "bench", "count": 1}]}
    if scorer in ("pickscore", "clipscore", "hpsv2", "imagereward"):
        wanted = "a red circle scores above a photo of a dog"
        return Example(circle, prompt, wanted, _prefers_the_first, other_prompt="a photo of a dog")
    examples = {
        "aesthetic": Example(circle, prompt, "a mark from 0 to 10", _between("aesthetic", 0, 10)),
        "geneval": Example(circle, "a photo of a bench", "no bench found", _near("strict", 0, 0), bench_metadata),
        "jpeg": Example(circle, prompt, "5.1 kilobytes", _near("jpeg_kilobytes", 5.13, 0.2)),
        "ocr": Example(word("HELLO"), 'a sign that says "HELLO"', "HELLO is read", _near("ocr", 1, 0)),
        "shapes": Example(circle, prompt, "a red circle is seen", _near("strict", 1, 0), circle_metadata),
        "vlm": Example(circle, prompt, "an answer with a number in it", lambda scores: True),
    }
    return examples.get(scorer)
