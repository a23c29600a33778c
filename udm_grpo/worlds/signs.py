"""The prompts and images of the signs world: one to three digits on a plain background, to be read by OCR.

A small replacement for posters and shop signs with an OCR reward: prompts such as `a sign that says "427"` and images
of 32x64 pixels, which a small model can learn on a CPU. Digits only: at this size OCR reads all of them correctly.

    rng = np.random.default_rng(0)
    metadata = sample_prompts(train_prompts(), 128, rng)
    images = render_batch([sign_for(m, rng) for m in metadata])  # u8[128, 32, 64, 3]

The scorer (rewards_bridge/scorers/ocr.py) shares nothing with this file.
"""

import importlib.metadata
import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from udm_grpo.worlds import shapes
from udm_grpo.worlds.shapes import Metadata

DIGITS = "0123456789"
TAGS = ("one", "two", "three")
"""The tag of a prompt is the number of digits of its text."""

RL_TAG_WEIGHTS = {"three": 6, "two": 3, "one": 1}
"""Relative frequency of each tag in RL batches: longer texts offer more to get wrong."""

PRETRAIN_TAG_WEIGHTS = {"three": 6, "two": 3, "one": 1}
"""Relative frequency of each tag in pre-training: tags with more texts need more images."""

HEIGHT, WIDTH = 32, 64
"""Size of an image, in pixels."""

PLACES = {"one": (32,), "two": (24, 40), "three": (16, 32, 48)}
"""Centre of each character, in pixels from the left. A place is 16 pixels wide: two columns of image tokens, and no
character extends into a third."""

FONTS = (
    ("font-manrope==0.0.2", "font_manrope/files/Manrope-Bold.ttf"),
    ("font-source-sans-pro==0.0.1", "font_source_sans_pro/files/SourceSansPro-Bold.ttf"),
    ("font-source-serif-pro==0.0.1", "font_source_serif_pro/files/SourceSerifPro-Bold.ttf"),
    ("font-fredoka-one==0.0.4", "font_fredoka_one/files/FredokaOne-Regular.ttf"),
)
"""(package, its font file): a geometric and a humanist sans, a serif and a rounded font, all under the SIL OFL 1.1."""

INKS = ((20, 20, 20), (20, 40, 140))
"""RGB of black and blue, both dark, since OCR needs contrast."""

GROUNDS = ((250, 250, 250), (250, 242, 220))
"""RGB of white and cream. Few, so that image tokens are spent on digits."""


# ---------------------------------------------------------------- prompts


def prompt_of(text: str) -> Metadata:
    """Return the prompt of a text of one to three digits: {"tag", "text", "prompt"}."""
    return {"tag": TAGS[len(text) - 1], "text": text, "prompt": f'a sign that says "{text}"'}


def all_prompts() -> list[Metadata]:
    """Return every prompt of the world once, by tag in the order of TAGS: 10 + 100 + 1000 = 1110."""
    lengths = range(1, len(TAGS) + 1)
    return [prompt_of("".join(text)) for length in lengths for text in itertools.product(DIGITS, repeat=length)]


def is_held_out(metadata: Metadata) -> bool:
    """Return whether this prompt's text is kept for evaluation: a fifth of every tag, a fixed split.

    The held-out single digits (3 and 8) occur in training as the middle one of three, at the same place.
    """
    return sum(rank * int(digit) for rank, digit in enumerate(metadata["text"], 1)) % 5 == 3


def train_prompts() -> list[Metadata]:
    """Return the training prompts; every digit occurs in them at every place of an image."""
    return [metadata for metadata in all_prompts() if not is_held_out(metadata)]


def heldout_prompts() -> list[Metadata]:
    """Return the prompts kept for evaluation; none of their texts is in train_prompts()."""
    return [metadata for metadata in all_prompts() if is_held_out(metadata)]


def sample_prompts(
    prompts: Sequence[Metadata], n: int, rng: np.random.Generator, weights: dict[str, int] | None = None
) -> list[Metadata]:
    """Draw n prompts with replacement: first a tag by weight (default: RL_TAG_WEIGHTS), then a prompt with that tag.

    Raises ValueError if none of the prompts has a tag of positive weight.
    """
    return shapes.sample_prompts(prompts, n, rng, RL_TAG_WEIGHTS if weights is None else weights)


def corrupt_caption(metadata: Metadata, rng: np.random.Generator) -> Metadata:
    """Return a training prompt whose text has the same length and differs in exactly one digit.

    It is always a training prompt, so that held-out texts do not leak through wrong captions.
    """
    text = metadata["text"]
    others = [
        prompt_of(text[:place] + digit + text[place + 1 :])
        for place in range(len(text))
        for digit in DIGITS
        if digit != text[place]
    ]
    candidates = [other for other in others if not is_held_out(other)]
    return candidates[int(rng.integers(len(candidates)))]


# ---------------------------------------------------------------- images


@dataclass(frozen=True)
class Sign:
    """The content of an image; lengths in pixels, colours in RGB."""

    text: str
    font: int
    """Index into FONTS."""
    height: float
    """Height of a digit."""
    slant: float
    """Pixels to the right per pixel up."""
    dx: float
    """Shift of the whole text to the right of its place."""
    dy: float
    """Shift of the whole text below the middle."""
    ink: tuple[int, int, int]
    ground: tuple[int, int, int]


def sign_for(metadata: Metadata, rng: np.random.Generator) -> Sign:
    """Return a sign that satisfies the prompt; font, size, slant, colours and jitter are drawn from rng."""
    ground = GROUNDS[int(rng.integers(len(GROUNDS)))]
    brighter = int(rng.integers(-4, 5))
    return Sign(
        text=metadata["text"],
        font=int(rng.integers(len(FONTS))),
        height=float(rng.uniform(18.0, 20.0)),
        slant=float(rng.uniform(-0.08, 0.16)),
        dx=float(rng.uniform(-0.75, 0.75)),
        dy=float(rng.uniform(-0.75, 0.75)),
        ink=INKS[int(rng.integers(len(INKS)))],
        ground=(ground[0] + brighter, ground[1] + brighter, ground[2] + brighter),
    )


_SUPERSAMPLING = 4  # samples per pixel along each side
_NOMINAL = 100  # font size, in samples, at which heights are measured


def font_file(index: int) -> Path:
    """Return the file of FONTS[index]; raise RuntimeError with the install command if its package is missing."""
    package, file = FONTS[index]
    name, _, version = package.partition("==")
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        problem = "is not installed"
    else:
        path = Path(str(distribution.locate_file(file)))
        if distribution.version == version and path.is_file():
            return path
        problem = f"is installed as {distribution.version}" + ("" if path.is_file() else ", without that file")
    raise RuntimeError(
        f"the font {file} comes from {package}, which {problem}; fix: {sys.executable} -m pip install {package}"
    )


@cache
def _font(index: int, size: float) -> ImageFont.FreeTypeFont:
    # Basic layout, because Pillow's other engine depends on what is installed.
    return ImageFont.truetype(str(font_file(index)), size, layout_engine=ImageFont.Layout.BASIC)


@cache
def _nominal_height(index: int) -> float:
    """Return the height of a digit (8, the tallest in most fonts) at the nominal font size."""
    _, top, _, bottom = _font(index, _NOMINAL).getbbox("8", anchor="ls")
    return bottom - top


@cache
def _glyph(digit: str, index: int, size: float) -> tuple[float, float]:
    """Return the offset (x, y) of a digit's middle from its anchor "ls", in samples."""
    left, top, right, bottom = _font(index, size).getbbox(digit, anchor="ls")
    return (left + right) / 2, (top + bottom) / 2


def render(sign: Sign) -> np.ndarray:
    """Render a sign with anti-aliased edges: u8[32, 64, 3]; raise RuntimeError if the font's package is missing."""
    n = _SUPERSAMPLING
    size = round(sign.height * n / _nominal_height(sign.font) * _NOMINAL)  # whole, so that few fonts are cached
    font = _font(sign.font, size)
    mask = Image.new("L", (WIDTH * n, HEIGHT * n), 0)
    middle = HEIGHT / 2 + sign.dy
    for digit, place in zip(sign.text, PLACES[TAGS[len(sign.text) - 1]], strict=True):
        glyph = Image.new("L", mask.size, 0)
        x, y = _glyph(digit, sign.font, size)
        ImageDraw.Draw(glyph).text(((place + sign.dx) * n - x, middle * n - y), digit, 255, font, anchor="ls")
        mask.paste(255, (0, 0), glyph)
    # Each slanted sample is read from an upright one at x + slant * (y - middle), so that the middle stays in place.
    shear = (1.0, sign.slant, -sign.slant * middle * n, 0.0, 1.0, 0.0)
    mask = mask.transform(mask.size, Image.Transform.AFFINE, shear, Image.Resampling.BILINEAR)
    coverage = np.asarray(mask.reduce(n), dtype=np.float32)[:, :, None] / 255.0
    ink, ground = np.array(sign.ink, np.float32), np.array(sign.ground, np.float32)
    return np.clip(ground + coverage * (ink - ground) + 0.5, 0.0, 255.0).astype(np.uint8)


def render_batch(signs: Sequence[Sign]) -> np.ndarray:
    """Render signs: u8[B, 32, 64, 3]."""
    return np.stack([render(sign) for sign in signs])
