"""Token ids are those of transformers' AutoTokenizer, for every form of tokenizer folder."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden_data import golden_paths
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

from udm_grpo.data.tokenizer import MAX_CHARACTERS, load_tokenizer, tokenizer_class
from udm_grpo.tensor_files.torch_files import WeightsError

ASSETS = Path(__file__).resolve().parents[2] / "udm_grpo" / "assets"
TEXTS = [
    "a photo of a red circle left of two blue stars",
    "a photo of [PAD] three stars [UNK]",
    "",
    "  two   spaces and\n\n lines\t",
    "Größe, naïve café 日本語 😀 don't we'll 1234 e\u0301",
    "<|im_start|>user\nhello<|im_end|>",
    "x<|endoftext|>y <tool_call> z",
]


def qwen(folder: Path) -> None:
    """Save a small tokenizer of the family of the released ones with transformers."""
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.train_from_iterator(TEXTS * 3, trainer)
    model = json.loads(trained.to_str())["model"]
    tokenizer = Qwen2Tokenizer(vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]])
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.add_tokens(["<tool_call>"])
    tokenizer.save_pretrained(folder)


def edit(folder: Path, **values: Any) -> None:
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def without_tokenizer_json(folder: Path) -> None:
    """Save only vocabulary, merges and configuration, as older versions of transformers do."""
    qwen(folder)
    whole = json.loads((folder / "tokenizer.json").read_text())
    (folder / "vocab.json").write_text(json.dumps(whole["model"]["vocab"]))
    merges = "\n".join(" ".join(merge) for merge in whole["model"]["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    added = {str(token.pop("id")): token for token in whole["added_tokens"]}
    (folder / "tokenizer.json").unlink()
    edit(folder, added_tokens_decoder=added, pad_token="<|endoftext|>")


def with_a_new_special_token(folder: Path) -> None:
    qwen(folder)
    edit(folder, pad_token="<|pad|>")


def with_flags(folder: Path) -> None:
    """Save flags of added tokens in the configuration, as transformers 4 does."""
    qwen(folder)
    whole = json.loads((folder / "tokenizer.json").read_text())
    added = {str(token.pop("id")): token for token in whole["added_tokens"]}
    edit(folder, added_tokens_decoder=added, additional_special_tokens=["<|im_start|>", "<|vision_pad|>"])


def cut_and_padded(folder: Path) -> None:
    """Save a tokenizer.json in which truncation and padding are enabled."""
    qwen(folder)
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(3)
    backend.enable_padding(length=5)
    backend.save(str(folder / "tokenizer.json"))


FOLDERS: dict[str, Callable[[Path], None]] = {
    "qwen": qwen,
    "no tokenizer.json": without_tokenizer_json,
    "a new special token": with_a_new_special_token,
    "flags": with_flags,
    "cut and padded": cut_and_padded,
}


def assert_as_transformers(folder: Path) -> None:
    ours, theirs = load_tokenizer(folder, 500), AutoTokenizer.from_pretrained(folder, local_files_only=True)
    expected = [theirs(text, add_special_tokens=False, verbose=False)["input_ids"] for text in TEXTS]
    assert [encoding.ids for encoding in ours.backend.encode_batch(TEXTS, add_special_tokens=False)] == expected
    assert (ours.pad_id, ours.vocabulary) == (theirs.pad_token_id, len(theirs))
    assert load_tokenizer(folder).length == min(int(theirs.model_max_length), 320)
    assert ours(TEXTS[:1])[0, -len(expected[0]) :].tolist() == expected[0]
    assert set(ours(TEXTS[:1])[0, : -len(expected[0])]) == {theirs.pad_token_id}


@pytest.mark.parametrize("name", FOLDERS)
def test_the_ids_are_those_of_transformers(name: str, tmp_path: Path):
    FOLDERS[name](tmp_path)
    assert_as_transformers(tmp_path)


def test_the_ids_of_shipped_tokenizers_are_those_of_transformers():
    folders = [*ASSETS.glob("*/tokenizer"), *(path / "checkpoint" / "tokenizer" for path in golden_paths())]
    assert len(folders) >= 4
    for folder in folders:
        assert_as_transformers(folder)


def test_the_class_is_one_of_transformers_4(tmp_path: Path):
    qwen(tmp_path)
    assert tokenizer_class(tmp_path) == "Qwen2Tokenizer"
    backend = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<|endoftext|>").save_pretrained(tmp_path)
    assert tokenizer_class(tmp_path) == "PreTrainedTokenizerFast"


def test_a_folder_that_cannot_be_read_says_why(tmp_path: Path):
    without_tokenizer_json(tmp_path)
    edit(tmp_path, tokenizer_class="LlamaTokenizer")
    with pytest.raises(WeightsError, match=r"no tokenizer.json.*save_pretrained"):
        load_tokenizer(tmp_path)
    edit(tmp_path, tokenizer_class="Qwen2Tokenizer", added_tokens_decoder={"x": {}})
    with pytest.raises(WeightsError, match="is not a tokenizer that can be read"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(WeightsError, match=r"tokenizer_config.json: is not JSON"):
        load_tokenizer(tmp_path)


def test_the_text_of_special_tokens_is_warned_of():
    tokenizer = load_tokenizer(ASSETS / "ursa-shapes" / "tokenizer")
    with pytest.warns(UserWarning, match=r"1 of 2 prompts contain the text of a special token, such as '\[PAD\]'"):
        tokenizer(["a photo of a [PAD] circle", "a photo of a zebra"])


def test_a_prompt_of_any_length_ends_quickly_and_counts_as_cut():
    tokenizer = load_tokenizer(ASSETS / "ursa-shapes" / "tokenizer")
    lengths = []

    class Backend:
        def encode_batch(self, texts, **options):
            lengths.extend(map(len, texts))
            return tokenizer.backend.encode_batch(texts, **options)

    watched = dataclasses.replace(tokenizer, backend=Backend())
    long = "a photo of a red circle " * 50_000
    with pytest.warns(UserWarning, match="2 of 3 prompts have more than 10 tokens"):
        ids = watched([long, "x" * 10**6, "a photo"])
    assert max(lengths) <= MAX_CHARACTERS
    np.testing.assert_array_equal(ids[:1], tokenizer([long[:200]], warn=False))
    assert watched.cut([long, "x" * 10**6, "a photo"]) == [0, 1]
    assert tokenizer.marked(["a photo", "a [PAD] circle", "zebra"]) == [1]


def test_no_prompt_is_no_rows():
    tokenizer = load_tokenizer(ASSETS / "ursa-shapes" / "tokenizer")
    assert tokenizer([]).shape == (0, 10)
    assert np.array_equal(tokenizer([""])[0], tokenizer.empty())
