"""The models behind the demo page: images of one prompt by two models from the same noise, and their scores."""

import itertools
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import UInt8

from rewards_bridge.client import BridgeConfig, BridgeError, RewardsClient
from rewards_bridge.errors import UserError
from rewards_bridge.scorers.base import Scores
from udm_grpo.data.prompts import UNTAGGED
from udm_grpo.pipeline import Pipeline
from udm_grpo.worlds import shapes

PICTURES = 4
MAX_STEPS, MAX_GUIDANCE, MAX_SEED, MAX_CHARACTERS = 50, 8, 2**32 - 1, 2000
MAX_COMPILED = 32
"""Compiled programs to keep; every number of steps and every guidance needs one of its own."""


class DemoError(UserError, ValueError):
    """A request that cannot be fulfilled; the message says what to change."""


@dataclass(frozen=True)
class Drawer:
    """A model: its name on the page ("Base", "Trained"), its source, and the pipeline that samples from it."""

    name: str
    source: str
    pipeline: Pipeline


@dataclass(frozen=True)
class Wish:
    """A request of the page. steps: T, 1 to 50; guidance: g, 1 to 8, 1 is no guidance; seed: 0 to 2**32 - 1.

    negative: the negative prompt of guidance; "" is the empty prompt.
    """

    prompt: str
    steps: int
    guidance: float
    seed: int
    negative: str = ""


@dataclass(frozen=True)
class Side:
    """One model's result: images from consecutive noises, and their scores if they could be scored."""

    name: str
    images: UInt8[np.ndarray, "b hh ww 3"]
    scores: Scores | None


@dataclass(frozen=True)
class Answer:
    """The results of all models for a wish, in the order of the models.

    number: counts answers, from 1; problem: why there are no scores, or ""; notes: warnings to show.
    """

    number: int
    wish: Wish
    sides: tuple[Side, ...]
    problem: str
    notes: tuple[str, ...]


def checked_wish(prompt: Any, steps: Any, guidance: Any, seed: Any, negative: Any = "") -> Wish:
    """Return the form's values as a checked Wish; raises DemoError."""
    words, negative_words = _text("prompt", prompt), _text("negative prompt", negative)
    if not words:
        raise DemoError("There is no prompt. Write one, or choose an example.")
    t, number = _whole("Steps", steps, 1, MAX_STEPS), _whole("Seed", seed, 0, MAX_SEED)
    g = _number("Guidance", guidance, 1, MAX_GUIDANCE)
    if negative_words and round(g, 2) == 1:
        raise DemoError("A negative prompt has no effect without guidance. Choose a guidance above 1, or leave it out.")
    return Wish(words, t, round(g, 2), number, negative_words)


def _text(name: str, value: Any) -> str:
    if isinstance(value, str) and len(value) > 10 * MAX_CHARACTERS:
        raise DemoError(f"The {name} has {len(value)} characters. Write at most {MAX_CHARACTERS}.")
    words = " ".join(str(value or "").split())
    if len(words) > MAX_CHARACTERS:
        raise DemoError(f"The {name} has {len(words)} characters. Write at most {MAX_CHARACTERS}.")
    return words


def _number(name: str, value: Any, low: float, high: float) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
        shown = "empty" if value is None else repr(value)
        raise DemoError(f"{name} is {shown}. Choose {low} to {high}.")
    return float(value)


def _whole(name: str, value: Any, low: int, high: int) -> int:
    number = _number(name, value, low, high)
    if number != int(number):
        raise DemoError(f"{name} is {value!r}. Choose a whole number.")
    return int(number)


def sharing_programs(base: Pipeline, trained: Pipeline) -> Pipeline:
    """Return the trained pipeline, sharing the base's compiled programs if both have the same configuration."""
    ours, theirs = base.released, trained.released
    alike = (
        ours.transformer_config == theirs.transformer_config
        and ours.vq_config == theirs.vq_config
        and ours.scheduler == theirs.scheduler
        and base.execution == trained.execution
        and np.array_equal(ours.path_codebook, theirs.path_codebook)
    )
    return replace(trained, compiled=base.compiled) if alike else trained


class Demo:
    """One or two models and a scorer in a process of its own; answers one wish at a time.

    size: height and width in pixels. Raises DemoError for a size that a model cannot generate, BridgeError and
    UsageError for a scorer that cannot be started.
    """

    def __init__(self, drawers: Sequence[Drawer], size: tuple[int, int], config: BridgeConfig) -> None:
        for drawer in drawers:
            stride = drawer.pipeline.stride
            if any(side < 1 or side % stride for side in size):
                raise DemoError(
                    f"--height {size[0]} and --width {size[1]} must be multiples of {stride}, "
                    f"the pixels of a token of {drawer.source}."
                )
        self.drawers = tuple(drawers)
        self.size = size
        self.scorer = config.scorer
        self._metadata = {row["prompt"]: row for row in shapes.all_prompts()}
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._client = RewardsClient(config)
        for text in self._client.warnings():
            warnings.warn(text, stacklevel=2)

    def close(self) -> None:
        """End the scorer's process."""
        self._client.close()

    def answer(self, wish: Wish, report_progress: Callable[[float, str], None]) -> Answer:
        """Sample and score; `report_progress` receives the fraction done, 0 to 1, and the present activity."""
        with self._lock:
            batches, notes = [], []
            for number, drawer in enumerate(self.drawers):
                report_progress(number / (len(self.drawers) + 1), f"{drawer.name} draws")
                images, warned = self._draw(drawer.pipeline, wish)
                batches.append(images)
                notes += warned
            report_progress(len(batches) / (len(batches) + 1), f"{self.scorer} scores")
            scores, problem = self._score(wish.prompt, np.concatenate(batches))
        sides = tuple(
            Side(drawer.name, images, part)
            for drawer, images, part in zip(self.drawers, batches, _split(scores, len(batches)), strict=True)
        )
        return Answer(next(self._numbers), wish, sides, problem, tuple(dict.fromkeys(notes)))

    def _draw(self, pipeline: Pipeline, wish: Wish) -> tuple[np.ndarray, list[str]]:
        if len(pipeline.compiled) >= MAX_COMPILED:
            pipeline.compiled.clear()
        height, width = self.size
        with warnings.catch_warnings(record=True) as caught:  # a truncated prompt, for instance
            warnings.simplefilter("always", UserWarning)
            images = pipeline.generate(
                [wish.prompt] * PICTURES,
                wish.steps,
                wish.guidance,
                wish.seed,
                negative_prompt=wish.negative,
                height=height,
                width=width,
            )
        return images, [str(warning.message) for warning in caught if warning.category is UserWarning]

    def _score(self, prompt: str, images: np.ndarray) -> tuple[Scores | None, str]:
        """Return (scores, ""), or (None, the reason why there are none)."""
        metadata: Mapping[str, Any] = self._metadata.get(prompt, {"tag": UNTAGGED, "prompt": prompt})
        try:
            problems = self._client.check([prompt], [dict(metadata)])
            if problems:
                return None, f"The scorer {self.scorer} cannot score this prompt: {problems[0]}"
            rows = len(images)
            return self._client.submit(images, [prompt] * rows, [dict(metadata)] * rows).result(), ""
        except (BridgeError, ValueError) as error:
            return None, f"The scorer {self.scorer} failed: {error}"


def _split(scores: Scores | None, parts: int) -> list[Scores | None]:
    if scores is None:
        return [None] * parts
    return [
        Scores(
            score=scores.score[at : at + PICTURES],
            raw={name: values[at : at + PICTURES] for name, values in scores.raw.items()},
            reasons=scores.reasons[at : at + PICTURES],
        )
        for at in range(0, parts * PICTURES, PICTURES)
    ]
