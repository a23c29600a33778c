"""Check that a scorer returned one finite number per image; if not, raise an error that names and saves the images."""

from __future__ import annotations

import json
import secrets
import time
from pathlib import Path

import numpy as np

from rewards_bridge.errors import BadScoresError
from rewards_bridge.protocol.messages import Batch
from rewards_bridge.scorers.base import Scores

MAX_NAMED = 16  # images named in an error's text
MAX_KEPT = 64  # images kept of one batch


def check_scores(scores: Scores, batch: Batch, batch_id: int, scorer: str, folder: str | None) -> None:
    """Raise BadScoresError, and save its images in folder, unless every array has one finite value per image."""
    problems = find_problems(scores, len(batch.prompts))
    if not problems:
        return
    lines = [f"image {index} ({batch.prompts[index]!r}): {text}" for index, text in problems.items()]
    if len(lines) > MAX_NAMED:
        lines[MAX_NAMED:] = [f"and {len(lines) - MAX_NAMED} more images"]
    message = f"scorer {scorer!r} gave no usable scores for {len(problems)} of {len(batch.prompts)} images of batch "
    message += f"{batch_id}:\n" + "\n".join(lines)
    kept: list[str] = []
    if folder is not None:
        try:
            kept = keep_images(problems, scores, batch, batch_id, Path(folder))
            message += f"\ntheir images are kept in {folder}"
        except (OSError, ImportError, ValueError) as error:
            message += f"\ntheir images could not be kept in {folder}: {type(error).__name__}: {error}"
    raise BadScoresError(message, list(problems), [batch.prompts[index] for index in problems], kept)


def find_problems(scores: Scores, count: int) -> dict[int, str]:
    """Return the problems by image index; a wrong count concerns every image, since values cannot be assigned."""
    arrays = {"score": scores.score, **{f"raw[{name!r}]": values for name, values in scores.raw.items()}}
    counts = {name: len(values) for name, values in arrays.items()} | {"reasons": len(scores.reasons)}
    if scores.details:
        counts["details"] = len(scores.details)
    wrong = [f"{number} {name} for {count} images" for name, number in counts.items() if number != count]
    if wrong:
        return dict.fromkeys(range(count), ", ".join(wrong))
    problems: dict[int, str] = {}
    for name, values in arrays.items():
        for index in np.flatnonzero(~np.isfinite(values)).tolist():
            text = f"{name} = {float(values[index])}"
            problems[index] = f"{problems[index]}, {text}" if index in problems else text
    return dict(sorted(problems.items()))


def keep_images(problems: dict[int, str], scores: Scores, batch: Batch, batch_id: int, folder: Path) -> list[str]:
    """Save the images concerned as PNG files, with one line each in kept.jsonl; return the PNG paths."""
    from PIL import Image  # needed only for bad scores

    folder.mkdir(parents=True, exist_ok=True)
    # Several processes of a run save to the same folder and use the same batch numbers.
    stamp = f"{time.strftime('%Y%m%dT%H%M%S')}_{secrets.token_hex(3)}"
    kept = []
    with (folder / "kept.jsonl").open("a", encoding="utf-8") as record:
        for index, problem in list(problems.items())[:MAX_KEPT]:
            path = folder / f"{stamp}_batch{batch_id:06d}_image{index:04d}.png"
            Image.fromarray(batch.images[index]).save(path)
            kept.append(str(path))
            line = {
                "image": path.name,
                "prompt": batch.prompts[index],
                "metadata": batch.metadata[index],
                "problem": problem,
                "score": _number(scores.score, index),
                "raw": {name: _number(values, index) for name, values in scores.raw.items()},
            }
            record.write(json.dumps(line) + "\n")
    return kept


def _number(values: np.ndarray, index: int) -> float | str | None:
    """Return the value for JSON: "nan" and "inf" as text, null where there is none."""
    if index >= len(values):
        return None
    value = float(values[index])
    return value if np.isfinite(value) else str(value)
