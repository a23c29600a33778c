"""Scenes of the shapes world that satisfy a prompt, and their images.

Two layouts: "free" places objects anywhere they fit, "anchored" near fixed positions, which a small model can learn in
minutes. The image tokenizer and the scorer's tests use the free layout, the transformer the anchored one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from udm_grpo.worlds.shapes import CLASSES, COLORS, RELATIONS, Metadata

GRID = 32.0
"""Side of a scene: positions and sizes are in pixels of a 32x32 image, whatever size is rendered."""

_GAP = 2.0  # minimum distance between two objects
_BORDER = 1.0  # minimum distance between objects and the edge of the image
_SIZES = {1: (13.0, 20.0), 2: (11.0, 14.0), 3: (10.0, 12.0), 4: (10.0, 12.0)}  # side of an object, by object count
_ANCHORED_SIZES = {1: (13.0, 18.0), 2: (10.5, 12.4), 3: (10.0, 12.0), 4: (10.0, 12.0)}
_NEAR, _MIDDLE, _FAR = 8.0, 16.0, 24.0  # coordinates of the anchors
_JITTER = {1: 2.0, 2: 0.8, 3: 0.8, 4: 0.8}  # maximum distance from the anchor along an axis, by object count
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
    """One object: its class and colour words, the centre and side of its bounding square, and its exact colour."""

    name: str
    color: str
    x: float
    y: float
    size: float
    rgb: tuple[float, float, float]


@dataclass(frozen=True)
class Scene:
    """The content of an image: a plain background of one grey level (0..255) and the objects on it."""

    ground: float
    shapes: tuple[Shape, ...]


def scene_for(metadata: Metadata, rng: np.random.Generator, layout: str = "free") -> Scene:
    """Return a random scene that satisfies a prompt and contains nothing else; the generator state determines it.

    Colours and positions that the prompt leaves open are random. Raises ValueError for a prompt outside this world, and
    for a layout other than "free" or "anchored".
    """
    if layout not in ("free", "anchored"):
        raise ValueError(f"layout is {layout!r}; it must be free or anchored")
    objects: list[tuple[str, str | None]] = []
    relation = None
    for part in metadata["include"]:
        if part["class"] not in CLASSES:
            raise ValueError(f"the shapes world has the classes {CLASSES}, the prompt asks for {part['class']!r}")
        objects += [(part["class"], part.get("color"))] * part["count"]
        if "position" in part:
            relation = part["position"][0]
    count = len(objects)
    if count not in _SIZES:
        raise ValueError(f"a scene has 1 to 4 objects, but {metadata['prompt']!r} asks for {count}")
    low, high = (_SIZES if layout == "free" else _ANCHORED_SIZES)[count]
    sizes = rng.uniform(low, high, count).tolist()
    if layout == "anchored":
        centers = _anchored_centers(count, relation, rng)
    elif count == 1:
        centers = [_uniform_center(sizes[0], rng)]
    elif count == 2:
        centers = _two_centers(sizes, relation, rng)
    else:
        centers = _quadrant_centers(sizes, rng)
    shapes = []
    for (name, color), (x, y), size in zip(objects, centers, sizes, strict=True):
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
    """Return the centres of the reference object and of the one that is RELATION it; any pair if relation is None.

    The pair is separated along one axis (the relation's, or a random one); the remaining length is split at random into
    before, between and after. Across that axis both are anywhere, provided that a given relation is unambiguous.
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
    """Return whether a relation is unambiguous: at least 0.65 along its axis (GenEval: 0.5), at most 0.35 across."""
    distance = float(np.hypot(along, across))
    return abs(along) - 0.1 * sizes >= 0.65 * distance and abs(across) - 0.1 * sizes <= 0.35 * distance


def _quadrant_centers(sizes: list[float], rng: np.random.Generator) -> list[tuple[float, float]]:
    """Return centres of three or four objects, each anywhere in its own quarter of the image."""
    centers = []
    for quadrant, size in zip(rng.permutation(4).tolist(), sizes, strict=False):
        low, high = _BORDER + size / 2, GRID / 2 - _GAP / 2 - size / 2
        x, y = rng.uniform(low, high, 2).tolist()
        centers.append((x if quadrant % 2 == 0 else GRID - x, y if quadrant < 2 else GRID - y))
    return centers


def _anchored_centers(count: int, relation: str | None, rng: np.random.Generator) -> list[tuple[float, float]]:
    """Return centres near fixed positions: the middle, two beside or above each other, or three or four quarters.

    A pair whose relation is left open is placed side by side, left to right in the order of the prompt.
    """
    if count == 1:
        places = [(_MIDDLE, _MIDDLE)]
    elif count == 2:
        relation = relation or "right of"
        ends = (_FAR, _NEAR) if relation in ("left of", "above") else (_NEAR, _FAR)
        beside = relation in ("left of", "right of")
        places = [(end, _MIDDLE) if beside else (_MIDDLE, end) for end in ends]
    else:
        quarters = [(_NEAR, _NEAR), (_FAR, _NEAR), (_NEAR, _FAR), (_FAR, _FAR)]
        places = [quarters[index] for index in rng.permutation(4)[:count].tolist()]
    jitter = rng.uniform(-_JITTER[count], _JITTER[count], (count, 2)).tolist()
    return [(x + dx, y + dy) for (x, y), (dx, dy) in zip(places, jitter, strict=True)]


_SUPERSAMPLING = 4  # samples per pixel along each side, at 32x32


def _star_half_planes() -> list[tuple[float, float, float]]:
    """Return the five lines of a pentagram with its point up, scaled to a box of width 2 and centred in that box."""
    radius = 1.0 / np.sin(np.deg2rad(72.0))
    angles = np.deg2rad(90.0 + 72.0 * np.arange(5))
    drop = radius * (1.0 - np.cos(np.deg2rad(36.0))) / 2  # the box's centre is above the pentagon's
    inner = radius * np.cos(np.deg2rad(72.0))
    return [(np.cos(a), -np.sin(a), inner - drop * np.sin(a)) for a in angles]


# A polygon is the set of points in the box [-1, 1]^2, y down, at which at least `needed` of its half-planes
# a*x + b*y <= c hold: all of them for a convex one, four of the pentagram's five for a five-pointed star.
_POLYGONS: dict[str, tuple[list[tuple[float, float, float]], int]] = {
    "square": ([(1.0, 0.0, 1.0), (-1.0, 0.0, 1.0), (0.0, 1.0, 1.0), (0.0, -1.0, 1.0)], 4),
    "triangle": ([(0.0, 1.0, 1.0), (2.0, -1.0, 1.0), (-2.0, -1.0, 1.0)], 3),
    "star": (_star_half_planes(), 4),
}


def _inside(name: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return which points of the grid x[W] by y[H] are in a shape that fills the box [-1, 1]^2: bool[H, W]."""
    if name == "circle":
        return (y * y)[:, None] + x * x <= 1.0
    half_planes, needed = _POLYGONS[name]
    a, b, c = np.array(half_planes).T[:, :, None]
    holds = (b * y)[:, :, None] <= (c - a * x)[:, None, :]
    return holds.all(0) if needed == len(half_planes) else holds.sum(0, dtype=np.uint8) >= needed


def render(scene: Scene, size: int = 32) -> np.ndarray:
    """Render a scene with anti-aliased edges: u8[size, size, 3]."""
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
    """Render scenes: u8[B, size, size, 3]."""
    return np.stack([render(scene, size) for scene in scenes])
