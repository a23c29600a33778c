"""Raw prompt files -> one dict a prompt: {"tag", "prompt", and whatever else a scorer needs}.

    parsed = parse_file("evaluation_metadata.jsonl")   # .jsonl, .json, .txt, .csv, or a folder of .txt files
    parsed = parse_file("prompts.json", key="dense_prompt")
    rows = parsed.all_or_error()

Nothing is dropped in silence: what cannot be read is kept with its line number, and lines with nothing in them are
counted.
"""

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from udm_grpo.host.progress import progress_bar
from udm_grpo.host.prompt_objects import (
    PROMPT,
    UNTAGGED,
    Row,
    json_array,
    json_of,
    not_utf8,
    object_row,
    with_key,
    wrong_text,
)

__all__ = ["DATASET", "KINDS", "PROMPT", "UNTAGGED", "Parsed", "Row", "parse_file", "with_key", "wrong_text"]

DATASET = "udm_grpo_prompts"
"""The folder within a prepared folder that marks it as one; the name of the dataset in it."""

PROMPT_COLUMNS = ("prompt", "prompts", "caption", "captions", "text")
"""Column of a .csv file that holds the prompts unless another is named; upper and lower case are alike."""

TAG_COLUMNS = ("tag", "category")
"""Column of a .csv file that holds the tags unless another is named."""

KINDS = (
    ".jsonl (GenEval's format, or objects with a prompt), .json (an array of such), .txt (one prompt a line), "
    ".csv (with a header), or a folder of .txt files (one prompt a file)"
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
    """What a place is: line, file or item (of a JSON array, from 1)."""

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
        return self.listed(f"bad {self.unit}{'s' if len(self.bad) > 1 else ''}; {advice}", self.bad)

    def listed(self, what: str, places: Sequence[tuple[str, str]]) -> str:
        """How many places there are of something, and each with its text, of the first MOST_LINES_SHOWN."""
        lines = [f"{self.path}: {len(places)} {what}:"]
        lines += [f"  {self.unit} {place}: {reason}" for place, reason in places[:MOST_LINES_SHOWN]]
        further = ", ".join(place for place, _ in places[MOST_LINES_SHOWN:])
        if further:
            lines.append(f"  and {self.unit}s {further}")
        return "\n".join(lines)


def _natural(place: str) -> tuple[int, str]:
    return (int(place), "") if place.isdecimal() else (0, place)


def parse_file(path: str | Path, column: str = "", tag_column: str = "", key: str = PROMPT) -> Parsed:
    """Read a prompt file of one of KINDS.

    column, tag_column: of a .csv file; "" finds one of PROMPT_COLUMNS and of TAG_COLUMNS (the tag may be missing).
    key: which text of each object is the prompt. Another than "prompt" is kept under its own name as well, and the text
    it replaces as "original_prompt"; of a .csv file it is a column.

    Raises FileNotFoundError, and ValueError for another kind of file, a .csv file without such a column, and a file
    none of whose objects has the key (it names those that there are).
    """
    path = Path(path)
    if path.suffix not in (".jsonl", ".json", ".txt", ".csv") and not path.is_dir():
        raise ValueError(f"{path}: a prompt file is {KINDS}")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such prompt file")
    if (column or tag_column) and path.suffix != ".csv":
        raise ValueError(f"{path}: only a .csv file has columns; leave out the names of columns")
    if key != PROMPT and (path.is_dir() or path.suffix == ".txt"):
        raise ValueError(f"{path}: only .json, .jsonl and .csv files have keys; leave out the prompt key {key!r}")
    if path.is_dir():
        return _parse_folder(path)
    if path.suffix == ".csv":
        return _parse_csv(path, column or (key if key != PROMPT else ""), tag_column)
    return _parse_objects(path, key) if path.suffix != ".txt" else _parse_lines(path, _plain_row)


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
            found.bad.append((str(number), not_utf8(error)))
        except ValueError as error:
            found.bad.append((str(number), str(error)))
    found.empty -= not raw.strip()  # what stands behind the last line break is no line
    return found.parsed(path)


def _parse_objects(path: Path, key: str) -> Parsed:
    """Objects, one a line or in one array; ValueError if none of them has the key."""
    keys: dict[str, None] = {}

    def row_of(thing: Any) -> Row:
        keys.update(dict.fromkeys(thing) if isinstance(thing, dict) else {})
        return object_row(thing, key)

    array = json_array(path)
    if array is None:
        parsed = _parse_lines(path, lambda text: row_of(json_of(text)))
    else:
        found = _Collector()
        for number, thing in enumerate(array, start=1):
            try:
                found.take(str(number), row_of(thing))
            except ValueError as error:
                found.bad.append((str(number), str(error)))
        parsed = found.parsed(path, "item")
    if keys and key not in keys:
        raise ValueError(
            f"{path}: no prompt has the key {key!r}; the keys are {', '.join(map(repr, keys))}; name the one of the "
            "prompts with --prompt-key (prompts.prompt_key in a config)"
        )
    return parsed


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
            found.bad.append((file.name, not_utf8(error)))
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
        raise ValueError(f"{path}: line {number}: {not_utf8(error)}; save the file as UTF-8") from None
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
