"""The scorer of the shapes world: GenEval's rule on objects that are detected from the pixels alone.

Detection has three steps. Whatever stands out from the plain background is segmented by colour into connected regions;
the outline of each region is measured as a radial profile; and the profile is compared, independent of size and
rotation, with those of ideal shapes. The score of a detection says how well it fits its best shape, and how clearly
better than the next.
"""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.ndimage import gaussian_filter, map_coordinates
from skimage.measure import label

from rewards_bridge.scorers.base import Scores
from rewards_bridge.scorers.geneval_metadata import Words, problems, read_metadata
from rewards_bridge.scorers.rubric import details, judge, keep

CLASSES = ("circle", "square", "triangle", "star")
COLORS = ("red", "yellow", "green", "blue", "purple", "black")
DECOYS = ("pentagon",)  # detected by name although no prompt asks for it, since it is easily mistaken for a class

WORDS = Words("the shapes judge", CLASSES, COLORS)

MIN_SIDE = 32  # pixels


class ShapesScorer:
    """Scores pictures of the shapes world: score = GenEval's soft score, raw = strict, soft and official."""

    def score(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[dict]) -> Scores:
        """Score images u8[B,H,W,3] against GenEval metadata; the prompts themselves are not read.

        Raises ValueError for images of another form or unless there is one metadata entry per image, and PromptError
        for metadata that are not in GenEval's format or name an unknown class or colour.
        """
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or min(images.shape[1:3]) < MIN_SIDE:
            raise ValueError(
                f"the shapes judge expects images uint8[B, H, W, 3] of at least {MIN_SIDE} pixels per side; "
                f"found {images.dtype}{list(images.shape)}"
            )
        if not len(images) == len(prompts) == len(metadata):
            raise ValueError(
                f"the shapes judge expects one prompt and one metadata entry per image; "
                f"found {len(images)} images, {len(prompts)} prompts, {len(metadata)} metadata entries"
            )
        entries = [read_metadata(entry, WORDS) for entry in metadata]
        kept = [keep(entry, detect(image)) for entry, image in zip(entries, images, strict=True)]
        verdicts = [judge(entry, detections) for entry, detections in zip(entries, kept, strict=True)]
        soft = np.array([verdict.soft for verdict in verdicts], dtype=np.float32)
        strict = np.array([verdict.strict for verdict in verdicts], dtype=np.float32)
        official = np.array([verdict.official for verdict in verdicts], dtype=np.float32)
        return Scores(
            score=soft,
            raw={"strict": strict, "soft": soft, "official": official},
            reasons=["; ".join(verdict.reasons) for verdict in verdicts],
            details=[details(verdict, detections) for verdict, detections in zip(verdicts, kept, strict=True)],
        )

    def problem(self, prompt: str, metadata: Mapping[str, Any]) -> str:
        """Return why pictures of a prompt cannot be scored (incomplete metadata, an unknown word), or ""."""
        return "; ".join(problems(metadata, WORDS))


def detect(image: np.ndarray) -> dict[str, list[dict[str, Any]]]:
    """Return the objects in a picture u8[H,W,3]: {class: [{"box": [x0, y0, x1, y1], "score": 0..1, "color": word}]}.

    Every object is assigned to the best fitting shape of CLASSES and DECOYS; hollow and bent ones are ignored. Colours
    outside COLORS have other names, such as "grey".
    """
    unit = min(image.shape[:2]) / MIN_SIDE  # all lengths are in pixels of a 32x32 picture
    smooth = gaussian_filter(image.astype(np.float32), (0.5 * unit, 0.5 * unit, 0))
    ground = np.median(np.concatenate([smooth[0], smooth[-1], smooth[:, 0], smooth[:, -1]]), axis=0)
    detections: dict[str, list[dict[str, Any]]] = {}
    for thing in _segment(smooth, ground, least_area=_MIN_AREA * unit**2):
        profile = _profile(thing, 0.25 * unit)
        if profile.mean() < unit:  # its centroid is outside of it
            continue
        name, score = _classify(profile, area=len(thing.ys))
        box = [float(thing.xs.min()), float(thing.ys.min()), float(thing.xs.max() + 1), float(thing.ys.max() + 1)]
        detections.setdefault(name, []).append({"box": box, "score": score, "color": _color_word(thing.color)})
    return detections


# ---------------------------------------------------------------- segmentation by colour

_CONTRAST = 60.0  # minimum RGB distance of the foreground from the background
_MIN_AREA = 12.0  # smaller regions are specks
_TYPICAL = ((210, 45, 45), (235, 200, 40), (45, 155, 70), (45, 85, 210), (145, 60, 175), (30, 30, 30))


@dataclass(frozen=True)
class _Thing:
    """One segmented object: its pixels, its colour, and how much each pixel of the image is covered by that colour."""

    ys: np.ndarray
    xs: np.ndarray
    color: np.ndarray  # f32[3]
    cover: np.ndarray  # f32[H, W], 1 on the object, 0 on the background, negative on very different colours


def _segment(image: np.ndarray, ground: np.ndarray, least_area: float) -> list[_Thing]:
    """Return the connected, single-coloured objects of at least least_area in a picture f32[H,W,3]; ground f32[3]."""
    things = []
    for region in _regions(image, ground, least_area):
        pixels = image[region]
        contrast = _length(pixels - ground)
        color = pixels[contrast.argsort()[int(0.6 * len(pixels)) :]].mean(0)  # from the inner pixels, not the edge
        cover = 1.0 - _length(image - color) / _length(color - ground)
        parts = label(region & (cover > 0.5), connectivity=1)  # separates what only blurred edges joined
        for index in range(1, parts.max() + 1):
            ys, xs = np.nonzero(parts == index)
            if len(ys) >= least_area:
                things.append(_Thing(ys, xs, color, cover))
    return things


def _regions(image: np.ndarray, ground: np.ndarray, least_area: float) -> list[np.ndarray]:
    """Return masks bool[H,W] of the connected foreground regions; touching regions of different colours are separated.

    A pixel's colour is classified by its direction from the background colour, which is the same on a soft edge as in
    the middle.
    """
    difference = image - ground
    foreground = _length(difference) > _CONTRAST
    directions = np.array(_TYPICAL, dtype=np.float32) - ground
    directions /= np.maximum(_length(directions), 1.0)[:, None]
    kind = np.where(foreground, (difference @ directions.T).argmax(-1) + 1, 0)
    wholes, parts = label(foreground, connectivity=1), label(kind, background=0, connectivity=1)
    areas = np.bincount(parts.ravel())
    masks = []
    for index in range(1, wholes.max() + 1):
        whole = wholes == index
        area = np.count_nonzero(whole)
        if area >= least_area:
            main = [part for part in np.unique(parts[whole]) if areas[part] >= max(least_area, 0.2 * area)]
            masks += [parts == part for part in main] if len(main) > 1 else [whole]
    return masks


def _length(vectors: np.ndarray) -> np.ndarray:
    """Return the length of vectors f32[..., 3]."""
    length: np.ndarray = np.sqrt(np.einsum("...c,...c->...", vectors, vectors))
    return length


def _color_word(rgb: np.ndarray) -> str:
    """Return the name of a colour: one of COLORS where people would agree, otherwise another name."""
    red, green, blue = (min(max(float(level) / 255, 0.0), 1.0) for level in rgb)
    hue, saturation, value = colorsys.rgb_to_hsv(red, green, blue)
    if saturation * value < 0.18:
        return "black" if value < 0.36 else "grey"
    if saturation < 0.4:
        return "pale"
    hues = ((18, "red"), (38, "orange"), (70, "yellow"), (168, "green"), (195, "cyan"), (258, "blue"), (316, "purple"))
    return next((word for limit, word in hues if 360 * hue < limit), "pink" if 360 * hue < 336 else "red")


# ---------------------------------------------------------------- shape by geometry

_HARMONICS = 12
_TURNS = 64
_THETA = np.arange(_TURNS) * (2 * np.pi / _TURNS)
_ROUNDINGS = (0.06, 0.12, 0.2)  # radians over which corners are blurred; more for smaller objects
# The misfit at which the score is one half.
_TOLERANCE = {"circle": 0.06, "square": 0.08, "triangle": 0.09, "star": 0.13, "pentagon": 0.08}
_CLARITY = 0.01  # misfits that differ by less are hard to distinguish


def _classify(profile: np.ndarray, area: int) -> tuple[str, float]:
    """Return the best fitting shape for an object of this profile and area, and a confidence in 0..1."""
    misfits = _misfits(profile)
    name = min(misfits, key=lambda candidate: misfits[candidate])
    fit = 1.0 / (1.0 + (misfits[name] / _TOLERANCE[name]) ** 4)
    clear = 1.0 / sum(np.exp((misfits[name] ** 2 - other**2) / (2 * _CLARITY**2)) for other in misfits.values())
    solid = 1.0 / (1.0 + (np.log(np.pi * np.mean(profile**2) / area) / 0.5) ** 4)  # the outline encloses the object
    return name, float(fit * clear * solid)


def _profile(thing: _Thing, step: float) -> np.ndarray:
    """Return the object's radius from its centroid in each of _TURNS directions, f64[_TURNS]; all lengths in pixels."""
    weight = thing.cover[thing.ys, thing.xs]
    weight = weight / weight.sum()
    y, x = weight @ thing.ys, weight @ thing.xs
    reach = np.hypot(thing.ys - y, thing.xs - x).max() + 2 * step + 1
    radii = np.arange(0.0, reach + step, step)
    along = map_coordinates(
        thing.cover,
        [y + np.sin(_THETA)[:, None] * radii, x + np.cos(_THETA)[:, None] * radii],
        order=1,
        cval=0.0,
    )
    outside = along < 0.5
    outside[:, -1] = True
    first = np.maximum(outside.argmax(1), 1)
    turn = np.arange(_TURNS)
    inner, outer = along[turn, first - 1], along[turn, first]
    return radii[first - 1] + step * np.clip((inner - 0.5) / np.maximum(inner - outer, 1e-6), 0.0, 1.0)


def _misfits(profile: np.ndarray) -> dict[str, float]:
    """Return, by class, the rms distance of the profile, scaled to mean 1, from the nearest ideal one, best rotated."""
    seen = _spectrum(profile)
    product = np.zeros((len(_IDEAL), _TURNS // 2 + 1), dtype=np.complex128)
    product[:, 1 : _HARMONICS + 1] = seen * _IDEAL.conj()
    overlap = np.fft.irfft(product, axis=-1).max(-1) * _TURNS
    square = 2.0 * ((np.abs(seen) ** 2).sum() + (np.abs(_IDEAL) ** 2).sum(-1) - overlap)
    misfit = np.sqrt(np.maximum(square, 0.0))
    return {name: float(misfit[rows].min()) for name, rows in _ROWS.items()}


def _spectrum(profile: np.ndarray) -> np.ndarray:
    """Return the harmonics 1.._HARMONICS of profiles f64[..., _TURNS] divided by their mean, independent of size."""
    spectrum = np.fft.rfft(profile, axis=-1)[..., : _HARMONICS + 1]
    return spectrum[..., 1:] / spectrum[..., :1].real


def _polygon_profile(points: np.ndarray) -> np.ndarray:
    """Return the distance from a polygon's centroid to its outline in _TURNS directions; points f64[n, 2] in order."""
    following = np.roll(points, -1, axis=0)
    cross = points[:, 0] * following[:, 1] - following[:, 0] * points[:, 1]
    centroid = ((points + following) * cross[:, None]).sum(0) / (3 * cross.sum())
    (ax, ay), (ex, ey) = (points - centroid).T, (following - points).T
    rx, ry = np.cos(_THETA)[:, None], np.sin(_THETA)[:, None]
    parallel = rx * ey - ry * ex
    parallel = np.where(np.abs(parallel) < 1e-12, 1e-12, parallel)
    distance, share = (ax * ey - ay * ex) / parallel, (ax * ry - ay * rx) / parallel
    hit = (share >= -1e-9) & (share <= 1 + 1e-9) & (distance > 0)
    reach: np.ndarray = np.where(hit, distance, 0.0).max(1)
    return reach


def _star(inner: float) -> np.ndarray:
    """Return the corners of a five-pointed star of radius 1 whose inner corners are at radius `inner`."""
    radius = np.where(np.arange(10) % 2 == 0, 1.0, inner)
    angle = np.arange(10) * np.pi / 5
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def _ideal_spectra() -> tuple[dict[str, slice], np.ndarray]:
    """Return the spectra of all shapes in several proportions and roundings: the rows of each shape, and all rows."""
    disc = np.stack([np.cos(_THETA), np.sin(_THETA)], axis=1)
    square = np.array([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]])
    triangle = np.array([[-0.5, 0.0], [0.5, 0.0], [0.0, 1.0]])
    outlines = {
        "circle": [disc * (1.0, aspect) for aspect in (0.87, 1.0)],
        "square": [square * (1.0, aspect) for aspect in (0.87, 1.0)],
        "triangle": [triangle * (1.0, aspect) for aspect in (0.75, 0.87, 1.0, 1.15)],
        "star": [_star(inner) for inner in (0.38, 0.45, 0.52, 0.6)],
        "pentagon": [_star(np.cos(np.pi / 5))],
    }
    harmonics = np.arange(1, _HARMONICS + 1)
    rows: dict[str, slice] = {}
    spectra: list[np.ndarray] = []
    for name, polygons in outlines.items():
        begin = len(spectra)
        for polygon in polygons:
            spectrum = _spectrum(_polygon_profile(polygon))
            roundings = (0.0,) if name in DECOYS else _ROUNDINGS
            spectra += [spectrum * np.exp(-0.5 * (harmonics * rounding) ** 2) for rounding in roundings]
        rows[name] = slice(begin, len(spectra))
    return rows, np.array(spectra)


_ROWS, _IDEAL = _ideal_spectra()
