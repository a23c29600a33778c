"""Notes of the scorers on prompts that they may not score as expected: truncated and ambiguous ones.

lines = note_warnings("prompts.train", 8000, client.notes(texts, metadata), lambda indices: places(train, indices))
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rewards_bridge.composition import Composition
from rewards_bridge.errors import UserError
from udm_grpo.data.prompt_warnings import listed
from udm_grpo.reporting.metrics import write_json

FILE = "prompt_notes.json"
"""File in a folder of scores: {scorer: [warning, ...]}."""
MAX_LINES = 50
"""Number of different notes of a scorer on a prompt set that are shown; of further ones only the places are."""


def note_warnings(
    name: str, count: int, notes: Mapping[str, Mapping[int, str]], where: Callable[[Sequence[int]], str]
) -> list[str]:
    """Return a line for each different note: how many of `count` prompts it concerns, and which.

    notes: {scorer: {index: note}}, as `Composition.notes` returns it; where: indices -> "lines 3, 7".
    """
    lines = []
    for scorer, texts in notes.items():
        alike: dict[str, list[int]] = {}
        for index, text in texts.items():
            alike.setdefault(text, []).append(index)
        spelled, further = [*alike.items()][:MAX_LINES], [*alike.values()][MAX_LINES:]
        if further:
            others = sorted(index for indices in further for index in indices)
            spelled.append((f"{len(further)} more notes of this kind", others))
        lines += [
            f"{name}, scorer {scorer}: {len(indices)} of {count} prompts ({where(indices)}): {text}"
            for text, indices in spelled
        ]
    return lines


def notes_of_prompts(
    clients: Mapping[str, Composition], prompts: Mapping[int, Mapping[str, Any]], output: Path
) -> list[str]:
    """Return the scorers' notes on prompts by number, with the saved notes of scorers that are not asked again.

    clients: the scorers that still have something to score. Raises UserError if the saved notes are damaged,
    BridgeError if a scorer fails.
    """
    numbers, metadata = [*map(str, prompts)], [dict(entry) for entry in prompts.values()]
    texts = [entry["prompt"] for entry in metadata]

    def where(indices: Sequence[int]) -> str:
        return listed("prompt", [numbers[index] for index in indices])

    return _kept(
        output,
        {
            name: note_warnings("prompts", len(texts), client.notes(texts, metadata), where)
            for name, client in clients.items()
        },
    )


def _kept(folder: Path, said: Mapping[str, Sequence[str]]) -> list[str]:
    """Add notes to those saved in a folder of scores; return all lines of all its scorers."""
    file = folder / FILE
    kept: dict[str, Sequence[str]] = {}
    if file.is_file():
        try:
            kept = {
                str(scorer): [str(line) for line in lines] for scorer, lines in json.loads(file.read_bytes()).items()
            }
        except (ValueError, AttributeError, TypeError) as error:
            raise UserError(f"{file} is damaged ({error}); remove it.") from error
    kept.update(said)
    if said:
        write_json(file, kept)
    return [line for lines in kept.values() for line in lines]
