"""Convert a prompt's JSON object to a row {"tag", "prompt", and whatever else a scorer needs}, or say what is wrong."""

import json
import math
from pathlib import Path
from typing import Any

from rewards_bridge.scorers.geneval_metadata import problems, read_metadata
from udm_grpo.data.prompt_text import PromptsError, control_character, is_blank, undecodable

Row = dict[str, Any]

UNTAGGED = "untagged"
"""Tag of a prompt that has none in its file."""

PROMPT = "prompt"
"""Default key of the prompt in an object."""

GENEVAL = ("tag", "include", "exclude")
"""Keys of GenEval's metadata; a null value counts as missing."""

ORIGINAL = "original_prompt"
"""Key of the original "prompt" where another key's text has replaced it."""


def with_key(row: Row, key: str) -> Row:
    """Return the row with the text under `key` as its prompt; raise PromptsError if that is not a text."""
    if key == PROMPT:
        return row
    if wrong := wrong_text(key, row.get(key)):
        raise PromptsError(wrong[0])
    return {**row, PROMPT: row[key], **({ORIGINAL: row[PROMPT]} if PROMPT in row else {})}


def wrong_text(name: str, text: Any) -> list[str]:
    """Return what is wrong with a text that must not be empty, as a list of at most one message."""
    if not isinstance(text, str) or is_blank(text):
        return [f'"{name}" must be a text that is not empty']
    try:
        text.encode()
    except UnicodeEncodeError:
        return [f'"{name}" holds half of a surrogate pair at character {_surrogate(text)}, which is not valid text']
    control = control_character(text)
    return [f'"{name}" holds {control}; remove it'] if control else []


def _surrogate(text: str) -> int:
    return next(i for i, character in enumerate(text, 1) if "\ud800" <= character <= "\udfff")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        twice = next(key for i, (key, _) in enumerate(pairs) if any(key == other for other, _ in pairs[:i]))
        raise PromptsError(f"the key {twice!r} occurs twice in one object; keep one of them")
    return fields


def _no_number(text: str) -> Any:
    raise PromptsError(f"{text} is not a JSON number; write a number, or null if there is none")


def _float(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _no_number(text)


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_no_number, parse_float=_float)


def json_of(text: str) -> Any:
    """Return the JSON value of a line; raise PromptsError also for NaN, infinite numbers and repeated keys."""
    if wrong := undecodable(text):
        raise PromptsError(wrong)
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise PromptsError(f"not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise PromptsError("not JSON that can be read: nested too deeply") from None


def json_sequence(text: str) -> list[tuple[int, Any]] | None:
    """Return the JSON values of a text, each over any number of lines, with the lines on which they begin.

    Return None if the text holds anything else.
    """
    values: list[tuple[int, Any]] = []
    start = end = line = 0
    try:
        while start < len(text):
            if text[start].isspace():
                start += 1
                continue
            line += text.count("\n", end if values else 0, start)
            value, stop = _DECODER.raw_decode(text, start)
            values.append((line + 1, value))
            end, start = start, stop
    except (ValueError, RecursionError):
        return None
    return values


def object_row(line: Any, key: str) -> Row:
    """Return an object as a row; raise PromptsError that lists everything that is wrong with it.

    An object with "include" is in GenEval's format and is read as every scorer reads it
    (rewards_bridge.scorers.geneval_metadata). Any other needs a prompt and may have a tag; a plain text is a prompt. A
    "tag", "include" or "exclude" of null counts as missing.
    """
    if isinstance(line, str) and key == PROMPT:
        line = {PROMPT: line}
    if not isinstance(line, dict):
        raise PromptsError('not a JSON object like {"tag": ..., "include": [...], "prompt": ...}')
    line = with_key(line, key)
    if line.get("include") is None:
        there = {key: value for key, value in line.items() if value is not None or key not in GENEVAL}
        return {"tag": UNTAGGED, **there}
    if wrong := [*problems(line), *wrong_text("prompt", line.get("prompt"))]:
        raise PromptsError("; ".join(wrong))
    return read_metadata(line)


def json_array(path: Path, text: str) -> list[Any] | None:
    """Return the JSON array in the text of a file, or None if the text does not begin like one."""
    content = text.strip()
    is_json = path.suffix.lower() == ".json"
    if not is_json and not content.startswith("["):
        return None
    if wrong := undecodable(content):
        raise PromptsError(f"{path}: {wrong}")
    try:
        array = _DECODER.decode(content)
    except json.JSONDecodeError as error:
        if not is_json or error.msg == "Extra data":
            return None  # objects, one per line
        raise PromptsError(f"{path}: not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    except ValueError as error:
        raise PromptsError(f"{path}: {error}") from None
    except RecursionError:
        raise PromptsError(f"{path}: not JSON that can be read: nested too deeply") from None
    if isinstance(array, dict) and is_json and "\n" not in content:
        return None  # a single line
    if not isinstance(array, list):
        raise PromptsError(f'{path}: expected one JSON array of objects like {{"id": ..., "prompt": ...}}')
    return array
