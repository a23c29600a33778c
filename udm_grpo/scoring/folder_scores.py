"""Scores of a folder of pictures, written down as they come, so that scoring continues where it stopped.

In the folder of scores: settings.json (what decides them), prompts.jsonl (each prompt's metadata by its number) and
scores.jsonl, a line a picture and scorer:

    {"image", "prompt", "picture", "scorer", "score", "raw", "reasons", "details"}

image: path in the folder of pictures. prompt: number. picture: its digest (sample_folder.Picture). details: what the
scorer saw, JSON as a text, "" if it does not say.
"""

import collections
import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from rewards_bridge.composition import Composition
from rewards_bridge.errors import UserError
from rewards_bridge.redaction import redacted_texts, redacted_values
from rewards_bridge.scorers.base import Scores
from udm_grpo.config import RewardsConfig, ScorerConfig
from udm_grpo.files.atomic import remove_unfinished, replace_file
from udm_grpo.machine.progress import progress_bar
from udm_grpo.reporting.metrics import write_json
from udm_grpo.scoring.rewards import connect, warn_of
from udm_grpo.scoring.sample_folder import MAX_SHOWN, Picture, SampleFolder, load_picture
from udm_grpo.scoring.scorer_notes import notes_of_prompts

MAX_BATCH = 2**28
"""Bytes of pixels that are sent together at most."""


class ScoringError(UserError, ValueError):
    """Pictures that cannot be scored as asked; the message says what to change."""


@dataclass(frozen=True)
class Mark:
    """What one scorer says of one picture: a line of scores.jsonl."""

    image: str
    prompt: int
    picture: str
    scorer: str
    score: float
    raw: dict[str, float]
    reasons: str
    details: str


@dataclass(frozen=True)
class Scored:
    """All marks of a folder of pictures; scorers: {name: {"scorer", "options"}}, what they were made by."""

    samples: Path
    scorers: dict[str, dict[str, Any]]
    prompts: dict[int, dict[str, Any]]
    marks: list[Mark]


def score_folder(
    folder: SampleFolder,
    scorers: Mapping[str, ScorerConfig],
    output: Path,
    batch: int,
    warn: Callable[[Sequence[str]], None],
) -> tuple[Scored, list[str]]:
    """Score every picture by every scorer, at most `batch` at a time; returns all marks in order, and warnings.

    warn: is called with the same warnings before anything is scored.

    Raises ScoringError for an output of something else or of other settings, for pictures that have changed since
    they were scored, and for prompts that a scorer cannot judge (all of them); BridgeError as the scorers fail.
    """
    settings = made_by(scorers)
    marks, warnings = _open_output(output, settings, folder)
    lines = [json.dumps({"prompt": number, "metadata": metadata}) for number, metadata in folder.prompts.items()]
    text = "".join(f"{line}\n" for line in lines)
    replace_file(output / "prompts.jsonl", partial(Path.write_text, data=text, encoding="utf-8"))
    todo = _parts(folder, scorers, marks, batch)
    with contextlib.ExitStack() as stack:
        clients: dict[str, Composition] = {}
        if todo:
            needed = {name: given for name, given in scorers.items() if any(name in names for names, _ in todo)}
            clients = _open_scorers(needed, output / "kept_images", stack)
            _check_prompts(clients, folder.prompts)
            _try_out(clients, folder)
        warnings += notes_of_prompts(clients, folder.prompts, output)
        warn(warnings)
        if todo:
            file = stack.enter_context((output / "scores.jsonl").open("a", encoding="utf-8"))
            total = len(folder.pictures) * len(scorers)
            bar = stack.enter_context(progress_bar(total, "scoring", "score", len(marks)))
            places = (max(given.replicas, len(given.addresses), len(given.devices)) for given in scorers.values())
            waiting = 2 * max(places) + 1
            for made in _score_parts(folder, clients, todo, waiting):
                _write(file, made)
                marks.update({(mark.image, mark.scorer): mark for mark in made})
                bar.update(len(made))
    ordered = [marks[picture.path, name] for name in scorers for picture in folder.pictures]
    return Scored(folder.root, settings, folder.prompts, ordered), warnings


def made_by(scorers: Mapping[str, ScorerConfig]) -> dict[str, dict[str, Any]]:
    """{name: {"scorer", "options"}}: of a configuration, what decides its scores, without secrets."""
    return {
        name: {"scorer": given.scorer or name, "options": redacted_values(given.options)}
        for name, given in scorers.items()
    }


def load_scored(output: Path) -> Scored:
    """Return the scores that an earlier call has completed in a folder.

    Raises ScoringError if there are none, or damaged.
    """
    for name in ("settings.json", "prompts.jsonl", "scores.jsonl", "summary.json"):
        if not (output / name).is_file():
            raise ScoringError(f"{output} has no {name}, so nothing was scored there to the end; score it first.")
    settings = _read_settings(output)
    try:
        lines = [json.loads(line) for line in (output / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
        prompts = {int(line["prompt"]): dict(line["metadata"]) for line in lines}
    except (ValueError, KeyError, TypeError) as error:
        raise ScoringError(f"{output / 'prompts.jsonl'} is damaged ({error!r}); run its scoring again.") from error
    marks, damaged = _read_marks(output / "scores.jsonl")
    if damaged:
        raise ScoringError(f"{output / 'scores.jsonl'} has {damaged} damaged lines; run its scoring again.")
    return Scored(Path(settings["samples"]), settings["scorers"], prompts, list(marks.values()))


def is_scored(folder: Path) -> bool:
    """Whether a folder is one of scores (rather than of pictures)."""
    return (folder / "scores.jsonl").is_file()


def _read_settings(output: Path) -> dict[str, Any]:
    file = output / "settings.json"
    try:
        settings = dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ScoringError(f"{file} is damaged ({error}); give another folder.") from error
    if not isinstance(settings.get("scorers"), dict) or not isinstance(settings.get("samples"), str):
        raise ScoringError(f"{file} is not of scores; give an empty or new folder for the scores.")
    return settings


def _open_output(
    output: Path, scorers: dict[str, dict[str, Any]], folder: SampleFolder
) -> tuple[dict[tuple[str, str], Mark], list[str]]:
    """Make the folder, or check that it is one to continue with: what is scored there, and warnings."""
    marks: dict[tuple[str, str], Mark] = {}
    warnings = []
    if (output / "settings.json").exists():
        _compare_settings(output, _read_settings(output)["scorers"], scorers)
        file = output / "scores.jsonl"
        if file.exists():
            marks, damaged = _read_marks(file)
            if damaged:
                warnings.append(f"{damaged} lines of {file} were damaged; their pictures are scored again.")
            _compare_pictures(output, marks, folder)
            replace_file(file, partial(_write_all, marks=list(marks.values())))
    # What starts with a dot is what a kill leaves of a file that was being written.
    elif output.exists() and any(not entry.name.startswith(".") for entry in output.iterdir()):
        raise ScoringError(f"{output} holds something, but no settings.json; give an empty or new folder as --output.")
    else:
        write_json(output / "settings.json", {"samples": str(folder.root), "scorers": scorers})
    remove_unfinished(output)
    (output / "summary.json").unlink(missing_ok=True)  # it stands for scores that are complete
    return marks, warnings


def _compare_settings(output: Path, there: dict[str, Any], now: dict[str, Any]) -> None:
    lines = []
    if there.keys() != now.keys():
        lines.append(f"scorers: there {', '.join(there)}, now {', '.join(now)}")
    for name in now:
        for key, value in now[name].items():
            if name in there and (before := _shown(there[name].get(key))) != value:
                lines.append(f"{key} of {name}: there {before!r}, now {value!r}")
    if lines:
        lines.append("Set these back to continue there, or give another folder as --output.")
        raise ScoringError("\n  ".join([f"{output} holds scores of other settings:", *lines]))


def _shown(value: Any) -> Any:
    return redacted_values(value) if isinstance(value, Mapping) else value


def _compare_pictures(output: Path, marks: Mapping[tuple[str, str], Mark], folder: SampleFolder) -> None:
    now = {picture.path: picture.digest for picture in folder.pictures}
    changed = sorted({image for (image, _), mark in marks.items() if now.get(image) != mark.picture})
    if changed:
        shown = [*changed[:MAX_SHOWN], *([f"and {len(changed) - MAX_SHOWN} more"] if changed[MAX_SHOWN:] else [])]
        raise ScoringError(
            "\n  ".join(
                [
                    f"{output} holds scores of {len(changed)} pictures that are gone, or are others, or have another "
                    f"prompt in {folder.root} now; give another folder as --output:",
                    *shown,
                ]
            )
        )


def _read_marks(file: Path) -> tuple[dict[tuple[str, str], Mark], int]:
    """Return the marks of scores.jsonl by picture and scorer, and how many lines are damaged.

    A torn last line is none.
    """
    marks, damaged = {}, 0
    for line in file.read_bytes().split(b"\n")[:-1]:
        try:
            mark = Mark(**json.loads(line))
            whole = all(math.isfinite(number) for number in (mark.score, *mark.raw.values()))
        except (ValueError, TypeError, AttributeError):
            whole = False
        if whole:
            marks[mark.image, mark.scorer] = mark
        else:
            damaged += 1
    return marks, damaged


def _write_all(path: Path, marks: Sequence[Mark]) -> None:
    with path.open("w", encoding="utf-8") as file:
        _write(file, marks)


def _write(file: TextIO, marks: Sequence[Mark]) -> None:
    file.write("".join(json.dumps(redacted_texts(asdict(mark)), allow_nan=False) + "\n" for mark in marks))
    file.flush()


def _parts(
    folder: SampleFolder, scorers: Mapping[str, ScorerConfig], marks: Mapping[tuple[str, str], Mark], batch: int
) -> list[tuple[tuple[str, ...], list[Picture]]]:
    """Which scorers are to score which pictures together; those are of one size."""
    alike: dict[tuple[tuple[str, ...], tuple[int, int]], list[Picture]] = {}
    for picture in folder.pictures:
        lacking = tuple(name for name in scorers if (picture.path, name) not in marks)
        if lacking:
            alike.setdefault((lacking, picture.size), []).append(picture)
    parts = []
    for (names, (width, height)), pictures in alike.items():
        count = max(1, min(batch, MAX_BATCH // (3 * width * height)))
        parts += [(names, pictures[at : at + count]) for at in range(0, len(pictures), count)]
    return parts


def _open_scorers(
    scorers: Mapping[str, ScorerConfig], kept_images: Path, stack: contextlib.ExitStack
) -> dict[str, Composition]:
    """Every scorer, loaded; all at once, since loading takes long."""
    with ThreadPoolExecutor(len(scorers)) as pool:
        opening = {
            name: pool.submit(connect, RewardsConfig({name: replace(given, weight=1.0)}), kept_images)
            for name, given in scorers.items()
        }
    failed = [error for future in opening.values() if (error := future.exception()) is not None]
    clients = {
        name: stack.enter_context(future.result()) for name, future in opening.items() if future.exception() is None
    }
    if failed:
        raise failed[0]
    warn_of(clients.values())
    return clients


def _check_prompts(clients: Mapping[str, Composition], prompts: Mapping[int, Mapping[str, Any]]) -> None:
    """Raise ScoringError naming every prompt that a scorer cannot judge."""
    numbers, metadata = list(prompts), [dict(entry) for entry in prompts.values()]
    texts = [entry["prompt"] for entry in metadata]
    problems = [
        f"prompt {numbers[index]} ({texts[index]!r}): {problem}"
        for client in clients.values()
        for index, problem in client.check(texts, metadata).items()
    ]
    if problems:
        heading = f"{len(problems)} prompts cannot be scored; correct them, or leave that scorer out:"
        raise ScoringError("\n  ".join([heading, *problems]))


def _try_out(clients: Mapping[str, Composition], folder: SampleFolder) -> None:
    """Have scorers of the user's own judge test images of the first picture's size and prompt."""
    width, height = folder.pictures[0].size
    metadata = dict(folder.prompts[folder.pictures[0].prompt])
    for client in clients.values():
        client.try_out(metadata["prompt"], metadata, height, width)


def _score_parts(
    folder: SampleFolder,
    clients: Mapping[str, Composition],
    parts: Sequence[tuple[tuple[str, ...], list[Picture]]],
    waiting: int,
) -> Iterator[list[Mark]]:
    """Yield the marks of every part and scorer; at most `waiting` parts are at the scorers at a time.

    If a scorer fails, what the others had already scored is given before its error is raised.
    """
    queue: collections.deque[tuple[str, list[Picture], Future[Scores]]] = collections.deque()
    most = waiting * len(clients)
    for names, pictures in parts:
        images = np.stack([load_picture(folder.root / picture.path) for picture in pictures])
        metadata = [folder.prompts[picture.prompt] for picture in pictures]
        texts = [entry["prompt"] for entry in metadata]
        queue.extend((name, pictures, clients[name].submit(images, texts, metadata)) for name in names)
        while len(queue) > most:
            yield from _take(queue)
    while queue:
        yield from _take(queue)


def _take(queue: "collections.deque[tuple[str, list[Picture], Future[Scores]]]") -> Iterator[list[Mark]]:
    """Yield the marks that have waited longest; if they failed, all that are there, and then the error."""
    name, pictures, ticket = queue.popleft()
    error = ticket.exception()
    if error is None:
        yield _marks(name, pictures, ticket.result())
        return
    for other, those, done in queue:
        if done.done() and done.exception() is None:
            yield _marks(other, those, done.result())
    raise error


def _marks(name: str, pictures: Sequence[Picture], scores: Scores) -> list[Mark]:
    details = scores.details or [""] * len(pictures)
    return [
        Mark(
            image=picture.path,
            prompt=picture.prompt,
            picture=picture.digest,
            scorer=name,
            score=float(scores.score[row]),
            raw={key: float(values[row]) for key, values in scores.raw.items()},
            reasons=scores.reasons[row],
            details=details[row],
        )
        for row, picture in enumerate(pictures)
    ]
