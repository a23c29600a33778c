"""Test images for every built-in scorer, with the expected results.

Scorers of content get photographs that come with scikit-image, so that there is something to detect; the others get
drawn images.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from rewards_bridge.scorers.base import Scorer, Scores
from rewards_bridge.scorers.records import SCORERS

SIDE = 224
PHOTOGRAPH_SIDE = 256
GROUND, RED = (228, 228, 228), (214, 40, 44)
MIDDLE_GREY = (128, 128, 128)
CIRCLE = "a photo of a red circle"

PHOTOGRAPHS = {
    "chelsea": ("cat", "a photo of a cat"),
    "astronaut": ("person", "a photo of an astronaut in an orange space suit"),
    "coffee": ("cup", "a photo of a cup of coffee"),
}
"""Photograph of skimage.data -> (the COCO class that it shows, a prompt that fits it and neither of the others)."""


@dataclass(frozen=True)
class Example:
    """Test images with their prompts; `expected` describes what `is_right` checks."""

    images: np.ndarray
    """u8[B,H,W,3]."""
    prompts: Sequence[str]
    expected: str
    is_right: Callable[[Scores], bool]
    metadata: Sequence[dict[str, Any]] = field(default_factory=tuple)
    """One object per image; default: empty objects."""

    def score(self, scorer: Scorer) -> Scores:
        """Return the scorer's scores of the images."""
        return scorer.score(self.images, list(self.prompts), list(self.metadata) or [{}] * len(self.prompts))


def red_circle() -> np.ndarray:
    """Return an image of a red circle on light grey: u8[224,224,3]."""
    y, x = np.mgrid[:SIDE, :SIDE] - (SIDE - 1) / 2
    return np.where((x * x + y * y <= 60**2)[:, :, None], RED, GROUND).astype(np.uint8)


def word(text: str) -> np.ndarray:
    """Return an image of a word in black on white: u8[224,224,3]."""
    image = Image.new("RGB", (SIDE, SIDE), "white")
    ImageDraw.Draw(image).text((SIDE / 2, SIDE / 2), text, "black", ImageFont.load_default(size=48), anchor="mm")
    return np.asarray(image)


def photographs() -> np.ndarray:
    """Return the uncropped PHOTOGRAPHS on grey squares: u8[3,256,256,3]. ImportError without skimage."""
    from skimage import data  # needed only in the interpreters of these scorers

    squares = []
    for name in PHOTOGRAPHS:
        picture = Image.fromarray(getattr(data, name)())
        picture.thumbnail((PHOTOGRAPH_SIDE, PHOTOGRAPH_SIDE), Image.Resampling.BICUBIC)
        square = Image.new("RGB", (PHOTOGRAPH_SIDE, PHOTOGRAPH_SIDE), MIDDLE_GREY)
        square.paste(picture, ((PHOTOGRAPH_SIDE - picture.width) // 2, (PHOTOGRAPH_SIDE - picture.height) // 2))
        squares.append(np.asarray(square))
    return np.stack(squares)


def _near(name: str, value: float, tolerance: float) -> Callable[[Scores], bool]:
    return lambda scores: abs(float(scores.raw[name][0]) - value) <= tolerance


def _all_between(name: str, low: float, high: float) -> Callable[[Scores], bool]:
    return lambda scores: bool(np.all((low <= scores.raw[name]) & (scores.raw[name] <= high)))


def _drawn(
    image: np.ndarray, prompt: str, expected: str, is_right: Callable[[Scores], bool], **metadata: Any
) -> Example:
    return Example(image[None], (prompt,), expected, is_right, (metadata,))


def each_prefers_its_own_prompt() -> Example:
    """Return each photograph paired with each of the prompts."""
    prompts = [prompt for _, prompt in PHOTOGRAPHS.values()]
    count = len(prompts)

    def in_order(scores: Scores) -> bool:
        table = scores.score.reshape(count, count)
        return bool(np.isfinite(table).all() and (table.argmax(axis=1) == np.arange(count)).all())

    expected = "of three photographs (a cat, an astronaut, a cup of coffee) each scores highest with its own prompt"
    return Example(np.repeat(photographs(), count, axis=0), prompts * count, expected, in_order)


def finds_what_is_there() -> Example:
    """Return each photograph with the class that it shows, and the first one again with a class that it does not."""
    images = photographs()
    asked = [name for name, _ in PHOTOGRAPHS.values()] + ["bench"]

    def seen(scores: Scores) -> bool:
        return scores.raw["official"].tolist() == [1.0] * (len(asked) - 1) + [0.0]

    return Example(
        np.concatenate([images, images[:1]]),
        [f"a photo of a {name}" for name in asked],
        "official is 1, 1, 1, 0: a cat, a person and a cup are found in their photographs, and no bench in the cat's",
        seen,
        [{"tag": "single_object", "include": [{"class": name, "count": 1}]} for name in asked],
    )


def ordinary_marks() -> Example:
    """Return the photographs, whose aesthetic marks are about 5 of 10."""
    prompts = [prompt for _, prompt in PHOTOGRAPHS.values()]
    right = _all_between("aesthetic", 3, 8)
    return Example(photographs(), prompts, "three good photographs get marks from 3 to 8", right)


def reads_a_word() -> Example:
    """Return an image of a printed word."""
    return _drawn(word("HELLO"), 'a sign that says "HELLO"', "HELLO is read", _near("ocr", 1, 0))


def sees_a_red_circle() -> Example:
    """Return a red circle with a prompt that asks for one."""
    include = [{"class": "circle", "count": 1, "color": "red"}]
    right = _near("strict", 1, 0)
    return _drawn(red_circle(), CIRCLE, "a red circle is seen", right, tag="colors", include=include)


def compresses_well() -> Example:
    """Return a red circle, whose JPEG file has a known size."""
    return _drawn(red_circle(), CIRCLE, "5.1 kilobytes", _near("jpeg_kilobytes", 5.13, 0.2))


def answers_with_a_number() -> Example:
    """Return a red circle, for which any clear score is accepted."""
    return _drawn(red_circle(), CIRCLE, "an answer with a number in it", lambda scores: True)


def example(scorer: str) -> Example | None:
    """Return the test images of a scorer, or None for one without a record; ImportError if they are not installed."""
    if scorer not in SCORERS:
        return None
    module, _, function = SCORERS[scorer].example.partition(":")
    test_images: Example = getattr(importlib.import_module(module), function)()
    return test_images
