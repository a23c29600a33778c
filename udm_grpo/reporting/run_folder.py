"""Read the files of a run's output_dir, also while it is training or after it was killed.

A torn last line and a missing file are not errors, and files of an older run in the same folder are skipped; notes
record what was skipped. Any other damage is an error with the file and the line.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rewards_bridge.errors import UserError
from udm_grpo.files.set_aside import CONFIG
from udm_grpo.reporting.grid_file import run_of


class RunFolderError(UserError, ValueError):
    """A folder that is not a run or holds a damaged file; the message says what to do, one line per problem."""


@dataclass(frozen=True)
class RunFolder:
    """The files of a run so far."""

    path: Path
    config: dict[str, Any]
    starts: list[dict[str, Any]]
    """From environment.json: the first start and every resume."""
    metrics: list[dict[str, Any]]
    """One line per iteration, steps rising."""
    evaluations: list[dict[str, Any]]
    """One line per evaluation during training, steps rising."""
    summary: dict[str, Any] | None
    """None until the run has ended."""
    pictures: dict[int, Path]
    """Sample grids by step."""
    extremes: dict[int, Path]
    """Best and worst images by step."""
    before_after: Path | None
    written: str
    """When its last iteration was written."""
    notes: list[str]

    @property
    def last(self) -> int:
        """Return the number of iterations done."""
        return self.metrics[-1]["step"] if self.metrics else 0


def read_run(folder: str | Path) -> RunFolder:
    """Read a run's folder; raise RunFolderError naming every file that cannot be read."""
    path = Path(folder)
    if not path.is_dir():
        raise RunFolderError(f"{path}: there is no such folder; give the output_dir of a training run.")
    if not (path / "metrics.jsonl").is_file():
        raise RunFolderError(
            f"{path} is not a training run, or has not begun: it has no metrics.jsonl. Give an output_dir."
        )
    reader = _Reader(path)
    config = reader.object(CONFIG) or {}
    reader.run = config.get("run")
    metrics = reader.lines("metrics.jsonl")
    last = metrics[-1]["step"] if metrics else 0
    summary = reader.summary(last)
    reader.notes += reader.prompt_warnings()
    run = RunFolder(
        path=path,
        config=config,
        starts=reader.starts(),
        metrics=metrics,
        evaluations=reader.until(last, reader.lines("evaluations.jsonl")),
        summary=summary,
        pictures=reader.by_step("pictures", last),
        extremes=reader.by_step("extremes", last),
        before_after=reader.before_after() if summary else None,
        written=datetime.fromtimestamp((path / "metrics.jsonl").stat().st_mtime, UTC).strftime("%Y-%m-%d %H:%M UTC"),
        notes=reader.notes,
    )
    if reader.problems:
        raise RunFolderError("\n".join(reader.problems))
    return run


class _Reader:
    """Reads the files of one folder and collects what is wrong (`problems`) and what was skipped (`notes`)."""

    def __init__(self, folder: Path):
        self._folder = folder
        self.run: str | None = None
        """The id of the run whose folder it is; None before it is known, and for runs of earlier versions."""
        self.problems: list[str] = []
        self.notes: list[str] = []

    def lines(self, name: str) -> list[dict[str, Any]]:
        """Return the lines of a file of JSON lines with rising steps; an empty list if there is no file."""
        path = self._folder / name
        if not path.is_file():
            return []
        *whole, torn = path.read_bytes().split(b"\n")
        if torn.strip():
            self.notes.append(f"{name}: the last line is incomplete and was skipped.")
        rows: list[dict[str, Any]] = []
        for number, line in enumerate(whole, start=1):
            if not line.strip():
                continue
            trouble, values = _line(line, rows[-1]["step"] if rows else None)
            if not trouble and not _has_scores(values):
                trouble = "has tags that are not objects of scores"
            if trouble:
                self.problems.append(f"{path}: line {number} {trouble}; remove the line.")
            else:
                rows.append(values)
        own = [values for values in rows if values.get("run", self.run) == self.run or self.run is None]
        if len(own) < len(rows):
            self.notes.append(f"{name}: {len(rows) - len(own)} lines are from another run and were skipped.")
        return own

    def object(self, name: str) -> dict[str, Any] | None:
        """Return a JSON file that holds an object; None if there is none."""
        path = self._folder / name
        if not path.is_file():
            return None
        try:
            content = json.loads(path.read_bytes())
        except ValueError as error:
            self.problems.append(f"{path} is not JSON ({error}); remove or repair it.")
            return None
        if not isinstance(content, dict):
            self.problems.append(f"{path} holds {_kind(content)}, not an object; remove or repair it.")
            return None
        return content

    def prompt_warnings(self) -> list[str]:
        """Return the warnings about the prompts from the start of the run."""
        content = self.object("prompt_warnings.json") or {}
        texts = content.get("warnings")
        is_own = self.run is None or content.get("run") == self.run
        return [f"prompts: {text}" for text in texts] if is_own and isinstance(texts, list) else []

    def starts(self) -> list[dict[str, Any]]:
        """Return the starts that environment.json lists."""
        content = self.object("environment.json") or {"starts": []}
        if self.run is not None and content.get("run", self.run) != self.run:
            self.notes.append("environment.json is from another run and was skipped.")
            return []
        starts = content.get("starts")
        if isinstance(starts, list) and all(isinstance(start, dict) for start in starts):
            return starts
        path = self._folder / "environment.json"
        self.problems.append(f"{path}: starts is {_kind(starts)}, not a list of objects; remove it.")
        return []

    def summary(self, last: int) -> dict[str, Any] | None:
        """Return summary.json, unless it is from an older run in the same folder."""
        summary = self.object("summary.json")
        if summary is None:
            return None
        by_steps = summary.get("by_steps")
        pairs = list(by_steps.values()) if isinstance(by_steps, dict) else []
        if not pairs or not all(_is_pair(pair) for pair in pairs):
            path = self._folder / "summary.json"
            self.problems.append(f"{path} has no by_steps with base and final scores; remove or repair it.")
            return None
        if self.run is not None and summary.get("run") != self.run:
            self.notes.append("summary.json is from another run and was skipped.")
            return None
        if summary.get("iterations") != last:
            self.notes.append(
                f"summary.json is of {summary.get('iterations')} iterations, but {last} are done: it is from an older "
                "run and was skipped."
            )
            return None
        return summary

    def until(self, last: int, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the lines up to the last iteration that was written."""
        return [line for line in lines if line["step"] <= last]

    def by_step(self, name: str, last: int) -> dict[int, Path]:
        """Return the PNGs of a folder by the step that they are named after, up to the last iteration."""
        folder = self._folder / name
        pictures = sorted((int(path.stem), path) for path in _pngs(folder)) if folder.is_dir() else []
        pictures = [(step, path) for step, path in pictures if step <= last]
        own = {step: path for step, path in pictures if self.run is None or run_of(path) in (None, self.run)}
        if len(own) < len(pictures):
            self.notes.append(f"{name}: {len(pictures) - len(own)} pictures are from another run and were skipped.")
        return own

    def before_after(self) -> Path | None:
        """Return the picture of before and after, unless it is from another run."""
        path = self._folder / "before_after.png"
        if not path.is_file():
            return None
        if self.run is not None and run_of(path) != self.run:
            self.notes.append("before_after.png is from another run and was skipped.")
            return None
        return path


def _pngs(folder: Path) -> Iterator[Path]:
    return (path for path in folder.glob("*.png") if path.stem.isascii() and path.stem.isdigit())


def _line(line: bytes, before: int | None) -> tuple[str, dict[str, Any]]:
    """Return (what is wrong with the line or "", its values)."""
    try:
        values = json.loads(line)
    except ValueError as error:
        return f"is not JSON ({error})", {}
    if not isinstance(values, dict):
        return f"is {_kind(values)}, not an object", {}
    step = values.get("step")
    if not isinstance(step, int) or isinstance(step, bool):
        return f"has the step {step!r}, not a whole number", {}
    if before is not None and step <= before:
        return f"has step {step} after step {before}", {}
    return "", values


def _is_pair(pair: Any) -> bool:
    return isinstance(pair, dict) and all(_has_scores(pair.get(side)) for side in ("base", "final"))


def _has_scores(said: Any) -> bool:
    """Return whether it is an object whose tags, if it has any, are objects too."""
    tags = said.get("tags", {}) if isinstance(said, dict) else None
    return isinstance(tags, dict) and all(isinstance(tag, dict) for tag in tags.values())


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "nothing"}
    return kinds.get(type(value), "a number")
