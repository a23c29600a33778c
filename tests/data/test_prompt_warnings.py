"""Warnings about prompts at the start of a run: few, repeated, contradictory, leaked and truncated ones, by place."""

import json
from types import SimpleNamespace

from rewards_bridge.errors import ScorerError
from udm_grpo.data.prompt_warnings import cut_warnings, places, set_warnings, write_warnings
from udm_grpo.data.prompts import read_prompts
from udm_grpo.data.tokenizer import load_tokenizer
from udm_grpo.lifecycle.start_notes import prompt_notes
from udm_grpo.reporting.run_folder import read_run
from udm_grpo.scoring.scorer_notes import note_warnings
from udm_grpo.worlds.base_checkpoint import ASSETS


def sets(folder, train, heldout):
    (folder / "train.jsonl").write_text(train)
    (folder / "heldout.txt").write_text(heldout)
    return read_prompts(folder / "train.jsonl"), read_prompts(folder / "heldout.txt")


def geneval(prompt, count):
    return json.dumps({"tag": "counting", "include": [{"class": "star", "count": count}], "prompt": prompt})


def test_sets_without_doubts_give_no_warning(tmp_path):
    train, heldout = sets(tmp_path, "\n".join([geneval("a star", 1), geneval("two stars", 2)]), "a circle\nthree stars")
    assert set_warnings(train, heldout, 2) == []


def test_few_equal_contradictory_and_leaked_prompts_are_told_with_their_lines(tmp_path):
    lines = [geneval("two stars", 2), "", geneval("a star", 1), geneval("A  star", 1), geneval("Two stars ", 3)]
    train, heldout = sets(tmp_path, "\n".join(lines), "a circle\n# mine\n\na circle\nTWO stars\n")
    warnings = set_warnings(train, heldout, 3)
    assert len(warnings) == 8
    assert [text.rsplit(": ", 1)[1] for text in warnings[:3]] == ["1", "1", "1"]  # empty, empty, comment
    assert warnings[3].startswith("prompts.train has 2 different prompts, but an iteration uses 3")
    assert warnings[4] == "prompts.train has 1 prompts that repeat an earlier one: line 4"
    assert warnings[5].startswith("prompts.train has 1 prompts that contradict an earlier one")
    assert "line 5, such as 'Two stars' (first at line 1)" in warnings[5]
    assert warnings[6] == "prompts.heldout has 1 prompts that repeat an earlier one: line 4"
    assert "1 of 3 prompts that are also in prompts.train" in warnings[7]
    assert "line 5, such as 'TWO stars' (line 1 of prompts.train)" in warnings[7]


def test_prompts_longer_than_the_model_reads_are_counted_once_with_their_lines(tmp_path):
    tokenizer = load_tokenizer(ASSETS / "ursa-shapes" / "tokenizer", 6)
    train, heldout = sets(
        tmp_path, json.dumps({"prompt": "a photo of " + "a star and " * 20}), "a star\n" + "red " * 30
    )
    warnings = cut_warnings(train, heldout, tokenizer)
    assert [text.partition(" has ")[0] for text in warnings] == ["prompts.train", "prompts.heldout"]
    assert "1 of 2 prompts with more than the 6 tokens that the model reads" in warnings[1]
    assert warnings[1].endswith("line 2")
    assert tokenizer(train.prompts, warn=False).shape == (1, 6)


def test_places_beyond_ten_are_counted(tmp_path):
    train, _ = sets(tmp_path, "\n".join(json.dumps({"prompt": str(i)}) for i in range(15)), "x")
    assert places(train, list(range(15))) == "lines 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 and 5 more"


def test_the_start_keeps_them_for_the_report(tmp_path):
    train, heldout = sets(tmp_path, geneval("a star", 1), "a star")
    run = SimpleNamespace(
        train=train,
        heldout=heldout,
        config=SimpleNamespace(rollout=SimpleNamespace(prompts=1)),
        released=SimpleNamespace(tokenizer=load_tokenizer(ASSETS / "ursa-shapes" / "tokenizer")),
        output=tmp_path,
        identity=SimpleNamespace(id="mine"),
        client=SimpleNamespace(notes=lambda prompts, metadata: {"ocr": {}}),
    )
    marked = sets(tmp_path, geneval("a star", 1), "a [PAD]\nzebra")[1]
    (special,) = prompt_notes(SimpleNamespace(**{**vars(run), "heldout": marked}))
    assert "prompts.heldout has 1 of 2 prompts with the text of a special token, such as '[PAD]'" in special
    assert special.endswith("reads as that token: line 1")
    (note,) = prompt_notes(run)
    assert note.startswith("warning: the prompts:\n  prompts.heldout has 1 of 1 prompts that are also in prompts.train")
    kept = json.loads((tmp_path / "prompt_warnings.json").read_text())
    assert kept == {"run": "mine", "warnings": [note.split("\n  ")[1]]}
    write_warnings(tmp_path, "mine", [])
    assert json.loads((tmp_path / "prompt_warnings.json").read_text()) == {"run": "mine", "warnings": []}


def test_what_scorers_say_is_counted_with_the_lines_of_the_file(tmp_path):
    train, heldout = sets(tmp_path, "\n".join(["", *(geneval(f"star {i}", 1) for i in range(3))]), "a circle")

    def notes(prompts, metadata):
        if len(prompts) == 1:
            raise ScorerError("scorer 'ocr' raised")
        return {"pickscore": {0: "cut", 2: "cut"}, "ocr": {1: "the text that is looked for is 'OPEN'"}}

    tokenizer = load_tokenizer(ASSETS / "ursa-shapes" / "tokenizer")
    run = SimpleNamespace(
        train=train,
        heldout=heldout,
        config=SimpleNamespace(rollout=SimpleNamespace(prompts=1)),
        released=SimpleNamespace(tokenizer=tokenizer),
        output=tmp_path,
        identity=SimpleNamespace(id="mine"),
        client=SimpleNamespace(notes=notes),
    )
    (note,) = prompt_notes(run)
    assert note.split("\n  ")[-3:] == [
        "prompts.train, scorer pickscore: 2 of 3 prompts (lines 2, 4): cut",
        "prompts.train, scorer ocr: 1 of 3 prompts (line 3): the text that is looked for is 'OPEN'",
        "the scorers could not say which prompts they cut or find ambiguous: scorer 'ocr' raised",
    ]
    assert json.loads((tmp_path / "prompt_warnings.json").read_text())["warnings"][-3:] == note.split("\n  ")[-3:]


def test_notes_beyond_fifty_are_counted(tmp_path):
    notes = {"ocr": {index: f"target {index % 52}" for index in range(53)}}
    lines = note_warnings("prompts", 60, notes, lambda indices: f"lines {indices}")
    assert len(lines) == 51
    assert lines[0] == "prompts, scorer ocr: 2 of 60 prompts (lines [0, 52]): target 0"
    assert lines[-1] == "prompts, scorer ocr: 2 of 60 prompts (lines [50, 51]): 2 more notes of this kind"


def test_the_report_reads_those_of_its_own_run(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / "config.json").write_text('{"run": "mine"}')
    write_warnings(tmp_path, "mine", ["few"])
    assert "prompts: few" in read_run(tmp_path).notes
    write_warnings(tmp_path, "other", ["few"])
    assert "prompts: few" not in read_run(tmp_path).notes
