"""Warnings about the prompts of a run, shown once at its start and kept for its report.

    warnings = set_warnings(train, heldout, per_iteration=16) + cut_warnings(train, heldout, tokenizer)

Places are line numbers in the prompt file (or item numbers, file names, or numbers within a prepared set).
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from udm_grpo.data.prompt_text import same_text
from udm_grpo.data.prompts import PromptSet
from udm_grpo.data.tokenizer import PromptTokenizer
from udm_grpo.reporting.metrics import write_json

FILE = "prompt_warnings.json"
"""File in a run's folder: {"run": id, "warnings": [text, ...]}."""
MAX_PLACES = 10
"""Number of places that a warning names; further ones are only counted."""
NAMES = ("prompts.train", "prompts.heldout")
JUDGED = ("include", "exclude")
"""Metadata fields that specify what a picture must show."""


def set_warnings(train: PromptSet, heldout: PromptSet, per_iteration: int) -> list[str]:
    """Return warnings about the sets: skipped lines, and too few, repeated, contradictory and leaked prompts."""
    warnings = [*train.remarks, *heldout.remarks]
    if len(set(map(same_text, train.prompts))) < per_iteration:
        warnings.append(
            f"prompts.train has {len(set(map(same_text, train.prompts)))} different prompts, but an iteration "
            f"uses {per_iteration}, so some of them are repeated within it"
        )
    for name, prompts in zip(NAMES, (train, heldout), strict=True):
        warnings += _repeats(name, prompts)
    known = {same_text(prompt): index for index, prompt in reversed(list(enumerate(train.prompts)))}
    leaked = [index for index, prompt in enumerate(heldout.prompts) if same_text(prompt) in known]
    if leaked:
        first = heldout.prompts[leaked[0]]
        there = places(train, [known[same_text(first)]])
        warnings.append(
            f"prompts.heldout has {len(leaked)} of {len(heldout)} prompts that are also in prompts.train, so its "
            f"results are not for unseen prompts only: {places(heldout, leaked)}, "
            f"such as {first!r} ({there} of prompts.train)"
        )
    return warnings


def _repeats(name: str, prompts: PromptSet) -> list[str]:
    """Return warnings about repeated prompts, separately for those whose pictures must show different things."""
    first: dict[str, int] = {}
    equal: list[int] = []
    contradictory: list[int] = []
    for index, prompt in enumerate(prompts.prompts):
        earlier = first.setdefault(same_text(prompt), index)
        if earlier != index:
            same = _asked(prompts.metadata[earlier]) == _asked(prompts.metadata[index])
            (equal if same else contradictory).append(index)
    warnings = []
    if equal:
        warnings.append(f"{name} has {len(equal)} prompts that repeat an earlier one: {places(prompts, equal)}")
    if contradictory:
        index = contradictory[0]
        earlier = first[same_text(prompts.prompts[index])]
        warnings.append(
            f"{name} has {len(contradictory)} prompts that contradict an earlier one, with the same text but another "
            f'"include" or "exclude": {places(prompts, contradictory)}, such as {prompts.prompts[index]!r} '
            f"(first at {places(prompts, [earlier])})"
        )
    return warnings


def _asked(metadata: Mapping[str, Any]) -> str:
    return json.dumps([metadata.get(key) or [] for key in JUDGED], sort_keys=True)


def cut_warnings(train: PromptSet, heldout: PromptSet, tokenizer: PromptTokenizer) -> list[str]:
    """Return warnings about prompts of which the model reads only the beginning."""
    warnings = []
    for name, prompts in zip(NAMES, (train, heldout), strict=True):
        if cut := tokenizer.cut(prompts.prompts):
            warnings.append(
                f"{name} has {len(cut)} of {len(prompts)} prompts with more than the {tokenizer.length} tokens that "
                f"the model reads; the rest has no effect: {places(prompts, cut)}"
            )
    return warnings


def special_warnings(train: PromptSet, heldout: PromptSet, tokenizer: PromptTokenizer) -> list[str]:
    """Return warnings about prompts with the text of a special token, which the model reads as that token."""
    warnings = []
    for name, prompts in zip(NAMES, (train, heldout), strict=True):
        if marked := tokenizer.marked(prompts.prompts):
            warnings.append(
                f"{name} has {len(marked)} of {len(prompts)} prompts with the text of a special token, such as "
                f"{tokenizer.backend.id_to_token(tokenizer.pad_id)!r}, which the model reads as that token: "
                f"{places(prompts, marked)}"
            )
    return warnings


def places(prompts: PromptSet, indices: Sequence[int]) -> str:
    """Return the places of prompts: "line 3", "lines 3, 7 and 12 more"."""
    return listed(prompts.unit, [prompts.places[index] if prompts.places else str(index + 1) for index in indices])


def listed(unit: str, numbers: Sequence[str]) -> str:
    """Return numbers of a unit, such as line, in the form of `places`."""
    more = f" and {len(numbers) - MAX_PLACES} more" if len(numbers) > MAX_PLACES else ""
    return f"{unit}{'s' if len(numbers) > 1 else ''} {', '.join(numbers[:MAX_PLACES])}{more}"


def write_warnings(folder: Path, run: str, warnings: Iterable[str]) -> None:
    """Write the warnings of a run to its folder; an empty list if there are none."""
    write_json(folder / FILE, {"run": run, "warnings": list(warnings)})
