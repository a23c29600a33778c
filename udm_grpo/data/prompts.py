"""Prompt sets: which prompts an iteration trains on, as a pure function of (seed, step).

A set is read once, from a raw file (prompt_files.py) or a prepared folder (prompt_dataset.py). No position in the set
is ever stored: `PromptSet.batch(step, P, seed)` gives the same prompts on any number of hosts and after any resume.

The exact order: all batches of a run form one endless sequence of slots; slot s = step * P + j. Every slot belongs to
a pool of prompts: without weights there is one pool with all prompts, with weights one pool per tag. Slots come in
cycles of W = sum of the weights; in each cycle every tag gets exactly `weight` slots, in an order that is shuffled for
each cycle. The number of slots that a tag had before slot s is therefore known in closed form, and with it the position
in the tag's own endless sequence of shuffled epochs: no prompt of a pool is repeated before all others of that pool
have been used. (A batch that spans the end of an epoch may hold a prompt twice, once from each epoch.)
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32

from udm_grpo.data.prompt_files import DATASET, PROMPT, UNTAGGED, parse_file, with_key
from udm_grpo.data.prompt_text import PromptsError
from udm_grpo.data.shuffle import FIXED, POOL, SCHEDULE, shuffle

__all__ = ["UNTAGGED", "Batch", "PromptSet", "read_prompts"]

MAX_CYCLE = 100_000
"""Largest allowed sum of the tag weights, once they are converted to whole numbers."""

Batch = tuple[list[str], list[dict[str, Any]], Int32[np.ndarray, " P"]]


@dataclass(frozen=True)
class PromptSet:
    """Prompts with their metadata (what a scorer needs) and their tags (by which results are reported).

    `weights` (tag -> share of the training prompts, whole or decimal numbers; 0 leaves a tag out) must name every tag
    in the set. None means no weighting: every prompt is drawn equally often.

    Raises PromptsError for an empty set, fields of unequal length, or weights that do not fit the tags.
    """

    prompts: tuple[str, ...]
    metadata: tuple[dict[str, Any], ...]
    tags: tuple[str, ...]
    weights: Mapping[str, float] | None = None
    places: tuple[str, ...] = field(default=(), compare=False)
    """Place of each prompt in its file; if empty, prompts are numbered from 1."""
    unit: str = field(default="prompt", compare=False)
    """Kind of place: line, item, file or prompt."""
    remarks: tuple[str, ...] = field(default=(), compare=False)
    """What was skipped or changed when the file was read."""

    def __post_init__(self) -> None:
        if not self.prompts:
            raise PromptsError("a prompt set needs at least one prompt")
        if not len(self.prompts) == len(self.metadata) == len(self.tags):
            sizes = f"{len(self.prompts)} prompts, {len(self.metadata)} metadata, {len(self.tags)} tags"
            raise PromptsError(f"prompts, metadata and tags must have the same length; found {sizes}")
        if self.weights is not None:
            _whole_weights(self.weights, Counter(self.tags))

    def __len__(self) -> int:
        return len(self.prompts)

    def batch(self, step: int, P: int, seed: int) -> Batch:
        """Return the texts, metadata and indices i32[P] of the P prompts of iteration `step` (0, 1, ...)."""
        if step < 0 or P < 1:
            raise ValueError(f"step must be at least 0 and P at least 1; found step {step} and P {P}")
        slots = range(step * P, (step + 1) * P)
        return self._take([self._slot(slot, seed) for slot in slots])

    def fixed(self, count: int, seed: int) -> Batch:
        """Return `count` prompts for evaluation, the tags in turn, without repeats unless count exceeds the set.

        A tag that runs out of prompts is skipped until all have run out. Weights are ignored. The same count and
        seed always give the same list, and a smaller count gives its beginning.
        """
        if count < 1:
            raise ValueError(f"count must be at least 1; found {count}")
        pools = [self._where(tag) for tag in sorted(set(self.tags))]
        chosen: list[int] = []
        epoch = 0
        while len(chosen) < count:
            shuffled = [pool[shuffle(seed, FIXED, i, epoch, len(pool))] for i, pool in enumerate(pools)]
            longest = max(len(pool) for pool in pools)
            chosen += [int(row[turn]) for turn in range(longest) for row in shuffled if turn < len(row)]
            epoch += 1
        return self._take(chosen[:count])

    @cached_property
    def _pools(self) -> tuple[tuple[Int32[np.ndarray, " n"], int], ...]:
        """Return each pool's prompt indices and its slots per cycle."""
        if self.weights is None:
            return ((np.arange(len(self), dtype=np.int32), 1),)
        whole = _whole_weights(self.weights, Counter(self.tags))
        return tuple((self._where(tag), share) for tag, share in whole.items())

    def _slot(self, slot: int, seed: int) -> int:
        """Return the index of the prompt in this slot of the endless sequence."""
        shares = tuple(share for _, share in self._pools)
        cycle, place = divmod(slot, sum(shares))
        which, earlier = _schedule(seed, cycle, shares) if len(shares) > 1 else (_ZERO, _ZERO)
        pool = self._pools[which[place]][0]
        epoch, turn = divmod(cycle * shares[which[place]] + int(earlier[place]), len(pool))
        return int(pool[shuffle(seed, POOL, int(which[place]), epoch, len(pool))[turn]])

    def _where(self, tag: str) -> Int32[np.ndarray, " n"]:
        return np.array([i for i, other in enumerate(self.tags) if other == tag], dtype=np.int32)

    def _take(self, indices: Sequence[int]) -> Batch:
        texts = [self.prompts[i] for i in indices]
        metadata = [self.metadata[i] for i in indices]
        return texts, metadata, np.array(indices, dtype=np.int32)


def read_prompts(path: str | Path, weights: Mapping[str, float] | None = None, key: str = PROMPT) -> PromptSet:
    """Read a prompt set: a raw file or folder (prompt_files.KINDS), or a folder that scripts/prepare_prompts.py wrote.

    For a prepared folder with several splits, the path names one: FOLDER:train. A prompt without a tag gets UNTAGGED.
    key: the key of the text that is drawn, as for parse_file.

    Raises FileNotFoundError, and ValueError for another kind of file, an empty or damaged one, an unknown split or key,
    or bad lines (all in one error).
    """
    folder, split = _prepared(str(path))
    if folder is not None:
        # TensorFlow Datasets takes half a second to import, so it is imported only where it is needed.
        from udm_grpo.data.prompt_dataset import read_dataset

        rows = read_dataset(folder, split)
        if not any(key in row for row in rows):
            keys = ", ".join(map(repr, dict.fromkeys(name for row in rows for name in row)))
            raise PromptsError(f"{path}: no prompt has the key {key!r}; the keys are {keys}")
        rows = tuple(with_key(row, key) for row in rows)
        origin: dict[str, Any] = {}
    else:
        parsed = parse_file(path, key=key)
        rows = parsed.all_or_error()
        origin = {"places": parsed.places, "unit": parsed.unit, "remarks": tuple(parsed.remarks())}
    prompts = tuple(row["prompt"] for row in rows)
    tags = tuple(row["tag"] for row in rows)
    try:
        return PromptSet(prompts, rows, tags, weights, **origin)
    except ValueError as error:
        raise PromptsError(f"{path}: {error}") from None


def _prepared(path: str) -> tuple[Path | None, str]:
    """Return (a prepared folder, the split that the path names or ""), or (None, "") for anything else."""
    whole, colon, split = path.rpartition(":")
    for folder, named in ((path, ""), (whole, split if colon else "")):
        if folder and (Path(folder) / DATASET).is_dir():
            return Path(folder), named
    if colon and Path(whole).is_dir():
        raise PromptsError(f"{path}: {whole} was not made by scripts.prepare_prompts; only such folders have splits")
    if whole and split.isidentifier() and not Path(path).exists():
        raise FileNotFoundError(
            f"{path}: there is no folder {whole} with a split {split}; python -m scripts.prepare_prompts creates "
            "such folders (--help has the command for each prompt set)"
        )
    return None, ""


def _whole_weights(weights: Mapping[str, float], present: Mapping[str, int]) -> dict[str, int]:
    """Return the weights above 0 as the smallest whole numbers in the same ratio, by tag name."""
    wrong = [f"{tag!r} is {w!r}, not a number of at least 0" for tag, w in weights.items() if not _is_weight(w)]
    if wrong:
        raise PromptsError(f"tag weights: {'; '.join(wrong)}")
    unknown = sorted(tag for tag, weight in weights.items() if weight > 0 and tag not in present)
    unnamed = sorted(tag for tag in present if tag not in weights)
    if unknown:
        wrong.append(f"no prompt has the tag {', '.join(unknown)} (the set has {', '.join(sorted(present))})")
    if unnamed:
        wrong.append(f"no weight for the tag {', '.join(unnamed)} (0 leaves a tag out)")
    if not any(weight > 0 for weight in weights.values()):
        wrong.append("at least one weight must be above 0")
    if wrong:
        raise PromptsError(f"tag weights: {'; '.join(wrong)}")
    exact = {tag: Fraction(str(weights[tag])) for tag in sorted(weights) if weights[tag] > 0}
    unit = Fraction(
        math.gcd(*(weight.numerator for weight in exact.values())),
        math.lcm(*(weight.denominator for weight in exact.values())),
    )
    whole = {tag: int(weight / unit) for tag, weight in exact.items()}
    if sum(whole.values()) > MAX_CYCLE:
        advice = "use rounder numbers, such as 7, 5, 3, 1, 1"
        raise PromptsError(f"tag weights: {dict(weights)} are the ratio {whole}; {advice}")
    return whole


def _is_weight(weight: Any) -> bool:
    return isinstance(weight, int | float) and not isinstance(weight, bool) and math.isfinite(weight) and weight >= 0


_ZERO = np.zeros(1, dtype=np.int32)


@lru_cache(maxsize=8)
def _schedule(
    seed: int, cycle: int, shares: tuple[int, ...]
) -> tuple[Int32[np.ndarray, " W"], Int32[np.ndarray, " W"]]:
    """Return for each slot of a cycle its pool, and how many earlier slots of the cycle belong to that pool."""
    which = np.repeat(np.arange(len(shares), dtype=np.int32), shares)[shuffle(seed, SCHEDULE, 0, cycle, sum(shares))]
    earlier = np.empty_like(which)
    for pool, share in enumerate(shares):
        earlier[which == pool] = np.arange(share, dtype=np.int32)
    return which, earlier
