"""Raw prompt files of every kind, written here in the format of the public ones, and their errors by line."""

import json

import pytest

from udm_grpo.data.prompt_files import UNTAGGED, parse_file
from udm_grpo.data.prompts import read_prompts

GENEVAL = {"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "red"}], "prompt": "a photo of a red dog"}


def texts(rows):
    return [row["prompt"] for row in rows]


def test_drawbench_has_its_categories_as_tags(tmp_path):
    path = tmp_path / "DrawBench.csv"
    quoted = '"A sign that says ""Hello, World"".\nTwo lines.",Text\r\n'
    path.write_bytes(b"\xef\xbb\xbfPrompts,Category\r\nA red colored car.,Colors\r\n" + quoted.encode())
    rows = parse_file(path).all_or_error()
    assert rows == (
        {"tag": "Colors", "prompt": "A red colored car."},
        {"tag": "Text", "prompt": 'A sign that says "Hello, World".\nTwo lines.'},
    )
    assert read_prompts(path).tags == ("Colors", "Text")


def test_a_folder_of_texts_is_one_prompt_a_file(tmp_path):
    for name, text in (
        ("COCOval2014_9.txt", "A cat.\r\nIt sleeps.\n"),
        ("partiprompts2.txt", "  a dög "),
        (".x", "no"),
    ):
        (tmp_path / name).write_text(text)
    assert parse_file(tmp_path).all_or_error() == (
        {"tag": UNTAGGED, "prompt": "A cat. It sleeps.", "id": "COCOval2014_9"},
        {"tag": UNTAGGED, "prompt": "a dög", "id": "partiprompts2"},
    )
    assert read_prompts(tmp_path).prompts == ("A cat. It sleeps.", "a dög")


def test_what_a_folder_of_texts_should_not_hold_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("fine")
    (tmp_path / "b.txt").write_text("\n")
    (tmp_path / "c.txt").write_bytes(b"\xff")
    (tmp_path / "notes.md").write_text("")
    with pytest.raises(ValueError, match="3 bad files") as caught:
        parse_file(tmp_path).all_or_error()
    for says in ("file b.txt: the file is empty", "file c.txt: not UTF-8", "file notes.md: not a .txt file"):
        assert says in str(caught.value)


@pytest.mark.parametrize("name", ["prompts.json", "prompts.jsonl"])
def test_an_array_of_objects_is_read_by_any_of_its_texts(tmp_path, name):
    path = tmp_path / name
    rows = [
        {**GENEVAL, "id": 0, "dense_prompt": "A red dög in the snow."},
        {"id": "p1", "prompt": "x", "dense_prompt": "y"},
    ]
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(rows, indent=2, ensure_ascii=False).encode())
    assert read_prompts(path).metadata == (rows[0], {"tag": UNTAGGED, **rows[1]})
    dense = read_prompts(path, key="dense_prompt")
    assert dense.prompts == ("A red dög in the snow.", "y")
    assert dense.tags == ("colors", UNTAGGED)
    assert dense.metadata[0] == {**rows[0], "prompt": "A red dög in the snow.", "original_prompt": GENEVAL["prompt"]}


def test_a_key_is_one_of_objects_and_of_csv_columns(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,dense\nx,y\n")
    (tmp_path / "a.txt").write_text("x\n")
    (tmp_path / "a.jsonl").write_text('{"dense": "y"}\n{"dense": "z"}\n')
    assert read_prompts(tmp_path / "a.csv", key="dense").prompts == ("y",)
    assert read_prompts(tmp_path / "a.jsonl", key="dense").metadata[1] == {"tag": UNTAGGED, "dense": "z", "prompt": "z"}
    with pytest.raises(ValueError, match=r"only .json, .jsonl and .csv files have keys"):
        read_prompts(tmp_path / "a.txt", key="dense")


@pytest.mark.parametrize(
    ("content", "key", "said"),
    [
        (
            '[{"id": 1, "prompt": "x"}]',
            "dense_prompt",
            r"no prompt has the key 'dense_prompt'; the keys are 'id', 'prompt'",
        ),
        ('[{"caption": "x"}]', "prompt", r"no prompt has the key 'prompt'; the keys are 'caption'"),
        (
            '[{"prompt": "x"}, {"prompt": "y", "long": "z"}, 3]',
            "long",
            r"2 bad items.*\n.*item 1: \"long\".*\n.*item 3: not a",
        ),
        ('{"prompt": \n"x"}', "prompt", r"expected one JSON array"),
        ('[{"prompt": "x"},\n]', "prompt", r"not JSON: .* at line"),
        ("[]", "prompt", "is empty"),
        ("[" * 100_000, "prompt", "nested too deeply"),
    ],
)
def test_what_is_wrong_with_an_array_is_said(tmp_path, content, key, said):
    path = tmp_path / "prompts.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=said):
        read_prompts(path, key=key)
    path.write_bytes(b'[{"prompt": "\xff"}]')
    with pytest.raises(ValueError, match="not UTF-8 text"):
        read_prompts(path)


def test_objects_with_a_prompt_and_geneval_lines_in_one_file(tmp_path):
    path = tmp_path / "set.jsonl"
    plain, signs = {"prompt": "a dog", "source": 7}, {"tag": "two", "text": "42", "prompt": 'a sign that says "42"'}
    path.write_text("\n".join(map(json.dumps, (plain, signs, GENEVAL))))
    assert parse_file(path).all_or_error() == ({"tag": UNTAGGED, **plain}, signs, GENEVAL)


def test_every_bad_line_of_a_jsonl_is_named(tmp_path):
    path = tmp_path / "set.jsonl"
    wrong = [
        '{"prompt": 3}',
        '{"caption": "a dog"}',
        '{"prompt": "a", "tag": ""}',
        '{"prompt": "\\ud800"}',
        "[" * 10**5,
    ]
    path.write_text("\n".join([json.dumps(GENEVAL), "", *wrong, "oops"]))
    parsed = parse_file(path)
    assert parsed.rows == (GENEVAL,)
    assert parsed.empty == 1
    said = dict(parsed.bad)
    assert list(said) == ["3", "4", "5", "6", "7", "8"]
    assert said["3"] == said["4"] == '"prompt" must be a text that is not empty'
    assert said["5"] == '"tag" must be a text that is not empty'
    assert "surrogate pair at character 1" in said["6"]
    assert said["7"].startswith("not JSON")
    assert said["8"] == "not JSON: Expecting value at column 1"


def test_a_check_adds_to_the_bad_lines_in_their_order(tmp_path):
    path = tmp_path / "set.jsonl"
    path.write_text("\n".join(['{"prompt": "a"}', "oops", '{"prompt": "b"}', *['{"prompt": "a"}'] * 8]))
    parsed = parse_file(path).checked(lambda row: "an a" if row["prompt"] == "a" else "")
    assert [place for place, _ in parsed.bad] == ["1", "2", *map(str, range(4, 12))]
    assert texts(parsed.rows) == ["b"]
    assert parsed.places == ("3",)


def test_every_bad_line_of_a_csv_is_named(tmp_path):
    path = tmp_path / "set.csv"
    path.write_text('prompt,tag\na dog,x\n"a cat, two\nlines",y\na,b,c\n\n ,x\nonly one\na bird,\n"open,z\n')
    parsed = parse_file(path)
    assert texts(parsed.rows) == ["a dog", "a cat, two\nlines"]
    assert parsed.empty == 1
    said = dict(parsed.bad)
    assert list(said) == ["5", "7", "8", "9", "10"]
    assert said["5"] == "3 values, but the header names 2 columns"
    assert said["7"] == '"prompt" must be a text that is not empty'
    assert said["9"] == '"tag" must be a text that is not empty'
    assert said["10"].startswith("not CSV: unexpected end of data")


def test_columns_are_found_or_named_and_the_others_kept(tmp_path):
    path = tmp_path / "dpg_bench.csv"
    path.write_text("item_id,Text,Category,note\n7,a dog,animals,\n8,a cat,animals,grey\n")
    assert parse_file(path).rows == (
        {"tag": "animals", "prompt": "a dog", "item_id": "7"},
        {"tag": "animals", "prompt": "a cat", "item_id": "8", "note": "grey"},
    )
    named = parse_file(path, column="Category", tag_column="item_id")
    assert [(row["tag"], row["prompt"]) for row in named.rows] == [("7", "animals"), ("8", "animals")]


@pytest.mark.parametrize(
    ("content", "columns", "says"),
    [
        ("a,b\n1,2\n", {}, "expected one column named prompt, prompts, caption.*found a, b; .*--column NAME"),
        ("prompt,caption\n1,2\n", {}, "found prompt, caption"),
        ("prompt\n1\n", {"column": "Prompt"}, "expected a column 'Prompt'; found prompt"),
        ("prompt,tag,category\n1,2,3\n", {}, "--tag-column NAME"),
        ("prompt,prompt\n1,2\n", {}, "names a column twice"),
        ("", {}, "found none"),
        ('"prompt\n', {}, "line 1: not CSV"),
        ("prompt\na\n\xff\n", {}, "line 3: not UTF-8"),
        ("prompt\n", {}, "the prompt file is empty"),
    ],
)
def test_a_csv_that_cannot_be_read(tmp_path, content, columns, says):
    path = tmp_path / "set.csv"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=says):
        parse_file(path, **columns).all_or_error()


def test_paths_that_are_no_prompt_files(tmp_path):
    (tmp_path / "set.txt").write_text("a dog\n\n\n")
    assert parse_file(tmp_path / "set.txt").empty == 2
    with pytest.raises(ValueError, match=r"only a \.csv file has columns"):
        parse_file(tmp_path / "set.txt", column="prompt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no prompts"):
        parse_file(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="no such prompt file"):
        parse_file(tmp_path / "gone.csv")
    with pytest.raises(ValueError, match=r"a prompt file is \.jsonl"):
        parse_file(tmp_path / "set.parquet")
