"""Read raw prompt files into one dict per prompt: {"tag", "prompt", and whatever else a scorer needs}.

    parsed = parse_file("evaluation_metadata.jsonl")   # .jsonl, .json, .txt, .csv, or a folder of .txt files
    parsed = parse_file("prompts.json", key="dense_prompt")
    rows = parsed.all_or_error()

Nothing is dropped silently: lines that cannot be read are kept with their numbers, and empty lines are counted.
"""

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from udm_grpo.data.prompt_objects import (
    PROMPT,
    UNTAGGED,
    Row,
    json_array,
    json_of,
    json_sequence,
    object_row,
    with_key,
    wrong_text,
)
from udm_grpo.data.prompt_text import PromptsError, clean, decode, is_blank, is_comment, lines_of, undecodable
from udm_grpo.machine.progress import progress_bar

__all__ = ["DATASET", "KINDS", "PROMPT", "UNTAGGED", "Parsed", "Row", "parse_file", "with_key", "wrong_text"]

DATASET = "udm_grpo_prompts"
"""Name of the dataset in a prepared folder, and of the subfolder that identifies such a folder."""

PROMPT_COLUMNS = ("prompt", "prompts", "caption", "captions", "text")
"""Default names of the prompt column of a .csv file; case is ignored."""

TAG_COLUMNS = ("tag", "category")
"""Default names of the tag column of a .csv file; case is ignored."""

KINDS = (
    ".jsonl (GenEval's format, or objects with a prompt), .json (an array of these), .txt (one prompt per line), "
    ".csv or .tsv (with a header), or a folder of .txt files (one prompt per file)"
)

TABLES = (".csv", ".tsv")
DELIMITERS = (",", ";", "\t")
"""Delimiters of a .csv file; the first with which its header names a prompt column is used."""

MAX_LINES_SHOWN = 50
"""Number of bad lines that an error explains; of further ones it gives only the line numbers."""


@dataclass(frozen=True)
class Parsed:
    """Contents of a prompt file: rows, the place of each (line number, or file name in a folder), and errors by place.

    `bad` has (place, reason) pairs. `empty` counts empty lines and `comments` lines that begin with "# "; both are
    skipped. `cleaned` counts the prompts from which invisible characters or special spaces were removed.
    """

    path: Path
    rows: tuple[Row, ...] = ()
    places: tuple[str, ...] = ()
    bad: tuple[tuple[str, str], ...] = ()
    empty: int = 0
    comments: int = 0
    cleaned: int = 0
    unit: str = "line"
    """Kind of place: line, file or item (of a JSON array, counted from 1)."""

    def checked(self, problem: Callable[[Row], str]) -> "Parsed":
        """Return a copy in which the rows for which `problem` returns a reason are bad."""
        with progress_bar(len(self.rows), f"checking {self.path.name}", "prompt") as bar:
            reasons = []
            for row in self.rows:
                reasons.append(problem(row))
                bar.update()
        good = [i for i, text in enumerate(reasons) if not text]
        bad = [(place, text) for place, text in zip(self.places, reasons, strict=True) if text]
        order = {place: i for i, place in enumerate(sorted({p for p, _ in (*self.bad, *bad)}, key=_natural))}
        return replace(
            self,
            rows=tuple(self.rows[i] for i in good),
            places=tuple(self.places[i] for i in good),
            bad=tuple(sorted((*self.bad, *bad), key=lambda item: order[item[0]])),
        )

    def all_or_error(self) -> tuple[Row, ...]:
        """Return the rows; raise PromptsError that lists every bad place, or if there are no rows."""
        if self.bad:
            raise PromptsError(self.bad_text("correct or remove"))
        if not self.rows:
            raise PromptsError(f"{self.path}: the prompt file is empty; it needs at least one prompt")
        return self.rows

    def remarks(self) -> list[str]:
        """Return a message for each kind of thing that was skipped or changed when the file was read."""
        counts = (
            ("empty lines skipped", self.empty),
            ('comment lines (beginning with "# ") skipped', self.comments),
            ("prompts with invisible characters or special spaces, which were removed", self.cleaned),
        )
        return [f"{self.path}: {what}: {count}" for what, count in counts if count]

    def bad_text(self, advice: str) -> str:
        """Return a message that lists every bad place, the first MAX_LINES_SHOWN with their reasons."""
        return self.listed(f"bad {self.unit}{'s' if len(self.bad) > 1 else ''}; {advice}", self.bad)

    def listed(self, what: str, places: Sequence[tuple[str, str]]) -> str:
        """Return a message that counts and lists places, the first MAX_LINES_SHOWN with their texts."""
        lines = [f"{self.path}: {len(places)} {what}:"]
        lines += [f"  {self.unit} {place}: {reason}" for place, reason in places[:MAX_LINES_SHOWN]]
        further = ", ".join(place for place, _ in places[MAX_LINES_SHOWN:])
        if further:
            lines.append(f"  and {self.unit}s {further}")
        return "\n".join(lines)


def _natural(place: str) -> tuple[int, str]:
    return (int(place), "") if place.isdecimal() else (0, place)


def parse_file(path: str | Path, column: str = "", tag_column: str = "", key: str = PROMPT) -> Parsed:
    """Read a prompt file of one of KINDS.

    column, tag_column: columns of a .csv file; "" finds one of PROMPT_COLUMNS and of TAG_COLUMNS (tags are optional).
    key: the key of the prompt in each object (the column of a .csv file). If it is not "prompt", the text is also kept
    under its own key, and the text that it replaces under "original_prompt".

    Raises FileNotFoundError, and PromptsError for another kind of file, a .csv file without such a column, and a file
    in which no object has the key (it names the existing keys).
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in (".jsonl", ".json", ".txt", *TABLES) and not path.is_dir():
        raise PromptsError(f"{path}: a prompt file is {KINDS}")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such prompt file")
    if (column or tag_column) and suffix not in TABLES:
        raise PromptsError(f"{path}: only a .csv file has columns; omit the names of columns")
    if key != PROMPT and (path.is_dir() or suffix == ".txt"):
        raise PromptsError(f"{path}: only .json, .jsonl and .csv files have keys; omit the prompt key {key!r}")
    if path.is_dir():
        return _parse_folder(path)
    try:
        text = decode(path.read_bytes())
    except ValueError as error:
        raise PromptsError(f"{path}: {error}") from None
    if suffix in TABLES:
        return _parse_csv(path, text, column or (key if key != PROMPT else ""), tag_column)
    return _parse_objects(path, text, key) if suffix != ".txt" else _parse_plain(path, text)


@dataclass
class _Collector:
    """Collects rows and bad places while a file is read."""

    rows: list[Row] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    bad: list[tuple[str, str]] = field(default_factory=list)
    empty: int = 0
    comments: int = 0
    cleaned: int = 0

    def take(self, place: str, row: Row) -> None:
        wrong = wrong_text("prompt", row.get("prompt")) + wrong_text("tag", row.get("tag"))
        if wrong:
            self.bad.append((place, "; ".join(wrong)))
            return
        prompt, tag = clean(row["prompt"]), clean(row["tag"])
        self.cleaned += prompt != row["prompt"].replace("\r\n", "\n").strip()
        self.rows.append(row if (prompt, tag) == (row["prompt"], row["tag"]) else {**row, "prompt": prompt, "tag": tag})
        self.places.append(place)

    def read(self, place: str, row_of: Callable[[Any], Row], thing: Any) -> None:
        try:
            self.take(place, row_of(thing))
        except ValueError as error:
            self.bad.append((place, str(error)))

    def parsed(self, path: Path, unit: str = "line") -> Parsed:
        counts = {"empty": self.empty, "comments": self.comments, "cleaned": self.cleaned}
        return Parsed(path, tuple(self.rows), tuple(self.places), tuple(self.bad), **counts, unit=unit)


def _parse_lines(path: Path, text: str, row_of: Callable[[str], Row], comment: Callable[[str], bool]) -> Parsed:
    collector = _Collector()
    for number, line in enumerate(lines_of(text), start=1):
        if is_blank(line):
            collector.empty += 1
        elif comment(line.lstrip("\ufeff ")):
            collector.comments += 1
        else:
            collector.read(str(number), row_of, line.strip())
    return collector.parsed(path)


def _parse_plain(path: Path, text: str) -> Parsed:
    """Parse one prompt per line; raise PromptsError if the contents are of another kind: JSON, or a table."""
    if text.lstrip().startswith(("[", "{")) and json_sequence(text) is not None:
        raise PromptsError(f"{path}: holds JSON, not one prompt per line; give it the suffix .json or .jsonl")
    lines = [line.strip() for line in lines_of(text) if not is_blank(line)]
    tabs = {line.count("\t") for line in lines}
    if lines and len(tabs) == 1 and (values := tabs.pop() + 1) > 1:
        raise PromptsError(
            f"{path}: every line has {values} values separated by tabs, such as line 1: {lines[0]!r}; this is a table, "
            "not one prompt per line: add a header line with column names, such as prompt, and use the suffix .tsv"
        )
    return _parse_lines(path, text, _plain_row, is_comment)


def _parse_objects(path: Path, text: str, key: str) -> Parsed:
    """Parse objects, one per line, over several lines or in one array; raise PromptsError if none has the key."""
    keys: dict[str, None] = {}

    def row_of(thing: Any) -> Row:
        keys.update(dict.fromkeys(thing) if isinstance(thing, dict) else {})
        return object_row(thing, key)

    array = json_array(path, text)
    collector = _Collector()
    if array is not None:
        for number, thing in enumerate(array, start=1):
            collector.read(str(number), row_of, thing)
        parsed = collector.parsed(path, "item")
    else:
        parsed = _parse_lines(path, text, lambda line: row_of(json_of(line)), lambda line: line.startswith(("#", "//")))
        if parsed.bad and (sequence := json_sequence(text)) and len(sequence) < len(parsed.bad):
            for number, thing in sequence:
                collector.read(str(number), row_of, thing)
            parsed = collector.parsed(path)
    if keys and key not in keys:
        raise PromptsError(
            f"{path}: no prompt has the key {key!r}; the keys are {', '.join(map(repr, keys))}; name the key of "
            "the prompts with --prompt-key (prompts.prompt_key in a config)"
        )
    return parsed


def _plain_row(text: str) -> Row:
    if wrong := undecodable(text):
        raise PromptsError(wrong)
    if "\r" in text:
        raise PromptsError("a carriage return within the line: the file mixes line endings; save it with one kind")
    return {"tag": UNTAGGED, "prompt": text}


def _parse_folder(path: Path) -> Parsed:
    """Parse one prompt per file, sorted by name; line breaks become spaces, and the name's stem is kept as "id"."""
    entries = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    files = [entry for entry in entries if entry.suffix.lower() == ".txt"]
    if not files:
        raise PromptsError(f"{path}: the folder holds no prompts; a prompt set is {KINDS}, or a prepared folder")
    collector = _Collector(bad=[(entry.name, "not a .txt file") for entry in entries if entry not in files])
    for file in files:
        try:
            lines = lines_of(decode(file.read_bytes()))
            if wrong := undecodable("\n".join(lines)):
                raise PromptsError(wrong)
        except ValueError as error:
            collector.bad.append((file.name, str(error)))
            continue
        text = " ".join(line.strip() for line in lines if not is_blank(line))
        if text:
            collector.take(file.name, {"tag": UNTAGGED, "prompt": text, "id": file.stem})
        else:
            collector.bad.append((file.name, "the file is empty"))
    return collector.parsed(path, "file")


def _parse_csv(path: Path, text: str, column: str, tag_column: str) -> Parsed:
    if wrong := undecodable(text):
        line = next(number for number, line in enumerate(lines_of(text), start=1) if undecodable(line))
        raise PromptsError(f"{path}: line {line}: {wrong}")
    records = _csv_records(text, _delimiter(path, text, column))
    header_line, header = next(records, (1, []))
    if isinstance(header, str):
        raise PromptsError(f"{path}: line {header_line}: {header}")
    names = [name.strip() for name in header]
    if len(set(names)) < len(names):
        raise PromptsError(f"{path}: the header names a column twice: {', '.join(names)}")
    prompt = _column(path, names, column, PROMPT_COLUMNS, "column")
    others = [name for name in names if name != prompt]
    tagged = tag_column or _has(others, TAG_COLUMNS)
    tag = _column(path, others, tag_column, TAG_COLUMNS, "tag-column") if tagged else ""
    collector = _Collector()
    for line, record in records:
        if isinstance(record, str):
            collector.bad.append((str(line), record))
        elif all(is_blank(value) for value in record):
            collector.empty += 1
        elif len(record) == 1 and is_comment(record[0]):
            collector.comments += 1
        elif len(record) != len(names):
            collector.bad.append((str(line), f"{len(record)} values, but the header names {len(names)} columns"))
        else:
            row = {name: value.strip() for name, value in zip(names, record, strict=True)}
            named = {"tag": row.pop(tag) if tag else UNTAGGED, "prompt": row.pop(prompt)}
            collector.take(
                str(line), named | {name: value for name, value in row.items() if value and name not in named}
            )
    return collector.parsed(path)


def _delimiter(path: Path, text: str, column: str) -> str:
    """Return the delimiter; of a .csv file, the first of DELIMITERS with which its header names a prompt column."""
    if path.suffix.lower() == ".tsv":
        return "\t"
    for delimiter in DELIMITERS:
        header = next(_csv_records(text, delimiter), (1, ""))[1]
        names = [name.strip() for name in header] if isinstance(header, list) else []
        if column in names if column else _has(names, PROMPT_COLUMNS):
            return delimiter
    return DELIMITERS[0]


def _csv_records(text: str, delimiter: str) -> Iterator[tuple[int, list[str] | str]]:
    """Yield (line on which a record starts, its values or what is wrong with it)."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
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
    expected = f"a column {asked!r}" if asked else f"one column named {', '.join(usual)}"
    raise PromptsError(f"{path}: expected {expected}; found {', '.join(names) or 'none'}; name one: {advice}")
