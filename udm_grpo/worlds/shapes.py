"""The prompts of the shapes world: GenEval's grammar over four shapes and six colours.

The embedded default uses it in place of COCO and a large image model: the same six tags, wording and metadata as
GenEval (djghosh13/geneval, prompts/create_prompts.py), but images of 32x32 pixels, which a small model can learn on a
CPU.

    rng = np.random.default_rng(0)
    metadata = sample_prompts(train_prompts(), 128, rng)
    images = render_batch([scene_for(m, rng) for m in metadata])  # shapes_scenes.py: u8[128, 32, 32, 3]

The scorer (rewards_bridge/scorers/shapes.py) shares only the words for classes and colours with this file.
"""

import itertools
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from udm_grpo.data import geneval_prompts as geneval
from udm_grpo.data.geneval_prompts import RATIO, RELATIONS

Metadata = dict[str, Any]
"""A GenEval prompt: {"tag", "include": [{"class", "count", "color"?, "position"?}], "exclude"?, "prompt"}."""

CLASSES = ("circle", "square", "triangle", "star")
COLORS = ("red", "yellow", "green", "blue", "purple", "black")
COUNTS = (2, 3, 4)
TAGS = geneval.TAGS

RL_TAG_WEIGHTS = RATIO
"""Relative frequency of each tag in RL batches: the published ratio."""

PRETRAIN_TAG_WEIGHTS = {"position": 4, "counting": 3, "color_attr": 4, "colors": 2, "two_object": 2, "single_object": 1}
"""Relative frequency of each tag in pre-training: all six occur, harder ones more often."""


# ---------------------------------------------------------------- prompts


def all_prompts() -> list[Metadata]:
    """Return every prompt of the world once, by tag in the order of TAGS: 4 + 12 + 12 + 24 + 48 + 360 = 460."""
    pairs = list(itertools.permutations(CLASSES, 2))
    prompts = [geneval.single_object(name) for name in CLASSES]
    prompts += [geneval.two_object(a, b) for a, b in pairs]
    prompts += [geneval.counting(name, count, "benchmark") for name in CLASSES for count in COUNTS]
    prompts += [geneval.colors(name, color) for name in CLASSES for color in COLORS]
    prompts += [geneval.position(a, relation, b) for a, b in pairs for relation in RELATIONS]
    prompts += [geneval.color_attr(a, j, b, k) for a, b in pairs for j, k in itertools.permutations(COLORS, 2)]
    return prompts


# ---------------------------------------------------------------- the split


_MIRROR = {"right of": "left of", "below": "above"}

_HELD_OUT_COMBINATIONS = {
    ("single_object", "square"),
    ("two_object", "square", "triangle"),
    ("counting", "square", 2),
    ("counting", "star", 3),
    ("counting", "triangle", 4),
    ("colors", "circle", "blue"),
    ("colors", "square", "red"),
    ("colors", "triangle", "purple"),
    ("colors", "triangle", "yellow"),
    ("colors", "star", "green"),
    ("position", "square", "left of", "circle"),
    ("position", "triangle", "left of", "star"),
    ("position", "circle", "above", "star"),
    ("position", "star", "above", "square"),
    ("position", "triangle", "above", "circle"),
}


def combination(metadata: Metadata) -> tuple[Any, ...]:
    """Return what a prompt asks for, independent of its wording.

    Equivalent prompts share it: "a circle and a star" and "a star and a circle"; "a circle left of a star" and "a star
    right of a circle"; the same two coloured objects in either order.
    """
    tag, include = metadata["tag"], metadata["include"]
    if tag == "counting":
        return tag, include[0]["class"], include[0]["count"]
    if tag == "position":
        first, second = include[1]["class"], include[0]["class"]
        relation = include[1]["position"][0]
        if relation in _MIRROR:
            first, second, relation = second, first, _MIRROR[relation]
        return tag, first, relation, second
    objects = sorted((CLASSES.index(part["class"]), part["class"], part.get("color")) for part in include)
    return tag, *(word for _, name, color in objects for word in (name, color) if word is not None)


def is_held_out(metadata: Metadata) -> bool:
    """Return whether a prompt's combination is kept for evaluation: about a fifth of every tag, a fixed split."""
    key = combination(metadata)
    if key[0] != "color_attr":
        return key in _HELD_OUT_COMBINATIONS
    _, first, first_color, second, second_color = key
    pair = list(itertools.combinations(CLASSES, 2)).index((first, second))
    return (COLORS.index(first_color) + 2 * COLORS.index(second_color) + pair) % 5 == 2


def train_prompts() -> list[Metadata]:
    """Return the training prompts; every word of the world occurs in them."""
    return [metadata for metadata in all_prompts() if not is_held_out(metadata)]


def heldout_prompts() -> list[Metadata]:
    """Return the prompts kept for evaluation; none of their combinations, in any wording, is in train_prompts()."""
    return [metadata for metadata in all_prompts() if is_held_out(metadata)]


def sample_prompts(
    prompts: Sequence[Metadata], n: int, rng: np.random.Generator, weights: dict[str, int] | None = None
) -> list[Metadata]:
    """Draw n prompts with replacement: first a tag by weight (default: RL_TAG_WEIGHTS), then a prompt with that tag.

    Raises ValueError if none of the prompts has a tag of positive weight.
    """
    weights = RL_TAG_WEIGHTS if weights is None else weights
    by_tag: dict[str, list[Metadata]] = {}
    for metadata in prompts:
        by_tag.setdefault(metadata["tag"], []).append(metadata)
    tags = [tag for tag in by_tag if weights.get(tag, 0) > 0]
    if not tags:
        raise ValueError(f"no prompt to draw: the prompts have tags {sorted(by_tag)}, the weights are {weights}")
    law = np.array([weights[tag] for tag in tags], dtype=np.float64)
    chosen = rng.choice(len(tags), size=n, p=law / law.sum())
    drawn = []
    for index in chosen:
        of_tag = by_tag[tags[index]]
        drawn.append(of_tag[int(rng.integers(len(of_tag)))])
    return drawn


def _elements(metadata: Metadata) -> tuple[Any, ...]:
    """Return the words of a prompt that can be wrong, in a fixed order for each tag."""
    return tuple(
        element
        for part in metadata["include"]
        for element in (part["class"], part["count"], part.get("color"), part.get("position", [None])[0])
    )


@cache
def _wrong_captions() -> dict[str, list[Metadata]]:
    """Return, for every prompt, the training prompts of its tag that differ from it in exactly one element."""
    train = [(metadata, _elements(metadata)) for metadata in train_prompts()]
    wrong: dict[str, list[Metadata]] = {}
    for metadata in all_prompts():
        elements = _elements(metadata)
        wrong[metadata["prompt"]] = [
            other
            for other, other_elements in train
            if other["tag"] == metadata["tag"]
            and sum(a != b for a, b in zip(elements, other_elements, strict=True)) == 1
        ]
    return wrong


def corrupt_caption(metadata: Metadata, rng: np.random.Generator) -> Metadata:
    """Return a training prompt of the same tag that is wrong in one element: another class, colour, count or relation.

    An image of one never satisfies the other. The result is always a training prompt, so that held-out wordings do not
    leak through wrong captions. Wrong captions are used to get a base model that is genuinely imperfect.
    """
    candidates = _wrong_captions()[metadata["prompt"]]
    return candidates[int(rng.integers(len(candidates)))]
