"""The finished part of an evaluation, saved if the run is stopped during it, so that the evaluation can be resumed.

One .npz file per evaluation: the scores of its first images in order, the best and the worst of those, and what
identifies the evaluation (the run's fingerprint, the iteration, the number of steps and of images).
"""

import io
import json
import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from udm_grpo.files.atomic import replace_file
from udm_grpo.reporting.extremes import Judged

FOLDER = "evaluation_parts"


@dataclass(frozen=True)
class Part:
    """Results of the first images of an evaluation."""

    columns: dict[str, np.ndarray] = field(default_factory=dict)
    """f32[done] of the score and of each raw value, by name; empty if nothing is done."""
    best: tuple[Judged, ...] = ()
    worst: tuple[Judged, ...] = ()

    @property
    def done(self) -> int:
        """Number of scored images."""
        return len(next(iter(self.columns.values()), ()))


def write_part(file: Path, identity: Mapping[str, Any], part: Part) -> None:
    """Write a part atomically."""
    arrays: dict[str, Any] = {f"column/{name}": values for name, values in part.columns.items()}
    head: dict[str, Any] = {"identity": _plain(identity)}
    for kind, judged in (("best", part.best), ("worst", part.worst)):
        head[kind] = [{**asdict(one), "image": None} for one in judged]
        arrays |= {f"{kind}/{at}": one.image for at, one in enumerate(judged)}
    held = io.BytesIO()
    np.savez(held, head=np.frombuffer(json.dumps(head).encode(), np.uint8), **arrays)
    replace_file(file, partial(Path.write_bytes, data=held.getvalue()))


def read_part(file: Path, identity: Mapping[str, Any]) -> Part:
    """Return the saved part; an empty one if the file is missing, damaged or of another evaluation."""
    try:
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as arrays:
            head = json.loads(arrays["head"].tobytes())
            if head["identity"] != _plain(identity):
                return Part()
            columns = {name: arrays[name] for name in arrays.files if name.startswith("column/")}
            sides = {
                kind: tuple(Judged(**{**one, "image": arrays[f"{kind}/{at}"]}) for at, one in enumerate(head[kind]))
                for kind in ("best", "worst")
            }
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
        return Part()
    return Part({name.removeprefix("column/"): values for name, values in columns.items()}, **sides)


def remove_parts(output: Path) -> None:
    """Remove all parts of a run that has ended or starts over."""
    shutil.rmtree(output / FOLDER, ignore_errors=True)


def part_file(output: Path, step: int, sampler: str) -> Path:
    """Return the file of the evaluation after `step` iterations whose sampler has this name."""
    return output / FOLDER / f"{step:06d}-{sampler}.npz"


def _plain(identity: Mapping[str, Any]) -> Any:
    return json.loads(json.dumps(identity))
