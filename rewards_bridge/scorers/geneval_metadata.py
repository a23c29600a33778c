"""GenEval metadata: the one reader shared by prompt files, samples folders, the command line and servers.

    entry = read_metadata({"tag": "counting", "include": [{"class": "dog", "count": 2.0, "color": None}]})
    entry["include"]                        # [{"class": "dog", "count": 2}]
    texts = problems(entry, WORDS)          # [] if a judge with these words can use it

Null is the same as absent and 2.0 the same as 2, because other JSON writers and tables produce both. Anything else that
deviates from GenEval's format is reported as a problem and never guessed.

Source: Ghosh et al. 2023, "GenEval" (the format of its evaluation metadata).
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rewards_bridge.errors import PromptError

RELATIONS = ("left of", "right of", "above", "below")
MAX_OBJECTS = 16
"""Detections that GenEval's rule keeps per class, and thus the largest number that it can count."""

_KEYS = ("class", "count", "color", "position")
_TOP_KEYS = ("tag", "include", "exclude")


@dataclass(frozen=True)
class Words:
    """The vocabulary of a judge: its classes and colors, and its tags if it knows only some."""

    judge: str
    classes: Sequence[str]
    colors: Sequence[str]
    tags: Sequence[str] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Other names of classes -> the name that the judge knows."""


def read_metadata(entry: Any, words: Words | None = None) -> dict[str, Any]:
    """Return the metadata without null fields and with whole numbers as int; does not modify `entry`.

    Raises PromptError with all problems; with `words`, also for names that the judge does not know.
    """
    if texts := problems(entry, words):
        raise PromptError("; ".join(texts))
    return _normalized(entry)


def read_clauses(entry: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the include and exclude lists as `read_metadata` does, without checking the tag; PromptError likewise."""
    if texts := [*_list_problems("include", entry.get("include"), None), *_exclude_problems(entry, None)]:
        raise PromptError("; ".join(texts))
    whole = _normalized(entry)
    return whole["include"], whole.get("exclude", [])


def problems(entry: Any, words: Words | None = None) -> list[str]:
    """Return the problems for which `read_metadata` would raise; empty if there are none."""
    if not isinstance(entry, Mapping):
        return [f'GenEval metadata must be an object like {{"tag": ..., "include": [...]}}; found {_kind(entry)}']
    texts = [*_misspelt(entry, _TOP_KEYS, "the metadata have")]
    tag = entry.get("tag")
    if not isinstance(tag, str) or not tag.strip():
        texts.append(f'"tag" must be a text that is not empty; found {_shown(tag)}')
    elif words and words.tags and tag not in words.tags:
        texts.append(f'"tag" is {tag!r}; {words.judge} knows {", ".join(words.tags)}')
    return [*texts, *_list_problems("include", entry.get("include"), words), *_exclude_problems(entry, words)]


def _exclude_problems(entry: Mapping[str, Any], words: Words | None) -> Iterator[str]:
    if entry.get("exclude") is not None:
        yield from _list_problems("exclude", entry["exclude"], words)


def _list_problems(name: str, clauses: Any, words: Words | None) -> Iterator[str]:
    needed = name == "include"
    if not isinstance(clauses, list | tuple) or (needed and not clauses):
        least = " of at least one object" if needed else ""
        yield f'"{name}" must be a list{least} like {{"class": "dog", "count": 1}}; found {_shown(clauses)}'
        return
    for index, clause in enumerate(clauses):
        where = f'"{name}"[{index}]'
        if not isinstance(clause, Mapping):
            yield f'{where} must be an object like {{"class": "dog", "count": 1}}; found {_kind(clause)}'
            continue
        yield from _misspelt(clause, _KEYS, f"{where} has")
        yield from _class_problems(where, clause.get("class"), words)
        yield from _count_problems(where, clause.get("count"), MAX_OBJECTS + (not needed))
        yield from _color_problems(where, clause.get("color"), words)
        yield from _position_problems(where, clause.get("position"), index)
        for key in () if needed else ("color", "position"):
            if clause.get(key) is not None:
                yield f'{where} has "{key}", but GenEval\'s rule looks only at "class" and "count" in "exclude"'


def _class_problems(where: str, name: Any, words: Words | None) -> Iterator[str]:
    if not isinstance(name, str) or not name.strip():
        yield f'{where} needs "class", a text; found {_shown(name)}'
    elif words and name not in words.classes:
        instead = f"; GenEval calls it {words.aliases[name]!r}" if name in words.aliases else ""
        yield f"{where}: {words.judge} knows no class {name!r}, only {_some(words.classes)}{instead}"


def _count_problems(where: str, count: Any, largest: int) -> Iterator[str]:
    number = _whole(count)
    if number is None or number < 1:
        yield f'{where} needs "count", a whole number of at least 1; found {_shown(count)}'
    elif number > largest:
        yield f'{where}: "count" is {number}, but GenEval\'s rule keeps at most {MAX_OBJECTS} objects of a class'


def _color_problems(where: str, color: Any, words: Words | None) -> Iterator[str]:
    if color is None:
        return
    if not isinstance(color, str) or not color.strip():
        yield f'{where}: "color" must be a text; found {_shown(color)}'
    elif words and color not in words.colors:
        yield f"{where}: {words.judge} knows no color {color!r}, only {', '.join(words.colors)}"


def _position_problems(where: str, position: Any, own: int) -> Iterator[str]:
    if position is None:
        return
    pair = position if isinstance(position, list | tuple) and len(position) == 2 else (None, None)
    target = _whole(pair[1])
    if pair[0] not in RELATIONS or target is None or not 0 <= target < own:
        yield (
            f'{where}: "position" must be [one of {", ".join(RELATIONS)}; the number, from 0, of an earlier object of '
            f'"include"]; found {_shown(position)}'
        )


def _misspelt(entry: Mapping[str, Any], known: tuple[str, ...], who: str) -> Iterator[str]:
    """Yield problems for misspelt keys of GenEval; keys with entirely different names are the user's own."""
    for key in entry:
        meant = _meant(str(key), known)
        if meant and meant not in entry:
            yield f'{who} {key!r}; write it "{meant}"'


@functools.cache
def _meant(key: str, known: tuple[str, ...]) -> str:
    """Return the known key that is closest to a misspelt one; "" for a known key or one unlike all of them."""
    close = [] if key in known else difflib.get_close_matches(key.strip().lower(), known, n=1, cutoff=0.8)
    return close[0] if close else ""


def _whole(number: Any) -> int | None:
    """Return a whole number as int, or None for anything else."""
    if isinstance(number, bool) or not isinstance(number, int | float):
        return None
    return int(number) if isinstance(number, int) or number.is_integer() else None


def _normalized(entry: Mapping[str, Any]) -> dict[str, Any]:
    whole = {key: value for key, value in entry.items() if value is not None or key not in _TOP_KEYS}
    for name in ("include", "exclude"):
        if name in whole:
            whole[name] = [_normal_clause(clause) for clause in whole[name]]
    return whole


def _normal_clause(clause: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in clause.items() if value is not None or key not in _KEYS}
    kept["count"] = int(kept["count"])
    if "position" in kept:
        kept["position"] = [kept["position"][0], int(kept["position"][1])]
    return kept


def _some(names: Sequence[str]) -> str:
    rest = f" and {len(names) - 10} more" if len(names) > 12 else ""
    return f"{', '.join(names[:10] if rest else names)}{rest}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _kind(value: Any) -> str:
    return f"{type(value).__name__} {_shown(value)}"
