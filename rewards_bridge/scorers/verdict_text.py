"""Read the number in a judge's answer: the one that it clearly gives as its verdict, or none.

A model that is asked for "Score: NUMBER" may also think aloud, repeat the scale, rate single criteria, mention other
scores, or be truncated. Only these are verdicts, and only if all of them are the same number:

- "Score" at the start of a line or sentence or after a colon, preceded only by words such as "overall" or "my", then a
  colon or similar, then the number; the scale may precede it in brackets, and "/10" or "out of 10" may follow if that
  is the upper end of the scale. A later "no, score: 5" makes the answer unclear.
- "score" in an answer that is a JSON object, or has one as its only fenced block.
- An answer that is only a number.

Thoughts (<think> and similar) are ignored. A number that continues in another way (7-8, 4/5, 80 %, 1,000, 7½) is not
guessed at.
"""

from __future__ import annotations

import bisect
import contextlib
import json
import re
import sys
from typing import Any

MAX_CHARACTERS = 20_000
"""Limit for an answer without its thoughts."""
_PLAIN = {code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}
_PLAIN |= dict.fromkeys([0x3000, 0xA0, 0x202F], " ") | dict.fromkeys([0x2212, 0x2013, 0x2014], "-")
_PLAIN |= dict.fromkeys([0x201C, 0x201D], '"') | dict.fromkeys([0x2018, 0x2019], "'") | {0x2044: "/"}
"""Full-width characters, wide spaces, minus signs and dashes, quotes, and the fraction slash -> their ASCII forms."""

_THOUGHT = re.compile(
    r"(?P<begin><(?:think|thinking|thoughts?|reasoning)>|\[THINK\]|◁think▷|<\|begin_of_thought\|>)"
    r"|</(?:think|thinking|thoughts?|reasoning)>|\[/THINK\]|◁/think▷|<\|end_of_thought\|>",
    re.IGNORECASE,
)
_CHANNEL, _FINAL_CHANNEL = "<|channel|>", "<|channel|>final<|message|>"

_NUMBER = r"[-+]?(?:\d+(?:[.,]\d+)*|[.,]\d+)"
_MARKUP = r"[\s*_`\"'|<>{}\[\]()\\$]{0,40}"
_RANGE = r"\d\s*(?:[-=]|to\b|\.\.)\s*\w|out\s+of\b|max|scale"
_SCALE = rf"(?:[\s*_`]{{0,40}}[(\[](?=[^)\]\n]*(?:{_RANGE}))[^()\[\]\n]{{1,60}}[)\]])?"
_QUALIFIER = (
    r"(?:my|the|this|so|thus|therefore|hence|final|overall|total|resulting|is|"
    r"answer|verdict|rating|evaluation|assessment|judg(?:e?ment)|result|conclusion)\b"
)
_LEAD = re.compile(rf"[\W_]*(?:\d+[.)]\s*)?(?:{_QUALIFIER}[\W_]*)*", re.IGNORECASE)
_MAX_LEAD = 200
_MENTION = re.compile(r"\bscore\b", re.IGNORECASE)
_BREAK = re.compile(r"\n|[.!?]\s|:\s")
_CLAUSE = re.compile(r"[,;(-][\W_]*$")
_TAIL = re.compile(
    rf"(?:\s+(?:for|of)\s+(?:this|the)\s+(?:image|picture))?{_SCALE}{_MARKUP}"
    rf"(?P<separator>-\s{_MARKUP}|(?:(?:is\b|->|[:=→]){_SCALE}{_MARKUP})*)(?:boxed\{{)?(?P<number>{_NUMBER})",
    re.IGNORECASE,
)
_NOTHING = re.compile(rf"{_MARKUP}[:=-]{_MARKUP}(?:n\s*/\s*a|none|null|unknown|undefined)\b", re.IGNORECASE)
_OF = re.compile(
    rf"[\s*_`]{{0,40}}(?:points?\s+)?[(\[]?\s{{0,9}}(?:/|out\s+of\b|of\b)\s{{0,9}}(?P<whole>{_NUMBER})", re.IGNORECASE
)
_GOES_ON = re.compile(
    r"\w|[.,]\d|\.\.|[ \t]+\d"
    r"|[\s*_`]{0,40}(?:[%/±+:]|per\s?cent\b|[-~]\s{0,9}\d|(?:to|or|and)\s+[-+]?\d)"
    rf"|\s{{0,9}}[,;]\s{{0,9}}{_NUMBER}\s{{0,9}}(?:$|\n|[.,;)])",
    re.IGNORECASE,
)
_BARE = re.compile(rf"{_MARKUP}(?P<number>{_NUMBER})")
_FENCED = re.compile(r"```(?:json)?\s*(\{[^`]*\})\s*```", re.IGNORECASE)
_KEYS = ("score", "overall_score", "final_score", "total_score")


class UnreadableError(ValueError):
    """An answer without one clear verdict; the text gives the reason but not the answer."""


def read_verdict(text: str, high: float, pattern: re.Pattern[str] | None = None) -> float:
    """Return the number that an answer gives; high is the upper end of the scale. UnreadableError if there is none.

    pattern: instead of the rules above, a regular expression with one group, the number; all its matches must agree.
    """
    answer = _without_thoughts(text).translate(_PLAIN)
    if len(answer) > MAX_CHARACTERS:
        raise UnreadableError(f"it has more than {MAX_CHARACTERS} characters")
    if pattern is not None:
        return _only([_pattern_number(answer, match) for match in pattern.finditer(answer)])
    fenced = _FENCED.findall(answer)
    for body in fenced if len(fenced) == 1 else [answer.strip()]:
        if body.startswith("{") and (content := _json_object(body)) is not None:
            return _json_number(content, high)
    bare = _BARE.match(answer)
    if bare and not re.search(r"\w", _after_scale(answer[bare.end() :], high)) and not _goes_on(answer, bare, high):
        return _as_number(bare["number"])
    return _only(list(_statements(answer, high)))


def _without_thoughts(text: str) -> str:
    """Return the answer without thoughts; UnreadableError if they do not end."""
    if _CHANNEL in text:
        if _FINAL_CHANNEL not in text:
            raise UnreadableError("it has thoughts and no answer")
        text = text.rpartition(_FINAL_CHANNEL)[2]
    kept, at, inside = "", 0, False
    for tag in _THOUGHT.finditer(text):
        if tag["begin"] and not inside:
            kept, inside = f"{kept}\n{text[at : tag.start()]}", True
        elif not tag["begin"]:
            kept, inside = kept if inside else "", False  # some servers omit the opening tag
            at = tag.end()
    if inside:
        raise UnreadableError("its thoughts do not end")
    return f"{kept}\n{text[at:]}"


def _only(numbers: list[float | None]) -> float:
    """Return the number that all statements agree on; None stands for a statement without a clear number."""
    if not numbers:
        raise UnreadableError("it has no number that is clearly its score")
    number = numbers[0]
    if number is None or any(other != number for other in numbers):
        raise UnreadableError(
            "it has more than one number that could be its score, or one that continues in another way"
        )
    return number


def _statements(answer: str, high: float) -> list[float | None]:
    """Return all scores that the answer states, one for each statement."""
    numbers: list[float | None] = []
    breaks = [0, *(each.end() for each in _BREAK.finditer(answer))]
    for mention in _MENTION.finditer(answer):
        start = breaks[bisect.bisect_right(breaks, mention.start()) - 1]
        before = answer[max(start, mention.start() - _MAX_LEAD) : mention.start()]
        if not _LEAD.fullmatch(before) and not (numbers and _CLAUSE.search(before)):
            continue  # the score of something else, or an intermediate one
        tail = _TAIL.match(answer, mention.end())
        if tail:
            numbers.append(_stated(answer, mention.end(), tail, high))
        elif _NOTHING.match(answer, mention.end()):
            numbers.append(None)
    return numbers


def _stated(answer: str, start: int, tail: re.Match[str], high: float) -> float | None:
    number = tail["number"]
    line_rest = answer[tail.end() :].partition("\n")[0]
    elsewhere = "\n" in answer[start : tail.start("number")]
    if _goes_on(answer, tail, high) or (number.startswith("-") and not tail["separator"]):
        return None
    if elsewhere and re.search(r"\w", _after_scale(line_rest, high)):
        return None  # the start of the next line, such as the number of a list item
    try:
        return _as_number(number)
    except UnreadableError:
        return None


def _after_scale(rest: str, high: float) -> str:
    """Return the text after a number, without "/10" if the scale ends at 10."""
    whole = _OF.match(rest)
    with contextlib.suppress(UnreadableError):
        if whole and _as_number(whole["whole"]) == high:
            return rest[whole.end() :]
    return rest


def _goes_on(answer: str, match: re.Match[str], high: float) -> bool:
    """Return whether the text after the number changes it or makes it part of something else."""
    rest = answer[match.end("number") :]
    after = _after_scale(rest, high)
    return bool(_GOES_ON.match(after) or (after == rest and _OF.match(rest)))


def _as_number(text: str) -> float:
    """Return this text as a number, with a decimal point or comma; UnreadableError if it is ambiguous."""
    separators = re.findall("[.,]", text)
    if len(separators) > 1 or re.fullmatch(r"[-+]?[1-9]\d*,\d{3}", text):
        raise UnreadableError(f"{text!r} is ambiguous")
    return float(text.replace(",", "."))


def _pattern_number(answer: str, match: re.Match[str]) -> float | None:
    if re.match(r"\d|[.,]\d", answer[match.end() :]):
        return None  # cut in the middle of a number
    try:
        return float(match[1].replace(",", "."))
    except (AttributeError, ValueError):
        return None


def _json_object(body: str) -> list[tuple[str, Any]] | None:
    """Return the pairs of a JSON object in order; None if the text is not one."""
    try:
        content = json.loads(body, object_pairs_hook=list)
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, list) else None


def _json_number(content: list[tuple[str, Any]], high: float) -> float:
    by_key = {key: [value for name, value in content if name.lower().replace(" ", "_") == key] for key in _KEYS}
    stated = by_key["score"] or [value for values in by_key.values() for value in values]
    return _only([_json_value(value, high) for value in stated])


def _json_value(value: Any, high: float) -> float | None:
    if isinstance(value, str):
        return next(iter(_statements(f"Score: {value}", high)), None)
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > sys.float_info.max:
        return None
    return float(value)
