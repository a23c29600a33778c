"""GenEval's scoring rule, for any detector: what a prompt asks for and what was detected in, three verdicts out.

    verdict = judge(metadata, keep(metadata, detections))

Detections are {class: [{"box": [x0, y0, x1, y1], "score": float, "color": str or callable}]}, y down. A colour that is
costly to tell may be a function without arguments that returns the word: it is called only if a verdict depends on it.

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
    """One image judged: soft is what is optimised, strict what is logged, official the benchmark's own rule.

    Soft is at most 1 and not bounded below. Reasons name what strict found wrong and are empty if it holds;
    official_reasons likewise, in the words of the benchmark's own evaluation.
    """

    strict: bool
    soft: float
    official: bool
    reasons: list[str]
    official_reasons: list[str]


@dataclass(frozen=True)
class _Want:
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
        name: sorted((d for d in found if d["score"] > threshold), key=lambda d: -d["score"])[:MAX_OBJECTS]
        for name, found in detections.items()
    }


def judge(metadata: Mapping[str, Any], kept: Detections) -> Verdict:
    """Score one image's detections, as keep() returns them, against its GenEval metadata.

    Raises PromptError, naming the field, if the metadata are not what the rule needs.
    """
    wants, unwanted = _read(metadata)
    tell = _remembering_tell()
    soft, reasons = _exact(wants, kept, tell)
    official_reasons = _official(wants, unwanted, kept, tell)
    return Verdict(not reasons, soft, not official_reasons, reasons, official_reasons)


def details(verdict: Verdict, kept: Detections) -> str:
    """JSON of what the benchmark's own evaluation writes of an image: {"reason": text, "objects": {class: boxes}}.

    A box is [x0, y0, x1, y1, score], pixels, to 4 decimals.
    """
    objects = {
        name: [[round(float(number), 4) for number in (*seen["box"], seen["score"])] for seen in found]
        for name, found in kept.items()
        if found
    }
    return json.dumps({"reason": "\n".join(verdict.official_reasons), "objects": objects})


def relations(box: Sequence[float], other: Sequence[float]) -> set[str]:
    """Where a box lies relative to another, both [x0, y0, x1, y1]: none, one or two of RELATIONS."""
    dx, reduced_x = _offset(box[0], box[2], other[0], other[2])
    dy, reduced_y = _offset(box[1], box[3], other[1], other[3])
    if abs(reduced_x) < 1e-3 and abs(reduced_y) < 1e-3:
        return set()
    distance = math.hypot(dx, dy)
    x, y = reduced_x / distance, reduced_y / distance
    holds = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {relation for relation, true in holds.items() if true}


def _offset(low: float, high: float, other_low: float, other_high: float) -> tuple[float, float]:
    """Return the distance of two intervals' centres, and the same less a tenth of both lengths."""
    distance = (low + high - other_low - other_high) / 2
    lengths = abs(high - low) + abs(other_high - other_low)
    return distance, math.copysign(max(abs(distance) - POSITION_THRESHOLD * lengths, 0.0), distance)


def _exact(wants: list[_Want], kept: Detections, tell: Tell) -> tuple[float, list[str]]:
    """Return the soft score and what is wrong: every wanted class has to be there exactly as often as wanted."""
    parts: list[float] = []
    reasons: list[str] = []
    groups: list[Sequence[Detection] | None] = []  # by want: the objects that met it, None if they did not
    for want in wants:
        found = kept.get(want.name, [])
        parts.append(1 - abs(want.count - len(found)) / want.count)
        wrong = None
        if len(found) != want.count:
            wrong = f"expected {want.count} {want.name}, found {len(found)}"
            if want.color is not None or want.relation is not None:
                parts.append(0.0)
        else:
            if want.color is not None:
                colors = [tell(detection) for detection in found]
                parts.append(1 - abs(want.count - colors.count(want.color)) / want.count)
                if colors.count(want.color) != want.count:
                    wrong = f"expected {want.count} {want.color} {want.name}, found {', '.join(colors)}"
            if want.relation is not None and wrong is None:
                wrong = _misplaced(want, found, groups[want.target])
                parts.append(1.0 if wrong is None else 0.0)
        groups.append(found if wrong is None else None)
        if wrong is not None:
            reasons.append(wrong)
    return sum(parts) / len(parts), reasons


def _official(wants: list[_Want], unwanted: list[_Want], kept: Detections, tell: Tell) -> list[str]:
    """Return what the benchmark's rule finds wrong: at least as many of every class as wanted, the best of them as
    asked.
    """
    reasons: list[str] = []
    groups: list[Sequence[Detection] | None] = []
    for want in wants:
        found = kept.get(want.name, [])[: want.count]
        wrong = None
        if len(found) < want.count:
            wrong = f"expected {want.name}>={want.count}, found {len(found)}"
        elif want.color is not None:
            wrong = _miscolored(want, [tell(detection) for detection in found])
        if wrong is None and want.relation is not None:
            wrong = _misplaced(want, found, groups[want.target])
        groups.append(found if wrong is None else None)
        if wrong is not None:
            reasons.append(wrong)
    for want in unwanted:
        count = len(kept.get(want.name, []))
        if count >= want.count:
            reasons.append(f"expected {want.name}<{want.count}, found {count}")
    return reasons


def _miscolored(want: _Want, colors: list[str]) -> str | None:
    """Return what the benchmark's rule says of these colours, None if all are as asked for."""
    right = colors.count(str(want.color))
    if right == want.count:
        return None
    seen = ", ".join(f"{colors.count(color)} {color}" for color in dict.fromkeys(colors))
    return f"expected {want.color} {want.name}>={want.count}, found {right} {want.color}; and {seen}"


def _misplaced(want: _Want, found: Sequence[Detection], target: Sequence[Detection] | None) -> str | None:
    """Return what is wrong with the place of the objects found, None if every one is where it should be of every
    target.
    """
    if target is None:
        return f"no target for {want.name} to be {want.relation}"
    for detection in found:
        for other in target:
            held = relations(detection["box"], other["box"])
            if want.relation not in held:
                seen = " and ".join(sorted(held)) or "neither beside, above nor below"
                return f"expected {want.name} {want.relation} target, found {seen} target"
    return None


def _remembering_tell() -> Tell:
    """Return a function that says a detection's colour and asks a lazy one only once."""
    told: dict[int, str] = {}

    def tell(detection: Detection) -> str:
        key = id(detection)
        if key not in told:
            color = detection["color"]
            told[key] = color() if callable(color) else color
        return told[key]

    return tell


def _read(metadata: Mapping[str, Any]) -> tuple[list[_Want], list[_Want]]:
    """Return the include and exclude clauses, checked."""
    include, exclude = read_clauses(metadata)
    return [_want(clause) for clause in include], [_want(clause) for clause in exclude]


def _want(clause: Mapping[str, Any]) -> _Want:
    relation, target = clause.get("position", (None, 0))
    return _Want(clause["class"], clause["count"], clause.get("color"), relation, target)
