"""Compare two scored folders of pictures prompt by prompt: what changed, by how much, and the largest changes."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from udm_grpo.reporting.pictures import before_after
from udm_grpo.scoring.folder_scores import Mark, Scored, ScoringError
from udm_grpo.scoring.sample_folder import load_picture
from udm_grpo.scoring.score_summary import CONFIDENCE, columns, groups, interval, spread

MAX_CELL = 256
"""Maximum pixels of a side on comparison.png; larger pictures are scaled down."""
DRAWING = ("dtype", "steps", "guidance_scale", "guidance_trunc", "height", "width", "text_length", "seed")
"""Settings of `udm_grpo.sample` that change pictures independently of the weights."""


def compare(before: Scored, after: Scored, most: int, resamples: int, seed: int) -> dict[str, Any]:
    """Return comparison.json: for prompts and scorers in both, values before and after, and the most changed prompts.

    Prompts are the same if their metadata is. Raises ScoringError if the folders have no prompt or no scorer in common,
    or if scorers of the same name differ.
    """
    pairs, warnings = _common_prompts(before, after)
    warnings += _other_settings(before.samples, after.samples)
    names = common_scorers(before, after.scorers)
    alone = [name for name in {**before.scorers, **after.scorers} if name not in names]
    if alone:
        listed = ", ".join(alone)
        warnings.append(f"{len(alone)} scorers are in only one of the folders and are not compared: {listed}.")
    return {
        "before": str(before.samples),
        "after": str(after.samples),
        "prompts": len(pairs),
        "confidence": CONFIDENCE,
        "resamples": resamples,
        "seed": seed,
        "scorers": {name: _compare_scorer(before, after, pairs, name, most, resamples, seed) for name in names},
        "warnings": warnings,
    }


def _other_settings(before: Path, after: Path) -> list[str]:
    """Return a warning about settings of `udm_grpo.sample` that differ between the folders, if any do."""
    old, new = _drawn_with(before), _drawn_with(after)
    differing = [name for name in DRAWING if name in old and name in new and old[name] != new[name]]
    if not differing:
        return []
    listed = ", ".join(f"{name} {old[name]} before and {new[name]} after" for name in differing)
    note = "the pictures were drawn with different settings, so the difference is not due to the weights alone"
    return [f"{note}: {listed}."]


def _drawn_with(samples: Path) -> dict[str, Any]:
    """Return settings.json of a folder of pictures; empty if `udm_grpo.sample` did not draw it."""
    try:
        settings = json.loads((samples / "settings.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return settings if isinstance(settings, dict) else {}


def _common_prompts(before: Scored, after: Scored) -> tuple[list[tuple[int, int]], list[str]]:
    """Return (number before, number after) of the prompts with pictures in both, and warnings about the others."""
    first, second = _by_metadata(before), _by_metadata(after)
    pairs = [(number, second[key]) for key, number in first.items() if key in second]
    if not pairs:
        raise ScoringError(f"{before.samples} and {after.samples} have no prompt in common; compare other folders.")
    warnings = [
        f"{len(mine) - len(pairs)} of {len(mine)} prompts of {folder.samples} are not in the other folder and "
        "are left out."
        for folder, mine in ((before, first), (after, second))
        if len(mine) > len(pairs)
    ]
    return pairs, warnings


def _by_metadata(scored: Scored) -> dict[tuple[str, int], int]:
    """Return the number of every prompt with pictures, by (metadata, count of equal metadata so far)."""
    numbers: dict[tuple[str, int], int] = {}
    times: dict[str, int] = {}
    for number in sorted({mark.prompt for mark in scored.marks}):
        key = json.dumps(scored.prompts[number], sort_keys=True)
        times[key] = times.get(key, 0) + 1
        numbers[key, times[key]] = number
    return numbers


def common_scorers(before: Scored, scorers: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the names of the scorers, {name: {"scorer", "options"}}, that also scored `before`.

    Raises ScoringError if there are none, or if one of the same name was another scorer or had other options.
    """
    names = [name for name in scorers if name in before.scorers]
    if not names:
        raise ScoringError(
            f"no scorer in common: {', '.join(before.scorers)} scored {before.samples} before, now the scorers are "
            f"{', '.join(scorers)}; score one folder with the scorers of the other too."
        )
    lines = [
        f"{name}: before {before.scorers[name]}, now {scorers[name]}"
        for name in names
        if before.scorers[name] != scorers[name]
    ]
    if lines:
        heading = "scores with different settings cannot be compared; score one of the folders again:"
        raise ScoringError("\n  ".join([heading, *lines]))
    return names


def _compare_scorer(
    before: Scored, after: Scored, pairs: Sequence[tuple[int, int]], name: str, most: int, resamples: int, seed: int
) -> dict[str, Any]:
    """Return {"values": {value: {key: {before, after, difference}}}, "prompts": counts, "changed": rows}.

    The keys are "mean", "overall" and "tag:NAME".
    """
    first = columns(before, name, [pair[0] for pair in pairs])
    second = columns(after, name, [pair[1] for pair in pairs])
    # The same seed and tags resample the same prompts for both.
    left, right = spread(first, resamples, seed), spread(second, resamples, seed)
    tags = groups(first.tags)
    prompts = {"mean": len(pairs), "overall": max(len(rows) for rows in tags.values())}
    prompts.update({f"tag:{tag}": len(rows) for tag, rows in tags.items()})
    values: dict[str, dict[str, Any]] = {}
    for value in (value for value in second.names if value in first.names):
        a, b = first.names.index(value), second.names.index(value)
        values[value] = {}
        for key in left:
            size = prompts[key]
            change = right[key][:, b] - left[key][:, a]
            moved = {"before": float(left[key][0, a]), "after": float(right[key][0, b])}
            values[value][key] = {**moved, "difference": interval(change, size)}
    scores = [(table.sums[:, 0] / table.counts) for table in (first, second)]
    change = scores[1] - scores[0]
    order = [int(row) for row in np.argsort(-np.abs(change), kind="stable") if change[row] != 0][:most]
    return {
        "values": values,
        "prompts": {
            "better": int((change > 0).sum()),
            "worse": int((change < 0).sum()),
            "the same": int((change == 0).sum()),
        },
        "changed": [_changed(before, after, name, pairs[row], (scores[0][row], scores[1][row])) for row in order],
    }


def _changed(
    before: Scored, after: Scored, name: str, pair: tuple[int, int], means: tuple[float, float]
) -> dict[str, Any]:
    """Return a prompt that changed, with the pair of its pictures that changed most in the same direction."""
    difference = means[1] - means[0]
    old, new = (
        [mark for mark in scored.marks if mark.scorer == name and mark.prompt == number]
        for scored, number in zip((before, after), pair, strict=True)
    )
    couples: list[tuple[Mark, Mark]] = list(zip(old, new, strict=False))
    shown = max(couples, key=lambda couple: np.sign(difference) * (couple[1].score - couple[0].score))
    return {
        "prompt": after.prompts[pair[1]]["prompt"],
        "tag": after.prompts[pair[1]]["tag"],
        "before": float(means[0]),
        "after": float(means[1]),
        "difference": float(difference),
        "pictures": {
            side: {"file": str(scored.samples / mark.image), "score": mark.score, "reasons": mark.reasons}
            for side, scored, mark in (("before", before, shown[0]), ("after", after, shown[1]))
        },
    }


def draw_changed(comparison: Mapping[str, Any], output: Path) -> dict[str, str]:
    """Draw the most changed prompts of every scorer; return {scorer: file} for scorers with any change.

    The file of the first scorer is comparison.png, of others comparison_NAME.png. Raises ScoringError if pictures are
    missing.
    """
    drawn = {}
    for index, (name, scorer) in enumerate(comparison["scorers"].items()):
        file = f"comparison_{name}.png" if index else "comparison.png"
        (output / file).unlink(missing_ok=True)
        if scorer["changed"]:
            old, new = _cells([row["pictures"] for row in scorer["changed"]])
            captions = [f"{row['before']:.2f} -> {row['after']:.2f}: {row['prompt']}" for row in scorer["changed"]]
            before_after(old, new, captions, output / file)
            drawn[name] = file
    return drawn


def _cells(rows: Sequence[Mapping[str, Any]]) -> tuple[UInt8[np.ndarray, "B H W 3"], UInt8[np.ndarray, "B H W 3"]]:
    """Return the pictures before and after, all of one size: as they are, or each fitted into the same frame."""
    files = [Path(row[side]["file"]) for side in ("before", "after") for row in rows]
    try:
        pictures = [Image.fromarray(load_picture(file)) for file in files]
    except OSError as error:
        raise ScoringError(f"a picture to be shown can no longer be read: {error}") from error
    frame = (max(picture.width for picture in pictures), max(picture.height for picture in pictures))
    scale = min(1.0, MAX_CELL / max(frame))
    frame = (max(1, round(frame[0] * scale)), max(1, round(frame[1] * scale)))
    fitted = [each if each.size == frame else ImageOps.pad(each, frame, color="white") for each in pictures]
    cells = np.stack([np.asarray(each) for each in fitted])
    return cells[: len(rows)], cells[len(rows) :]
