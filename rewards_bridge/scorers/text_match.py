"""How well a text that was read matches the one a prompt asks for, for any reader.

    problems = check_prompts(prompts)          # before training
    score = match(read, target_text(prompt))   # 0..1

Source: the OCR reward of UDM-GRPO (SPEC 6), which is that of Flow-GRPO (arXiv 2505.05470).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_QUOTED = re.compile('"([^"]*)"')
_TYPOGRAPHIC = "“”„‟«»″"


def target_text(prompt: str) -> str:
    """The text that a prompt asks for: what stands between its first pair of double quotes, as it is written there.

    Raises ValueError if there is no such pair or nothing between it; the message says how to write one.
    """
    found = _QUOTED.search(prompt)
    if found is not None and _plain(found[1]):
        return found[1]
    if found is not None:
        wrong = "there is nothing between its first pair of double quotes"
    elif '"' in prompt:
        wrong = "its only double quote has no partner"
    elif any(mark in prompt for mark in _TYPOGRAPHIC):
        wrong = "its quotes are typographic ones"
    else:
        wrong = "it has no double quotes"
    raise ValueError(
        f"no text to look for in the prompt {prompt!r}: {wrong}; "
        'put the wanted text between straight double quotes (U+0022), as in: a sign that says "OPEN"'
    )


def check_prompts(prompts: Iterable[str]) -> list[str]:
    """What is wrong with prompts for an OCR reward, one text an offender with its number (from 1); empty if nothing."""
    problems = []
    for number, prompt in enumerate(prompts, 1):
        try:
            target_text(prompt)
        except ValueError as error:
            problems.append(f"prompt {number}: {error}")
    return problems


def match(read: str, target: str, extra_is_free: bool = True) -> float:
    """1 - distance / len(target), in 0..1, both without white space and in lower case.

    The distance is Levenshtein's, at most len(target); with `extra_is_free`, the published rule, it is 0 wherever the
    target is part of what was read. Raises ValueError for a target of nothing but white space.
    """
    from rapidfuzz.distance import Levenshtein  # not above: prompts are also checked where nothing is scored

    wanted, seen = _plain(target), _plain(read)
    if not wanted:
        raise ValueError(f"the target {target!r} is empty; check_prompts finds such prompts before training")
    if extra_is_free and wanted in seen:
        return 1.0
    return 1.0 - min(Levenshtein.distance(seen, wanted), len(wanted)) / len(wanted)


def is_exact(read: str, target: str) -> bool:
    """Whether the target and nothing else was read, white space and case aside."""
    return _plain(read) == _plain(target)


def join_lines(lines: Sequence[str]) -> str:
    """Recognised lines, in reading order, as one text for people; match() ignores the spaces."""
    return " ".join(line.strip() for line in lines if line.strip())


def _plain(text: str) -> str:
    return "".join(text.split()).lower()
