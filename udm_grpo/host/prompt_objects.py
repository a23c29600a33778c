"""One prompt's JSON object -> a row {"tag", "prompt", and whatever else a scorer needs}, or what is wrong with it."""

import json
from pathlib import Path
from typing import Any

from rewards_bridge.scorers.geneval_metadata import problems, read_metadata

Row = dict[str, Any]

UNTAGGED = "untagged"
"""The tag of a prompt whose file gives it none."""

PROMPT = "prompt"
"""Key of an object that holds the prompt unless another is named."""

GENEVAL = ("tag", "include", "exclude")
"""Keys of GenEval's metadata; null is the same as none."""

ORIGINAL = "original_prompt"
"""Key that keeps the text under "prompt" where another key's text takes its place."""


def with_key(row: Row, key: str) -> Row:
    """Return the row with the text under `key` as its prompt; ValueError if that is no text."""
    if key == PROMPT:
        return row
    if wrong := wrong_text(key, row.get(key)):
        raise ValueError(wrong[0])
    return {**row, PROMPT: row[key], **({ORIGINAL: row[PROMPT]} if PROMPT in row else {})}


def wrong_text(name: str, text: Any) -> list[str]:
    """What is wrong with a text that must not be empty, as a list of none or one."""
    if not isinstance(text, str) or not text.strip():
        return [f'"{name}" must be a text that is not empty']
    try:
        text.encode()
    except UnicodeEncodeError:
        return [f'"{name}" holds half of a surrogate pair at character {_surrogate(text)}, which is no text']
    return []


def _surrogate(text: str) -> int:
    return next(i for i, character in enumerate(text, 1) if "\ud800" <= character <= "\udfff")


def json_of(text: str) -> Any:
    """Return what a line holds, or raise ValueError."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError("not JSON that can be read: nested too deeply") from None


def object_row(line: Any, key: str) -> Row:
    """Return an object as a row, or raise ValueError with everything that is wrong with it.

    With "include" it is GenEval's and is read as every scorer reads it (rewards_bridge.scorers.geneval_metadata);
    without, a prompt and perhaps a tag will do. A tag, "include" or "exclude" of null is the same as none.
    """
    if not isinstance(line, dict):
        raise ValueError('not a JSON object like {"tag": ..., "include": [...], "prompt": ...}')
    line = with_key(line, key)
    if line.get("include") is None:
        there = {key: value for key, value in line.items() if value is not None or key not in GENEVAL}
        return {"tag": UNTAGGED, **there}
    if wrong := [*problems(line), *wrong_text("prompt", line.get("prompt"))]:
        raise ValueError("; ".join(wrong))
    return read_metadata(line)


def json_array(path: Path) -> list[Any] | None:
    """The array that a file holds, or None if it does not begin as one."""
    content = path.read_bytes().removeprefix(b"\xef\xbb\xbf").lstrip()
    if path.suffix != ".json" and not content.startswith(b"["):
        return None
    try:
        array = json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: {not_utf8(error)}; save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        if path.suffix == ".jsonl" or error.msg == "Extra data":
            return None  # objects, one a line
        raise ValueError(f"{path}: not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    except RecursionError:
        raise ValueError(f"{path}: not JSON that can be read: nested too deeply") from None
    if isinstance(array, dict) and path.suffix == ".json" and b"\n" not in content.strip():
        return None  # a single line
    if not isinstance(array, list):
        raise ValueError(f'{path}: expected one JSON array of objects like {{"id": ..., "prompt": ...}}')
    return array


def not_utf8(error: UnicodeDecodeError) -> str:
    """What is wrong with bytes that cannot be decoded."""
    return f"not UTF-8 text: {error.reason} at byte {error.start}"
