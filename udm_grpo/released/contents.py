"""The contents of a released model folder once it is read, and checks that they fit together."""

import functools
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from jaxtyping import Array, Float

from udm_grpo.batches import Params
from udm_grpo.data.tokenizer import PromptTokenizer
from udm_grpo.model.execution import TransformerConfig
from udm_grpo.model.vq.config import VQConfig
from udm_grpo.released.part_files import open_part
from udm_grpo.tensor_files.tensor_names import unwrapped_names
from udm_grpo.tensor_files.torch_files import Layout, TensorFiles, WeightsError
from udm_grpo.tensor_files.weight_table import Source, TensorInfo, problems

PathLike = str | os.PathLike[str]
T = TypeVar("T")

SCHEDULER_FILE = "scheduler_model.pth"
CODEBOOK_NAME = "path.emb"
MAX_SHOWN = 24
"""Number of tensors that an error names for each kind of problem."""
CONFIG_FILES = ("transformer/config.json", "vae/config.json", "scheduler/scheduler_config.json")
MAX_SCHEDULE = {"alpha": 100.0, "c": 1e6, "eps": 1.0, "shift": 1e4}
"""Largest value of each number of a schedule; the released ones are 0.9, 3, 1e-5 and 1 to 3."""


@dataclass(frozen=True)
class Scheduler:
    """scheduler_config.json: the probability path and the schedule."""

    alpha: float | None
    """Exponent of beta_t; None selects the mixture path."""
    c: float
    """Factor of beta_t."""
    eps: float
    """Lower bound on the norm of a codebook row when it is normalised."""
    shift: float
    """Shift s of the schedule."""

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> "Scheduler":
        """Read scheduler_config.json, with the release's defaults. Raises ValueError for a value out of range."""
        values: dict[str, float | None] = {"alpha": None, "c": 3.0, "eps": 1e-5, "shift": 1.0}
        for name in values:
            value = raw.get(name)
            if value is None:
                continue
            most = MAX_SCHEDULE[name]
            if not is_number(value) or not 0 < value <= most:
                raise ValueError(
                    f"scheduler_config.json: {name} is {value!r:.40}; expected a number above 0 and at most {most:g}"
                )
            values[name] = float(value)
        return cls(**values)  # type: ignore[arg-type]


@dataclass(frozen=True)
class ReleasedModel:
    """Everything that a released model folder holds, and how it was stored.

    To export trained weights: `save_folder(dataclasses.replace(released, transformer=params), folder)`.
    """

    transformer_config: TransformerConfig
    transformer: Params
    vq_config: VQConfig
    vq: Params
    path_codebook: Float[Array, "v e"]
    """Embeddings of the codes for the probability path, float32; the image tokenizer has its own."""
    scheduler: Scheduler
    tokenizer: PromptTokenizer
    files: Mapping[str, bytes]
    """Relative path -> content of every configuration and tokenizer file; saved verbatim."""
    layouts: Mapping[str, Layout]
    """Part (transformer, vae, scheduler) -> how its tensors are divided into files, with their dtypes."""


class Problems:
    """Collects problems, so that all of them are reported at once."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def collect(self, read: Callable[[], T]) -> T | None:
        """Return what `read` returns, or None if it raises ValueError, whose message is kept."""
        try:
            return read()
        except ValueError as error:
            self.lines.append(str(error))
            return None

    def part(self, path: Path, expected: Mapping[str, Source] | None) -> TensorFiles | None:
        """Open a part's tensors and compare them with the expected ones; None if they cannot be opened."""
        opened = self.collect(lambda: open_part(path))
        if opened and expected is not None:
            try:
                opened = without_wrapper(path, opened, expected)
            except ValueError as error:
                self.lines.append(f"{path}: {error}")
                return None
            self.lines += [f"{path}: {line}" for line in tensor_problems(expected, opened.infos)]
        return opened

    def raise_any(self, what: PathLike) -> None:
        """Raise WeightsError if there is any problem."""
        if self.lines:
            raise WeightsError("\n  ".join([f"{what}: {len(self.lines)} problem(s):", *self.lines]))


def without_wrapper(path: Path, opened: TensorFiles, expected: Mapping[str, Source]) -> TensorFiles:
    """Return the tensors under their names without what a wrapper added, and print one note on stderr."""
    names, wrapper = unwrapped_names(opened.infos, expected)
    if not names:
        return opened
    _say_once(
        f"note: {path}: the tensors were saved from inside a wrapper; {wrapper} in them is dropped from their names."
    )
    return opened.renamed(names)


@functools.cache
def _say_once(text: str) -> None:  # a run opens its folder twice
    print(text, file=sys.stderr, flush=True)


def tensor_problems(expected: Mapping[str, Source], infos: Mapping[str, TensorInfo]) -> list[str]:
    """Return a line for each problem of a tensor, at most MAX_SHOWN of a kind; one line if no tensor is known."""
    if infos and not any(name in expected for name in infos):
        first, first_expected = (", ".join(list(names)[:3]) for names in (infos, expected))
        text = f"none of its {len(infos)} tensors belongs to this model"
        return [f"{text}: it has {first}, ...; expected {first_expected}, ..."]
    kinds: dict[str, list[str]] = {}
    for line in problems(expected, infos):
        kinds.setdefault(line.partition(":")[0], []).append(line)
    shown = [
        [*lines[:MAX_SHOWN], f"{kind}: and {len(lines) - MAX_SHOWN} more"] if len(lines) > MAX_SHOWN else lines
        for kind, lines in kinds.items()
    ]
    return [line for lines in shown for line in lines]


def is_number(value: Any) -> bool:
    """Return whether a value of a JSON file is a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def tokenizer_problems(tokenizer: PromptTokenizer, config: TransformerConfig) -> list[str]:
    """Return a line for everything in a tokenizer that does not fit a transformer."""
    lines = []
    if tokenizer.vocabulary != config.lm_vocab_size:
        sizes = f"the tokenizer has {tokenizer.vocabulary} ids, transformer/config.json says lm_vocab_size"
        lines.append(f"{sizes} {config.lm_vocab_size}; use the tokenizer that the transformer was trained with")
    if not 0 <= config.bov_token_id < config.lm_vocab_size:
        lines.append(
            f"transformer/config.json: bov_token_id {config.bov_token_id} is not one of {config.lm_vocab_size} text ids"
        )
    return lines


def read_files(folder: Path) -> dict[str, bytes]:
    """Return the content of every file below a folder, by relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
