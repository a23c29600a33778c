"""Tests of GenEval metadata: prompt files, samples folders, `score --metadata` and servers read them alike."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rewards_bridge.__main__ import main
from rewards_bridge.errors import PromptError
from rewards_bridge.protocol import bridge_pb2, messages
from rewards_bridge.scorers import load_scorer
from rewards_bridge.scorers.geneval import WORDS, check_metadata
from rewards_bridge.scorers.geneval_metadata import problems, read_metadata
from rewards_bridge.server import _Bridge, _ScorerRaisedError
from udm_grpo.data.prompt_files import parse_file
from udm_grpo.scoring.sample_folder import SampleFolderError, read_samples

STAR = {"class": "star", "count": 1}
ENTRY = {"tag": "position", "include": [{"class": "circle", "count": 1}, {**STAR, "position": ["left of", 0]}]}

SAME = {
    "null fields": {
        "include": [
            {"class": "circle", "count": 1, "color": None, "position": None},
            {**STAR, "position": ["left of", 0], "color": None},
        ],
        "exclude": None,
    },
    "whole floats": {
        "include": [{"class": "circle", "count": 1.0}, {**STAR, "count": 1.0, "position": ["left of", 0.0]}]
    },
}
"""Forms in which other JSON writers may store ENTRY."""

WRONG = {
    "a list": ({"include": "[]"}, '"include" must be a list of at least one object'),
    "JSON in a text": ({"include": json.dumps(ENTRY["include"])}, '"include" must be a list of at least one object'),
    "none": ({"include": []}, '"include" must be a list of at least one object'),
    "an object": ({"include": {"class": "star", "count": 1}}, '"include" must be a list of at least one object'),
    "numbers": ({"include": [3]}, '"include"[0] must be an object like'),
    "no class": ({"include": [{"count": 1}]}, '"include"[0] needs "class", a text; found None'),
    "a class of two": ({"include": [{**STAR, "class": ["star"]}]}, '"include"[0] needs "class", a text'),
    "a half": ({"include": [{**STAR, "count": 1.5}]}, '"count", a whole number of at least 1; found 1.5'),
    "a text": ({"include": [{**STAR, "count": "1"}]}, "\"count\", a whole number of at least 1; found '1'"),
    "truth": ({"include": [{**STAR, "count": True}]}, '"count", a whole number of at least 1; found True'),
    "null count": ({"include": [{**STAR, "count": None}]}, '"count", a whole number of at least 1; found None'),
    "less": ({"include": [{**STAR, "count": -1}]}, '"count", a whole number of at least 1; found -1'),
    "too many": ({"include": [{**STAR, "count": 17}]}, "keeps at most 16 objects"),
    "colors": ({"include": [{**STAR, "color": ["red"]}]}, '"color" must be a text'),
    "nowhere": ({"include": [STAR, {**STAR, "position": ["beside", 0]}]}, '"include"[1]: "position" must be [one of'),
    "itself": ({"include": [{**STAR, "position": ["above", 0]}]}, "of an earlier object"),
    "of three": ({"include": [STAR, {**STAR, "position": ["above", 0, 1]}]}, '"position" must be'),
    "an index in a text": ({"include": [STAR, {**STAR, "position": ["above", "0"]}]}, '"position" must be'),
    "excluded text": ({"include": [STAR], "exclude": "star"}, '"exclude" must be a list'),
    "excluded color": ({"include": [STAR], "exclude": [{**STAR, "color": "red"}]}, "looks only at"),
    "excluded zero": ({"include": [STAR], "exclude": [{**STAR, "count": 0}]}, '"exclude"[0] needs "count"'),
    "misspelt": ({"include": [{**STAR, "colour": "red"}]}, 'write it "color"'),
    "misspelt above": ({"include": [STAR], "excludes": []}, 'write it "exclude"'),
    "a tag of two": ({"tag": ["position"]}, '"tag" must be a text'),
    "no tag": ({"tag": None}, '"tag" must be a text'),
}


def entry(**changes: object) -> dict:
    return {"prompt": "a photo", **ENTRY, **changes}


def ways(folder: Path, metadata: dict) -> dict[str, object]:
    """Return, for every way in, the metadata as a scorer gets them, or the error message."""
    picture = folder / "p" / "00000" / "samples" / "0000.png"
    picture.parent.mkdir(parents=True)
    Image.fromarray(np.full((32, 32, 3), 255, np.uint8)).save(picture)
    (folder / "p" / "00000" / "metadata.jsonl").write_text(json.dumps(metadata))
    (folder / "set.jsonl").write_text(json.dumps(metadata))
    (folder / "set.json").write_text(json.dumps([metadata]))
    seen: dict[str, object] = {}
    for name in ("set.jsonl", "set.json"):
        parsed = parse_file(folder / name)
        seen[name] = parsed.rows[0] if parsed.rows else parsed.bad[0][1]
    try:
        seen["folder"] = read_samples(folder / "p").prompts[0]
    except SampleFolderError as error:
        seen["folder"] = str(error)
    scorer, images = load_scorer("shapes", {}), np.full((1, 32, 32, 3), 255, np.uint8)
    seen["check"] = scorer.problem("a photo", metadata)  # type: ignore[attr-defined]
    bridge = _Bridge(scorer, bridge_pb2.DescribeReply())
    try:
        seen["server"] = bridge._score(messages.Batch(images, ["a photo"], [metadata]))[0].score.tolist()
    except _ScorerRaisedError as error:
        seen["server"] = str(error)
    bridge.finish()
    return seen


@pytest.mark.parametrize("name", SAME)
def test_null_is_absent_and_one_point_zero_is_one_by_every_way_in(tmp_path, name):
    seen = ways(tmp_path, entry(**SAME[name]))
    assert seen == {"set.jsonl": entry(), "set.json": entry(), "folder": entry(), "check": "", "server": [0.0]}
    assert type(seen["folder"]["include"][0]["count"]) is int
    assert load_scorer("shapes", {}).problem("", entry(**SAME[name])) == ""
    geneval = {**ENTRY, "include": [{"class": "dog", "count": 1.0, "color": None}], "exclude": None}
    assert check_metadata(["x"], [geneval]) == []


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said_in_the_same_words_by_every_way_in(tmp_path, name):
    change, said = WRONG[name]
    for way, text in ways(tmp_path, entry(**change)).items():
        assert said in text, way
        assert "Traceback" not in text, way


def test_a_prompt_with_a_null_include_is_a_plain_one(tmp_path):
    plain = {"prompt": "a photo", "tag": None, "include": None, "exclude": None, "id": None}
    (tmp_path / "set.jsonl").write_text(json.dumps(plain))
    assert parse_file(tmp_path / "set.jsonl").rows == ({"prompt": "a photo", "tag": "untagged", "id": None},)


def test_metadata_of_the_command_line_are_refused_in_one_line(tmp_path, capsys):
    picture = tmp_path / "white.png"
    Image.fromarray(np.full((32, 32, 3), 255, np.uint8)).save(picture)
    command = ["score", "--scorer", "shapes", "--prompt", "a photo", str(picture)]
    for name in ("a half", "none", "colors", "JSON in a text"):
        change, said = WRONG[name]
        assert main([*command, "--metadata", json.dumps({**ENTRY, **change})]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert len(error.splitlines()) == 1
    assert main([*command, "--metadata", json.dumps({**ENTRY, **SAME["null fields"]})]) == 0
    assert json.loads(capsys.readouterr().out)["raw"]["strict"] == 0.0


def test_the_argument_is_not_modified_and_own_keys_are_kept():
    metadata = entry(**SAME["null fields"], id=None, note={"a": 1})
    before = json.dumps(metadata)
    assert read_metadata(metadata) == {**entry(), "id": None, "note": {"a": 1}}
    assert json.dumps(metadata) == before
    for thing in (None, "text", 3, [ENTRY]):
        assert "must be an object" in problems(thing)[0]
    (text,) = problems({**ENTRY, "include": [{"class": "mouse", "count": 1}]}, WORDS)
    assert text.endswith("traffic light and 70 more; GenEval calls it 'computer mouse'")
    with pytest.raises(PromptError, match=r'"count".*; .*"color"'):
        read_metadata(entry(include=[{"class": "star", "color": 3}]))
