"""What is doubtful about a run's prompts, told once at its start and kept for its report.

    found = set_warnings(train, heldout, per_iteration=16) + cut_warnings(train, heldout, tokenizer)

Places are line numbers of the prompt file (or its items, files, or numbers within a prepared set).
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
"""In a run's folder: {"run": id, "warnings": [text, ...]}."""
MAX_PLACES = 10
"""Places that a warning names; of any further ones it gives the number."""
NAMES = ("prompts.train", "prompts.heldout")
JUDGED = ("include", "exclude")
"""Fields of metadata that say what a picture must show."""


def set_warnings(train: PromptSet, heldout: PromptSet, per_iteration: int) -> list[str]:
    """Return what is doubtful about the sets themselves: passed over, few, equal, contradictory and leaked prompts."""
    found = [*train.remarks, *heldout.remarks]
    if len(set(map(same_text, train.prompts))) < per_iteration:
        found.append(
            f"prompts.train has {len(set(map(same_text, train.prompts)))} different prompts for the {per_iteration} of "
            "an iteration, so that some come several times in one"
        )
    for name, prompts in zip(NAMES, (train, heldout), strict=True):
        found += _repeats(name, prompts)
    known = {same_text(prompt): index for index, prompt in reversed(list(enumerate(train.prompts)))}
    leaked = [index for index, prompt in enumerate(heldout.prompts) if same_text(prompt) in known]
    if leaked:
        first = heldout.prompts[leaked[0]]
        there = places(train, [known[same_text(first)]])
        found.append(
            f"prompts.heldout has {len(leaked)} of {len(heldout)} prompts that are in prompts.train, too, so that "
            f"results are not of unseen prompts alone: {places(heldout, leaked)}, "
            f"such as {first!r} ({there} of prompts.train)"
        )
    return found


def _repeats(name: str, prompts: PromptSet) -> list[str]:
    """Warnings of prompts that come several times in a set, apart those whose pictures are to show different things."""
    first: dict[str, int] = {}
    equal: list[int] = []
    contradictory: list[int] = []
    for index, prompt in enumerate(prompts.prompts):
        earlier = first.setdefault(same_text(prompt), index)
        if earlier != index:
            same = _asked(prompts.metadata[earlier]) == _asked(prompts.metadata[index])
            (equal if same else contradictory).append(index)
    found = []
    if equal:
        found.append(f"{name} has {len(equal)} prompts that repeat an earlier one: {places(prompts, equal)}")
    if contradictory:
        index = contradictory[0]
        earlier = first[same_text(prompts.prompts[index])]
        found.append(
            f"{name} has {len(contradictory)} prompts that an earlier one contradicts, with the same text but other "
            f'"include" or "exclude": {places(prompts, contradictory)}, such as {prompts.prompts[index]!r} '
            f"(first at {places(prompts, [earlier])})"
        )
    return found


def _asked(metadata: Mapping[str, Any]) -> str:
    return json.dumps([metadata.get(key) or [] for key in JUDGED], sort_keys=True)


def cut_warnings(train: PromptSet, heldout: PromptSet, tokenizer: PromptTokenizer) -> list[str]:
    """Return how many prompts the model sees only the beginning of, and which."""
    found = []
    for name, prompts in zip(NAMES, (train, heldout), strict=True):
        if cut := tokenizer.cut(prompts.prompts):
            found.append(
                f"{name} has {len(cut)} of {len(prompts)} prompts with more than the {tokenizer.length} tokens that "
                f"the model reads, the rest of which has no effect: {places(prompts, cut)}"
            )
    return found


def special_warnings(train: PromptSet, heldout: PromptSet, tokenizer: PromptTokenizer) -> list[str]:
    """Return how many prompts have the text of a special token, which the model reads as that token, and which."""
    found = []
    for name, prompts in zip(NAMES, (train, heldout), strict=True):
        if marked := tokenizer.marked(prompts.prompts):
            found.append(
                f"{name} has {len(marked)} of {len(prompts)} prompts with the text of a special token, such as "
                f"{tokenizer.backend.id_to_token(tokenizer.pad_id)!r}, which the model reads as that token: "
                f"{places(prompts, marked)}"
            )
    return found


def places(prompts: PromptSet, indices: Sequence[int]) -> str:
    """Return where prompts are: "line 3", "lines 3, 7 and 12 more"."""
    return listed(prompts.unit, [prompts.places[index] if prompts.places else str(index + 1) for index in indices])


def listed(unit: str, numbers: Sequence[str]) -> str:
    """Return places as `places` does, of a unit such as line."""
    more = f" and {len(numbers) - MAX_PLACES} more" if len(numbers) > MAX_PLACES else ""
    return f"{unit}{'s' if len(numbers) > 1 else ''} {', '.join(numbers[:MAX_PLACES])}{more}"


def write_warnings(folder: Path, run: str, warnings: Iterable[str]) -> None:
    """Keep the warnings of a run in its folder; a run without any keeps an empty list."""
    write_json(folder / FILE, {"run": run, "warnings": list(warnings)})
