"""Tests of the signs world: its split, images that OCR can read, and its base pre-training on a small scale."""

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rewards_bridge.scorers import ocr_models
from rewards_bridge.scorers.ocr import OcrScorer
from rewards_bridge.scorers.text_match import check_prompts, is_exact, match, target_text
from scripts import pretrain_signs
from udm_grpo.released.weights import load_folder
from udm_grpo.worlds import base_checkpoint, signs

TOKENS_OF_A_PROMPT = ["a", "sign", "that", "says", '"', "4", "2", "7", '"']


def texts(prompts: list[dict]) -> set[str]:
    return {metadata["text"] for metadata in prompts}


# ---------------------------------------------------------------- prompts


def test_every_text_once() -> None:
    prompts = signs.all_prompts()
    assert Counter(metadata["tag"] for metadata in prompts) == {"one": 10, "two": 100, "three": 1000}
    assert len({metadata["prompt"] for metadata in prompts}) == len(texts(prompts)) == 1110
    for metadata in prompts:
        assert re.fullmatch("[0-9]{1,3}", metadata["text"])
        assert json.loads(json.dumps(metadata)) == metadata
    assert signs.prompt_of("427") == {"tag": "three", "text": "427", "prompt": 'a sign that says "427"'}


def test_the_scorer_finds_the_text_in_every_prompt() -> None:
    prompts = signs.all_prompts()
    assert check_prompts(metadata["prompt"] for metadata in prompts) == []
    assert [target_text(metadata["prompt"]) for metadata in prompts] == [metadata["text"] for metadata in prompts]


def test_split_parts_all_texts_with_a_fifth_of_every_tag_held_out() -> None:
    train, held_out = signs.train_prompts(), signs.heldout_prompts()
    assert texts(train).isdisjoint(texts(held_out))
    assert texts(train) | texts(held_out) == texts(signs.all_prompts())
    assert Counter(metadata["tag"] for metadata in held_out) == {"one": 2, "two": 20, "three": 200}


def test_held_out_texts_are_these() -> None:
    """Every reported number depends on the split, so it must not change unnoticed."""
    held_out = [metadata["text"] for metadata in signs.heldout_prompts()]
    assert held_out[:10] == ["3", "8", "04", "09", "11", "16", "23", "28", "30", "35"]
    assert held_out[22:28] == ["001", "006", "012", "017", "023", "028"]


def test_every_digit_is_trained_on_at_every_place() -> None:
    seen = {
        (place, digit)
        for metadata in signs.train_prompts()
        for place, digit in zip(signs.PLACES[metadata["tag"]], metadata["text"], strict=True)
    }
    assert seen == {(place, digit) for places in signs.PLACES.values() for place in places for digit in signs.DIGITS}
    for tag in ("two", "three"):
        firsts = {metadata["text"][0] for metadata in signs.train_prompts() if metadata["tag"] == tag}
        lasts = {metadata["text"][-1] for metadata in signs.train_prompts() if metadata["tag"] == tag}
        assert firsts == lasts == set(signs.DIGITS)


def test_prompts_are_drawn_by_the_weight_of_their_tag() -> None:
    drawn = signs.sample_prompts(signs.train_prompts(), 4_000, np.random.default_rng(0))
    share = Counter(metadata["tag"] for metadata in drawn)
    for tag, weight in signs.RL_TAG_WEIGHTS.items():
        assert share[tag] / 4_000 == pytest.approx(weight / 10, abs=0.03)
    only = signs.sample_prompts(signs.heldout_prompts(), 20, np.random.default_rng(0), {"one": 1})
    assert texts(only) == {"3", "8"}
    with pytest.raises(ValueError, match="no prompt to draw"):
        signs.sample_prompts(signs.train_prompts(), 1, np.random.default_rng(0), {"four": 1})


def test_wrong_captions_differ_in_one_digit_and_are_trained_on() -> None:
    rng = np.random.default_rng(0)
    train = texts(signs.train_prompts())
    for metadata in signs.all_prompts():
        wrong = signs.corrupt_caption(metadata, rng)
        assert wrong["text"] in train
        assert wrong["tag"] == metadata["tag"]
        assert sum(a != b for a, b in zip(wrong["text"], metadata["text"], strict=True)) == 1
        assert wrong == signs.prompt_of(wrong["text"])


# ---------------------------------------------------------------- pictures


def drawn(count: int, seed: int) -> tuple[list[dict], list[signs.Sign]]:
    rng = np.random.default_rng(seed)
    prompts = signs.sample_prompts(signs.all_prompts(), count, rng)
    return prompts, [signs.sign_for(metadata, rng) for metadata in prompts]


def ink(sign: signs.Sign) -> np.ndarray:
    """Return the coverage of each pixel with ink, 0..1: f64[H,W]."""
    away = np.abs(signs.render(sign).astype(float) - sign.ground).sum(-1)
    return away / np.abs(np.subtract(sign.ink, sign.ground)).sum()


def test_same_state_same_pictures() -> None:
    first, again, other = (signs.render_batch(drawn(12, seed)[1]) for seed in (0, 0, 1))
    assert first.shape == (12, 32, 64, 3)
    assert first.dtype == np.uint8
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_signs_vary_in_everything_that_is_drawn() -> None:
    _, some = drawn(80, 0)
    assert {sign.font for sign in some} == set(range(len(signs.FONTS)))
    assert {sign.ink for sign in some} == set(signs.INKS)
    for name in ("height", "slant", "dx", "dy"):
        assert len({getattr(sign, name) for sign in some}) == 80
    assert all(0 <= value <= 255 for sign in some for value in sign.ground)


@pytest.mark.parametrize("font", range(len(signs.FONTS)))
def test_digits_stand_at_their_places(font: int) -> None:
    """In the pixels, each digit's box is centred on its place and does not overlap its neighbours' places."""
    for text in ("0", "47", "358", "191"):
        sign = signs.Sign(text, font, 19.0, 0.0, 0.0, 0.0, (20, 20, 20), (250, 250, 250))
        covered = ink(sign)
        rows = np.flatnonzero(covered.max(1) > 0.5)
        assert (rows[0] + rows[-1] + 1) / 2 == pytest.approx(16, abs=1)
        assert 17 <= rows[-1] - rows[0] + 1 <= 21
        places = signs.PLACES[signs.TAGS[len(text) - 1]]
        for place in places:
            columns = np.flatnonzero(covered[:, place - 8 : place + 8].max(0) > 0.5)
            assert (columns[0] + columns[-1] + 1) / 2 == pytest.approx(8, abs=1)
        outside = [x for x in range(64) if not any(place - 8 <= x < place + 8 for place in places)]
        assert covered[:, outside].max() < 0.02


def test_a_slant_leans_a_sign_and_leaves_it_where_it_is() -> None:
    upright = signs.Sign("1", 0, 19.0, 0.0, 0.0, 0.0, (20, 20, 20), (250, 250, 250))
    x = np.arange(64) + 0.5

    def centre(covered: np.ndarray) -> float:
        return float((covered.sum(0) * x).sum() / covered.sum())

    straight, leaning = ink(upright), ink(replace(upright, slant=0.2))
    assert centre(leaning) == pytest.approx(centre(straight), abs=0.3)
    assert centre(leaning[:12]) > centre(straight[:12]) + 0.5
    assert centre(leaning[20:]) < centre(straight[20:]) - 0.5
    moved = ink(replace(upright, dx=2.0, dy=-1.0))
    assert np.allclose(moved[4:28, 4:60], straight[5:29, 2:58], atol=0.01)


def test_a_missing_font_says_what_installs_it(monkeypatch) -> None:
    monkeypatch.setattr(signs, "FONTS", (("font-of-nobody==1.0", "none.ttf"), ("pillow==0.0.1", "none.ttf")))
    with pytest.raises(RuntimeError, match=r"font-of-nobody==1.0, which is not installed.* -m pip install font-of-nob"):
        signs.font_file(0)
    with pytest.raises(RuntimeError, match=r"is installed as [0-9.]+, without that file.* pip install pillow==0.0.1"):
        signs.font_file(1)


# ---------------------------------------------------------------- the reader


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PADDLE_PDX_CACHE_HOME", str(tmp_path_factory.mktemp("paddle")))  # created at import
        detection, recognition = ocr_models.make_folders(tmp_path_factory.mktemp("models"))
        reader = OcrScorer(str(detection), str(recognition))
        yield reader
        reader.close()


def test_the_reader_reads_what_a_sign_says_and_nothing_else(scorer) -> None:
    prompts, some = drawn(40, 3)
    scores = scorer.score(signs.render_batch(some), [metadata["prompt"] for metadata in prompts], prompts)
    assert scores.raw["exact"].mean() >= 0.9
    assert scores.score.mean() >= 0.95
    rng = np.random.default_rng(4)
    wrong = [signs.corrupt_caption(metadata, rng)["text"] for metadata in prompts]
    assert not any(is_exact(*pair) for pair in zip(scores.reasons, wrong, strict=True))
    assert np.mean([match(*pair) for pair in zip(scores.reasons, wrong, strict=True)]) < 0.7  # 2/3 with three digits


# ---------------------------------------------------------------- the base


def test_digits_and_quotes_are_words(tmp_path: Path) -> None:
    from udm_grpo.data.tokenizer import load_tokenizer

    every = [metadata["prompt"] for metadata in signs.all_prompts()]
    words = base_checkpoint.write_text_tokenizer(tmp_path, every, pretrain_signs.WORD_SPLITTER)
    assert set(words) == {"[PAD]", "[UNK]", "[BOV]", "a", "sign", "that", "says", '"', *signs.DIGITS}
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer(['a sign that says "427"', 'a sign that says "7"'])
    assert [words[index] for index in ids[0]] == TOKENS_OF_A_PROMPT
    assert [words[index] for index in ids[1]] == ["[PAD]", "[PAD]", *TOKENS_OF_A_PROMPT[:5], "7", '"']


@pytest.mark.usefixtures("compiled_quickly")
def test_the_base_is_made_in_small_and_goes_on(tmp_path: Path) -> None:
    """scripts/pretrain_signs.py runs with every stage shortened; run again, the tokenizer is already trained."""
    from udm_grpo.pipeline import load_pipeline

    plan = pretrain_signs.Plan(
        pool=100,
        continuous_updates=1,
        codebook_batches=1,
        quantized_updates=1,
        tokenizer_batch=4,
        pictures=64,
        updates=1,
        batch=8,
    )
    pretrain_signs.main(["--output", str(tmp_path)], plan)
    with np.load(tmp_path / "tokens.npz") as tokens:
        assert tokens["images"].shape == (64, 4, 8)
        assert set(tokens["prompts"]) <= {metadata["prompt"] for metadata in signs.train_prompts()}
    checkpoint = tmp_path / "base" / "checkpoint"
    assert load_pipeline(checkpoint).tokenize(['a sign that says "38"']).shape == (1, len(TOKENS_OF_A_PROMPT))
    assert json.loads((tmp_path / "base" / "pretrain.jsonl").read_text().splitlines()[-1])["update"] == 1

    log = (tmp_path / "tokenizer.jsonl").read_text()
    again = base_checkpoint.TokenizerTraining(pretrain_signs.WORLD, plan, tmp_path).run()
    assert (tmp_path / "tokenizer.jsonl").read_text() == log
    saved = load_folder(checkpoint).vq
    assert np.array_equal(again["codebook"]["embedding"], saved["codebook"]["embedding"])

    base_checkpoint.install(pretrain_signs.WORLD, tmp_path, tmp_path / "assets")
    lines = (tmp_path / "assets" / "signs-prompts" / "heldout.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == signs.heldout_prompts()
    assert (tmp_path / "assets" / "ursa-signs" / "model_index.json").is_file()
    assert (tmp_path / "assets" / "ursa-signs-log" / "tokenizer.jsonl").is_file()
