"""Write sample grids and before-and-after pictures as labelled PNGs, each atomically.

A text chunk of each PNG says where its pictures are and what belongs to each; `grid_file.py` reads it.
"""

import bisect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unicodedata import category, combining, normalize

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from udm_grpo.files.atomic import replace_file
from udm_grpo.reporting.grid_file import record

MIN_CELL = 96
"""Pixels. Pictures narrower or lower than this are enlarged by an integer factor, each pixel to a square."""

_GAP = 6  # pixels around a picture
_LINE = 14  # pixels a line of text takes
_CAPTION_LINES = 3
_FONT_SIZE = 11
_NO_CHARACTER = "\uffff"
REPLACEMENT = "?"
"""Replaces a character that the font of captions lacks."""
MAX_CAPTION = 2000
"""Characters of a caption that are kept in the file; three lines of them are drawn."""

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def image_grid(
    images: UInt8[np.ndarray, "B H W 3"],
    captions: Sequence[str],
    columns: int,
    path: str | Path,
    details: Sequence[Mapping[str, Any]] = (),
    run: str = "",
) -> None:
    """Write the pictures row by row as one PNG, each above its caption (up to three lines of it).

    details: further data of each picture, as plain JSON; run: the id of the run that generated them. Both are stored in
    the file but not drawn. Raises ValueError for no pictures, another shape or dtype, or a wrong number of captions.
    """
    _check(images, captions, columns)
    _write_grid(_enlarge(images), captions, columns, Path(path), {}, images.shape, details, run)


def before_after(
    before: UInt8[np.ndarray, "B H W 3"],
    after: UInt8[np.ndarray, "B H W 3"],
    captions: Sequence[str],
    path: str | Path,
    columns: int = 4,
    run: str = "",
) -> None:
    """Write one PNG with, for each prompt, the pictures before and after side by side, labelled, above the caption.

    run: the id of the run that generated them. Raises ValueError as `image_grid` does, and if the shapes differ.
    """
    _check(before, captions, columns)
    _check(after, captions, columns)
    if before.shape != after.shape:
        raise ValueError(f"before has the shape {before.shape}, but after has {after.shape}")
    left, right = _enlarge(before), _enlarge(after)
    gap = np.full_like(left[:, :, :2], 255)
    pairs = np.concatenate([left, gap, right], axis=2)
    _write_grid(pairs, captions, columns, Path(path), {"before": 0, "after": left.shape[2] + 2}, before.shape, (), run)


def _check(images: UInt8[np.ndarray, "B H W 3"], captions: Sequence[str], columns: int) -> None:
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or images.size == 0:
        raise ValueError(f"pictures must be uint8[B, H, W, 3] and not empty, found {images.dtype}{list(images.shape)}")
    if len(captions) != len(images) or columns < 1:
        counts = f"{len(images)} pictures, {len(captions)} captions, {columns} columns"
        raise ValueError(f"a grid needs a caption for each picture and at least 1 column, found {counts}")


def _enlarge(images: UInt8[np.ndarray, "B H W 3"]) -> UInt8[np.ndarray, "B H2 W2 3"]:
    factor = -(-MIN_CELL // min(images.shape[1:3]))
    return images.repeat(factor, axis=1).repeat(factor, axis=2)


def _write_grid(
    cells: UInt8[np.ndarray, "B H W 3"],
    captions: Sequence[str],
    columns: int,
    path: Path,
    marks: Mapping[str, int],
    shape: Sequence[int],
    details: Sequence[Mapping[str, Any]],
    run: str,
) -> None:
    """Write the grid.

    marks: labels above the pictures of every cell -> their pixels from its left edge. shape: [B, H, W, 3] of the
    pictures before they were enlarged.
    """
    count, height, width, _ = cells.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    font = ImageFont.load_default(size=_FONT_SIZE)
    captions = [caption if len(caption) <= MAX_CAPTION else f"{caption[:MAX_CAPTION]}..." for caption in captions]
    wrapped = [_wrap(caption, font, width) for caption in captions]
    header = _LINE if marks else 0
    pitch = header + height + _LINE * max(len(lines) for lines in wrapped) + _GAP
    sheet = Image.new("RGB", (columns * (width + _GAP) + _GAP, rows * pitch + _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    corners: list[tuple[int, int]] = []
    for i, (cell, lines) in enumerate(zip(cells, wrapped, strict=True)):
        left, top = _GAP + i % columns * (width + _GAP), _GAP + i // columns * pitch
        corners.append((left, top + header))
        for mark, distance in marks.items():
            draw.text((left + distance, top), mark, fill="gray", font=font)
        sheet.paste(Image.fromarray(cell), (left, top + header))
        for j, line in enumerate(lines):
            draw.text((left, top + header + height + 1 + j * _LINE), line, fill="black", font=font)
    said = record(shape, height // shape[1], marks or {"": 0}, corners, captions, details, run)
    replace_file(path, lambda temporary: sheet.save(temporary, format="PNG", pnginfo=said))


def _wrap(text: str, font: Font, width: int) -> list[str]:
    """Return the text in at most three lines no wider than `width` pixels; what does not fit ends in three dots.

    Words that are wider than a line are broken, characters that the font lacks are replaced.
    """
    rest = _drawable(" ".join(text[:MAX_CAPTION].split()), font)
    lines: list[str] = []
    while rest and len(lines) < _CAPTION_LINES:
        count = _fitting(rest, font, width)
        if count < len(rest):
            space = rest.rfind(" ", 0, count + 1)
            count = space if space > 0 else count
        lines.append(rest[:count].rstrip())
        rest = rest[count:].lstrip()
    if rest or len(text) > MAX_CAPTION:
        last = lines[-1]
        lines[-1] = last[: _fitting(last, font, width - int(font.getlength("...")))].rstrip() + "..."
    return lines


def _fitting(text: str, font: Font, width: int) -> int:
    """Return the number of characters, at least 1, that fit into a line."""
    counts = range(1, min(len(text), max(1, width)) + 1)  # no character that is drawn is narrower than a pixel
    return max(1, bisect.bisect_right(counts, float(width), key=lambda count: float(font.getlength(text[:count]))))


def _drawable(text: str, font: Font) -> str:
    """Replace characters that the font lacks or that draw nothing: by their letters without accents, or by "?"."""
    lacking = bytes(font.getmask(_NO_CHARACTER))

    def has(text: str) -> bool:
        return text.isprintable() and all(each == " " or bytes(font.getmask(each)) != lacking for each in text)

    def drawn(character: str) -> str:
        plain = "".join(each for each in normalize("NFKD", character) if not combining(each))
        choices = (character, plain, "-" if category(character) == "Pd" else "")
        return next((choice for choice in choices if choice and has(choice)), REPLACEMENT)

    known = {character: drawn(character) for character in set(text)}
    return "".join(known[character] for character in text)
