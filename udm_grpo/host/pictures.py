"""Sample grids and before-and-after pictures as labelled PNGs, each written completely or not at all.

A PNG also says in a text chunk where its pictures are and what belongs to each: `grid_file.py` takes it apart again.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from udm_grpo.host.atomic import replace_file
from udm_grpo.host.grid_file import record

SMALLEST_CELL = 96
"""Pixels. Pictures narrower or lower than this are enlarged by a whole factor, each pixel to a square."""

_GAP = 6  # pixels around a picture
_LINE = 14  # pixels a line of text takes
_CAPTION_LINES = 3
_FONT_SIZE = 11


def image_grid(
    images: UInt8[np.ndarray, "B H W 3"],
    captions: Sequence[str],
    columns: int,
    path: str | Path,
    details: Sequence[Mapping[str, Any]] = (),
    run: str = "",
) -> None:
    """Write the pictures row by row as one PNG, each above its caption (up to three lines of it).

    details: what else the file says of each picture, as plain JSON; run: the id of the run that drew them; not drawn.
    Raises ValueError for no pictures, another shape or dtype, or not one caption for each.
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
    """Write one PNG with, for each prompt, the pictures before and after side by side, so marked, above the caption.

    run: the id of the run that drew them. Raises ValueError as `image_grid` does, and when the two differ in shape.
    """
    _check(before, captions, columns)
    _check(after, captions, columns)
    if before.shape != after.shape:
        raise ValueError(f"before has the shape {before.shape}, but after {after.shape}")
    left, right = _enlarge(before), _enlarge(after)
    gap = np.full_like(left[:, :, :2], 255)
    pairs = np.concatenate([left, gap, right], axis=2)
    _write_grid(pairs, captions, columns, Path(path), {"before": 0, "after": left.shape[2] + 2}, before.shape, (), run)


def _check(images: UInt8[np.ndarray, "B H W 3"], captions: Sequence[str], columns: int) -> None:
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or images.size == 0:
        raise ValueError(f"pictures must be uint8[B, H, W, 3] and not empty, found {images.dtype}{list(images.shape)}")
    if len(captions) != len(images) or columns < 1:
        found = f"{len(images)} pictures, {len(captions)} captions, {columns} columns"
        raise ValueError(f"a grid needs a caption for each picture and at least 1 column, found {found}")


def _enlarge(images: UInt8[np.ndarray, "B H W 3"]) -> UInt8[np.ndarray, "B H2 W2 3"]:
    factor = -(-SMALLEST_CELL // min(images.shape[1:3]))
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

    marks: texts that every cell has above its picture, and their pixels from its left edge. shape: [B, H, W, 3] before
    the pictures were enlarged.
    """
    count, height, width, _ = cells.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    font = ImageFont.load_default(size=_FONT_SIZE)
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


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Return the text in lines no wider than `width` pixels; what does not fit ends in three dots."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    if len(lines) > _CAPTION_LINES:
        lines[_CAPTION_LINES - 1 :] = [f"{lines[_CAPTION_LINES - 1]}..."]
    for i, line in enumerate(lines):
        cut = line
        while font.getlength(cut) > width and len(cut) > 4:
            cut = cut.removesuffix("...")[:-1] + "..."
        lines[i] = cut
    return lines
