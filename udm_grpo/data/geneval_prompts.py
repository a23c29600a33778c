"""GenEval's prompt grammar (six tags, 80 classes), and seeded training sets that exclude its evaluation prompts.

    drawn = generate(50_000, seed=0, ratio=RATIO, leave_out=evaluation_rows)
    drawn.rows, drawn.shares["counting"]

Source: Ghosh et al. 2023, "GenEval" (the grammar); Flow-GRPO, arXiv 2505.05470, and UDM-GRPO, arXiv 2604.18518 (the
training set: its ratio, and the exclusion of the evaluation prompts).
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from udm_grpo.data.prompt_files import Row
from udm_grpo.data.prompt_text import PromptsError
from udm_grpo.data.shuffle import GENERATE, MIX, shuffle

CLASSES: tuple[str, ...] = (
    *("person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light"),
    *("fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow"),
    *("elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee"),
    *("skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard"),
    *("tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple"),
    *("sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch"),
    *("potted plant", "bed", "dining table", "toilet", "tv", "laptop", "computer mouse", "tv remote"),
    *("computer keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock"),
    *("vase", "scissors", "teddy bear", "hair drier", "toothbrush"),
)
"""COCO's class names; computer mouse, tv remote and computer keyboard are more specific than COCO's."""

COLORED = CLASSES[1:]
"""Classes that a prompt may give a color: all but person."""

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
NUMBERS = {2: "two", 3: "three", 4: "four"}
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")

RATIO = {"position": 7, "counting": 5, "color_attr": 3, "colors": 1, "two_object": 1, "single_object": 0}
"""The published ratio of the tags."""

PLURALS = ("benchmark", "english")

_ENGLISH = {
    "person": "people",
    "sheep": "sheep",
    "skis": "skis",
    "knife": "knives",
    "broccoli": "broccoli",
    "computer mouse": "computer mice",
    "scissors": "scissors",
}


def with_article(name: str) -> str:
    """Return a name with "a" or "an" before it, chosen by its first letter as in GenEval."""
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def plural(name: str, kind: str) -> str:
    """Return the plural of a class; kind: "benchmark" (its own: "knifes", "sheeps", "benchs") or "english"."""
    if kind == "benchmark":
        return f"{name}es" if name.endswith("s") else f"{name}s"
    if name in _ENGLISH:
        return _ENGLISH[name]
    return f"{name}es" if name.endswith(("s", "sh", "ch")) else f"{name}s"


# ---------------------------------------------------------------- the grammar


def _object(name: str, count: int = 1, **more: Any) -> dict[str, Any]:
    return {"class": name, "count": count, **more}


def single_object(name: str) -> Row:
    """Return a prompt for one object: "a photo of a cat"."""
    return {"tag": "single_object", "include": [_object(name)], "prompt": f"a photo of {with_article(name)}"}


def two_object(first: str, second: str) -> Row:
    """Return a prompt for two objects: "a photo of a cat and a dog"."""
    return {
        "tag": "two_object",
        "include": [_object(first), _object(second)],
        "prompt": f"a photo of {with_article(first)} and {with_article(second)}",
    }


def counting(name: str, count: int, plurals: str) -> Row:
    """Return a prompt for several objects of a class: "a photo of two cats"."""
    return {
        "tag": "counting",
        "include": [_object(name, count)],
        "exclude": [_object(name, count + 1)],
        "prompt": f"a photo of {NUMBERS[count]} {plural(name, plurals)}",
    }


def colors(name: str, color: str) -> Row:
    """Return a prompt for one object with a color: "a photo of a red car"."""
    return {
        "tag": "colors",
        "include": [_object(name, color=color)],
        "prompt": f"a photo of {with_article(color)} {name}",
    }


def position(first: str, relation: str, second: str) -> Row:
    """Return a prompt for two objects with a relation: "a photo of a cat left of a dog".

    The reference object comes first in "include".
    """
    return {
        "tag": "position",
        "include": [_object(second), _object(first, position=[relation, 0])],
        "prompt": f"a photo of {with_article(first)} {relation} {with_article(second)}",
    }


def color_attr(first: str, first_color: str, second: str, second_color: str) -> Row:
    """Return a prompt for two objects with a color each: "a photo of a red car and a blue cup"."""
    return {
        "tag": "color_attr",
        "include": [_object(first, color=first_color), _object(second, color=second_color)],
        "prompt": f"a photo of {with_article(first_color)} {first} and {with_article(second_color)} {second}",
    }


Space = tuple[int, Callable[[int], Row]]
"""The number of prompts of a tag, and a function that returns the prompt with an index below that number."""


def spaces(plurals: str = "benchmark") -> dict[str, Space]:
    """Return every prompt of the grammar by tag and index, 587,290 in all; a prompt is built only on request."""

    def space(make: Callable[..., Row], *choices: Sequence[Any]) -> Space:
        whole = 1
        for choice in choices:
            whole *= len(choice)

        def at(number: int) -> Row:
            words: list[Any] = []
            for choice in reversed(choices):
                number, place = divmod(number, len(choice))
                words.insert(0, choice[place])
            return make(*words)

        return whole, at

    pairs = list(itertools.permutations(CLASSES, 2))
    colored = list(itertools.permutations(COLORED, 2))
    two_colors = list(itertools.permutations(COLORS, 2))
    return {
        "single_object": space(single_object, CLASSES),
        "two_object": space(lambda pair: two_object(*pair), pairs),
        "counting": space(lambda name, count: counting(name, count, plurals), CLASSES, tuple(NUMBERS)),
        "colors": space(colors, COLORED, COLORS),
        "position": space(lambda pair, relation: position(pair[0], relation, pair[1]), pairs, RELATIONS),
        "color_attr": space(lambda pair, both: color_attr(pair[0], both[0], pair[1], both[1]), colored, two_colors),
    }


# ---------------------------------------------------------------- excluded prompts


_MIRROR = {"right of": "left of", "below": "above"}


def combination(row: Row) -> tuple[Any, ...]:
    """Return what a row asks for, independent of its wording; `row` is any metadata in GenEval's format.

    Equivalent prompts have the same combination: "a cat and a dog" and "a dog and a cat"; "a cat left of a dog" and
    "a dog right of a cat".
    """
    objects = []
    relations = []
    for item in row["include"]:
        objects.append((item["class"], item["count"], item.get("color") or ""))
        if "position" in item:
            relation, other = item["position"]
            ends = (item["class"], row["include"][other]["class"])
            if relation in _MIRROR:
                relation, ends = _MIRROR[relation], ends[::-1]
            relations.append((relation, *ends))
    return tuple(sorted(objects)), tuple(sorted(relations))


def unknown_words(row: Row) -> str:
    """Return which words of a row the grammar does not have, so that the row would exclude no prompt; "" if none."""
    wrong = []
    for item in row.get("include", []):
        if item["class"] not in CLASSES:
            wrong.append(f"{item['class']!r} is not one of GenEval's 80 classes")
        if item.get("color", COLORS[0]) not in COLORS:
            wrong.append(f"{item['color']!r} is not one of its colors {', '.join(COLORS)}")
        if "position" in item and item["position"][0] not in RELATIONS:
            wrong.append(f"{item['position'][0]!r} is not one of its relations {', '.join(RELATIONS)}")
    if not row.get("include"):
        wrong.append('there is no "include", so it is not in GenEval\'s format')
    return "; ".join(wrong)


# ---------------------------------------------------------------- training sets


@dataclass(frozen=True)
class Share:
    """Numbers of prompts of one tag of a generated set.

    target: its share by the ratio. available: different prompts (counted up to the size of the set). count: prompts in
    the set.
    """

    target: int
    available: int
    count: int


@dataclass(frozen=True)
class Generated:
    """A shuffled training set in GenEval's format, and the share of each tag."""

    rows: tuple[Row, ...]
    shares: dict[str, Share]


def generate(
    count: int,
    seed: int,
    ratio: Mapping[str, float],
    leave_out: Sequence[Row],
    plurals: str = "benchmark",
    repeats: bool = False,
) -> Generated:
    """Draw `count` training prompts with the tags in the proportions of `ratio`, excluding what `leave_out` asks for.

    No prompt is repeated: if a tag has fewer prompts than its share, all of them are in the set and the other tags make
    up the number in proportion. With `repeats`, every tag has exactly its share, and a tag with too few prompts repeats
    each of them equally often, give or take one.

    Raises PromptsError for a ratio without a known tag above 0, and for a count that cannot be reached.
    """
    unknown = sorted(set(ratio) - set(TAGS))
    if unknown or not any(ratio.values()) or not all(0 <= weight < math.inf for weight in ratio.values()):
        raise PromptsError(
            f"the ratio is {dict(ratio)}; expected numbers of at least 0, at least one of them above 0, for "
            f"{', '.join(TAGS)}"
        )
    if count < 1:
        raise PromptsError(f"count is {count}; expected at least 1")
    left_out = {combination(row) for row in leave_out}
    texts = {_words(row["prompt"]) for row in leave_out}
    weights = {tag: Fraction(str(ratio[tag])) for tag in TAGS if ratio.get(tag, 0) > 0}
    pools = {}
    for number, (tag, (size, at)) in enumerate(spaces(plurals).items()):
        if tag in weights:
            drawn = map(at, shuffle(seed, GENERATE, number, 0, size).tolist())
            allowed = (row for row in drawn if combination(row) not in left_out and _words(row["prompt"]) not in texts)
            # color_attr has half a million prompts; no more of them are built than could be needed.
            pools[tag] = list(itertools.islice(allowed, count))
    targets = split(count, weights)
    available = {tag: len(pool) for tag, pool in pools.items()}
    counts = targets if repeats else _within(count, weights, available)
    rows = [row for tag in weights for row in itertools.islice(_epochs(pools[tag], seed, tag), counts[tag])]
    shares = {tag: Share(targets[tag], available[tag], counts[tag]) for tag in weights}
    return Generated(tuple(rows[i] for i in shuffle(seed, MIX, 0, 0, count)), shares)


def _words(text: str) -> str:
    return " ".join(text.lower().split())


def _epochs(pool: Sequence[Row], seed: int, tag: str) -> Iterator[Row]:
    """Yield the prompts of a pool endlessly: every epoch has every prompt once, in an order of its own."""
    yield from pool
    for epoch in itertools.count(1):
        yield from (pool[i] for i in shuffle(seed, GENERATE, TAGS.index(tag), epoch, len(pool)))


def split(count: int, weights: Mapping[str, Fraction]) -> dict[str, int]:
    """Split a number into whole parts in proportion to weights above 0; the largest remainders are rounded up."""
    exact = {tag: count * weight / sum(weights.values()) for tag, weight in weights.items()}
    parts = {tag: int(part) for tag, part in exact.items()}
    for tag in sorted(exact, key=lambda tag: parts[tag] - exact[tag])[: count - sum(parts.values())]:
        parts[tag] += 1
    return parts


def _within(count: int, weights: Mapping[str, Fraction], available: Mapping[str, int]) -> dict[str, int]:
    """Split a number in proportion to weights, with no part larger than what is available."""
    if sum(available.values()) < count:
        there = ", ".join(f"{number} {tag}" for tag, number in available.items())
        raise PromptsError(
            f"count is {count}, but without repeats there are {sum(available.values())} prompts ({there}); ask for "
            "fewer, for other tags, or for repeats"
        )
    full: dict[str, int] = {}
    while True:
        rest = split(count - sum(full.values()), {tag: w for tag, w in weights.items() if tag not in full})
        over = {tag: available[tag] for tag, part in rest.items() if part > available[tag]}
        if not over:
            return {**full, **rest}
        full.update(over)
