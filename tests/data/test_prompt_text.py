"""Prompt files as other programs write them: encodings, line endings, invisible characters, tables, comments."""

import json

import pytest

from udm_grpo.data.prompt_files import parse_file
from udm_grpo.data.prompt_text import clean, decode, is_blank, lines_of, same_text, undecodable

TEXTS = ["a photo of a red circle", "three stars, “very” blue", "进口品"]


def read(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return parse_file(path)


def prompts(parsed):
    return [row["prompt"] for row in parsed.rows]


@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(
    ("encoding", "mark"),
    [
        ("utf-8", b""),
        ("utf-8-sig", b""),
        ("utf-16", b""),
        ("utf-16-le", b""),
        ("utf-16-be", b""),
        ("utf-16-be", b"\xfe\xff"),
        ("utf-32", b""),
        ("utf-32-le", b""),
        ("utf-32-be", b""),
        ("utf-32-be", b"\x00\x00\xfe\xff"),
    ],
)
def test_encodings_and_line_ends_of_every_kind_are_read_alike(tmp_path, encoding, mark, ends):
    objects = [json.dumps({"prompt": text}, ensure_ascii=False) for text in TEXTS]
    table = ["prompt;tag", *(f'"{text}";x' for text in TEXTS)]
    for name, lines in (
        ("a.txt", TEXTS),
        ("a.jsonl", objects),
        ("a.json", ["[", ",".join(objects), "]"]),
        ("a.csv", table),
    ):
        for last in ("", ends):
            parsed = read(tmp_path / name, mark + (ends.join(lines) + last).encode(encoding))
            assert prompts(parsed) == TEXTS, name
            assert (parsed.bad, parsed.empty) == ((), 0)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "A.TXT").write_bytes(mark + ends.join(TEXTS).encode(encoding))
    assert prompts(parse_file(tmp_path / "folder")) == [" ".join(TEXTS)]


def test_bytes_of_no_known_encoding_are_named_with_their_line(tmp_path):
    parsed = read(tmp_path / "a.txt", b"a dog\r\na sign \x93OPEN\x94\r\n")
    assert prompts(parsed) == ["a dog"]
    assert parsed.bad == (
        ("2", "not UTF-8 text: byte 0x93 (“ in Windows-1252) at character 8; save the file as UTF-8"),
    )
    for name, content in (("a.csv", b"prompt\na\n\x93\n"), ("a.json", b'["\x93"]')):
        with pytest.raises(ValueError, match="not UTF-8 text: byte 0x93"):
            read(tmp_path / name, content)
    for content in ("a dog".encode("utf-16")[:-1], b"\xff\xfe\x00\x00a\x00\x00\x00\x00\x00\x11\x00"):
        with pytest.raises(ValueError, match=r"a\.txt: invalid UTF-(16|32) text"):
            read(tmp_path / "a.txt", content)
    assert decode(b"") == ""
    assert undecodable(decode(b"caf\xc3\xa9")) == ""


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("a\u00a0red  circle", "a red  circle"),
        ("a red\u200b cir\u00adcle\ufeff", "a red circle"),
        ("a\u2028red \u0085 circle\r\nof two lines\n", "a red circle\nof two lines"),
        ("\ta\tred\u3000circle ", "a red\u3000circle"),
        ("\U0001f469\u200d\U0001f680 and ❤\ufe0f", "\U0001f469\u200d\U0001f680 and ❤\ufe0f"),
        ("cafe\u0301", "cafe\u0301"),
        ("\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645", "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645"),
    ],
)
def test_a_prompt_is_read_as_it_is_seen(tmp_path, text, seen):
    assert clean(text) == seen
    parsed = read(tmp_path / "a.jsonl", json.dumps({"prompt": text, "tag": text}))
    assert [(row["prompt"], row["tag"]) for row in parsed.rows] == [(seen, seen)]
    assert parsed.cleaned == (seen != text.replace("\r\n", "\n").strip())


def test_lines_of_invisible_characters_are_empty(tmp_path):
    blank = ["\u200b", "\ufeff", "\u2060\u200f", "\u3164", "\u00a0", "\u2800", " \u3000\t", "\u200d\ufe0f", "\u2028"]
    assert all(map(is_blank, blank))
    assert not any(map(is_blank, ("a", "。", "\u200ba", "\U0001f469\u200d")))
    parsed = read(tmp_path / "a.txt", "\n".join(["a dog", *blank, "a cat"]))
    assert (prompts(parsed), parsed.places, parsed.empty) == (["a dog", "a cat"], ("1", "11"), len(blank))
    assert read(tmp_path / "a.jsonl", '{"prompt": "\u200b"}').bad == (
        ("1", '"prompt" must be a text that is not empty'),
    )


@pytest.mark.parametrize("character", ["\x00", "\x07", "\x0b", "\x1b", "\x1a", "\x7f", "\x9b"])
def test_control_characters_are_refused_by_line(tmp_path, character):
    for name, lines in (
        ("a.txt", ["a dog", f"a{character}b"]),
        ("a.jsonl", ['{"prompt": "a"}', json.dumps({"prompt": f"a{character}b"})]),
        ("a.csv", ["prompt", f"a{character}b"]),
    ):
        ((place, reason),) = read(tmp_path / name, "\n".join(lines)).bad
        assert place == "2"
        assert f"the control character U+{ord(character):04X}" in reason
        assert "at character 2" in reason


def test_mixed_line_ends_are_refused_by_line(tmp_path):
    parsed = read(tmp_path / "a.txt", "a dog\r\na cat\ra bird\n")
    assert prompts(parsed) == ["a dog"]
    assert "carriage return within the line" in dict(parsed.bad)["2"]
    assert (lines_of(""), lines_of("\n"), lines_of("a\n \n")) == ([], [""], ["a", " "])


def test_comments_are_passed_over_and_counted(tmp_path):
    parsed = read(tmp_path / "a.txt", "\ufeff# my prompts\n#\n#1 dad mug\n#art\na # b\n")
    assert (prompts(parsed), parsed.comments) == (["#1 dad mug", "#art", "a # b"], 2)
    assert any("comment lines" in remark and remark.endswith(": 2") for remark in parsed.remarks())
    parsed = read(tmp_path / "a.jsonl", '# mine\n// too\n{"prompt": "a"}\n')
    assert (prompts(parsed), parsed.comments, parsed.places) == (["a"], 2, ("3",))
    parsed = read(tmp_path / "a.csv", "prompt\n# mine\na\n")
    assert (prompts(parsed), parsed.comments) == (["a"], 1)


@pytest.mark.parametrize(
    "content", ['["a", "b"]', '[\n"a",\n"b"\n]', '{"prompt": "a"}\n{"prompt": "b"}', '{\n"prompt": "a"\n}']
)
def test_json_in_a_text_file_is_refused_and_read_under_its_own_name(tmp_path, content):
    with pytest.raises(ValueError, match=r"a\.txt: holds JSON, .* suffix \.json"):
        read(tmp_path / "a.txt", content)
    assert prompts(read(tmp_path / "a.jsonl", content)) in (["a", "b"], ["a"])
    assert prompts(read(tmp_path / "b.txt", "[abstract] a cat\n{red} dog")) == ["[abstract] a cat", "{red} dog"]


def test_objects_over_several_lines_are_read_and_bad_ones_named_by_their_first(tmp_path):
    lines = json.dumps({"prompt": "a", "tag": "x"}, indent=1) + "\n\n" + json.dumps({"prompt": 3, "tag": "y"}, indent=1)
    parsed = read(tmp_path / "a.jsonl", lines)
    assert (prompts(parsed), parsed.places) == (["a"], ("1",))
    assert parsed.bad == (("6", '"prompt" must be a text that is not empty'),)
    broken = read(tmp_path / "a.jsonl", '{"prompt": "a"}\n{"prompt": "b"\n{"prompt": "c"}')
    assert prompts(broken) == ["a", "c"]
    assert [place for place, _ in broken.bad] == ["2"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "first", "prompt": "second"}', "the key 'prompt' occurs twice"),
        ('{"prompt": "a", "weight": NaN}', "NaN is not a JSON number"),
        ('{"prompt": "a", "weight": -Infinity}', "-Infinity is not a JSON number"),
        ('{"prompt": "a", "big": [{"x": 1e999}]}', "1e999 is not a JSON number"),
    ],
)
def test_json_that_readers_take_differently_is_refused(tmp_path, line, said):
    ((place, reason),) = read(tmp_path / "a.jsonl", f'{{"prompt": "b"}}\n{line}').bad
    assert place == "2"
    assert said in reason
    with pytest.raises(ValueError, match=r"a\.json: .*" + said):
        read(tmp_path / "a.json", f"[{line},\n{line}]")


def test_tables_are_read_by_the_mark_that_divides_them(tmp_path):
    for name, mark in (("a.csv", ","), ("a.csv", ";"), ("a.csv", "\t"), ("a.tsv", "\t"), ("A.CSV", ";")):
        parsed = read(
            tmp_path / name,
            f"Prompt{mark}Category\na dog, red{mark}x\n".replace("dog,", "dog" if mark == "," else "dog,"),
        )
        assert [row["tag"] for row in parsed.rows] == ["x"]
    assert parse_file(tmp_path / "A.CSV", column="Category").rows == (
        {"tag": "untagged", "prompt": "x", "Prompt": "a dog, red"},
    )
    with pytest.raises(ValueError, match=r"every line has 3 values separated by tabs.*suffix \.tsv"):
        read(tmp_path / "a.txt", "0\ta dog\tx\n1\ta cat\ty\n")
    assert prompts(read(tmp_path / "a.txt", "a\tdog\na cat\n")) == ["a dog", "a cat"]


def test_texts_that_differ_in_case_and_encoding_are_the_same():
    assert same_text("Café  in\u00a0\uff32\uff25\uff24") == same_text("cafe\u0301 in red")
