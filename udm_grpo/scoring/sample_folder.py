"""Read a folder of pictures and their prompts, and check every file before any is used.

The three layouts are those that `udm_grpo.sample` writes (layouts.py):

    geneval:   00000/metadata.jsonl, 00000/samples/0000.png (or 00000.png)      flat:  prompts.jsonl, 00000_0.png
    dpgbench:  prompts.jsonl, ID.png with four pictures; or no prompts.jsonl, if the prompts are passed

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
"""Number of files that an error or a warning names; further ones are only counted."""

_READERS = 8
_MAX_COUNT = 2**20  # of prompts, and of pictures of one prompt
_BESIDE = ("contact_sheet.png", "prompts.jsonl", "settings.json")  # other files in a flat folder


class SampleFolderError(UserError, ValueError):
    """A folder of pictures that cannot be scored as it is; the message names every file and what to do."""


@dataclass(frozen=True)
class SampleFolder:
    """Contents of a folder: every prompt's metadata by its number, the pictures in order, and warnings."""

    root: Path
    prompts: dict[int, dict[str, Any]]
    pictures: list[Picture]
    warnings: list[str]


@dataclass
class _Contents:
    """Contents of a folder according to file names, and what is wrong with it."""

    prompts: dict[int, dict[str, Any]] = field(default_factory=dict)
    files: dict[tuple[int, int], str] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    strange: list[str] = field(default_factory=list)
    misnamed: list[str] = field(default_factory=list)
    """Files that may be the missing pictures under other names."""
    pattern: str = ""
    """How the pictures of this layout are named."""


def has_prompts(root: Path) -> bool:
    """Return whether a folder of pictures holds their prompts as well."""
    return (root / "prompts.jsonl").exists() or any(entry.name.isdecimal() for entry in root.iterdir())


def read_samples(
    root: str | Path, allow_missing: bool = False, prompts: Sequence[Mapping[str, Any]] | None = None
) -> SampleFolder:
    """Read every file of a folder of pictures once; prompts: for a folder of grids without any of its own.

    Raises SampleFolderError for a folder with none of the layouts, and for missing or unreadable prompts and pictures,
    naming them all; with `allow_missing`, missing and unreadable pictures are counted in a warning instead.
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
        contents = _read_grids(root, flat, listed)
    else:
        contents = _read_numbered(root, numbered) if numbered else _read_flat(root, flat)
        promised = settings.get("images_per_prompt")
        _find_missing(root, contents, promised if isinstance(promised, int) else 0, bool(numbered))
    pictures, unreadable, transparent = _inspect(root, contents)
    _refuse(root, contents, unreadable, allow_missing)
    if not pictures:
        raise SampleFolderError(_no_pictures(root, contents))
    warnings = [
        *_listed("pictures are missing and left out", contents.missing),
        *_listed("pictures cannot be scored and are left out", unreadable),
        *_listed("files are not named like pictures and are left out", contents.strange),
        *_listed("pictures are partly transparent and are scored on white", transparent),
        *_sizes(pictures),
        *_counts(contents.prompts, pictures),
    ]
    return SampleFolder(root, contents.prompts, pictures, warnings)


def _read_numbered(root: Path, folders: Sequence[Path]) -> _Contents:
    contents = _Contents(pattern="NUMBER/samples/NUMBER.png, such as 00000/samples/0000.png")
    for folder in folders:
        prompt, file = int(folder.name), folder / "metadata.jsonl"
        if prompt >= _MAX_COUNT:
            contents.wrong.append(f"{folder}: numbers of prompts must be below {_MAX_COUNT}")
            continue
        if prompt in contents.prompts:
            contents.wrong.append(f"{folder}: another folder has the number {prompt} too; keep one of them")
            continue
        contents.prompts[prompt] = {}
        if file.is_file():
            try:
                contents.prompts[prompt] = _metadata(file.read_text(encoding="utf-8-sig"))
            except ValueError as error:
                contents.wrong.append(f"{file}: {error}")
        else:
            contents.wrong.append(f"{file}: is missing; it must hold the prompt as one line of GenEval's JSON")
        samples, before = folder / "samples", len(contents.files)
        for entry in sorted(samples.iterdir()) if samples.is_dir() else []:
            _add(root, contents, entry, prompt, re.fullmatch(r"(\d+)\.png", entry.name))
        if len(contents.files) == before:
            contents.misnamed += pictures_beside(folder)
    width = len(folders[0].name)
    for prompt in sorted(set(range(max(contents.prompts, default=0) + 1)) - set(contents.prompts)):
        contents.missing.append(f"{root / f'{prompt:0{width}d}'} (a prompt with all its pictures)")
    return contents


def _read_lines(file: Path) -> _Contents:
    """Return the prompts of prompts.jsonl."""
    contents = _Contents()
    lines = [line for line in file.read_bytes().splitlines() if line.strip()]
    for prompt, line in enumerate(lines):
        try:
            contents.prompts[prompt] = _metadata(line.decode("utf-8-sig"))
        except ValueError as error:
            contents.wrong.append(f"{file}, prompt {prompt}: {error}")
            contents.prompts[prompt] = {}
    return contents


def _read_flat(root: Path, file: Path) -> _Contents:
    contents = _read_lines(file)
    contents.pattern = "PROMPT_IMAGE.png, such as 00000_0.png for the first picture of prompt 0"
    count = len(contents.prompts)
    for entry in sorted(entry for entry in root.iterdir() if entry.is_file() and entry.name not in _BESIDE):
        named = re.fullmatch(r"(\d+)_(\d+)\.png", entry.name)
        if named and int(named[1]) >= count:
            contents.wrong.append(f"{entry}: is of prompt {int(named[1])}, but {file} has {count} prompts")
        else:
            _add(root, contents, entry, int(named[1]) if named else 0, named)
    return contents


def _read_grids(root: Path, file: Path, listed: Sequence[Mapping[str, Any]] | None) -> _Contents:
    """Read files with the four pictures of a prompt each, named by the ids of the prompts in `file` or `listed`."""
    contents = _read_lines(file) if listed is None else _Contents(dict(enumerate(map(dict, listed))))
    try:
        names = grid_names(list(contents.prompts.values()))
    except ValueError as error:
        contents.wrong.append(f"{file if listed is None else 'the prompts'}: {error}")
        return contents
    contents.pattern = f"ID.png, such as {names[0] if names else '00000'}.png"
    there = {entry.name for entry in root.iterdir() if entry.is_file()}
    for prompt, name in enumerate(names):
        if f"{name}.png" in there:
            contents.files |= {(prompt, image): f"{name}.png#{image}" for image in range(QUARTERS)}
        else:
            contents.missing.append(f"{root / name}.png (a prompt with its four pictures)")
    known = {*_BESIDE, *(f"{name}.png" for name in names)}
    contents.strange += sorted(str(root / name) for name in there - known if not name.startswith("."))
    return contents


def _metadata(text: str) -> dict[str, Any]:
    """Return the metadata of a prompt, read as from a prompt file; raises ValueError with what is wrong."""
    row = object_row(json_of(text), PROMPT)
    if wrong := wrong_text("prompt", row.get("prompt")) + wrong_text("tag", row["tag"]):
        raise ValueError("; ".join(wrong))
    return row


def _add(root: Path, contents: _Contents, entry: Path, prompt: int, named: re.Match[str] | None) -> None:
    """Add a file of a folder of pictures; names that start with a dot are leftovers of a killed process."""
    if named is None or not entry.is_file():
        contents.strange += [] if entry.name.startswith(".") else [str(entry)]
        return
    key = (prompt, int(named[named.lastindex or 1]))
    if key in contents.files:
        contents.wrong.append(f"{entry}: {contents.files[key]} has the same number; keep one of them")
    if key[1] >= _MAX_COUNT:
        contents.wrong.append(f"{entry}: numbers of pictures must be below {_MAX_COUNT}")
        return
    contents.files[key] = entry.relative_to(root).as_posix()


def _settings(file: Path) -> dict[str, Any]:
    """Return the settings of `udm_grpo.sample`; empty if it did not draw the pictures."""
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # drawn by another program
    return settings if isinstance(settings, dict) else {}


def _find_missing(root: Path, contents: _Contents, promised: int, numbered: bool) -> None:
    """Add missing pictures: prompts need as many as promised, at least one, and no gaps in the numbers."""
    there: dict[int, list[int]] = {prompt: [] for prompt in contents.prompts}
    for prompt, image in contents.files:
        there[prompt].append(image)
    width = max((len(Path(path).stem) for path in contents.files.values()), default=4)
    for prompt, images in there.items():
        for image in sorted(set(range(max([promised, 1, *(image + 1 for image in images)]))) - set(images)):
            name = f"{prompt:05d}/samples/{image:0{width}d}.png" if numbered else f"{prompt:05d}_{image}.png"
            contents.missing.append(str(root / name))


def _inspect(root: Path, contents: _Contents) -> tuple[list[Picture], list[str], list[str]]:
    """Return the readable pictures in order, the unreadable ones with reasons, and the partly transparent ones."""
    pictures, unreadable, transparent = [], [], []

    def look(key: tuple[int, int]) -> tuple[Picture, bool] | str:
        return examine(root, contents.files[key], *key, contents.prompts[key[0]])

    keys = sorted(contents.files)
    # Pillow releases the interpreter's lock while it decodes.
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


def _refuse(root: Path, contents: _Contents, unreadable: Sequence[str], allow_missing: bool) -> None:
    """Raise SampleFolderError if anything is wrong that is not allowed."""
    problems = [*_listed("files are wrong", contents.wrong)]
    if not allow_missing:
        misnamed = [*contents.misnamed, *pictures_by_suffix(map(Path, contents.strange))] if contents.missing else []
        problems += _listed(
            f"pictures have other names or suffixes than {contents.pattern}; rename or convert them", misnamed
        )
        remedy = "" if misnamed else "; draw them (the same udm_grpo.sample command continues)"
        problems += _listed(f"pictures are missing{remedy}", contents.missing)
        problems += _listed("pictures cannot be scored; convert them, or remove them and draw them again", unreadable)
        if len(problems) > bool(contents.wrong):
            problems.append("--allow-missing scores what is there and counts the rest.")
    if problems:
        raise SampleFolderError("\n".join([f"{root} cannot be scored as it is:", *problems]))


def _no_pictures(root: Path, contents: _Contents) -> str:
    misnamed = [*contents.misnamed, *pictures_by_suffix(map(Path, contents.strange))]
    heading = f"{root} holds no picture that can be read"
    if not misnamed:
        return f"{heading}; draw some with udm_grpo.sample."
    what = f"files have other names or suffixes than {contents.pattern}; rename or convert them"
    return "\n".join([f"{heading}.", *_listed(what, misnamed)])


def _listed(what: str, items: Sequence[str]) -> list[str]:
    """Return one message with the number of items and the first of them; [] if there are none."""
    if not items:
        return []
    rest = [f"and {len(items) - MAX_SHOWN} more"] if len(items) > MAX_SHOWN else []
    return ["\n    ".join([f"{len(items)} {what}:", *items[:MAX_SHOWN], *rest])]


def _sizes(pictures: Iterable[Picture]) -> list[str]:
    """Return a warning if pictures differ in size, the most common size first."""
    by_size: dict[tuple[int, int], list[str]] = {}
    for picture in pictures:
        by_size.setdefault(picture.size, []).append(picture.path)
    if len(by_size) == 1:
        return []
    rows = sorted(by_size.items(), key=lambda item: (-len(item[1]), item[0]))
    said = [f"{width}x{height}: {len(paths)} pictures, such as {paths[0]}" for (width, height), paths in rows]
    return _listed("sizes of pictures, each scored in batches of its own", said)


def _counts(prompts: Iterable[int], pictures: Iterable[Picture]) -> list[str]:
    """Return a warning if prompts differ in their number of pictures, the most common number first."""
    of_prompt = Counter(dict.fromkeys(prompts, 0))
    of_prompt.update(picture.prompt for picture in pictures)
    numbers = Counter(of_prompt.values()).most_common()
    if len(numbers) == 1:
        return []
    first = {number: next(prompt for prompt, count in of_prompt.items() if count == number) for number, _ in numbers}
    said = [f"{number} pictures: {times} prompts, such as prompt {first[number]}" for number, times in numbers]
    return _listed("different numbers of pictures per prompt; every picture has the same weight", said)
