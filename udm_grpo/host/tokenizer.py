"""Prompts as token ids, the way the released models were trained: left-padded to L, cut after L, nothing added."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32

from udm_grpo.host.torch_files import WeightsError

MAX_LENGTH = 320
"""L of the released models, whatever longer length their tokenizers allow."""


@dataclass(frozen=True)
class PromptTokenizer:
    """A Hugging Face tokenizer at a fixed length.

    length: L; pad_id: the id on the left of shorter prompts; vocabulary: ids in all, added tokens included.
    """

    backend: Any
    length: int
    pad_id: int
    vocabulary: int

    def __call__(self, prompts: Sequence[str]) -> Int32[np.ndarray, "b l"]:
        """Return the ids of prompts; those longer than L keep their first L, with one warning that counts them."""
        if isinstance(prompts, str):
            raise TypeError("prompts is one text; give a list of texts")
        made = np.full((len(prompts), self.length), self.pad_id, np.int32)
        if not len(prompts):
            return made
        # verbose=False: the length is counted here, and the backend's own message about it names another limit.
        rows = self.backend(list(prompts), add_special_tokens=False, verbose=False)["input_ids"]
        cut = sum(len(ids) > self.length for ids in rows)
        for row, ids in zip(made, rows, strict=True):
            kept = ids[: self.length]
            row[self.length - len(kept) :] = kept
        if cut:
            advice = "the rest of them has no effect; shorten them"
            warnings.warn(
                f"{cut} of {len(prompts)} prompts have more than {self.length} tokens: {advice}", stacklevel=2
            )
        return made

    def empty(self) -> Int32[np.ndarray, " l"]:
        """Return the ids of the empty prompt, which guidance contrasts with."""
        return np.full(self.length, self.pad_id, np.int32)


def load_tokenizer(folder: Path, length: int | None = None) -> PromptTokenizer:
    """Read a tokenizer folder; `length` is L, by default the tokenizer's model_max_length, at most 320.

    Never touches the network and never runs code of the folder. Raises WeightsError if it cannot be read.
    """
    from transformers import AutoTokenizer

    if not folder.is_dir():
        raise WeightsError(
            f"{folder}: no such folder; the tokenizer is missing. Download the folder with all its files."
        )
    try:
        backend = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise any type, bare Exception included
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise WeightsError(
            f"{folder}: is no tokenizer that transformers can read ({reason}). Download it again."
        ) from error
    if backend.pad_token_id is None:
        raise WeightsError(f"{folder}: the tokenizer has no pad token; name one in tokenizer_config.json.")
    if length is None:
        length = min(int(backend.model_max_length), MAX_LENGTH)
    if length < 1:
        raise WeightsError(f"{folder}: prompts cannot be {length} tokens long; give a length of at least 1.")
    return PromptTokenizer(backend, length, int(backend.pad_token_id), len(backend))
