"""Read the pictures in the PNGs of `pictures.py`: a text chunk of each says where they are and what they show.

So one file serves both viewers and the report, and unlike a folder of files it is complete or absent: it is copied into
buckets, sent to trackers and set aside with older runs as one unit.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from PIL.PngImagePlugin import PngInfo

CHUNK = "udm_grpo"
"""Keyword of the text chunk (iTXt)."""


@dataclass(frozen=True)
class Cell:
    """A cell of a grid: its caption, its pictures by mark ("" if the grid has no marks), its details."""

    caption: str
    pictures: dict[str, UInt8[np.ndarray, "H W 3"]]
    details: dict[str, Any]


def record(
    shape: Sequence[int],
    factor: int,
    marks: Mapping[str, int],
    corners: Sequence[tuple[int, int]],
    captions: Sequence[str],
    details: Sequence[Mapping[str, Any]],
    run: str = "",
) -> PngInfo:
    """Return the text chunk of a grid.

    shape: [B, H, W, 3] of the pictures. factor: that of their enlargement. marks: their pixels from a cell's left edge.
    corners: (left, top) of every cell's first picture. details: none, or plain JSON for each cell. run: the id of the
    run that generated them.
    """
    if details and len(details) != len(captions):
        raise ValueError(
            f"details must be for every picture or for none, found {len(details)} for {len(captions)} pictures"
        )
    cells = [
        {"caption": caption, "corner": corner, "details": dict(more)}
        for caption, corner, more in zip(captions, corners, details or [{}] * len(captions), strict=True)
    ]
    said = {"height": int(shape[1]), "width": int(shape[2]), "factor": factor, "marks": dict(marks), "cells": cells}
    said |= {"run": run} if run else {}
    info = PngInfo()
    info.add_itxt(CHUNK, json.dumps(said, allow_nan=False), zip=True)
    return info


def read_grid(path: str | Path) -> list[Cell] | None:
    """Return the pictures of a PNG in their original size; None if it does not say where they are.

    Raises ValueError, naming the file, if it is damaged.
    """
    try:
        with Image.open(path) as file:
            sheet = np.asarray(file.convert("RGB"))
            text = file.info.get(CHUNK)
        return None if text is None else _cells(sheet, json.loads(text))
    except (OSError, SyntaxError, ValueError, KeyError, TypeError, AttributeError) as error:  # PIL raises all of these
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}); remove it") from error


def run_of(path: str | Path) -> str | None:
    """Return the id of the run that wrote a PNG; None if it does not say, or cannot be read."""
    try:
        with Image.open(path) as file:
            run = json.loads(file.info[CHUNK])["run"]
        return str(run)
    except (OSError, SyntaxError, ValueError, KeyError, TypeError):
        return None


def _cells(sheet: UInt8[np.ndarray, "H W 3"], said: Mapping[str, Any]) -> list[Cell]:
    height, width, factor = (int(said[name]) for name in ("height", "width", "factor"))
    cells = []
    for cell in said["cells"]:
        left, top = (int(place) for place in cell["corner"])
        pictures = {}
        for mark, distance in said["marks"].items():
            start = left + int(distance)
            part = sheet[top : top + height * factor : factor, start : start + width * factor : factor]
            if part.shape != (height, width, 3) or 0 in part.shape:
                raise ValueError(f"a picture of {width} x {height} is listed where there is none")
            pictures[str(mark)] = part
        cells.append(Cell(str(cell["caption"]), pictures, dict(cell["details"])))
    return cells
