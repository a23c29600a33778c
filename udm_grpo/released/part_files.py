"""Find the files that hold the weights of a part, and those of trained transformers in their usual places."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from udm_grpo.machine.progress import progress_bar
from udm_grpo.tensor_files.streaming import row_ranges
from udm_grpo.tensor_files.torch_files import (
    ENDINGS,
    TensorFiles,
    WeightsError,
    candidates,
    find,
    open_tensors,
    read_json,
)
from udm_grpo.tensor_files.weight_table import TensorInfo

ADAPTER_FILE = "adapter_config.json"


def open_part(path: Path) -> TensorFiles:
    """Open the tensors of a part, from its folder or from one file.

    Raises WeightsError if there are none, if they are damaged, or if a folder holds several files with different
    weights, where any choice between them would be a guess.
    """
    if not path.is_dir():
        return open_tensors(path)
    first, *others = candidates(path) or [find(path)]
    opened = open_tensors(first)
    for other in others:
        if problem := different_files(first, other):
            raise WeightsError(problem)
    return opened


def different_files(one: Path, other: Path) -> str:
    """Return an error message if two files of a folder hold different weights; empty if they are equal."""
    difference = _difference(_identity(one), _identity(other))
    if not difference:
        return ""
    return (
        f"{one.parent}: {one.name} and {other.name} hold different weights ({difference}). Remove the one that you "
        "do not need, or move it to another folder."
    )


def transformer_source(path: Path) -> Path:
    """Return the file or folder with the tensors of a trained transformer, for a path that a user gave.

    The path may be the file itself, its folder, a training checkpoint of the public release (checkpoint-100 in
    checkpoints or ema_checkpoints, with a folder transformer), a folder with one such checkpoint, or a released folder.
    Raises WeightsError for anything else.
    """
    if path.is_file():
        if not path.name.endswith(ENDINGS):
            raise WeightsError(f"{path}: not a weights file; its name must end with one of {', '.join(ENDINGS)}.")
        return path
    if not path.is_dir():
        raise WeightsError(
            f"{path}: no such file or folder; give a transformer's weights or the folder that holds them."
        )
    for folder in (path, path / "transformer"):
        if candidates(folder):
            return folder
        if (folder / ADAPTER_FILE).is_file():
            raise WeightsError(f"{folder} is a PEFT adapter, not a whole transformer; give it as --adapter.")
    checkpoints = sorted(entry for entry in path.glob("checkpoint-*") if entry.is_dir())
    if len(checkpoints) == 1:
        return transformer_source(checkpoints[0])
    if checkpoints:
        names = ", ".join(entry.name for entry in checkpoints)
        raise WeightsError(f"{path} has {len(checkpoints)} checkpoints: {names}. Give one of them.")
    return find(path / "transformer" if (path / "transformer").is_dir() else path)  # raises WeightsError


def size_differences(source: Path, sizes: Mapping[str, Any]) -> list[str]:
    """Return how the config.json beside a transformer's weights, if there is one, contradicts the sizes of the base.

    The shapes of the tensors show most differences, but not the base of the rotary frequencies or the number of heads.
    """
    file = (source if source.is_dir() else source.parent) / "config.json"
    if not file.is_file():
        return []
    beside = read_json(file)
    return [
        f"{file}: {name} is {beside[name]} here but {value} in the base folder; give the base that it was trained from"
        for name, value in sizes.items()
        if name in beside and beside[name] != value
    ]


Identity = tuple[tuple[str, int, int], ...]
"""(path, bytes, time of the last change) of each file that a comparison depends on."""


def _identity(path: Path) -> Identity:
    opened = open_tensors(path)
    files = [path, *(path.parent / name for name in opened.layout.files)]
    return tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files)


@functools.lru_cache(maxsize=8)  # a run opens its folder twice, and the files may be large
def _difference(one: Identity, other: Identity) -> str:
    """Return the first difference between two sets of tensors, compared block by block; empty if they are equal."""
    a, b = open_tensors(Path(one[0][0])), open_tensors(Path(other[0][0]))
    alone = sorted(a.infos.keys() ^ b.infos.keys())
    if alone:
        return f"{alone[0]} is only in one of them"
    with progress_bar(len(a.infos), "comparing", "tensor") as bar:
        for name, info in a.infos.items():
            if info.shape != b.infos[name].shape:
                return f"{name} is {info.shape} in one and {b.infos[name].shape} in the other"
            if not _equal(a, b, name, info):
                return f"{name} has other values"
            bar.update()
    return ""


def _equal(a: TensorFiles, b: TensorFiles, name: str, info: TensorInfo) -> bool:
    ranges = row_ranges(info.shape, 8) if info.shape else [(0, 1)]
    for start, stop in ranges:
        # Widening is exact from every dtype of weights.
        one, other = (files.read_rows(name, start, stop).astype(np.float64) for files in (a, b))
        if not np.array_equal(one, other, equal_nan=True):
            return False
    return True
