"""Tests of the text score: targets of prompts, scores computed by hand, and prompts that cannot be scored."""

import pytest

from rewards_bridge.scorers import text_match


@pytest.mark.parametrize(
    ("prompt", "target"),
    [
        ('a sign that says "Hello World" in neon', "Hello World"),
        ('"7"', "7"),
        ('first "one" then "two"', "one"),
        ('an unclosed one follows "so": "', "so"),
        ("it's \"Ben's Café\"", "Ben's Café"),
        ('two\n"lines\nof text"', "lines of text"),
        ('typographic “no”, straight "yes"', "yes"),
        ("a “typographic” one", "typographic"),
        ("„unten“", "unten"),
        ("»Guillemets« und «autres»", "Guillemets"),
        ("写着「开」的招牌", "开"),
        ("full-width \uff02quotes\uff02", "quotes"),
        ('mixed “marks"', "marks"),
        ('a 24" monitor that shows "HELLO"', "HELLO"),
        ('5\' 10" tall, with a card "YES"', "YES"),
        ('the number "24" on a door', "24"),
        ('only 7"HELLO"', "HELLO"),
        (r"escaped \"SALE TODAY\" twice", "SALE TODAY"),
        ('"doubled ""SALE TODAY"" in a cell"', "SALE TODAY"),
        ('doubled ""SALE"" outside', "SALE"),
        ("as HTML: &quot;OPEN&quot;", "OPEN"),
        ('nothing in "", then "X"', "X"),
        ('"DON\u2019T PANIC"', "DON'T PANIC"),
        ('"CAFE\u0301"', "CAFÉ"),
        ('"\uff33\uff21\uff2c\uff25 \uff15\uff10\uff05"', "SALE 50%"),
        ('"RO\u00adU\u200bTE\u00a066"', "ROUTE 66"),
        ('"A\u2013Z… ﬁn"', "A-Z... fin"),
    ],
)
def test_the_target_is_between_the_first_pair_of_double_quotes(prompt, target):
    assert text_match.target_text(prompt) == target


@pytest.mark.parametrize(
    ("read", "target", "score"),
    [
        ("HELLO", "hello", 1.0),
        ("h e l l o", "Hello", 1.0),
        ("hello", "H e\tl\u3000lo", 1.0),
        ("say hello world", "hello", 1.0),  # the target is part of it
        ("hel lo", "lol", 0.0),  # four edits, of which three count
        ("helo", "hello", 0.8),  # one letter is missing
        ("hallo", "hello", 0.8),  # one is another
        ("h3ll0", "hello", 0.6),
        ("heello", "hello", 0.8),  # one too many, and hello is not part of it
        ("", "hello", 0.0),
        ("goodbye and thanks for all the fish", "hi", 0.0),  # a distance of more than the target counts as all of it
        ("l", "1", 0.0),
        ("ol", "01", 0.0),
        ("0l", "01", 0.5),
        ("abcd", "abxy", 0.5),
        ("ABC", "abcabc", 0.5),
        ("12 3", "1234", 0.75),
        ("STRASSE", "straße", 1.0),
        ("Straße", "STRASSE", 1.0),
        ("İZMİR", "izmir", 1.0),
        ("IZMIR", "İzm\u0131r", 1.0),
        ("İZMİK", "İZMİR", 0.8),  # five letters, not seven
        ("DON'T", "don\u2019t", 1.0),
        ("don\u2019t", "DON'T", 1.0),
        ("\uff33\uff21\uff2c\uff25", "sale", 1.0),
        ("CAFE\u0301", "café", 1.0),
        ("ΟΔΟΣ", "οδος", 1.0),
        ("A-Z", "a\u2013z", 1.0),
        ("WAIT...", "wait…", 1.0),
        ('say "no"', "say “no”", 1.0),
        ("❤️", "❤", 1.0),
    ],
)
def test_scores_by_hand(read, target, score):
    assert text_match.match(read, target) == pytest.approx(score, abs=1e-12)


@pytest.mark.parametrize(
    ("read", "target", "score"), [("17", "7", 0.0), ("say hi", "hi", 0.0), ("1234", "123", 2 / 3), ("12", "12", 1.0)]
)
def test_what_is_read_beside_the_target_may_count(read, target, score):
    assert text_match.match(read, target, extra_is_free=False) == pytest.approx(score, abs=1e-12)


def test_exact_is_the_target_and_nothing_else():
    assert text_match.is_exact("He llo", "hello")
    assert not text_match.is_exact("hello!", "hello")
    assert text_match.match("hello!", "hello") == 1.0


def test_lines_are_joined_in_order():
    assert text_match.join_lines([" NEW", "", "YORK "]) == "NEW YORK"
    assert text_match.join_lines([]) == ""
    assert text_match.match(text_match.join_lines(["NEW", "YORK"]), "new york") == 1.0


def test_all_bad_prompts_are_listed_with_their_numbers():
    prompts = ['a sign "A"', "a sign", 'half a "quote', "single 'quotes'", 'empty ""', 'blank "\u200b "', 'fine "B"']
    problems = text_match.check_prompts(prompts)
    wrong = ["no double quotes", "is unpaired", "no double quotes", "is empty", "is empty"]
    assert [problem.partition(":")[0] for problem in problems] == [f"prompt {number}" for number in (2, 3, 4, 5, 6)]
    for problem, words, prompt in zip(problems, wrong, prompts[1:6], strict=True):
        assert words in problem
        assert repr(prompt) in problem
        assert 'straight double quotes (U+0022), as in: a sign that says "OPEN"' in problem
    assert text_match.check_prompts(['"A"', '"B"']) == []


def test_a_prompt_without_a_target_is_no_score():
    with pytest.raises(ValueError, match="no double quotes"):
        text_match.target_text("a cat")
    with pytest.raises(ValueError, match="is empty"):
        text_match.match("anything", " ")


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ('first "one" then "two"', "2 texts are in quotes and only the first is looked for"),
        ('typographic “no”, straight "yes"', "2 texts are in quotes"),
        ('a 24" monitor that shows "HELLO"', "after a digit is read as the symbol for inches"),
        ('an unclosed one follows "so": "', "a double quote is unpaired"),
        ('"HELLO and "BYE"', "a double quote is unpaired"),
        ('nothing in "", then "X"', "a pair of quotes is empty"),
        (r"escaped \"SALE\" twice", "its quotes are escaped"),
        ('"doubled ""SALE"" in a cell"', "its quotes are doubled"),
        ('a heart "❤"', "text readers rarely recognise ❤"),
    ],
)
def test_a_doubtful_target_is_said_with_its_reason(prompt, reason):
    said = text_match.ambiguity(prompt)
    assert reason in said
    assert said.endswith(f"the text that is looked for is {text_match.target_text(prompt)!r}")


def test_plain_prompts_are_not_doubtful_and_all_texts_can_be_looked_for():
    assert [text_match.ambiguity(prompt) for prompt in ('a "B"', "a “B”", '"Happy 40"', 'the Smiths\' "B"')] == [""] * 4
    assert text_match.target_text('"one" then "two"', every=True) == "one two"
    assert text_match.ambiguity('"one" then "two"', every=True) == ""
