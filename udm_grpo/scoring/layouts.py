"""Where the pictures of prompts are in a folder: GenEval's folders, numbered files or DPG-Bench's grids.

    geneval    00000/samples/0000.png    a folder per prompt, a file per picture
    flat       00000_0.png               a file per picture
    dpgbench   ID.png                    a file per prompt: its four pictures in a 2 x 2 grid, row by row

Source of the last: DPG-Bench's evaluation, which cuts each file into four (TencentQQGYLab/ELLA).
"""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from udm_grpo.data.prompt_text import PromptsError

LAYOUTS = ("geneval", "flat", "dpgbench")
GRID = "dpgbench"
QUARTERS = 4
"""Pictures in a grid, numbered 0 to 3."""
MAX_NAME = 200
"""Maximum characters of a file name without its suffix."""
MAX_SHOWN = 20
"""Maximum number of ids that an error names."""

Place = tuple[Path, int | None]
"""A picture's file, and where in it the picture is: a quarter of a grid, or None for all of it."""


def place_of(layout: str, output: Path, names: Sequence[str], prompt: int, image: int) -> Place:
    """Return where picture `image` of a prompt is; names: file names of the prompts, used for grids only."""
    if layout == GRID:
        return output / f"{names[prompt]}.png", image
    if layout == "geneval":
        return output / f"{prompt:05d}" / "samples" / f"{image:04d}.png", None
    return output / f"{prompt:05d}_{image}.png", None


def picture_files(
    layout: str, output: Path, names: Sequence[str], prompts: int, images: int
) -> list[tuple[Path, list[tuple[int, int]]]]:
    """Return every file of pictures and the (prompt, image) pairs in it, in order."""
    files: dict[Path, list[tuple[int, int]]] = {}
    for pair in itertools.product(range(prompts), range(images)):
        files.setdefault(place_of(layout, output, names, *pair)[0], []).append(pair)
    return list(files.items())


def file_names(layout: str, metadata: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Return the file names of the prompts if the layout uses them; raises what `grid_names` raises."""
    return grid_names(metadata) if layout == GRID else ()


def grid_names(metadata: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Return the name of each prompt's grid: its "id", or its number if no prompt has one.

    Raises PromptsError that names the ids that are missing, repeated or not file names.
    """
    if not any("id" in row for row in metadata):
        return tuple(f"{number:05d}" for number in range(len(metadata)))
    names, wrong = [], []
    for number, row in enumerate(metadata):
        name = row.get("id")
        whole = isinstance(name, int) and not isinstance(name, bool)
        names.append(str(name) if isinstance(name, str) or whole else "")
        if not _is_file_name(names[-1]):
            wrong.append(f"prompt {number} has the id {name!r}")
    repeated = [name for name, count in Counter(name.lower() for name in names if name).items() if count > 1]
    wrong += [f"the id {name!r} occurs more than once" for name in repeated]
    if wrong:
        shown = "; ".join(wrong[:MAX_SHOWN]) + (f"; and {len(wrong) - MAX_SHOWN} more" if wrong[MAX_SHOWN:] else "")
        raise PromptsError(
            "DPG-Bench's files are named by the ids of the prompts, so each prompt needs an id that is a file name: "
            f"{shown}"
        )
    return tuple(names)


def _is_file_name(name: str) -> bool:
    sound = name.isprintable() and not any(character in '/\\:*?"<>|' for character in name)
    return sound and 0 < len(name) <= MAX_NAME and name[0] != "." and name == name.strip() and name != "contact_sheet"


def join_grid(pictures: Sequence[UInt8[np.ndarray, "hh ww 3"]]) -> UInt8[np.ndarray, "2*hh 2*ww 3"]:
    """Return four pictures of one size as a grid, row by row."""
    first, second, third, fourth = pictures
    return np.concatenate([np.concatenate([first, second], 1), np.concatenate([third, fourth], 1)])


def cut_grid(grid: UInt8[np.ndarray, "2*hh 2*ww 3"], quarter: int) -> UInt8[np.ndarray, "hh ww 3"]:
    """Return one of the four pictures of a grid; raises ValueError for a grid with an odd side."""
    if grid.shape[0] % 2 or grid.shape[1] % 2:
        height, width = grid.shape[:2]
        raise ValueError(f"is {width} x {height} pixels; a grid of 2 x 2 pictures has even sides")
    height, width = grid.shape[0] // 2, grid.shape[1] // 2
    row, column = divmod(quarter, 2)
    return grid[row * height : (row + 1) * height, column * width : (column + 1) * width]
