"""Tokenize prompts as the released models were trained: padded to L on the left, truncated to L, no tokens added.

Hugging Face tokenizer folders are read with the tokenizers library alone, because transformers would import torch.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from udm_grpo.tensor_files.torch_files import WeightsError, read_json

MAX_LENGTH = 320
"""L of the released models, even where their tokenizers allow more."""
MAX_CHARACTERS = 2**16
"""Characters of a prompt that are tokenized, at least 200 per token, so that a text of any length takes little time."""
SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
QWEN = ("Qwen2Tokenizer", "Qwen2TokenizerFast")
QWEN_END = "<|endoftext|>"
"""Default token that pads and ends texts, for configurations of such tokenizers that name none."""
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How such a tokenizer splits texts, for folders with a vocabulary but no tokenizer.json."""


@dataclass(frozen=True)
class PromptTokenizer:
    """A Hugging Face tokenizer with a fixed length.

    length: L; pad_id: the id that pads shorter prompts on the left; vocabulary: number of ids, with added tokens.
    """

    backend: Tokenizer
    length: int
    pad_id: int
    vocabulary: int
    special: frozenset[int] = frozenset()
    """Ids of tokens that are not text, such as padding."""

    def __call__(self, prompts: Sequence[str], warn: bool = True) -> Int32[np.ndarray, "b l"]:
        """Return the ids of prompts; those longer than L keep their first L, and one warning counts them.

        warn: False if `cut` and `marked` have already reported the prompts.
        """
        if isinstance(prompts, str):
            raise TypeError("prompts is one text; give a list of texts")
        padded = np.full((len(prompts), self.length), self.pad_id, np.int32)
        if not len(prompts):
            return padded
        rows = self._ids(prompts)
        cut = len(self._longer(prompts, rows))
        for row, ids in zip(padded, rows, strict=True):
            kept = ids[: self.length]
            row[self.length - len(kept) :] = kept
        marked = sum(not self.special.isdisjoint(ids) for ids in rows)
        if marked and warn:
            warnings.warn(
                f"{marked} of {len(prompts)} prompts contain the text of a special token, such as "
                f"{self.backend.id_to_token(self.pad_id)!r}, which the model reads as that token; reword them",
                stacklevel=2,
            )
        if cut and warn:
            advice = "the rest has no effect; shorten them"
            warnings.warn(
                f"{cut} of {len(prompts)} prompts have more than {self.length} tokens: {advice}", stacklevel=2
            )
        return padded

    def cut(self, prompts: Sequence[str]) -> list[int]:
        """Return the indices of prompts that are longer than L."""
        return self._longer(prompts, self._ids(prompts))

    def marked(self, prompts: Sequence[str]) -> list[int]:
        """Return the indices of prompts with the text of a special token, such as "[PAD]"."""
        return [index for index, ids in enumerate(self._ids(prompts)) if not self.special.isdisjoint(ids)]

    def _ids(self, prompts: Sequence[str]) -> list[list[int]]:
        """Return the ids of the first MAX_CHARACTERS of each prompt."""
        texts = [prompt[:MAX_CHARACTERS] for prompt in prompts]
        return [row.ids for row in self.backend.encode_batch(texts, add_special_tokens=False)] if texts else []

    def _longer(self, prompts: Sequence[str], rows: Sequence[Sequence[int]]) -> list[int]:
        return [
            index
            for index, (prompt, ids) in enumerate(zip(prompts, rows, strict=True))
            if len(ids) > self.length or len(prompt) > MAX_CHARACTERS
        ]

    def empty(self) -> Int32[np.ndarray, " l"]:
        """Return the ids of the empty prompt, which guidance contrasts with."""
        return np.full(self.length, self.pad_id, np.int32)

    def negative(self, text: str) -> Int32[np.ndarray, " l"]:
        """Return the ids of a negative prompt, which guidance contrasts with instead; "" is the empty prompt."""
        return self([text])[0] if text else self.empty()


def load_tokenizer(folder: Path, length: int | None = None) -> PromptTokenizer:
    """Read a tokenizer folder; `length` is L, by default the tokenizer's model_max_length, at most 320.

    The ids are those of transformers' AutoTokenizer. Never accesses the network and never runs code from the folder.
    Raises WeightsError if it cannot be read.
    """
    if not folder.is_dir():
        raise WeightsError(
            f"{folder}: no such folder; the tokenizer is missing. Download the folder with all its files."
        )
    config = {**_optional(folder / "special_tokens_map.json"), **_optional(folder / "tokenizer_config.json")}
    qwen = config.get("tokenizer_class") in QWEN
    special = {name: _content(config[name]) for name in SPECIAL if config.get(name)}
    if qwen:
        special = {"eos_token": QWEN_END, "pad_token": QWEN_END} | special
    try:
        backend = _backend(folder, qwen)
        added = list(_added(folder, config, list(special.values())))
        known = {token.content for token in backend.get_added_tokens_decoder().values()}
        backend.add_tokens([token for token in added if token.content not in known])
        backend.no_truncation()
        backend.no_padding()
    except WeightsError:
        raise
    except Exception as error:  # tokenizers raises any type, bare Exception included
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise WeightsError(f"{folder}: is not a tokenizer that can be read ({reason}). Download it again.") from error
    pad_id = backend.token_to_id(special.get("pad_token", ""))
    if pad_id is None:
        raise WeightsError(f"{folder}: the tokenizer has no pad token; name one in tokenizer_config.json.")
    if length is None:
        length = int(min(config.get("model_max_length") or MAX_LENGTH, MAX_LENGTH))
    if length < 1:
        raise WeightsError(f"{folder}: prompts cannot be {length} tokens long; give a length of at least 1.")
    tokens = backend.get_added_tokens_decoder().items()
    unknown = special.get("unk_token")  # words outside of the vocabulary become this one
    special_ids = frozenset(number for number, token in tokens if token.special and token.content != unknown)
    return PromptTokenizer(backend, length, pad_id, backend.get_vocab_size(with_added_tokens=True), special_ids)


def tokenizer_class(folder: Path) -> str:
    """Return the class with which transformers 4 reads a tokenizer folder; it does not know that of transformers 5."""
    name = _optional(folder / "tokenizer_config.json").get("tokenizer_class")
    return name if name and name != "TokenizersBackend" else "PreTrainedTokenizerFast"


def _backend(folder: Path, qwen: bool) -> Tokenizer:
    if (folder / "tokenizer.json").is_file():
        return Tokenizer.from_file(str(folder / "tokenizer.json"))
    files = [folder / "vocab.json", folder / "merges.txt"]
    if not qwen or not all(file.is_file() for file in files):
        raise WeightsError(
            f"{folder}: no tokenizer.json. Download the folder with all its files; if it never had one, "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) of transformers writes it."
        )
    backend = Tokenizer(models.BPE.from_file(str(files[0]), str(files[1])))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return backend


def _added(folder: Path, config: Mapping[str, Any], special: Sequence[str]) -> Iterator[AddedToken]:
    """Yield the tokens that configuration files add to those of tokenizer.json, in the order of their ids."""
    described = config.get("added_tokens_decoder") or {}
    for _, token in sorted(described.items(), key=lambda item: int(item[0])):
        flags = {name: token[name] for name in ("lstrip", "rstrip", "normalized", "single_word") if name in token}
        yield AddedToken(token["content"], special=bool(token.get("special")), **flags)
    if not described:
        for content, _ in sorted(_optional(folder / "added_tokens.json").items(), key=lambda item: item[1]):
            yield AddedToken(content, special=content in special)
    more = config.get("additional_special_tokens") or config.get("extra_special_tokens") or []
    more = more.values() if isinstance(more, dict) else more
    there = {token["content"] for token in described.values()}
    for content in dict.fromkeys([*special, *map(_content, more)]):
        if content not in there:
            yield AddedToken(content, special=True)


def _content(token: Any) -> str:
    """Return the text of a token, which files store as a text or as an object with flags."""
    return str(token["content"] if isinstance(token, dict) else token)


def _optional(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}
