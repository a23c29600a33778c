"""The shapes world: GenEval's prompts over four shapes and six colours, and the pictures that satisfy them.

It stands in for COCO and a large image model in the embedded default: the same six tags, wording and metadata as
GenEval (djghosh13/geneval, prompts/create_prompts.py), but pictures of 32x32 pixels that a small model can learn on a
CPU.

    rng = np.random.default_rng(0)
    metadata = sample_prompts(train_prompts(), 128, rng)
    images = render_batch([scene_for(m, rng) for m in metadata])  # u8[128, 32, 32, 3]

The judge (rewards_bridge/scorers/shapes.py) shares nothing with this file but the words for classes and colours.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

Metadata = dict[str, Any]
"""A GenEval prompt: {"tag", "include": [{"class", "count", "color"?, "position"?}], "exclude"?, "prompt"}."""

CLASSES = ("circle", "square", "triangle", "star")
COLORS = ("red", "yellow", "green", "blue", "purple", "black")
RELATIONS = ("left of", "right of", "above", "below")
COUNTS = (2, 3, 4)
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")

RL_TAG_WEIGHTS = {"position": 7, "counting": 5, "color_attr": 3, "colors": 1, "two_object": 1, "single_object": 0}
"""How often each tag is drawn for RL batches: the published ratio (SPEC 7)."""

PRETRAIN_TAG_WEIGHTS = {"position": 4, "counting": 3, "color_attr": 4, "colors": 2, "two_object": 2, "single_object": 1}
"""How often each tag is drawn for pre-training: all six occur, those with more to learn more often."""


# ---------------------------------------------------------------- prompts


_NUMBERS = {2: "two", 3: "three", 4: "four"}


def with_article(name: str) -> str:
    """Puts "a" or "an" before a name, by its first letter as in GenEval."""
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def _single_object(name: str) -> Metadata:
    return {
        "tag": "single_object",
        "include": [{"class": name, "count": 1}],
        "prompt": f"a photo of {with_article(name)}",
    }


def _two_object(first: str, second: str) -> Metadata:
    return {
        "tag": "two_object",
        "include": [{"class": first, "count": 1}, {"class": second, "count": 1}],
        "prompt": f"a photo of {with_article(first)} and {with_article(second)}",
    }


def _counting(name: str, count: int) -> Metadata:
    return {
        "tag": "counting",
        "include": [{"class": name, "count": count}],
        "exclude": [{"class": name, "count": count + 1}],
        "prompt": f"a photo of {_NUMBERS[count]} {name}s",
    }


def _colors(name: str, color: str) -> Metadata:
    return {
        "tag": "colors",
        "include": [{"class": name, "count": 1, "color": color}],
        "prompt": f"a photo of {with_article(color)} {name}",
    }


def _position(first: str, relation: str, second: str) -> Metadata:
    return {  # the second object named is the reference and comes first in "include", as in GenEval
        "tag": "position",
        "include": [{"class": second, "count": 1}, {"class": first, "count": 1, "position": [relation, 0]}],
        "prompt": f"a photo of {with_article(first)} {relation} {with_article(second)}",
    }


def _color_attr(first: str, first_color: str, second: str, second_color: str) -> Metadata:
    return {
        "tag": "color_attr",
        "include": [
            {"class": first, "count": 1, "color": first_color},
            {"class": second, "count": 1, "color": second_color},
        ],
        "prompt": f"a photo of {with_article(first_color)} {first} and {with_article(second_color)} {second}",
    }


def all_prompts() -> list[Metadata]:
    """Every prompt of the world once, by tag in the order of TAGS: 4 + 12 + 12 + 24 + 48 + 360 = 460."""
    pairs = list(itertools.permutations(CLASSES, 2))
    prompts = [_single_object(name) for name in CLASSES]
    prompts += [_two_object(a, b) for a, b in pairs]
    prompts += [_counting(name, count) for name in CLASSES for count in COUNTS]
    prompts += [_colors(name, color) for name in CLASSES for color in COLORS]
    prompts += [_position(a, relation, b) for a, b in pairs for relation in RELATIONS]
    prompts += [_color_attr(a, j, b, k) for a, b in pairs for j, k in itertools.permutations(COLORS, 2)]
    return prompts


# ---------------------------------------------------------------- the split


_MIRROR = {"right of": "left of", "below": "above"}

_HELD_OUT_COMBINATIONS = {
    ("single_object", "triangle"),
    ("two_object", "circle", "star"),
    ("counting", "circle", 2),
    ("counting", "square", 3),
    ("counting", "star", 4),
    ("colors", "circle", "green"),
    ("colors", "square", "purple"),
    ("colors", "square", "yellow"),
    ("colors", "triangle", "red"),
    ("colors", "star", "blue"),
    ("position", "circle", "left of", "square"),
    ("position", "star", "left of", "circle"),
    ("position", "triangle", "above", "star"),
    ("position", "square", "above", "triangle"),
    ("position", "square", "left of", "star"),
}


def combination(metadata: Metadata) -> tuple[Any, ...]:
    """What a prompt asks for, whatever its wording.

    Twins share it: "a circle and a star" and "a star and a circle"; "a circle left of a star" and "a star right of a
    circle"; the same two coloured objects in either order.
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
    """True if this prompt's combination is kept for evaluation: about a fifth of every tag, the same everywhere."""
    key = combination(metadata)
    if key[0] != "color_attr":
        return key in _HELD_OUT_COMBINATIONS
    _, first, first_color, second, second_color = key
    pair = list(itertools.combinations(CLASSES, 2)).index((first, second))
    return (COLORS.index(first_color) + 2 * COLORS.index(second_color) + pair) % 5 == 0


def train_prompts() -> list[Metadata]:
    """The prompts that may be trained on; every word of the world occurs in them."""
    return [metadata for metadata in all_prompts() if not is_held_out(metadata)]


def heldout_prompts() -> list[Metadata]:
    """The prompts kept for evaluation: no combination of theirs, in either wording, is in train_prompts()."""
    return [metadata for metadata in all_prompts() if is_held_out(metadata)]


def sample_prompts(
    prompts: Sequence[Metadata], n: int, rng: np.random.Generator, weights: dict[str, int] | None = None
) -> list[Metadata]:
    """Draws n prompts with replacement: first the tag by its weight (RL_TAG_WEIGHTS unless told), then one of that tag.

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
    """The words of a prompt that can be wrong, in a fixed order for each tag."""
    return tuple(
        element
        for part in metadata["include"]
        for element in (part["class"], part["count"], part.get("color"), part.get("position", [None])[0])
    )


@cache
def _wrong_captions() -> dict[str, list[Metadata]]:
    """For every prompt, the training prompts of its tag that differ from it in exactly one element."""
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
    """A training prompt of the same tag that is wrong in one element: another class, colour, count or relation.

    A picture of the one never satisfies the other. It is always a training prompt, so that a held-out wording is not
    seen by way of a wrong caption. Used to make a base model that is imperfect in an honest way.
    """
    candidates = _wrong_captions()[metadata["prompt"]]
    return candidates[int(rng.integers(len(candidates)))]


# ---------------------------------------------------------------- scenes


GRID = 32.0
"""The side of a scene: places and sizes are in pixels of a 32x32 picture, whatever size is rendered."""

_GAP = 2.0  # least clear ground between two objects
_BORDER = 1.0  # least clear ground around the picture
_SIZES = {1: (13.0, 20.0), 2: (11.0, 14.0), 3: (10.0, 12.0), 4: (10.0, 12.0)}  # side of an object by how many there are
_PALETTE = {
    "red": (214, 40, 44),
    "yellow": (238, 200, 30),
    "green": (40, 155, 66),
    "blue": (40, 84, 214),
    "purple": (146, 54, 178),
    "black": (28, 28, 32),
}


@dataclass(frozen=True)
class Shape:
    """One object: its class and colour words, the centre and side of its bounding square, and its shade."""

    name: str
    color: str
    x: float
    y: float
    size: float
    rgb: tuple[float, float, float]


@dataclass(frozen=True)
class Scene:
    """What is in a picture: a plain ground of one grey level (0..255) and the objects on it."""

    ground: float
    shapes: tuple[Shape, ...]


def scene_for(metadata: Metadata, rng: np.random.Generator) -> Scene:
    """A random scene that truly satisfies a prompt and holds nothing else; the same generator state, the same scene.

    Colours and places that the prompt leaves open are random. Raises ValueError for a prompt outside this world.
    """
    wanted: list[tuple[str, str | None]] = []
    relation = None
    for part in metadata["include"]:
        if part["class"] not in CLASSES:
            raise ValueError(f"the shapes world has the classes {CLASSES}, the prompt asks for {part['class']!r}")
        wanted += [(part["class"], part.get("color"))] * part["count"]
        if "position" in part:
            relation = part["position"][0]
    count = len(wanted)
    if count not in _SIZES:
        raise ValueError(f"a scene holds 1 to 4 objects, {metadata['prompt']!r} asks for {count}")
    low, high = _SIZES[count]
    sizes = rng.uniform(low, high, count).tolist()
    if count == 1:
        centers = [_uniform_center(sizes[0], rng)]
    elif count == 2:
        centers = _two_centers(sizes, relation, rng)
    else:
        centers = _quadrant_centers(sizes, rng)
    shapes = []
    for (name, color), (x, y), size in zip(wanted, centers, sizes, strict=True):
        word = COLORS[int(rng.integers(len(COLORS)))] if color is None else color
        shapes.append(Shape(name, word, x, y, size, _shade(word, rng)))
    return Scene(ground=float(rng.uniform(218.0, 236.0)), shapes=tuple(shapes))


def _shade(color: str, rng: np.random.Generator) -> tuple[float, float, float]:
    brightness, *tint = rng.uniform((0.9, -6.0, -6.0, -6.0), (1.07, 6.0, 6.0, 6.0)).tolist()
    red, green, blue = (brightness * base + shift for base, shift in zip(_PALETTE[color], tint, strict=True))
    return red, green, blue


def _uniform_center(size: float, rng: np.random.Generator) -> tuple[float, float]:
    margin = _BORDER + size / 2
    x, y = rng.uniform(margin, GRID - margin, 2).tolist()
    return x, y


def _two_centers(sizes: list[float], relation: str | None, rng: np.random.Generator) -> list[tuple[float, float]]:
    """Centres of the reference object and of the object that is RELATION it; a free pair if relation is None.

    The pair is apart along one axis (the relation's, or a random one); what is left of that side is split at random
    into before, between and after. Across, both are anywhere, for a relation as long as it is plain to see.
    """
    if relation is None:
        relation = RELATIONS[int(rng.integers(4))]
        plain = False
    else:
        plain = True
    first, second = (1, 0) if relation in ("left of", "above") else (0, 1)
    cuts = np.sort(rng.uniform(0.0, GRID - 2 * _BORDER - _GAP - sum(sizes), 2)).tolist()
    along = [0.0, 0.0]
    along[first] = _BORDER + cuts[0] + sizes[first] / 2
    along[second] = _BORDER + cuts[1] + sizes[first] + _GAP + sizes[second] / 2
    while True:
        across = [_uniform_center(size, rng)[0] for size in sizes]
        if not plain or _is_plain(along[1] - along[0], across[1] - across[0], sum(sizes)):
            break
    if relation in ("left of", "right of"):
        return list(zip(along, across, strict=True))
    return list(zip(across, along, strict=True))


def _is_plain(along: float, across: float, sizes: float) -> bool:
    """GenEval's position rule wants 0.5 along one axis (SPEC 6); here at least 0.65, at most 0.35 along the other."""
    distance = float(np.hypot(along, across))
    return abs(along) - 0.1 * sizes >= 0.65 * distance and abs(across) - 0.1 * sizes <= 0.35 * distance


def _quadrant_centers(sizes: list[float], rng: np.random.Generator) -> list[tuple[float, float]]:
    """Centres of three or four objects, each anywhere in a quarter of the picture of its own."""
    centers = []
    for quadrant, size in zip(rng.permutation(4).tolist(), sizes, strict=False):
        low, high = _BORDER + size / 2, GRID / 2 - _GAP / 2 - size / 2
        x, y = rng.uniform(low, high, 2).tolist()
        centers.append((x if quadrant % 2 == 0 else GRID - x, y if quadrant < 2 else GRID - y))
    return centers


# ---------------------------------------------------------------- pictures


_SUPERSAMPLING = 4  # samples a pixel along each side, at 32x32


def _star_half_planes() -> list[tuple[float, float, float]]:
    """The five lines of a pentagram with its point up, scaled to a box of width 2 and centred in that box."""
    radius = 1.0 / np.sin(np.deg2rad(72.0))
    angles = np.deg2rad(90.0 + 72.0 * np.arange(5))
    drop = radius * (1.0 - np.cos(np.deg2rad(36.0))) / 2  # the box's centre lies above the pentagon's
    inner = radius * np.cos(np.deg2rad(72.0))
    return [(np.cos(a), -np.sin(a), inner - drop * np.sin(a)) for a in angles]


# A polygon is where at least `needed` of its half-planes a*x + b*y <= c hold, in a box [-1, 1]^2 with y down. A convex
# one needs all of them; a five-pointed star is where four of the five lines of the pentagram hold.
_POLYGONS: dict[str, tuple[list[tuple[float, float, float]], int]] = {
    "square": ([(1.0, 0.0, 1.0), (-1.0, 0.0, 1.0), (0.0, 1.0, 1.0), (0.0, -1.0, 1.0)], 4),
    "triangle": ([(0.0, 1.0, 1.0), (2.0, -1.0, 1.0), (-2.0, -1.0, 1.0)], 3),
    "star": (_star_half_planes(), 4),
}


def _inside(name: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Which points of the grid x[W] by y[H] lie in a shape that fills the box [-1, 1]^2: bool[H, W]."""
    if name == "circle":
        return (y * y)[:, None] + x * x <= 1.0
    half_planes, needed = _POLYGONS[name]
    a, b, c = np.array(half_planes).T[:, :, None]
    holds = (b * y)[:, :, None] <= (c - a * x)[:, None, :]
    return holds.all(0) if needed == len(half_planes) else holds.sum(0, dtype=np.uint8) >= needed


def render(scene: Scene, size: int = 32) -> np.ndarray:
    """Draws a scene, edges anti-aliased: u8[size, size, 3]."""
    scale = size / GRID
    canvas = np.full((size, size, 3), scene.ground, dtype=np.float32)
    n = max(2, round(_SUPERSAMPLING / scale)) if scale > 1 else _SUPERSAMPLING
    for shape in scene.shapes:
        x, y, half = shape.x * scale, shape.y * scale, shape.size * scale / 2
        left, right = max(int(x - half), 0), min(int(x + half) + 1, size)
        top, bottom = max(int(y - half), 0), min(int(y + half) + 1, size)
        offsets = (np.arange(max(right - left, bottom - top) * n) + 0.5) / n
        xs = (left + offsets[: (right - left) * n] - x) / half
        ys = (top + offsets[: (bottom - top) * n] - y) / half
        samples = _inside(shape.name, xs, ys).reshape(bottom - top, n, right - left, n)
        coverage = (samples.sum((1, 3), dtype=np.float32) / (n * n))[:, :, None]
        window = canvas[top:bottom, left:right]
        window += coverage * (np.array(shape.rgb, dtype=np.float32) - window)
    return np.clip(canvas + 0.5, 0.0, 255.0).astype(np.uint8)


def render_batch(scenes: Sequence[Scene], size: int = 32) -> np.ndarray:
    """Draws scenes: u8[B, size, size, 3]."""
    return np.stack([render(scene, size) for scene in scenes])
