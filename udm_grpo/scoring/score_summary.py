"""Summary of the scores of a folder: means with bootstrap intervals, GenEval's table, and its results file.

Every mean is over pictures, as in GenEval. An interval is the middle 95 % of that mean over resamples of the prompts,
each with all its pictures: pictures of one prompt are alike, so intervals from resampled pictures would be too narrow.

Source: Efron & Tibshirani 1993, "An Introduction to the Bootstrap", chapters 8 and 13 (percentile intervals); Ghosh et
al. 2023, "GenEval" (overall = mean of the tasks' accuracies).
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from rewards_bridge.composition import apart
from udm_grpo.files.atomic import replace_file
from udm_grpo.scoring.folder_scores import Scored

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
"""GenEval's tasks, in its order."""
RULE = ("official", "strict", "soft")
"""Raw values of a scorer that judges by GenEval's rule."""
CONFIDENCE = 0.95
_CHUNK = 2**22  # prompts that are resampled at a time


@dataclass(frozen=True)
class Columns:
    """One scorer's marks as a table of prompts by values; the marks of a prompt are summed and counted."""

    names: tuple[str, ...]
    """Names of the values: "score", then the raw ones."""
    prompts: tuple[int, ...]
    tags: tuple[str, ...]
    sums: np.ndarray
    """f64[P, M]."""
    counts: np.ndarray
    """f64[P], numbers of pictures."""


def columns(scored: Scored, scorer: str, numbers: Sequence[int] | None = None) -> Columns:
    """Return the marks of one scorer by prompt; numbers: the prompts, in the order to return them (None: all).

    Raw values that some pictures lack are left out, and one named "score" becomes "raw/score".
    """
    among = set(scored.prompts if numbers is None else numbers)
    marks = [mark for mark in scored.marks if mark.scorer == scorer and mark.prompt in among]
    raw = [apart(mark.raw, ("score",)) for mark in marks]
    names = ("score", *(name for name in raw[0] if all(name in values for values in raw)))
    prompts = tuple(dict.fromkeys(mark.prompt for mark in marks)) if numbers is None else tuple(numbers)
    row = {prompt: index for index, prompt in enumerate(prompts)}
    sums, counts = np.zeros((len(prompts), len(names))), np.zeros(len(prompts))
    for mark, values in zip(marks, raw, strict=True):
        sums[row[mark.prompt]] += [mark.score, *(values[name] for name in names[1:])]
        counts[row[mark.prompt]] += 1
    return Columns(names, prompts, tuple(scored.prompts[prompt]["tag"] for prompt in prompts), sums, counts)


def bootstrap(
    sums: Float[np.ndarray, "P M"], counts: Float[np.ndarray, " P"], resamples: int, seed: Sequence[int]
) -> Float[np.ndarray, "R M"]:
    """Return the means over pictures in R resamples of the P prompts, which the seed and P determine."""
    rng = np.random.default_rng(seed)
    size = len(counts)
    means = []
    for start in range(0, resamples, step := max(1, _CHUNK // size)):
        draws = rng.integers(size, size=(min(step, resamples - start), size))
        drawn = np.stack([np.bincount(row, minlength=size) for row in draws]).astype(float)  # how often each is drawn
        means.append((drawn @ sums) / (drawn @ counts)[:, None])
    return np.concatenate(means)


def groups(tags: Sequence[str]) -> dict[str, np.ndarray]:
    """Return the rows of every tag, GenEval's tasks first."""
    order = sorted(set(tags), key=lambda tag: (TASKS.index(tag) if tag in TASKS else len(TASKS), tag))
    return {tag: np.flatnonzero(np.array(tags) == tag) for tag in order}


def spread(table: Columns, resamples: int, seed: int) -> dict[str, np.ndarray]:
    """Return f64[1 + R, M] for "mean", "overall" and "tag:NAME": the means in row 0, then those of R resamples.

    "overall" is the mean of the tags' means, each tag resampled by itself; with a single tag there is only "mean".
    """
    means = {"mean": _spread(table.sums, table.counts, resamples, (seed, 0))}
    rows = groups(table.tags)
    if len(rows) > 1:
        parts = {
            tag: _spread(table.sums[at], table.counts[at], resamples, (seed, 1 + number))
            for number, (tag, at) in enumerate(rows.items())
        }
        means["overall"] = np.mean(list(parts.values()), axis=0)
        means.update({f"tag:{tag}": values for tag, values in parts.items()})
    return means


def _spread(sums: np.ndarray, counts: np.ndarray, resamples: int, seed: Sequence[int]) -> np.ndarray:
    mean = sums.sum(0, keepdims=True) / counts.sum()
    return np.concatenate([mean, bootstrap(sums, counts, resamples, seed)])


def interval(values: Float[np.ndarray, " n"], prompts: int) -> dict[str, Any]:
    """Return {"value", "low", "high"} of a value and its resamples; low and high are None for a single prompt."""
    if prompts < 2:
        return {"value": float(values[0]), "low": None, "high": None}
    low, high = np.quantile(values[1:], [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return {"value": float(values[0]), "low": float(low), "high": float(high)}


def by_value(table: Columns, means: Mapping[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """Return {value: {"mean", "overall"?, "tags"?: {tag: ...}}}, each an interval with its "prompts" and "images".

    A tag of a single prompt adds nothing to the interval of "overall".
    """
    size = {"mean": slice(None), "overall": slice(None)} | {f"tag:{tag}": at for tag, at in groups(table.tags).items()}
    result: dict[str, dict[str, Any]] = {name: {} for name in table.names}
    for key, values in means.items():
        counts = table.counts[size[key]]
        for column, name in enumerate(table.names):
            most = len(counts) if key != "overall" else max(len(at) for at in groups(table.tags).values())
            said = {**interval(values[:, column], most), "prompts": len(counts), "images": int(counts.sum())}
            place = result[name].setdefault("tags", {}) if key.startswith("tag:") else result[name]
            place[key.removeprefix("tag:")] = said
    return result


def summarize(scored: Scored, warnings: Sequence[str], resamples: int, seed: int) -> dict[str, Any]:
    """Return summary.json: every scorer's values with intervals, the numbers of pictures and prompts, and warnings."""
    pictures = {mark.image: mark.prompt for mark in scored.marks}
    of_prompt = Counter(pictures.values())
    scorers, warned = {}, list(warnings)
    for name, scorer in scored.scorers.items():
        table = columns(scored, name)
        scorers[name] = {**scorer, "values": by_value(table, spread(table, resamples, seed))}
        warned += _left_out(scored, name)
        if "official" in table.names:
            scorers[name]["correct_prompts"] = _correct_prompts(scored, name)
            warned += _lacking_tasks(name, table.tags)
    return {
        "samples": str(scored.samples),
        "images": len(pictures),
        "prompts": len(of_prompt),
        "images_per_prompt": {str(count): times for count, times in sorted(Counter(of_prompt.values()).items())},
        "confidence": CONFIDENCE,
        "resamples": resamples,
        "seed": seed,
        "scorers": scorers,
        "warnings": warned,
    }


def _left_out(scored: Scored, scorer: str) -> list[str]:
    """Return a warning for every raw value that only some of the pictures have."""
    marks = [mark for mark in scored.marks if mark.scorer == scorer]
    times = Counter(name for mark in marks for name in mark.raw)
    return [
        f"{scorer}: {len(marks) - count} of {len(marks)} pictures have no raw value {name!r}, which is left out here; "
        "scores.jsonl has those of the others."
        for name, count in times.items()
        if count < len(marks)
    ]


def _correct_prompts(scored: Scored, scorer: str) -> float:
    """Return the share of prompts with at least one picture that is right by the official rule.

    Prompts with the same metadata count as one.
    """
    right: dict[str, bool] = {}
    for mark in scored.marks:
        if mark.scorer == scorer:
            key = json.dumps(scored.prompts[mark.prompt])
            right[key] = right.get(key, False) or mark.raw["official"] > 0.5
    return sum(right.values()) / len(right)


def _lacking_tasks(scorer: str, tags: Sequence[str]) -> list[str]:
    """Return a warning if the tags are not GenEval's six tasks."""
    if set(tags) == set(TASKS):
        return []
    lacking = ", ".join(task for task in TASKS if task not in tags) or "none"
    return [f"{scorer}: overall is the mean over {', '.join(groups(tags))}; missing tasks of GenEval: {lacking}."]


def official_lines(scored: Scored, scorer: str) -> list[dict[str, Any]]:
    """Return one line per picture as GenEval's evaluate_images.py writes it, for its summary_scores.py.

    For a scorer without details, the lines have its reasons and no boxes.
    """
    lines = []
    for mark in scored.marks:
        if mark.scorer == scorer:
            seen = _seen(mark.details)
            metadata = scored.prompts[mark.prompt]
            lines.append(
                {
                    "filename": str(scored.samples / mark.image),
                    "tag": metadata["tag"],
                    "prompt": metadata["prompt"],
                    "correct": mark.raw["official"] > 0.5,
                    "reason": seen.get("reason", mark.reasons),
                    "metadata": json.dumps(metadata),
                    "details": json.dumps(seen.get("objects", {})),
                }
            )
    return lines


def _seen(details: str) -> dict[str, Any]:
    """Return the details of rubric.details; empty if a custom scorer has something else there."""
    try:
        seen = json.loads(details or "{}")
    except ValueError:
        return {}
    return seen if isinstance(seen, dict) else {}


def write_official(scored: Scored, output: Path) -> list[Path]:
    """Write results.jsonl for the scorer that judges by GenEval's rule; for several, one results_NAME.jsonl each."""
    judges = [name for name in scored.scorers if "official" in columns(scored, name).names]
    written = []
    for name in judges:
        path = output / ("results.jsonl" if len(judges) == 1 else f"results_{name}.jsonl")
        write_lines(path, official_lines(scored, name))
        written.append(path)
    return written


def write_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Write a file of JSON lines atomically."""
    text = "".join(json.dumps(line) + "\n" for line in lines)
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
