"""Prompt sets: reading, the order of training prompts, fixed evaluation lists, and bad files."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from udm_grpo.data.prompts import UNTAGGED, PromptSet, read_prompts

RATIO = {"position": 7, "counting": 5, "color_attr": 3, "colors": 1, "two_object": 1, "single_object": 0}


def make_set(sizes: dict[str, int], weights: dict[str, float] | None = None) -> PromptSet:
    tags = [tag for tag, size in sizes.items() for _ in range(size)]
    prompts = [f"{tag} {i}" for i, tag in enumerate(tags)]
    metadata = [{"tag": tag, "prompt": prompt} for tag, prompt in zip(tags, prompts, strict=True)]
    return PromptSet(tuple(prompts), tuple(metadata), tuple(tags), weights)


def geneval_line(**changes: object) -> str:
    line = {
        "tag": "single_object",
        "include": [{"class": "dog", "count": 1}],
        "exclude": [],
        "prompt": "a photo of a dog",
    }
    return json.dumps({name: value for name, value in (line | changes).items() if value is not None})


def indices(prompts: PromptSet, steps: int, P: int, seed: int = 0) -> list[int]:
    return [int(i) for step in range(steps) for i in prompts.batch(step, P, seed)[2]]


def test_a_batch_is_texts_metadata_and_indices_of_the_same_prompts():
    prompts = make_set({"a": 5, "b": 4})
    texts, metadata, chosen = prompts.batch(3, 4, seed=1)
    assert chosen.dtype == np.int32
    assert chosen.shape == (4,)
    assert texts == [prompts.prompts[i] for i in chosen]
    assert metadata == [prompts.metadata[i] for i in chosen]


@pytest.mark.parametrize("P", [1, 3, 4, 10, 25])
def test_every_epoch_has_every_prompt_once_in_a_new_order(P):
    prompts = make_set({"a": 10})
    row = indices(prompts, steps=60, P=P)
    epochs = [tuple(row[start : start + 10]) for start in range(0, len(row) - 9, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len(set(epochs)) == len(epochs)


def test_the_order_is_one_row_cut_into_batches():
    prompts = make_set({"a": 7, "b": 5}, {"a": 1, "b": 2})
    assert indices(prompts, steps=12, P=2) == indices(prompts, steps=4, P=6) == indices(prompts, steps=1, P=24)


def test_seeds_give_different_orders():
    prompts = make_set({"a": 50})
    rows = {tuple(indices(prompts, 5, 10, seed)) for seed in (0, 1, 2**63, -1)}
    assert len(rows) == 4


def test_the_same_prompts_in_another_process_and_after_a_jump_to_the_step():
    prompts = make_set({"a": 40, "b": 30}, {"a": 3, "b": 1})
    code = (
        "from test_prompts import make_set; p = make_set({'a': 40, 'b': 30}, {'a': 3, 'b': 1});"
        "print(p.batch(1000, 8, 7)[2].tolist(), p.fixed(5, 7)[2].tolist())"
    )
    there = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    ).stdout
    for step in range(3):
        prompts.batch(step, 8, 7)
    assert there.strip() == f"{prompts.batch(1000, 8, 7)[2].tolist()} {prompts.fixed(5, 7)[2].tolist()}"


def test_the_order_is_the_one_of_earlier_versions():
    """If this fails, runs can no longer be resumed across this change: find out why before editing the numbers."""
    assert make_set({"a": 10}).batch(0, 10, seed=0)[2].tolist() == [0, 1, 9, 6, 5, 3, 7, 8, 2, 4]
    weighted = make_set({"a": 4, "b": 4, "c": 4}, {"a": 2, "b": 1, "c": 0})
    assert weighted.batch(1, 9, seed=3)[2].tolist() == [5, 1, 0, 3, 5, 0, 1, 2, 6]
    assert weighted.fixed(8, seed=3)[2].tolist() == [0, 6, 8, 3, 5, 10, 2, 4]


def test_weights_are_met_exactly_in_every_cycle_and_each_tag_goes_through_its_own_epochs():
    prompts = make_set(dict.fromkeys(RATIO, 20), RATIO)
    row = indices(prompts, steps=340, P=8)
    tags = [prompts.tags[i] for i in row]
    for start in range(0, len(row), 17):
        assert Counter(tags[start : start + 17]) == {tag: share for tag, share in RATIO.items() if share}
    for tag in ("position", "colors"):
        own = [i for i in row if prompts.tags[i] == tag]
        for start in range(0, len(own) - 19, 20):
            assert len(set(own[start : start + 20])) == 20


def test_every_batch_follows_the_weights_closely():
    prompts = make_set(dict.fromkeys(RATIO, 20), RATIO)
    for step in range(50):
        counts = Counter(prompts.tags[i] for i in prompts.batch(step, 34, seed=5)[2])
        assert abs(counts["position"] - 14) <= 7
        assert counts["single_object"] == 0


def test_decimal_weights_are_the_same_as_their_whole_ratio():
    sizes = {"a": 6, "b": 6, "c": 6}
    tenths = make_set(sizes, {"a": 0.7, "b": 0.2, "c": 0.1})
    whole = make_set(sizes, {"a": 14, "b": 4, "c": 2})
    assert indices(tenths, 9, 7) == indices(whole, 9, 7)


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        ({"a": 1}, "no weight for the tag b"),
        ({"a": 1, "b": 1, "c": 2}, "no prompt has the tag c"),
        ({"a": 0, "b": 0}, "at least one weight must be above 0"),
        ({"a": -1, "b": 1}, "'a' is -1"),
        ({"a": float("nan"), "b": 1}, "'a' is nan"),
        ({"a": "7", "b": 1}, "'a' is '7'"),
        ({"a": 0.3333333, "b": 0.6666667}, "rounder numbers"),
    ],
)
def test_weights_that_do_not_fit_are_refused(weights, says):
    with pytest.raises(ValueError, match=says):
        make_set({"a": 3, "b": 3}, weights)


def test_a_weight_of_zero_may_name_a_tag_that_is_not_there():
    assert len(make_set({"a": 3}, {"a": 1, "z": 0}).batch(0, 5, 0)[0]) == 5


def test_fixed_lists_take_the_tags_in_turn_without_repeats():
    prompts = make_set({"a": 2, "b": 9, "c": 9}, {"a": 0, "b": 1, "c": 1})
    texts, metadata, chosen = prompts.fixed(20, seed=4)
    tags = [prompts.tags[i] for i in chosen]
    assert tags == ["a", "b", "c"] * 2 + ["b", "c"] * 7
    assert len(set(chosen.tolist())) == 20
    assert texts == [item["prompt"] for item in metadata]
    assert prompts.fixed(6, seed=4)[2].tolist() == chosen[:6].tolist()
    assert prompts.fixed(20, seed=5)[2].tolist() != chosen.tolist()


def test_a_fixed_list_longer_than_the_set_begins_again():
    prompts = make_set({"a": 2, "b": 3})
    chosen = prompts.fixed(12, seed=0)[2].tolist()
    assert sorted(chosen[:5]) == sorted(chosen[5:10]) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("call", [lambda p: p.batch(-1, 4, 0), lambda p: p.batch(0, 0, 0), lambda p: p.fixed(0, 0)])
def test_impossible_requests_are_refused(call):
    with pytest.raises(ValueError, match="must be at least"):
        call(make_set({"a": 3}))


def test_geneval_lines_are_read_whole(tmp_path):
    position = [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0], "color": "red"}]
    lines = [geneval_line(), geneval_line(tag="position", include=position, exclude=None, prompt="ä cat")]
    path = tmp_path / "set.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join([lines[0], "", lines[1], ""]).encode())
    prompts = read_prompts(path, {"position": 1, "single_object": 2})
    assert prompts.prompts == ("a photo of a dog", "ä cat")
    assert prompts.tags == ("single_object", "position")
    assert prompts.metadata == tuple(json.loads(line) for line in lines)


def test_plain_lists_have_one_prompt_a_line(tmp_path):
    path = tmp_path / "ocr.txt"
    path.write_text('a sign that says "open"\n\n  a poster that reads "JAX"  \n')
    prompts = read_prompts(path)
    assert prompts.prompts == ('a sign that says "open"', 'a poster that reads "JAX"')
    assert prompts.tags == (UNTAGGED, UNTAGGED)
    assert prompts.metadata[0] == {"tag": UNTAGGED, "prompt": 'a sign that says "open"'}


def test_all_bad_lines_are_in_one_error_with_their_numbers(tmp_path):
    bad_objects = [{"class": "dog", "count": 0}, "dog", {"count": 1, "position": ["left of", 2], "color": 3}]
    lines = [
        geneval_line(),
        '{"tag": "colors", "include"',
        "[1, 2]",
        geneval_line(prompt="  ", tag=None),
        geneval_line(include=[]),
        geneval_line(include=bad_objects),
        geneval_line(exclude={}),
        geneval_line(),
    ]
    path = tmp_path / "set.jsonl"
    path.write_bytes("\n".join(lines).encode() + b'\n{"prompt": "\xff"}')
    with pytest.raises(ValueError, match="7 bad lines") as caught:
        read_prompts(path)
    text = str(caught.value)
    assert [line.split(":")[0].strip() for line in text.splitlines()[1:]] == [
        f"line {n}" for n in (2, 3, 4, 5, 6, 7, 9)
    ]
    for says in (
        "line 2: not JSON",
        "line 3: not a JSON object",
        'line 4: "tag" must be a text that is not empty; found None; "prompt" must be',
        'line 5: "include" must be a list of at least one object',
        '"include"[0] needs "count"',
        '"include"[1] must be an object',
        '"include"[2] needs "class"',
        '"include"[2]: "color"',
        '"include"[2]: "position" must be [one of left of',
        'line 7: "exclude" must be a list',
        "line 9: not UTF-8",
    ):
        assert says in text


def test_a_thousand_bad_lines_are_all_named(tmp_path):
    path = tmp_path / "set.jsonl"
    path.write_text("oops\n" * 1000)
    with pytest.raises(ValueError, match="1000 bad lines") as caught:
        read_prompts(path)
    text = str(caught.value)
    assert len(text.splitlines()) == 52
    assert text.endswith(", 999, 1000")


@pytest.mark.parametrize("name", ["set.jsonl", "set.txt"])
@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_file_is_an_error(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match="the prompt file is empty"):
        read_prompts(tmp_path / name)


def test_a_missing_file_another_kind_and_wrong_weights_name_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.txt: no such prompt file"):
        read_prompts(tmp_path / "gone.txt")
    with pytest.raises(ValueError, match=r"set\.parquet: a prompt file is \.jsonl"):
        read_prompts(tmp_path / "set.parquet")
    (tmp_path / "set.txt").write_text("a dog\n")
    with pytest.raises(ValueError, match=r"set\.txt: tag weights: .*no weight for the tag untagged"):
        read_prompts(tmp_path / "set.txt", {"dog": 0, "cat": 1})


def test_a_set_must_be_consistent():
    with pytest.raises(ValueError, match="at least one prompt"):
        PromptSet((), (), ())
    with pytest.raises(ValueError, match="2 prompts, 1 metadata, 1 tags"):
        PromptSet(("a", "b"), ({},), ("t",))
