"""A folder of pictures and their prompts, every file looked at before anything is made of it.

Three layouts are read, those that `udm_grpo.sample` writes (layouts.py):

    geneval:   00000/metadata.jsonl, 00000/samples/0000.png (or 00000.png)      flat:  prompts.jsonl, 00000_0.png
    dpgbench:  prompts.jsonl, ID.png with four pictures; or without prompts.jsonl, and the prompts are given

Source: the first is GenEval's own (djghosh13/geneval, evaluation/evaluate_images.py).
"""

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rewards_bridge.errors import UserError
from udm_grpo.data.prompt_objects import PROMPT, json_of, object_row, wrong_text
from udm_grpo.machine.progress import progress_bar
from udm_grpo.scoring.layouts import GRID, QUARTERS, grid_names
from udm_grpo.scoring.sample_files import Picture, examine, load_picture, pictures_beside, pictures_by_suffix

__all__ = ["MAX_SHOWN", "Picture", "SampleFolder", "SampleFolderError", "has_prompts", "load_picture", "read_samples"]

MAX_SHOWN = 50
"""Files that an error or a warning names; of any further ones it gives the number."""

_READERS = 8
_MOST = 2**20  # of prompts, and of pictures of one
_BESIDE = ("contact_sheet.png", "prompts.jsonl", "settings.json")  # what lies beside the pictures of a flat folder


class SampleFolderError(UserError, ValueError):
    """A folder of pictures that cannot be scored as it is; the message names every file and what to do."""


@dataclass(frozen=True)
class SampleFolder:
    """What a folder holds: every prompt's metadata by its number, the pictures in order, what to say about them."""

    root: Path
    prompts: dict[int, dict[str, Any]]
    pictures: list[Picture]
    warnings: list[str]


@dataclass
class _Found:
    """What is in a folder by its names, and what is wrong with it."""

    prompts: dict[int, dict[str, Any]] = field(default_factory=dict)
    files: dict[tuple[int, int], str] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    strange: list[str] = field(default_factory=list)
    misnamed: list[str] = field(default_factory=list)
    """Files that look like the pictures that are missing, but for their names."""
    pattern: str = ""
    """How the pictures of this layout are called."""


def has_prompts(root: Path) -> bool:
    """Whether a folder of pictures holds their prompts as well."""
    return (root / "prompts.jsonl").exists() or any(entry.name.isdecimal() for entry in root.iterdir())


def read_samples(
    root: str | Path, allow_missing: bool = False, prompts: Sequence[Mapping[str, Any]] | None = None
) -> SampleFolder:
    """Read every file of a folder of pictures once; prompts: of a folder of grids that holds none itself.

    Raises SampleFolderError for a folder of neither layout, and for prompts and pictures that are missing or cannot be
    read, naming them all; with `allow_missing`, pictures that are missing or unreadable are counted in a warning.
    """
    root = Path(root)
    if not root.is_dir():
        raise SampleFolderError(f"there is no folder {root}; give one of pictures, such as udm_grpo.sample writes.")
    numbered = sorted(entry for entry in root.iterdir() if entry.is_dir() and entry.name.isdecimal())
    flat, settings = root / "prompts.jsonl", _settings(root / "settings.json")
    listed = None if has_prompts(root) else prompts
    if listed is None and bool(numbered) == flat.exists():
        what = "both" if numbered else "neither"
        raise SampleFolderError(
            f"{root} has {what} of numbered folders (00000/metadata.jsonl, 00000/samples/0000.png) and prompts.jsonl "
            "(with 00000_0.png); it needs exactly one of these. For DPG-Bench's ID.png, give --prompts FILE."
        )
    if listed is not None or (settings.get("layout") == GRID and not numbered):
        found = _read_grids(root, flat, listed)
    else:
        found = _read_numbered(root, numbered) if numbered else _read_flat(root, flat)
        promised = settings.get("images_per_prompt")
        _find_missing(root, found, promised if isinstance(promised, int) else 0, bool(numbered))
    pictures, unreadable, transparent = _inspect(root, found)
    _refuse(root, found, unreadable, allow_missing)
    if not pictures:
        raise SampleFolderError(_no_pictures(root, found))
    warnings = [
        *_listed("pictures are missing and left out", found.missing),
        *_listed("pictures cannot be scored and are left out", unreadable),
        *_listed("files are no pictures by their names and are left out", found.strange),
        *_listed("pictures are partly transparent and are scored on white", transparent),
        *_sizes(pictures),
        *_counts(found.prompts, pictures),
    ]
    return SampleFolder(root, found.prompts, pictures, warnings)


def _read_numbered(root: Path, folders: Sequence[Path]) -> _Found:
    found = _Found(pattern="NUMBER/samples/NUMBER.png, such as 00000/samples/0000.png")
    for folder in folders:
        prompt, file = int(folder.name), folder / "metadata.jsonl"
        if prompt >= _MOST:
            found.wrong.append(f"{folder}: numbers of prompts are below {_MOST}")
            continue
        if prompt in found.prompts:
            found.wrong.append(f"{folder}: another folder has the number {prompt} too; keep one of them")
            continue
        found.prompts[prompt] = {}
        if file.is_file():
            try:
                found.prompts[prompt] = _metadata(file.read_text(encoding="utf-8-sig"))
            except ValueError as error:
                found.wrong.append(f"{file}: {error}")
        else:
            found.wrong.append(f"{file}: is missing; it holds the prompt as one line of GenEval's JSON")
        samples, before = folder / "samples", len(found.files)
        for entry in sorted(samples.iterdir()) if samples.is_dir() else []:
            _add(root, found, entry, prompt, re.fullmatch(r"(\d+)\.png", entry.name))
        if len(found.files) == before:
            found.misnamed += pictures_beside(folder)
    width = len(folders[0].name)
    for prompt in sorted(set(range(max(found.prompts, default=0) + 1)) - set(found.prompts)):
        found.missing.append(f"{root / f'{prompt:0{width}d}'} (a prompt with all its pictures)")
    return found


def _read_lines(file: Path) -> _Found:
    """Return the prompts of prompts.jsonl."""
    found = _Found()
    lines = [line for line in file.read_bytes().splitlines() if line.strip()]
    for prompt, line in enumerate(lines):
        try:
            found.prompts[prompt] = _metadata(line.decode("utf-8-sig"))
        except ValueError as error:
            found.wrong.append(f"{file}, prompt {prompt}: {error}")
            found.prompts[prompt] = {}
    return found


def _read_flat(root: Path, file: Path) -> _Found:
    found = _read_lines(file)
    found.pattern = "PROMPT_IMAGE.png, such as 00000_0.png for the first picture of prompt 0"
    count = len(found.prompts)
    for entry in sorted(entry for entry in root.iterdir() if entry.is_file() and entry.name not in _BESIDE):
        named = re.fullmatch(r"(\d+)_(\d+)\.png", entry.name)
        if named and int(named[1]) >= count:
            found.wrong.append(f"{entry}: is of prompt {int(named[1])}, but {file} has {count} prompts")
        else:
            _add(root, found, entry, int(named[1]) if named else 0, named)
    return found


def _read_grids(root: Path, file: Path, listed: Sequence[Mapping[str, Any]] | None) -> _Found:
    """Files with the four pictures of a prompt each, by the ids of the prompts in a file or of those listed."""
    found = _read_lines(file) if listed is None else _Found(dict(enumerate(map(dict, listed))))
    try:
        names = grid_names(list(found.prompts.values()))
    except ValueError as error:
        found.wrong.append(f"{file if listed is None else 'the prompts'}: {error}")
        return found
    found.pattern = f"ID.png, such as {names[0] if names else '00000'}.png"
    there = {entry.name for entry in root.iterdir() if entry.is_file()}
    for prompt, name in enumerate(names):
        if f"{name}.png" in there:
            found.files |= {(prompt, image): f"{name}.png#{image}" for image in range(QUARTERS)}
        else:
            found.missing.append(f"{root / name}.png (a prompt with its four pictures)")
    known = {*_BESIDE, *(f"{name}.png" for name in names)}
    found.strange += sorted(str(root / name) for name in there - known if not name.startswith("."))
    return found


def _metadata(text: str) -> dict[str, Any]:
    """Return the metadata of a prompt, read as from a prompt file; raises ValueError with what is wrong."""
    row = object_row(json_of(text), PROMPT)
    if wrong := wrong_text("prompt", row.get("prompt")) + wrong_text("tag", row["tag"]):
        raise ValueError("; ".join(wrong))
    return row


def _add(root: Path, found: _Found, entry: Path, prompt: int, named: re.Match[str] | None) -> None:
    """Take a file of a folder of pictures; what starts with a dot is what a kill left of one being written."""
    if named is None or not entry.is_file():
        found.strange += [] if entry.name.startswith(".") else [str(entry)]
        return
    key = (prompt, int(named[named.lastindex or 1]))
    if key in found.files:
        found.wrong.append(f"{entry}: {found.files[key]} has the same number; keep one of them")
    if key[1] >= _MOST:
        found.wrong.append(f"{entry}: numbers of pictures are below {_MOST}")
        return
    found.files[key] = entry.relative_to(root).as_posix()


def _settings(file: Path) -> dict[str, Any]:
    """Return what `udm_grpo.sample` was asked for there; empty if it does not say."""
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # of other origin
    return settings if isinstance(settings, dict) else {}


def _find_missing(root: Path, found: _Found, promised: int, numbered: bool) -> None:
    """Add the pictures that should be there: as many as promised, at least one of a prompt, and no gap in numbers."""
    there: dict[int, list[int]] = {prompt: [] for prompt in found.prompts}
    for prompt, image in found.files:
        there[prompt].append(image)
    width = max((len(Path(path).stem) for path in found.files.values()), default=4)
    for prompt, images in there.items():
        for image in sorted(set(range(max([promised, 1, *(image + 1 for image in images)]))) - set(images)):
            name = f"{prompt:05d}/samples/{image:0{width}d}.png" if numbered else f"{prompt:05d}_{image}.png"
            found.missing.append(str(root / name))


def _inspect(root: Path, found: _Found) -> tuple[list[Picture], list[str], list[str]]:
    """Return the pictures that can be read, in order; those that cannot, with the reason; those partly transparent."""
    pictures, unreadable, transparent = [], [], []

    def look(key: tuple[int, int]) -> tuple[Picture, bool] | str:
        return examine(root, found.files[key], *key, found.prompts[key[0]])

    keys = sorted(found.files)
    # Pillow decodes without the interpreter's lock.
    with (
        ThreadPoolExecutor(min(_READERS, os.cpu_count() or 1)) as pool,
        progress_bar(len(keys), "reading", "image") as bar,
    ):
        for seen in pool.map(look, keys):
            bar.update()
            if isinstance(seen, str):
                unreadable.append(seen)
            else:
                pictures.append(seen[0])
                transparent += [str(root / seen[0].path)] if seen[1] else []
    return pictures, unreadable, transparent


def _refuse(root: Path, found: _Found, unreadable: Sequence[str], allow_missing: bool) -> None:
    """Raise SampleFolderError if anything is wrong that is not allowed."""
    told = [*_listed("files are wrong", found.wrong)]
    if not allow_missing:
        misnamed = [*found.misnamed, *pictures_by_suffix(map(Path, found.strange))] if found.missing else []
        told += _listed(f"pictures have other names or suffixes than {found.pattern}; rename or convert them", misnamed)
        remedy = "" if misnamed else "; draw them (the same udm_grpo.sample command continues)"
        told += _listed(f"pictures are missing{remedy}", found.missing)
        told += _listed("pictures cannot be scored; convert them, or draw them again (remove them first)", unreadable)
        if len(told) > bool(found.wrong):
            told.append("--allow-missing scores what is there and counts the rest.")
    if told:
        raise SampleFolderError("\n".join([f"{root} cannot be scored as it is:", *told]))


def _no_pictures(root: Path, found: _Found) -> str:
    misnamed = [*found.misnamed, *pictures_by_suffix(map(Path, found.strange))]
    heading = f"{root} holds no picture that can be read"
    if not misnamed:
        return f"{heading}; draw some with udm_grpo.sample."
    what = f"files have other names or suffixes than {found.pattern}; rename or convert them"
    return "\n".join([f"{heading}.", *_listed(what, misnamed)])


def _listed(what: str, items: Sequence[str]) -> list[str]:
    """Nothing for no items, otherwise one text: how many, and the first of them."""
    if not items:
        return []
    rest = [f"and {len(items) - MAX_SHOWN} more"] if len(items) > MAX_SHOWN else []
    return ["\n    ".join([f"{len(items)} {what}:", *items[:MAX_SHOWN], *rest])]


def _sizes(pictures: Iterable[Picture]) -> list[str]:
    """Return a warning of several sizes, most common first: each is scored in batches of its own."""
    by_size: dict[tuple[int, int], list[str]] = {}
    for picture in pictures:
        by_size.setdefault(picture.size, []).append(picture.path)
    if len(by_size) == 1:
        return []
    rows = sorted(by_size.items(), key=lambda item: (-len(item[1]), item[0]))
    said = [f"{width}x{height}: {len(paths)} pictures, such as {paths[0]}" for (width, height), paths in rows]
    return _listed("sizes of pictures, each scored in batches of its own", said)


def _counts(prompts: Iterable[int], pictures: Iterable[Picture]) -> list[str]:
    """Return a warning of prompts with different numbers of pictures, most common number first."""
    of_prompt = Counter(dict.fromkeys(prompts, 0))
    of_prompt.update(picture.prompt for picture in pictures)
    numbers = Counter(of_prompt.values()).most_common()
    if len(numbers) == 1:
        return []
    first = {number: next(prompt for prompt, count in of_prompt.items() if count == number) for number, _ in numbers}
    said = [f"{number} pictures: {times} prompts, such as prompt {first[number]}" for number, times in numbers]
    return _listed("different numbers of pictures for a prompt; every picture counts alike", said)
