"""Prompt sets: which prompts an iteration trains on, as a pure function of (seed, step).

A set is read once, from a GenEval-format .jsonl file or from a .txt file with one prompt a line. No position in the set
is ever stored: `PromptSet.batch(step, P, seed)` gives the same prompts on any number of hosts and after any resume.

The order, exactly. All batches of a run form one endless row of slots; slot s = step * P + j. Every slot belongs
to a pool of prompts: without weights there is one pool with everything, with weights there is one pool per tag.
Slots come in cycles of W = sum of the weights; in each cycle every tag gets exactly `weight` slots, in an order
shuffled anew for each cycle. So the number of slots a tag had before slot s is known in closed form, and with it
the place in the tag's own endless row of shuffled epochs: no prompt of a pool comes a second time before all
others of that pool came once. (A batch that reaches over the end of an epoch may hold a prompt twice: once from
the old epoch, once from the new.)
Shuffles sort the raw 64-bit words of the Philox counter generator, the part of NumPy that is fixed across its versions.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32

UNTAGGED = "untagged"
"""The tag of every prompt that comes from a .txt file."""

LONGEST_CYCLE = 100_000
"""Largest allowed sum of the tag weights, once they are brought to whole numbers."""

MOST_LINES_SHOWN = 50
"""Bad lines that an error explains one by one; of any further ones it gives the line numbers."""

_SCHEDULE, _POOL, _FIXED = 0, 1, 2  # what a shuffle is for: the three never share random words

Batch = tuple[list[str], list[dict[str, Any]], Int32[np.ndarray, "P"]]


@dataclass(frozen=True)
class PromptSet:
    """Prompts, their metadata (what a scorer needs) and their tags (what results are reported by), equally many.

    `weights` (tag -> share of the training prompts, whole or decimal numbers; 0 leaves a tag out) must name every tag
    in the set. None means no weighting: every prompt comes equally often.

    Raises ValueError for an empty set, rows of unequal length, or weights that do not fit the tags.
    """

    prompts: tuple[str, ...]
    metadata: tuple[dict[str, Any], ...]
    tags: tuple[str, ...]
    weights: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ValueError("a prompt set needs at least one prompt")
        if not len(self.prompts) == len(self.metadata) == len(self.tags):
            sizes = f"{len(self.prompts)} prompts, {len(self.metadata)} metadata, {len(self.tags)} tags"
            raise ValueError(f"prompts, metadata and tags must be equally many, found {sizes}")
        if self.weights is not None:
            _whole_weights(self.weights, Counter(self.tags))

    def __len__(self) -> int:
        return len(self.prompts)

    def batch(self, step: int, P: int, seed: int) -> Batch:
        """Return the texts, metadata and indices i32[P] of the P prompts of iteration `step` (0, 1, ...)."""
        if step < 0 or P < 1:
            raise ValueError(f"step must be at least 0 and P at least 1, found step {step} and P {P}")
        slots = range(step * P, (step + 1) * P)
        return self._take([self._slot(slot, seed) for slot in slots])

    def fixed(self, count: int, seed: int) -> Batch:
        """Return `count` prompts for evaluation, the tags in turn, none twice unless count exceeds the set.

        A tag that runs out of prompts is passed over until all have run out. Weights play no part. The same count and
        seed always give the same list, and a smaller count gives its beginning.
        """
        if count < 1:
            raise ValueError(f"count must be at least 1, found {count}")
        pools = [self._where(tag) for tag in sorted(set(self.tags))]
        chosen: list[int] = []
        epoch = 0
        while len(chosen) < count:
            shuffled = [pool[_shuffle(seed, _FIXED, i, epoch, len(pool))] for i, pool in enumerate(pools)]
            longest = max(len(pool) for pool in pools)
            chosen += [int(row[turn]) for turn in range(longest) for row in shuffled if turn < len(row)]
            epoch += 1
        return self._take(chosen[:count])

    @cached_property
    def _pools(self) -> tuple[tuple[Int32[np.ndarray, "n"], int], ...]:
        """Return each pool's prompt indices and its slots per cycle."""
        if self.weights is None:
            return ((np.arange(len(self), dtype=np.int32), 1),)
        whole = _whole_weights(self.weights, Counter(self.tags))
        return tuple((self._where(tag), share) for tag, share in whole.items())

    def _slot(self, slot: int, seed: int) -> int:
        """Return the index of the prompt in this slot of the endless row."""
        shares = [share for _, share in self._pools]
        cycle, place = divmod(slot, sum(shares))
        schedule = np.repeat(np.arange(len(shares)), shares)[_shuffle(seed, _SCHEDULE, 0, cycle, sum(shares))]
        which = int(schedule[place])
        taken_before = cycle * shares[which] + int(np.count_nonzero(schedule[:place] == which))
        pool = self._pools[which][0]
        epoch, turn = divmod(taken_before, len(pool))
        return int(pool[_shuffle(seed, _POOL, which, epoch, len(pool))[turn]])

    def _where(self, tag: str) -> Int32[np.ndarray, "n"]:
        return np.array([i for i, other in enumerate(self.tags) if other == tag], dtype=np.int32)

    def _take(self, indices: Sequence[int]) -> Batch:
        texts = [self.prompts[i] for i in indices]
        metadata = [self.metadata[i] for i in indices]
        return texts, metadata, np.array(indices, dtype=np.int32)


def read_prompts(path: str | Path, weights: Mapping[str, float] | None = None) -> PromptSet:
    """Read a prompt set: .jsonl in GenEval's format, or .txt with one prompt a line; empty lines are passed over.

    A .txt prompt gets the tag UNTAGGED and the metadata {"tag": UNTAGGED, "prompt": text}.

    Raises FileNotFoundError, and ValueError for another kind of file, an empty one, or bad lines (all in one error).
    """
    path = Path(path)
    if path.suffix not in (".jsonl", ".txt"):
        raise ValueError(f"{path}: a prompt file ends in .jsonl (GenEval's format) or .txt (one prompt a line)")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such prompt file")
    parse = _geneval_line if path.suffix == ".jsonl" else _plain_line
    metadata = _parse_lines(path, parse)
    if not metadata:
        raise ValueError(f"{path}: the prompt file is empty; it needs at least one prompt")
    prompts = tuple(line["prompt"] for line in metadata)
    tags = tuple(line["tag"] for line in metadata)
    try:
        return PromptSet(prompts, tuple(metadata), tags, weights)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _parse_lines(path: Path, parse: Callable[[str], dict[str, Any]]) -> list[dict[str, Any]]:
    good: list[dict[str, Any]] = []
    bad: list[tuple[int, str]] = []
    for number, raw in enumerate(path.read_bytes().split(b"\n"), start=1):
        try:
            text = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            if text:
                good.append(parse(text))
        except UnicodeDecodeError as error:
            bad.append((number, f"not UTF-8 text: {error.reason} at byte {error.start}"))
        except ValueError as error:
            bad.append((number, str(error)))
    if bad:
        raise ValueError(_bad_lines(path, bad))
    return good


def _bad_lines(path: Path, bad: Sequence[tuple[int, str]]) -> str:
    lines = [f"{path}: {len(bad)} bad line{'s' if len(bad) > 1 else ''}; correct or remove:"]
    lines += [f"  line {number}: {reason}" for number, reason in bad[:MOST_LINES_SHOWN]]
    further = ", ".join(str(number) for number, _ in bad[MOST_LINES_SHOWN:])
    if further:
        lines.append(f"  and lines {further}")
    return "\n".join(lines)


def _plain_line(text: str) -> dict[str, Any]:
    return {"tag": UNTAGGED, "prompt": text}


def _geneval_line(text: str) -> dict[str, Any]:
    """Return a line's object, or raise ValueError with everything that is wrong with it."""
    try:
        line = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(line, dict):
        raise ValueError('not a JSON object like {"tag": ..., "include": [...], "prompt": ...}')
    wrong = []
    for name in ("tag", "prompt"):
        if not isinstance(line.get(name), str) or not line[name].strip():
            wrong.append(f'"{name}" must be a text that is not empty')
    for name, needed in (("include", True), ("exclude", False)):
        wrong += _wrong_objects(name, line.get(name, None if needed else []), needed)
    if wrong:
        raise ValueError("; ".join(wrong))
    return line


def _wrong_objects(name: str, objects: Any, needed: bool) -> list[str]:
    if not isinstance(objects, list) or (needed and not objects):
        return [f'"{name}" must be a list' + (" of at least one object" if needed else "")]
    wrong = []
    for i, item in enumerate(objects):
        where = f'"{name}"[{i}]'
        if not isinstance(item, dict):
            wrong.append(f'{where} must be an object like {{"class": "dog", "count": 1}}')
            continue
        if not isinstance(item.get("class"), str) or not item["class"]:
            wrong.append(f'{where} needs "class", a text')
        if type(item.get("count")) is not int or item["count"] < 1:
            wrong.append(f'{where} needs "count", a whole number of at least 1')
        if "color" in item and not isinstance(item["color"], str):
            wrong.append(f'{where}: "color" must be a text')
        if "position" in item and not _is_position(item["position"], len(objects), i):
            wrong.append(f'{where}: "position" must be [relation, index of another object in "{name}"]')
    return wrong


def _is_position(position: Any, count: int, own: int) -> bool:
    if not isinstance(position, list) or len(position) != 2:
        return False
    relation, other = position
    return isinstance(relation, str) and type(other) is int and 0 <= other < count and other != own


def _whole_weights(weights: Mapping[str, float], present: Mapping[str, int]) -> dict[str, int]:
    """Return the weights above 0 as the smallest whole numbers of the same ratio, by tag name."""
    wrong = [f"{tag!r} is {w!r}, not a number of at least 0" for tag, w in weights.items() if not _is_weight(w)]
    if wrong:
        raise ValueError(f"tag weights: {'; '.join(wrong)}")
    unknown = sorted(tag for tag, weight in weights.items() if weight > 0 and tag not in present)
    unnamed = sorted(tag for tag in present if tag not in weights)
    if unknown:
        wrong.append(f"no prompt has the tag {', '.join(unknown)} (the set has {', '.join(sorted(present))})")
    if unnamed:
        wrong.append(f"no weight for the tag {', '.join(unnamed)} (0 leaves a tag out)")
    if not any(weight > 0 for weight in weights.values()):
        wrong.append("at least one weight must be above 0")
    if wrong:
        raise ValueError(f"tag weights: {'; '.join(wrong)}")
    exact = {tag: Fraction(str(weights[tag])) for tag in sorted(weights) if weights[tag] > 0}
    unit = Fraction(
        math.gcd(*(weight.numerator for weight in exact.values())),
        math.lcm(*(weight.denominator for weight in exact.values())),
    )
    whole = {tag: int(weight / unit) for tag, weight in exact.items()}
    if sum(whole.values()) > LONGEST_CYCLE:
        advice = "use rounder numbers, such as 7, 5, 3, 1, 1"
        raise ValueError(f"tag weights: {dict(weights)} are the ratio {whole}; {advice}")
    return whole


def _is_weight(weight: Any) -> bool:
    return isinstance(weight, int | float) and not isinstance(weight, bool) and math.isfinite(weight) and weight >= 0


@lru_cache(maxsize=64)
def _shuffle(seed: int, purpose: int, pool: int, epoch: int, n: int) -> Int32[np.ndarray, "n"]:
    """Return a permutation of range(n), a function of the arguments alone."""
    words = np.random.Philox(key=seed % 2**64, counter=[0, purpose, pool, epoch]).random_raw(n)
    order = np.argsort(words, kind="stable").astype(np.int32)
    order.flags.writeable = False
    return order
