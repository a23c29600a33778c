"""Raw prompt files -> one dict a prompt: {"tag", "prompt", and whatever else a scorer needs}.

    parsed = parse_file("evaluation_metadata.jsonl")   # .jsonl, .txt, .csv, or a folder of .txt files
    rows = parsed.all_or_error()

Nothing is dropped in silence: what cannot be read is kept with its line number, and lines with nothing in them are
counted.
"""

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from udm_grpo.host.progress import progress_bar

Row = dict[str, Any]

DATASET = "udm_grpo_prompts"
"""The folder within a prepared folder that marks it as one; the name of the dataset in it."""

UNTAGGED = "untagged"
"""The tag of a prompt whose file gives it none."""

PROMPT_COLUMNS = ("prompt", "prompts", "caption", "captions", "text")
"""Column of a .csv file that holds the prompts unless another is named; upper and lower case are alike."""

TAG_COLUMNS = ("tag", "category")
"""Column of a .csv file that holds the tags unless another is named."""

KINDS = (
    ".jsonl (GenEval's format, or objects with a prompt), .txt (one prompt a line), .csv (with a header), "
    "or a folder of .txt files (one prompt a file)"
)

MOST_LINES_SHOWN = 50
"""Bad lines that an error explains one by one; of any further ones it gives the line numbers."""


@dataclass(frozen=True)
class Parsed:
    """What a file holds: rows, the place of each (its line number, or its name in a folder), and what is wrong where.

    `empty` counts lines with nothing in them; they are passed over.
    """

    path: Path
    rows: tuple[Row, ...] = ()
    places: tuple[str, ...] = ()
    bad: tuple[tuple[str, str], ...] = ()
    empty: int = 0
    unit: str = "line"
    """What a place is: line or file."""

    def checked(self, problem: Callable[[Row], str]) -> "Parsed":
        """Return this with the rows that `problem` has a text for among the bad ones."""
        with progress_bar(len(self.rows), f"checking {self.path.name}", "prompt") as bar:
            found = []
            for row in self.rows:
                found.append(problem(row))
                bar.update()
        good = [i for i, text in enumerate(found) if not text]
        bad = [(place, text) for place, text in zip(self.places, found, strict=True) if text]
        order = {place: i for i, place in enumerate(sorted({p for p, _ in (*self.bad, *bad)}, key=_natural))}
        return replace(
            self,
            rows=tuple(self.rows[i] for i in good),
            places=tuple(self.places[i] for i in good),
            bad=tuple(sorted((*self.bad, *bad), key=lambda item: order[item[0]])),
        )

    def all_or_error(self) -> tuple[Row, ...]:
        """Return the rows; ValueError with every bad place, or if there is no row at all."""
        if self.bad:
            raise ValueError(self.bad_text("correct or remove"))
        if not self.rows:
            raise ValueError(f"{self.path}: the prompt file is empty; it needs at least one prompt")
        return self.rows

    def bad_text(self, advice: str) -> str:
        """Every bad place and what is wrong with it, the first MOST_LINES_SHOWN with their reasons."""
        unit, count = self.unit, len(self.bad)
        lines = [f"{self.path}: {count} bad {unit}{'s' if count > 1 else ''}; {advice}:"]
        lines += [f"  {unit} {place}: {reason}" for place, reason in self.bad[:MOST_LINES_SHOWN]]
        further = ", ".join(place for place, _ in self.bad[MOST_LINES_SHOWN:])
        if further:
            lines.append(f"  and {unit}s {further}")
        return "\n".join(lines)


def _natural(place: str) -> tuple[int, str]:
    return (int(place), "") if place.isdecimal() else (0, place)


def parse_file(path: str | Path, column: str = "", tag_column: str = "") -> Parsed:
    """Read a prompt file of one of KINDS.

    column, tag_column: of a .csv file; "" finds one of PROMPT_COLUMNS and of TAG_COLUMNS (the tag may be missing).

    Raises FileNotFoundError, and ValueError for another kind of file or a .csv file without such a column.
    """
    path = Path(path)
    if path.suffix not in (".jsonl", ".txt", ".csv") and not path.is_dir():
        raise ValueError(f"{path}: a prompt file is {KINDS}")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such prompt file")
    if (column or tag_column) and path.suffix != ".csv":
        raise ValueError(f"{path}: only a .csv file has columns; leave out the names of columns")
    if path.is_dir():
        return _parse_folder(path)
    if path.suffix == ".csv":
        return _parse_csv(path, column, tag_column)
    return _parse_lines(path, _json_row if path.suffix == ".jsonl" else _plain_row)


@dataclass
class _Collector:
    """Rows and bad places while a file is read."""

    rows: list[Row] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    bad: list[tuple[str, str]] = field(default_factory=list)
    empty: int = 0

    def take(self, place: str, row: Row) -> None:
        wrong = wrong_text("prompt", row.get("prompt")) + wrong_text("tag", row.get("tag"))
        if wrong:
            self.bad.append((place, "; ".join(wrong)))
        else:
            self.rows.append(row)
            self.places.append(place)

    def parsed(self, path: Path, unit: str = "line") -> Parsed:
        return Parsed(path, tuple(self.rows), tuple(self.places), tuple(self.bad), self.empty, unit)


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


def _parse_lines(path: Path, parse: Callable[[str], Row]) -> Parsed:
    found = _Collector()
    for number, raw in enumerate(path.read_bytes().split(b"\n"), start=1):
        try:
            text = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            if text:
                found.take(str(number), parse(text))
            else:
                found.empty += 1
        except UnicodeDecodeError as error:
            found.bad.append((str(number), _not_utf8(error)))
        except ValueError as error:
            found.bad.append((str(number), str(error)))
    found.empty -= not raw.strip()  # what stands behind the last line break is no line
    return found.parsed(path)


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"not UTF-8 text: {error.reason} at byte {error.start}"


def _plain_row(text: str) -> Row:
    return {"tag": UNTAGGED, "prompt": text}


def _parse_folder(path: Path) -> Parsed:
    """One prompt a file, by file name; line breaks within it become spaces. The name's stem is kept as "id"."""
    entries = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    files = [entry for entry in entries if entry.suffix == ".txt"]
    if not files:
        raise ValueError(f"{path}: the folder holds no prompts; a set is {KINDS}, or one that was prepared")
    found = _Collector(bad=[(entry.name, "not a .txt file") for entry in entries if entry not in files])
    for file in files:
        try:
            lines = file.read_bytes().decode("utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            found.bad.append((file.name, _not_utf8(error)))
            continue
        text = " ".join(line.strip() for line in lines if line.strip())
        if text:
            found.take(file.name, {"tag": UNTAGGED, "prompt": text, "id": file.stem})
        else:
            found.bad.append((file.name, "the file is empty"))
    return found.parsed(path, "file")


def _parse_csv(path: Path, column: str, tag_column: str) -> Parsed:
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}: line {number}: {_not_utf8(error)}; save the file as UTF-8") from None
    records = _csv_records(text)
    header_line, header = next(records, (1, []))
    if isinstance(header, str):
        raise ValueError(f"{path}: line {header_line}: {header}")
    names = [name.strip() for name in header]
    if len(set(names)) < len(names):
        raise ValueError(f"{path}: the header names a column twice: {', '.join(names)}")
    prompt = _column(path, names, column, PROMPT_COLUMNS, "column")
    tag = _column(path, names, tag_column, TAG_COLUMNS, "tag-column") if tag_column or _has(names, TAG_COLUMNS) else ""
    found = _Collector()
    for line, record in records:
        if isinstance(record, str):
            found.bad.append((str(line), record))
        elif not any(value.strip() for value in record):
            found.empty += 1
        elif len(record) != len(names):
            found.bad.append((str(line), f"{len(record)} values, but the header names {len(names)} columns"))
        else:
            row = {name: value.strip() for name, value in zip(names, record, strict=True)}
            named = {"tag": row.pop(tag) if tag else UNTAGGED, "prompt": row.pop(prompt)}
            found.take(str(line), named | {name: value for name, value in row.items() if value and name not in named})
    return found.parsed(path)


def _csv_records(text: str) -> Iterator[tuple[int, list[str] | str]]:
    """Yield (line a record starts on, its values, or what is wrong with it)."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    while True:
        line = reader.line_num + 1
        try:
            yield line, next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield line, f"not CSV: {error}"


def _has(names: Sequence[str], usual: Sequence[str]) -> bool:
    return any(name.lower() in usual for name in names)


def _column(path: Path, names: Sequence[str], asked: str, usual: Sequence[str], option: str) -> str:
    fitting = [name for name in names if (name == asked if asked else name.lower() in usual)]
    if len(fitting) == 1:
        return fitting[0]
    advice = f"python -m scripts.prepare_prompts prompts --{option} NAME"
    wanted = f"a column {asked!r}" if asked else f"one column named {', '.join(usual)}"
    raise ValueError(f"{path}: wanted {wanted}; found {', '.join(names) or 'none'}; name one: {advice}")


def _json_row(text: str) -> Row:
    """Return a line's object, or raise ValueError with everything that is wrong with it.

    With "include" it is GenEval's and needs all that GenEval's have; without, a prompt and perhaps a tag will do.
    """
    try:
        line = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError("not JSON that can be read: nested too deeply") from None
    if not isinstance(line, dict):
        raise ValueError('not a JSON object like {"tag": ..., "include": [...], "prompt": ...}')
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
