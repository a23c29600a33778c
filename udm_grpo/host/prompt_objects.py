"""One prompt's JSON object -> a row {"tag", "prompt", and whatever else a scorer needs}, or what is wrong with it."""

import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]

UNTAGGED = "untagged"
"""The tag of a prompt whose file gives it none."""

PROMPT = "prompt"
"""Key of an object that holds the prompt unless another is named."""

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

    With "include" it is GenEval's and needs all that GenEval's have; without, a prompt and perhaps a tag will do.
    """
    if not isinstance(line, dict):
        raise ValueError('not a JSON object like {"tag": ..., "include": [...], "prompt": ...}')
    line = with_key(line, key)
    if "include" not in line:
        return {"tag": UNTAGGED, **line}
    wrong = wrong_text("tag", line.get("tag")) + wrong_text("prompt", line.get("prompt"))
    for name, needed in (("include", True), ("exclude", False)):
        wrong += _wrong_objects(name, line.get(name, None if needed else []), needed)
    if wrong:
        raise ValueError("; ".join(wrong))
    return line


def _wrong_objects(name: str, objects: Any, needed: bool) -> list[str]:
    if not isinstance(objects, list) or (needed and not objects):
        return [f'"{name}" must be a list' + (" of at least one object" if needed else "")]
    wrong = []
    for i, item in enumerate(objects):
        where = f'"{name}"[{i}]'
        if not isinstance(item, dict):
            wrong.append(f'{where} must be an object like {{"class": "dog", "count": 1}}')
            continue
        if not isinstance(item.get("class"), str) or not item["class"]:
            wrong.append(f'{where} needs "class", a text')
        if type(item.get("count")) is not int or item["count"] < 1:
            wrong.append(f'{where} needs "count", a whole number of at least 1')
        if "color" in item and not isinstance(item["color"], str):
            wrong.append(f'{where}: "color" must be a text')
        if "position" in item and not _is_position(item["position"], len(objects), i):
            wrong.append(f'{where}: "position" must be [relation, index of another object in "{name}"]')
    return wrong


def _is_position(position: Any, count: int, own: int) -> bool:
    if not isinstance(position, list) or len(position) != 2:
        return False
    relation, other = position
    return isinstance(relation, str) and type(other) is int and 0 <= other < count and other != own


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
