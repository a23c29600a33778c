"""Convert run folders to the data of the report page: plain values, thinned curves, small pictures."""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from udm_grpo.files.redaction import HIDDEN, hide_logins, is_secret
from udm_grpo.reporting.grid_file import Cell, read_grid
from udm_grpo.reporting.run_folder import RunFolder, RunFolderError

MAX_POINTS = 1500
"""Points of a curve; longer curves are averaged over neighbours."""
MAX_PROMPTS = 16
"""Prompts whose pictures are shown."""
MAX_MOMENTS, MAX_EXTREMES = 24, 6
"""Moments of the slider and of the best and worst, shared by all runs."""
MAX_REPORT_SIDE = 256
"""Pixels of a picture's longest side; larger pictures are scaled down."""
LOSSLESS_SIDE = 96
"""Pixels. Pictures up to this side are stored exactly."""
MAX_SHEET = 1400
"""Pixels of the longest side of a whole grid that does not say where its pictures are."""


def report_data(runs: Sequence[RunFolder]) -> dict[str, Any]:
    """Return everything the page shows, as JSON; raise RunFolderError for damaged pictures."""
    problems: list[str] = []
    shown = []
    for run, name in zip(runs, names_of(runs), strict=True):
        try:
            shown.append(_run(run, name, len(runs)))
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise RunFolderError("\n".join(problems))
    return {"runs": shown}


def names_of(runs: Sequence[RunFolder]) -> list[str]:
    """Return the last parts of the folders' paths, as many as it takes to tell the runs apart."""
    parts = [run.path.resolve().parts for run in runs]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{run.path} ({number})" for number, run in enumerate(runs, start=1)]


def _run(run: RunFolder, name: str, runs: int) -> dict[str, Any]:
    notes = list(run.notes)
    return {
        "name": name,
        "done": run.last,
        "iterations": run.config.get("iterations"),
        "written": run.written,
        "finished": run.summary is not None,
        "seconds": _number(run.summary.get("seconds")) if run.summary else None,
        "curves": _curves(run.metrics, notes),
        "evaluations": _evaluations(run),
        "by_steps": finite(run.summary["by_steps"]) if run.summary else {},
        "moments": _moments(run, runs, notes),
        "extremes": _extremes(run, runs, notes),
        "config": {name: _shown(name, value) for name, value in _flat(run.config).items()},
        "environment": _environment(run.starts),
        "notes": notes,
    }


def finite(value: Any) -> Any:
    """Return the same JSON with None for numbers that are not finite."""
    if isinstance(value, Mapping):
        return {str(name): finite(part) for name, part in value.items()}
    if isinstance(value, list):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: Any) -> float | None:
    """Return a finite number in six digits, None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(f"{value:.6g}")


def _flat(values: Mapping[str, Any], joint: str = ".", prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        inner = isinstance(value, Mapping) and value
        flat |= _flat(value, joint, f"{prefix}{name}{joint}") if inner else {f"{prefix}{name}": value}
    return flat


def _curves(metrics: Sequence[Mapping[str, Any]], notes: list[str]) -> dict[str, Any]:
    """Return {"per": iterations per point, "steps": [...], "values": {"kl" or "raw/x": [number or None, ...]}}."""
    rows = [_flat({name: part for name, part in line.items() if name != "nonfinite"}, "/") for line in metrics]
    named = dict.fromkeys(name for row in rows for name in row if name != "step")
    every = {name: [_number(row.get(name)) for row in rows] for name in named}
    every = {name: numbers for name, numbers in every.items() if any(number is not None for number in numbers)}
    broken = {name: line["step"] for line in reversed(metrics) for name in line.get("nonfinite", {})}
    for name, step in sorted(broken.items()):
        notes.append(f"{name} was not finite, first at iteration {step}.")
    lacking = {name for line in metrics for name in line.get("raw_missing", {})}
    notes += [f"raw/{name}: some images have no such value; its mean is over the others." for name in sorted(lacking)]
    skipped = [line["step"] for line in metrics if line.get("skipped") == 1]
    if skipped:
        notes.append(
            f"{len(skipped)} of {len(metrics)} iterations made no update, first iteration {skipped[0]}: in every group "
            "all images got the same score (dead groups)."
        )
    per = max(1, -(-len(rows) // MAX_POINTS))
    if per > 1:
        notes.append(f"Each point of a curve is the mean of {per} iterations.")
    parts = [slice(at, at + per) for at in range(0, len(rows), per)]
    return {
        "per": per,
        "steps": [metrics[part][-1]["step"] for part in parts],
        "values": {name: [_mean(numbers[part]) for part in parts] for name, numbers in every.items()},
    }


def _mean(numbers: Sequence[float | None]) -> float | None:
    known = [number for number in numbers if number is not None]
    return _number(sum(known) / len(known)) if known else None


def _evaluations(run: RunFolder) -> list[dict[str, Any]]:
    """Return all evaluations: [{"step", "label", "prompts", "images", "values": {...}, "tags": {tag: {...}}}, ...]."""
    evaluations = {line["step"]: _evaluation(line["step"], "", line) for line in run.evaluations}
    if run.summary:
        pair = next(iter(run.summary["by_steps"].values()))
        evaluations.setdefault(0, _evaluation(0, "", pair["base"]))
        evaluations[run.last] = _evaluation(run.last, "final", pair["final"])
    if 0 in evaluations:
        evaluations[0]["label"] = "base"
    return [evaluations[step] for step in sorted(evaluations)]


def _evaluation(step: int, label: str, said: Mapping[str, Any]) -> dict[str, Any]:
    tags = said.get("tags")
    return {
        "step": step,
        "label": label,
        "prompts": said.get("prompts"),
        "images": said.get("images"),
        "values": {name: _number(value) for name, value in said.items() if isinstance(value, float)},
        "tags": {tag: {name: _number(value) for name, value in part.items()} for tag, part in (tags or {}).items()},
    }


def _spread(steps: Sequence[int], most: int) -> list[int]:
    """Return at most `most` of the steps, evenly spaced, with the first and the last."""
    if len(steps) <= most:
        return list(steps)
    return [steps[round(at * (len(steps) - 1) / (most - 1))] for at in range(most)]


def _moments(run: RunFolder, runs: int, notes: list[str]) -> list[dict[str, Any]]:
    """Return the same prompts during training: {"step", "label", "cells": [{"caption", "src"}], perhaps "sheet"}."""
    steps = _spread(sorted(run.pictures), max(4, MAX_MOMENTS // runs))
    if len(steps) < len(run.pictures):
        notes.append(f"Pictures of {len(steps)} of {len(run.pictures)} moments are shown.")
    moments: dict[int, dict[str, Any]] = {}
    for step in steps:
        moments[step] = _moment(step, read_grid(run.pictures[step]), "", run.pictures[step], notes)
    pairs = read_grid(run.before_after) if run.before_after else None
    if pairs:
        moments.setdefault(0, _moment(0, pairs, "before", None, notes))
        moments[run.last] = _moment(run.last, pairs, "after", None, notes) | {"label": "final"}
    elif run.before_after and not moments:
        moments[run.last] = _moment(run.last, None, "", run.before_after, notes) | {"label": "before and after"}
    if 0 in moments:
        moments[0]["label"] = "base"
    return [moments[step] for step in sorted(moments)]


def _moment(step: int, cells: Sequence[Cell] | None, mark: str, path: Path | None, notes: list[str]) -> dict[str, Any]:
    if cells is None and path is not None:
        with Image.open(path) as file:
            return {
                "step": step,
                "label": "",
                "cells": [],
                "sheet": encode(np.asarray(file.convert("RGB")), MAX_SHEET),
            }
    cells = cells or []
    limit = f"Pictures of {MAX_PROMPTS} of {len(cells)} prompts are shown."
    if len(cells) > MAX_PROMPTS and limit not in notes:
        notes.append(limit)
    named = ((cell.caption, cell.pictures.get(mark)) for cell in cells[:MAX_PROMPTS])
    shown = [{"caption": caption, "src": encode(image)} for caption, image in named if image is not None]
    return {"step": step, "label": "", "cells": shown}


def _extremes(run: RunFolder, runs: int, notes: list[str]) -> list[dict[str, Any]]:
    """Return the best and worst: {"step", "cells": [{"kind", "prompt", "score", "raw", "reason", "src"}]}."""
    steps = _spread(sorted(run.extremes), max(2, MAX_EXTREMES // runs))
    if len(steps) < len(run.extremes):
        notes.append(f"Best and worst images of {len(steps)} of {len(run.extremes)} evaluations are shown.")
    extremes = []
    for step in steps:
        cells = [
            {**finite(cell.details), "src": encode(cell.pictures[""])}
            for cell in read_grid(run.extremes[step]) or []
            if {"kind", "prompt", "score", "raw", "reason"} <= set(cell.details) and "" in cell.pictures
        ]
        if cells:
            extremes.append({"step": step, "cells": cells})
    return extremes


def encode(image: UInt8[np.ndarray, "H W 3"], longest: int = MAX_REPORT_SIDE) -> str:
    """Return a picture as a data URI: a small one exactly (PNG), a larger one within `longest` pixels (WebP)."""
    picture = Image.fromarray(image)
    buffer = io.BytesIO()
    if max(picture.size) <= LOSSLESS_SIDE:
        picture.save(buffer, format="PNG", optimize=True)
        kind = "png"
    else:
        picture.thumbnail((longest, longest), Image.Resampling.LANCZOS)
        picture.save(buffer, format="WEBP", quality=82)
        kind = "webp"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _environment(starts: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return the first start as text; for each resume, when it was and what it changed."""
    if not starts:
        return {}
    shown = _start(starts[0])
    for number, start in enumerate(starts[1:], start=1):
        again = _start(start)
        changed = [f"{name}: {value}" for name, value in again.items() if shown.get(name) != value]
        shown[f"resume {number}"] = f"after iteration {start.get('after_step')}; " + "; ".join(changed)
    return shown


def _start(start: Mapping[str, Any]) -> dict[str, str]:
    shown = {}
    for name, value in _flat(start, " ").items():
        if name == "after_step" or value is None or value == {}:
            continue
        if name.endswith("memory_bytes") and _number(value):
            shown[name.removesuffix("_bytes").replace("_", " ")] = f"{value / 2**30:.1f} GiB"
        elif name.startswith("devices "):
            shown[name.replace("devices ", "device ", 1)] = str(value)
        else:
            shown[name.removeprefix("versions ")] = _shown(name, value)
    return shown


def _shown(name: str, value: Any) -> str:
    """Return a setting as text, without secrets."""
    if value and isinstance(value, str) and is_secret(name):
        return HIDDEN
    if isinstance(value, list):
        return ", ".join(str(part) for part in value)
    if isinstance(value, bool):
        return "true" if value else "false"
    return "" if value is None or value == {} else hide_logins(str(value))
