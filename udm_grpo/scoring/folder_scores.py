"""Score a folder of pictures; scores are written as they arrive, so that scoring continues where it stopped.

The folder of scores has settings.json (what determines them), prompts.jsonl (each prompt's metadata by its number) and
scores.jsonl, a line per picture and scorer:

    {"image", "prompt", "picture", "scorer", "score", "raw", "reasons", "details"}

image: path in the folder of pictures. prompt: number. picture: its digest (sample_folder.Picture). details: what the
scorer saw, as a JSON text, or "" if it does not report that.
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
"""Maximum bytes of pixels that are sent together."""


class ScoringError(UserError, ValueError):
    """Pictures that cannot be scored as requested; the message says what to change."""


@dataclass(frozen=True)
class Mark:
    """The result of one scorer for one picture: a line of scores.jsonl."""

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
    """All marks of a folder of pictures; scorers: {name: {"scorer", "options"}}, which gave them."""

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
    """Score every picture with every scorer, at most `batch` at a time; return all marks in order, and warnings.

    warn: called with the same warnings before anything is scored.

    Raises ScoringError for an output folder with other contents or settings, for pictures that have changed since they
    were scored, and for prompts that a scorer cannot judge (naming all); BridgeError if a scorer fails.
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
            needed = {name: config for name, config in scorers.items() if any(name in names for names, _ in todo)}
            clients = _open_scorers(needed, output / "kept_images", stack)
            _check_prompts(clients, folder.prompts)
            _try_out(clients, folder)
        warnings += notes_of_prompts(clients, folder.prompts, output)
        warn(warnings)
        if todo:
            file = stack.enter_context((output / "scores.jsonl").open("a", encoding="utf-8"))
            total = len(folder.pictures) * len(scorers)
            bar = stack.enter_context(progress_bar(total, "scoring", "score", len(marks)))
            places = (max(config.replicas, len(config.addresses), len(config.devices)) for config in scorers.values())
            waiting = 2 * max(places) + 1
            for new_marks in _score_parts(folder, clients, todo, waiting):
                _write(file, new_marks)
                marks.update({(mark.image, mark.scorer): mark for mark in new_marks})
                bar.update(len(new_marks))
    ordered = [marks[picture.path, name] for name in scorers for picture in folder.pictures]
    return Scored(folder.root, settings, folder.prompts, ordered), warnings


def made_by(scorers: Mapping[str, ScorerConfig]) -> dict[str, dict[str, Any]]:
    """Return {name: {"scorer", "options"}}, which determines the scores of a configuration, without secrets."""
    return {
        name: {"scorer": config.scorer or name, "options": redacted_values(config.options)}
        for name, config in scorers.items()
    }


def load_scored(output: Path) -> Scored:
    """Return the scores that an earlier call has completed in a folder.

    Raises ScoringError if they are incomplete or damaged.
    """
    for name in ("settings.json", "prompts.jsonl", "scores.jsonl", "summary.json"):
        if not (output / name).is_file():
            raise ScoringError(f"{output} has no {name}, so its scores are incomplete; finish scoring it first.")
    settings = _read_settings(output)
    try:
        lines = [json.loads(line) for line in (output / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
        prompts = {int(line["prompt"]): dict(line["metadata"]) for line in lines}
    except (ValueError, KeyError, TypeError) as error:
        raise ScoringError(f"{output / 'prompts.jsonl'} is damaged ({error!r}); score it again.") from error
    marks, damaged = _read_marks(output / "scores.jsonl")
    if damaged:
        raise ScoringError(f"{output / 'scores.jsonl'} has {damaged} damaged lines; score it again.")
    return Scored(Path(settings["samples"]), settings["scorers"], prompts, list(marks.values()))


def is_scored(folder: Path) -> bool:
    """Return whether a folder has scores (rather than pictures)."""
    return (folder / "scores.jsonl").is_file()


def _read_settings(output: Path) -> dict[str, Any]:
    file = output / "settings.json"
    try:
        settings = dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ScoringError(f"{file} is damaged ({error}); give another folder.") from error
    if not isinstance(settings.get("scorers"), dict) or not isinstance(settings.get("samples"), str):
        raise ScoringError(f"{file} does not belong to scores; give an empty or new folder for the scores.")
    return settings


def _open_output(
    output: Path, scorers: dict[str, dict[str, Any]], folder: SampleFolder
) -> tuple[dict[tuple[str, str], Mark], list[str]]:
    """Create the folder, or check that scoring can continue in it; return the marks in it, and warnings."""
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
    # Names that start with a dot are leftovers of files that were being written when a process was killed.
    elif output.exists() and any(not entry.name.startswith(".") for entry in output.iterdir()):
        raise ScoringError(f"{output} is not empty and has no settings.json; give an empty or new folder as --output.")
    else:
        write_json(output / "settings.json", {"samples": str(folder.root), "scorers": scorers})
    remove_unfinished(output)
    (output / "summary.json").unlink(missing_ok=True)  # it marks complete scores
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
        lines.append("Restore these to continue there, or give another folder as --output.")
        raise ScoringError("\n  ".join([f"{output} has scores with different settings:", *lines]))


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
                    f"{output} has scores of {len(changed)} pictures that were removed or changed in {folder.root}, or "
                    "have another prompt now; give another folder as --output:",
                    *shown,
                ]
            )
        )


def _read_marks(file: Path) -> tuple[dict[tuple[str, str], Mark], int]:
    """Return the marks of scores.jsonl by picture and scorer, and the number of damaged lines.

    An incomplete last line does not count.
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
    """Return which scorers have to score which pictures together; the pictures of a part have the same size."""
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
    """Load every scorer, all at the same time because loading is slow."""
    with ThreadPoolExecutor(len(scorers)) as pool:
        opening = {
            name: pool.submit(connect, RewardsConfig({name: replace(config, weight=1.0)}), kept_images)
            for name, config in scorers.items()
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
    """Raise ScoringError that names every prompt that a scorer cannot judge."""
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
    """Let custom scorers judge test images with the size and prompt of the first picture."""
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
    """Yield the marks of every part and scorer; at most `waiting` parts are being scored at a time.

    If a scorer fails, what the others have already scored is yielded before its error is raised.
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
    """Yield the oldest marks; if they failed, yield all finished marks and raise the error."""
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
