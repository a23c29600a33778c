"""Files of a folder of pictures: reading one, and finding pictures with other names than expected."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from rewards_bridge.picture_files import DecodedPicture, decode_picture, read_content
from udm_grpo.scoring.layouts import cut_grid

SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic")
"""Suffixes of picture files, in lower case."""


@dataclass(frozen=True)
class Picture:
    """One picture that can be read."""

    path: str
    """Path in its folder, with forward slashes; in a grid with the quarter, as in ID.png#0."""
    prompt: int
    """The number of its prompt."""
    image: int
    """The number of the picture among those of its prompt."""
    size: tuple[int, int]
    """Width and height, pixels."""
    digest: str
    """SHA-256 of the file and its prompt's metadata: all that a score depends on, besides the scorer."""


def load_picture(path: Path) -> UInt8[np.ndarray, "H W 3"]:
    """Return a picture as it is scored (picture_files.decode_picture); raises PictureError.

    FILE.png#0 to FILE.png#3 are the four pictures of a grid.
    """
    file, quarter = _file_of(str(path))
    return _part(_decoded(read_content(file), quarter), quarter)


def examine(root: Path, path: str, prompt: int, image: int, metadata: Mapping[str, Any]) -> tuple[Picture, bool] | str:
    """Return (the picture, whether it is partly transparent), or what is wrong with it."""
    file, quarter = _file_of(path)
    try:
        content = read_content(root / file)
        decoded = _decoded(content, quarter)
        height, width = _part(decoded, quarter).shape[:2]
    except ValueError as error:  # PictureError, or cut_grid for a grid with odd sides
        return f"{root / path}: {error}"
    suffix = b"" if quarter is None else bytes([quarter])
    digest = hashlib.sha256(content + suffix + json.dumps(metadata, sort_keys=True).encode()).hexdigest()
    return Picture(path, prompt, image, (width, height), digest), decoded.is_transparent


def pictures_by_suffix(entries: Iterable[Path]) -> list[str]:
    """Return the files among `entries` with the suffix of a picture, whatever their names."""
    named = (entry for entry in entries if entry.suffix.lower() in SUFFIXES and not entry.name.startswith("."))
    return sorted(str(entry) for entry in named if entry.is_file())


def pictures_beside(folder: Path) -> list[str]:
    """Return the files with the suffix of a picture in a prompt's folder and its subfolders, except samples/."""
    paths = pictures_by_suffix(folder.iterdir())
    for entry in sorted(folder.iterdir()):
        if entry.is_dir() and entry.name != "samples":
            paths += pictures_by_suffix(entry.iterdir())
    return paths


def _file_of(path: str) -> tuple[str, int | None]:
    """Return the file of a picture, and which quarter of it the picture is."""
    named = re.fullmatch(r"(.*\.png)#([0-3])", path, re.DOTALL)
    return (named[1], int(named[2])) if named else (path, None)


def _decoded(content: bytes, quarter: int | None) -> DecodedPicture:
    return decode_picture(content, 1 if quarter is None else 2)


def _part(decoded: DecodedPicture, quarter: int | None) -> UInt8[np.ndarray, "H W 3"]:
    return decoded.pixels if quarter is None else cut_grid(decoded.pixels, quarter)
