"""Compare a text that was read with the one that a prompt asks for, for any text reader.

    problems = check_prompts(prompts)          # before training
    score = match(read, target_text(prompt))   # 0..1

Both sides are normalised in the same way before they are compared, see `plain`.

Source: the OCR reward of UDM-GRPO, arXiv 2604.18518, which is that of Flow-GRPO, arXiv 2505.05470: the target is
between the first pair of straight double quotes; spaces and case are ignored. In addition, this module handles
typographic quotes where there are no straight ones, inch marks, escaped and doubled quotes, and characters that look
alike.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

TYPOGRAPHIC = "“”„‟«»″「」『』〝〞❝❞"
"""Characters that count as double quotes in a prompt without straight ones."""

_LIKE_ASCII = str.maketrans(
    {
        **dict.fromkeys("\u2018\u2019\u201a\u201b\u2032`\u00b4\u02bc\u02b9", "'"),
        **dict.fromkeys(TYPOGRAPHIC, '"'),
        **dict.fromkeys("\u2010\u2011\u2012\u2013—―\u2212﹣", "-"),
        **dict.fromkeys("•∙・⋅", "·"),
        **dict.fromkeys("\u2044\u2215", "/"),
        "⋯": "...",
    }
)
"""Characters -> the ones that text readers return for them."""

_INVISIBLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164"
    "\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
"""Invisible characters: Unicode's Default_Ignorable_Code_Point."""


def target_text(prompt: str, every: bool = False) -> str:
    """Return the text that a prompt asks for, in normalised spelling: the content of its first pair of quotes.

    every: return the contents of all pairs, joined by spaces. Raises ValueError, which says how to write the quotes,
    if there is no such pair or nothing in it.
    """
    return _target(prompt, every)[0]


def ambiguity(prompt: str, every: bool = False) -> str:
    """Return why the target of a prompt may not be the intended one, and which target is used; "" for a clear prompt.

    Raises ValueError as `target_text` does.
    """
    target, reasons = _target(prompt, every)
    return f"{'; '.join(reasons)}; the text that is looked for is {target!r}" if reasons else ""


def check_prompts(prompts: Iterable[str]) -> list[str]:
    """Return the problems of prompts for an OCR reward, one text per invalid prompt with its number (from 1)."""
    problems = []
    for number, prompt in enumerate(prompts, 1):
        try:
            target_text(prompt)
        except ValueError as error:
            problems.append(f"prompt {number}: {error}")
    return problems


def plain(text: str) -> str:
    """Return a text in the form that is compared, for either side.

    Unicode's compatibility form (which turns full-width letters, ligatures and decomposed accents into usual letters),
    with ASCII quotes, apostrophes and dashes, without invisible characters and white space, and case-folded, which
    makes a sharp s two s and an i with or without its dot one letter.
    """
    return "".join(_tidy(text).casefold().replace("i\u0307", "i").replace("\u0131", "i").split())


def match(read: str, target: str, extra_is_free: bool = True) -> float:
    """Return 1 - distance / len(target), in 0..1, after `plain` has normalised both sides.

    The distance is Levenshtein's, at most len(target); with `extra_is_free`, the published rule, it is 0 if the target
    is part of the text that was read. Raises ValueError for a target without visible characters.
    """
    from rapidfuzz.distance import Levenshtein  # imported here, because prompts are also checked without scoring

    expected, actual = plain(target), plain(read)
    if not expected:
        raise ValueError(f"the target {target!r} is empty; check_prompts finds such prompts before training")
    if extra_is_free and expected in actual:
        return 1.0
    return 1.0 - min(Levenshtein.distance(actual, expected), len(expected)) / len(expected)


def is_exact(read: str, target: str) -> bool:
    """Return whether the target and nothing else was read, as `plain` compares them."""
    return plain(read) == plain(target)


def join_lines(lines: Sequence[str]) -> str:
    """Return recognised lines, in reading order, as one readable text; match() ignores the spaces."""
    return " ".join(line.strip() for line in lines if line.strip())


def _tidy(text: str) -> str:
    """Return the text with a single form of every letter, quote and dash, and with single spaces."""
    alike = unicodedata.normalize("NFKC", _INVISIBLE.sub("", text.translate(_LIKE_ASCII)))
    return " ".join(alike.translate(_LIKE_ASCII).split())


@dataclass(frozen=True)
class _Quotes:
    """The texts between pairs of quotes, and whether the prompt has other quotes."""

    texts: Sequence[str]
    unpaired: bool = False
    inches: bool = False
    empty: bool = False


def _target(prompt: str, every: bool) -> tuple[str, list[str]]:
    """Return the target of a prompt, and the reasons why it is doubtful."""
    text, reasons = _unescaped(prompt)
    text = text.replace("\uff02", '"')
    of_any_kind = _quotes(text.translate(dict.fromkeys(map(ord, TYPOGRAPHIC), '"')))
    straight = _quotes(text)
    used = straight if straight.texts else of_any_kind
    if not used.texts:
        raise ValueError(
            f"no text to look for in the prompt {prompt!r}: {_missing(text)}; "
            'put the text between straight double quotes (U+0022), as in: a sign that says "OPEN"'
        )
    count = len(max(used.texts, of_any_kind.texts, key=len))
    if used.inches:
        reasons.append("a double quote after a digit is read as the symbol for inches")
    if used.unpaired:
        reasons.append("a double quote is unpaired")
    if used.empty:
        reasons.append("a pair of quotes is empty")
    if count > 1 and not every:
        reasons.append(f"{count} texts are in quotes and only the first is looked for (option texts=all: all of them)")
    target = _tidy(" ".join(used.texts) if every else used.texts[0])
    strange = sorted({letter for letter in target if unicodedata.category(letter) in ("So", "Co", "Cn", "Cc")})
    if strange:
        reasons.append(f"text readers rarely recognise {' '.join(strange)}")
    return target, reasons


def _unescaped(prompt: str) -> tuple[str, list[str]]:
    """Return the prompt with quotes unescaped from JSON, HTML or CSV, and the reasons for any change."""
    text, reasons = re.sub(r'\\+"|&quot;|&#34;', '"', prompt.strip()), []
    if text != prompt.strip():
        reasons.append("its quotes are escaped, as in JSON or HTML")
    whole = re.fullmatch(r'"(.*""[^"].*)"', text, re.DOTALL)
    doubled = re.sub(r'""([^"]+)""', r'"\1"', whole[1] if whole else text)
    if doubled != text:
        reasons.append("its quotes are doubled, as in a CSV file")
    return doubled, reasons


def _quotes(text: str) -> _Quotes:
    """Return the texts between pairs of straight double quotes.

    A quote after a digit opens a pair only if there is no other pair.
    """
    marks = [place for place, letter in enumerate(text) if letter == '"']
    for skip_inches in (True, False):
        pairs, start, inches = [], -1, False
        for place in marks:
            if start >= 0:
                pairs.append(text[start + 1 : place])
                start = -1
            elif skip_inches and place and text[place - 1].isdecimal():
                inches = True
            else:
                start = place
        texts = [pair for pair in pairs if plain(pair)]
        if texts:
            return _Quotes(texts, start >= 0, inches, len(texts) < len(pairs))
    return _Quotes(())


def _missing(text: str) -> str:
    if not any(mark in text for mark in f'"{TYPOGRAPHIC}'):
        return "it has no double quotes"
    pairs = sum(text.count(mark) for mark in f'"{TYPOGRAPHIC}') > 1
    return "its first pair of double quotes is empty" if pairs else "its only double quote is unpaired"
