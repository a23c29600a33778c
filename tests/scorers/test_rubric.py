"""Tests of GenEval's scoring rule: 400 verdicts of the release, and cases computed by hand."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from rewards_bridge.scorers.rubric import details, judge, keep, relations

GOLDEN = Path(__file__).parents[1] / "golden" / "geneval_rubric.jsonl"


def _seen(*boxes: tuple[float, float, float, float], score: float = 0.95, color: str | Callable = "red") -> list[dict]:
    return [{"box": list(box), "score": score, "color": color} for box in boxes]


def _metadata(*include: dict, tag: str = "two_object", exclude: tuple = ()) -> dict:
    return {"tag": tag, "include": list(include), "exclude": list(exclude), "prompt": "x"}


A, B, C, D = (0, 0, 10, 10), (20, 0, 30, 10), (40, 0, 50, 10), (60, 0, 70, 10)


def test_the_verdicts_of_the_release() -> None:
    """Every case contains only the detections that were kept, so no threshold is applied."""
    cases = [json.loads(line) for line in GOLDEN.read_text().splitlines()]
    assert len(cases) == 400
    wrong = []
    for index, case in enumerate(cases):
        verdict = judge(case["metadata"], case["detections"])
        if (verdict.strict, verdict.official) != (case["strict"], case["official"]):
            wrong.append(f"case {index}: {verdict}, the release says {case}")
        if verdict.soft != pytest.approx(case["soft"], abs=1e-9):
            wrong.append(f"case {index}: soft {verdict.soft}, the release says {case['soft']}")
        if verdict.strict == bool(verdict.reasons):
            wrong.append(f"case {index}: strict is {verdict.strict}, reasons are {verdict.reasons}")
    assert not wrong, "\n".join(wrong)


def test_all_is_well() -> None:
    verdict = judge(_metadata({"class": "cat", "count": 2}), {"cat": _seen(A, B)})
    assert (verdict.strict, verdict.soft, verdict.official, verdict.reasons) == (True, 1.0, True, [])


@pytest.mark.parametrize(("count", "soft"), [(0, 0.0), (1, 0.5), (2, 1.0), (3, 0.5), (4, 0.0)])
def test_counts_are_exact_for_soft_and_at_least_for_official(count: int, soft: float) -> None:
    verdict = judge(_metadata({"class": "cat", "count": 2}), {"cat": _seen(A, B, C, D)[:count]})
    assert verdict.soft == soft
    assert verdict.strict == (count == 2)
    assert verdict.official == (count >= 2)


def test_soft_is_not_bounded_below() -> None:
    assert judge(_metadata({"class": "cat", "count": 1}), {"cat": _seen(*[A] * 6)}).soft == -4


def test_exclude_binds_only_the_official_rule() -> None:
    metadata = _metadata({"class": "cat", "count": 1}, exclude=({"class": "dog", "count": 1},))
    verdict = judge(metadata, {"cat": _seen(A), "dog": _seen(B)})
    assert verdict.strict
    assert not verdict.official


def test_color_parts() -> None:
    metadata = _metadata({"class": "cat", "count": 2, "color": "red"}, tag="color_attr")
    one_red = judge(metadata, {"cat": _seen(A) + _seen(B, color="blue")})
    assert one_red.soft == pytest.approx((1 + 0.5) / 2)
    assert not one_red.strict
    assert one_red.reasons == ["expected 2 red cat, found red, blue"]
    too_many = judge(metadata, {"cat": _seen(A, B) + _seen(C, color="blue")})
    assert too_many.soft == pytest.approx((0.5 + 0) / 2)
    assert too_many.official  # its two best are red


def test_position_parts() -> None:
    metadata = _metadata(
        {"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["left of", 0]}, tag="position"
    )
    assert judge(metadata, {"cat": _seen(A), "dog": _seen(B)}).soft == 1
    wrong_side = judge(metadata, {"cat": _seen(B), "dog": _seen(A)})
    assert wrong_side.soft == pytest.approx(2 / 3)
    assert wrong_side.reasons == ["expected cat left of target, found right of target"]
    no_target = judge(metadata, {"cat": _seen(A)})
    assert no_target.soft == pytest.approx((0 + 1 + 0) / 3)
    no_cat = judge(metadata, {"dog": _seen(A)})
    assert no_cat.soft == pytest.approx((1 + 0 + 0) / 3)


def test_position_is_judged_only_if_the_color_holds() -> None:
    metadata = _metadata(
        {"class": "dog", "count": 1},
        {"class": "cat", "count": 1, "color": "red", "position": ["left of", 0]},
        tag="position",
    )
    assert judge(metadata, {"cat": _seen(A, color="blue"), "dog": _seen(B)}).soft == pytest.approx((1 + 1 + 0) / 3)


@pytest.mark.parametrize(
    ("other", "held"),
    [
        ((30, 0, 40, 10), {"left of"}),
        ((-30, 0, -20, 10), {"right of"}),
        ((0, 30, 10, 40), {"above"}),
        ((0, -30, 10, -20), {"below"}),
        ((30, 30, 40, 40), {"left of", "above"}),
        ((1, 1, 11, 11), set()),
        ((0, 0, 10, 10), set()),
    ],
)
def test_relations(other: tuple[int, int, int, int], held: set[str]) -> None:
    assert relations((0, 0, 10, 10), other) == held


def test_relations_by_hand() -> None:
    """Centres are 10 apart in x and 8 in y, sides 10: reduced to 8 and 6, divided by the norm 12.806: 0.62 and 0.47."""
    assert relations((10, 8, 20, 18), (0, 0, 10, 10)) == {"right of"}


def test_thresholds() -> None:
    detections = {"cat": _seen(A, score=0.3) + _seen(B, score=0.31) + _seen(C, score=0.9) + _seen(D, score=0.91)}
    assert [d["score"] for d in keep({"tag": "colors"}, detections)["cat"]] == [0.91, 0.9, 0.31]
    assert [d["score"] for d in keep({"tag": "counting"}, detections)["cat"]] == [0.91]


def test_at_most_sixteen_are_kept() -> None:
    assert len(keep({"tag": "colors"}, {"cat": _seen(*[A] * 20)})["cat"]) == 16


def test_costly_colors_are_asked_once_and_only_if_needed() -> None:
    asked: list[str] = []

    def look() -> str:
        asked.append("look")
        return "red"

    detections = {"cat": _seen(A, color=look)}
    judge(_metadata({"class": "cat", "count": 1}), detections)
    assert asked == []
    assert judge(_metadata({"class": "cat", "count": 1, "color": "red"}), detections).strict
    assert asked == ["look"]


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"tag": "counting"}, '"include" must be a list'),
        ({"tag": "counting", "include": []}, '"include" must be a list'),
        ({"tag": "counting", "include": [{"count": 1}]}, 'needs "class"'),
        ({"tag": "counting", "include": [{"class": "cat"}]}, 'needs "count"'),
        ({"tag": "counting", "include": [{"class": "cat", "count": 0}]}, "at least 1; found 0"),
        ({"tag": "position", "include": [{"class": "cat", "count": 1, "position": ["near", 0]}]}, "left of"),
        ({"tag": "position", "include": [{"class": "cat", "count": 1, "position": ["above", 0]}]}, "earlier object"),
        (
            {"tag": "counting", "include": [{"class": "cat", "count": 1}], "exclude": [{"class": "cat"}]},
            'needs "count"',
        ),
    ],
)
def test_incomplete_metadata_are_named(metadata: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        judge(metadata, {})


def test_a_missing_tag_is_named() -> None:
    with pytest.raises(ValueError, match='"tag"'):
        keep({"include": []}, {})


OFFICIAL = [
    (_metadata({"class": "cat", "count": 2}), {"cat": _seen(A)}, "expected cat>=2, found 1"),
    (_metadata({"class": "cat", "count": 1}), {"cat": _seen(A, B, C)}, ""),
    (
        _metadata({"class": "cat", "count": 1}, exclude=({"class": "cat", "count": 2},)),
        {"cat": _seen(A, B, C)},
        "expected cat<2, found 3",
    ),
    (
        _metadata({"class": "bus", "count": 2, "color": "red"}),
        {"bus": _seen(A) + _seen(B, color="blue")},
        "expected red bus>=2, found 1 red; and 1 red, 1 blue",
    ),
    (
        _metadata({"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["left of", 0]}),
        {"dog": _seen(A), "cat": _seen(B)},
        "expected cat left of target, found right of target",
    ),
    (
        _metadata({"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["left of", 0]}),
        {"cat": _seen(B)},
        "expected dog>=1, found 0\nno target for cat to be left of",
    ),
]
"""Metadata, detections, and the reason of the benchmark's own evaluation, derived by hand from its source."""


@pytest.mark.parametrize(("metadata", "kept", "reason"), OFFICIAL)
def test_official_reasons_are_in_the_words_of_the_benchmark(metadata: dict, kept: dict, reason: str) -> None:
    verdict = judge(metadata, kept)
    assert verdict.official == (not reason)
    assert "\n".join(verdict.official_reasons) == reason


def test_details_are_the_boxes_and_the_official_reason() -> None:
    verdict = judge(_metadata({"class": "cat", "count": 2}), {"cat": _seen(A), "dog": []})
    said = json.loads(details(verdict, {"cat": _seen(A, score=1 / 3), "dog": []}))
    assert said == {"reason": "expected cat>=2, found 1", "objects": {"cat": [[0, 0, 10, 10, 0.3333]]}}
