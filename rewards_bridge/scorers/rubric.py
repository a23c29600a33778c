"""GenEval's scoring rule, for any detector: from a prompt's metadata and the detections to three verdicts.

    verdict = judge(metadata, keep(metadata, detections))

Detections are {class: [{"box": [x0, y0, x1, y1], "score": float, "color": str or callable}]}, y down. A colour that is
expensive to determine may be a function without arguments that returns the word; it is called only if needed.

Source: Ghosh et al. 2023, "GenEval" (the official rule); UDM-GRPO, arXiv 2604.18518 (the soft and strict rules).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rewards_bridge.errors import PromptError
from rewards_bridge.scorers.geneval_metadata import MAX_OBJECTS, read_clauses

Detection = Mapping[str, Any]
Detections = Mapping[str, Sequence[Detection]]
Tell = Callable[[Detection], str]

SCORE_THRESHOLD = 0.3
COUNTING_SCORE_THRESHOLD = 0.9
POSITION_THRESHOLD = 0.1


@dataclass(frozen=True)
class Verdict:
    """The verdict on one image: soft is optimised, strict is logged, official is the benchmark's own rule.

    Soft is at most 1 and has no lower bound. reasons lists what violates strict and is empty if it holds;
    official_reasons does the same for official, in the words of the benchmark's own evaluation.
    """

    strict: bool
    soft: float
    official: bool
    reasons: list[str]
    official_reasons: list[str]


@dataclass(frozen=True)
class _Clause:
    name: str
    count: int
    color: str | None
    relation: str | None
    target: int


def keep(metadata: Mapping[str, Any], detections: Detections) -> dict[str, list[Detection]]:
    """Return the detections that count, by class: above the threshold of the tag, best first, at most MAX_OBJECTS.

    Raises PromptError for metadata without a tag.
    """
    if not isinstance(metadata.get("tag"), str):
        raise PromptError(f'GenEval metadata need "tag", a text; found {dict(metadata)}')
    threshold = COUNTING_SCORE_THRESHOLD if metadata["tag"] == "counting" else SCORE_THRESHOLD
    return {
        name: sorted((d for d in objects if d["score"] > threshold), key=lambda d: -d["score"])[:MAX_OBJECTS]
        for name, objects in detections.items()
    }


def judge(metadata: Mapping[str, Any], kept: Detections) -> Verdict:
    """Score one image's detections, as keep() returns them, against its GenEval metadata.

    Raises PromptError, naming the field, if the metadata do not suffice for the rule.
    """
    included, excluded = _read(metadata)
    tell = _remembering_tell()
    soft, reasons = _exact(included, kept, tell)
    official_reasons = _official(included, excluded, kept, tell)
    return Verdict(not reasons, soft, not official_reasons, reasons, official_reasons)


def details(verdict: Verdict, kept: Detections) -> str:
    """Return, as JSON, what the benchmark's own evaluation writes: {"reason": text, "objects": {class: boxes}}.

    A box is [x0, y0, x1, y1, score], pixels, to 4 decimals.
    """
    objects = {
        name: [[round(float(number), 4) for number in (*seen["box"], seen["score"])] for seen in detections]
        for name, detections in kept.items()
        if detections
    }
    return json.dumps({"reason": "\n".join(verdict.official_reasons), "objects": objects})


def relations(box: Sequence[float], other: Sequence[float]) -> set[str]:
    """Return the position of a box relative to another, both [x0, y0, x1, y1]: none, one or two of RELATIONS."""
    dx, reduced_x = _offset(box[0], box[2], other[0], other[2])
    dy, reduced_y = _offset(box[1], box[3], other[1], other[3])
    if abs(reduced_x) < 1e-3 and abs(reduced_y) < 1e-3:
        return set()
    distance = math.hypot(dx, dy)
    x, y = reduced_x / distance, reduced_y / distance
    holds = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {relation for relation, true in holds.items() if true}


def _offset(low: float, high: float, other_low: float, other_high: float) -> tuple[float, float]:
    """Return the distance of two intervals' centres, and that distance less a tenth of both lengths."""
    distance = (low + high - other_low - other_high) / 2
    lengths = abs(high - low) + abs(other_high - other_low)
    return distance, math.copysign(max(abs(distance) - POSITION_THRESHOLD * lengths, 0.0), distance)


def _exact(included: list[_Clause], kept: Detections, tell: Tell) -> tuple[float, list[str]]:
    """Return the soft score and the violations: every class must occur exactly as often as its clause says."""
    parts: list[float] = []
    reasons: list[str] = []
    groups: list[Sequence[Detection] | None] = []  # by clause: the objects that satisfy it, None if they do not
    for clause in included:
        objects = kept.get(clause.name, [])
        parts.append(1 - abs(clause.count - len(objects)) / clause.count)
        wrong = None
        if len(objects) != clause.count:
            wrong = f"expected {clause.count} {clause.name}, found {len(objects)}"
            if clause.color is not None or clause.relation is not None:
                parts.append(0.0)
        else:
            if clause.color is not None:
                colors = [tell(detection) for detection in objects]
                parts.append(1 - abs(clause.count - colors.count(clause.color)) / clause.count)
                if colors.count(clause.color) != clause.count:
                    wrong = f"expected {clause.count} {clause.color} {clause.name}, found {', '.join(colors)}"
            if clause.relation is not None and wrong is None:
                wrong = _misplaced(clause, objects, groups[clause.target])
                parts.append(1.0 if wrong is None else 0.0)
        groups.append(objects if wrong is None else None)
        if wrong is not None:
            reasons.append(wrong)
    return sum(parts) / len(parts), reasons


def _official(included: list[_Clause], excluded: list[_Clause], kept: Detections, tell: Tell) -> list[str]:
    """Return the violations of the benchmark's rule: at least `count` objects per class, the best ones as asked."""
    reasons: list[str] = []
    groups: list[Sequence[Detection] | None] = []
    for clause in included:
        objects = kept.get(clause.name, [])[: clause.count]
        wrong = None
        if len(objects) < clause.count:
            wrong = f"expected {clause.name}>={clause.count}, found {len(objects)}"
        elif clause.color is not None:
            wrong = _miscolored(clause, [tell(detection) for detection in objects])
        if wrong is None and clause.relation is not None:
            wrong = _misplaced(clause, objects, groups[clause.target])
        groups.append(objects if wrong is None else None)
        if wrong is not None:
            reasons.append(wrong)
    for clause in excluded:
        count = len(kept.get(clause.name, []))
        if count >= clause.count:
            reasons.append(f"expected {clause.name}<{clause.count}, found {count}")
    return reasons


def _miscolored(clause: _Clause, colors: list[str]) -> str | None:
    """Return how these colours violate the benchmark's rule, None if they do not."""
    right = colors.count(str(clause.color))
    if right == clause.count:
        return None
    seen = ", ".join(f"{colors.count(color)} {color}" for color in dict.fromkeys(colors))
    return f"expected {clause.color} {clause.name}>={clause.count}, found {right} {clause.color}; and {seen}"


def _misplaced(clause: _Clause, objects: Sequence[Detection], target: Sequence[Detection] | None) -> str | None:
    """Return the first violation of the clause's position, None if every object has it relative to every target."""
    if target is None:
        return f"no target for {clause.name} to be {clause.relation}"
    for detection in objects:
        for other in target:
            held = relations(detection["box"], other["box"])
            if clause.relation not in held:
                seen = " and ".join(sorted(held)) or "neither beside, above nor below"
                return f"expected {clause.name} {clause.relation} target, found {seen} target"
    return None


def _remembering_tell() -> Tell:
    """Return a function that returns a detection's colour and calls a callable one only once."""
    colors: dict[int, str] = {}

    def tell(detection: Detection) -> str:
        key = id(detection)
        if key not in colors:
            color = detection["color"]
            colors[key] = color() if callable(color) else color
        return colors[key]

    return tell


def _read(metadata: Mapping[str, Any]) -> tuple[list[_Clause], list[_Clause]]:
    """Return the checked include and exclude clauses."""
    include, exclude = read_clauses(metadata)
    return [_to_clause(entry) for entry in include], [_to_clause(entry) for entry in exclude]


def _to_clause(entry: Mapping[str, Any]) -> _Clause:
    relation, target = entry.get("position", (None, 0))
    return _Clause(entry["class"], entry["count"], entry.get("color"), relation, target)
