"""The text score by hand: what is asked for, how far what was read is from it, and which prompts cannot be scored."""

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
        ('two\n"lines\nof text"', "lines\nof text"),
        ('typographic “no”, straight "yes"', "yes"),
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
        ("heello", "hello", 0.8),  # one too many, and hello is no part of it
        ("", "hello", 0.0),
        ("goodbye and thanks for all the fish", "hi", 0.0),  # a distance of more than the target counts as all of it
        ("l", "1", 0.0),
        ("ol", "01", 0.0),
        ("0l", "01", 0.5),
        ("abcd", "abxy", 0.5),
        ("ABC", "abcabc", 0.5),
        ("12 3", "1234", 0.75),
        ("STRASSE", "straße", 1 - 2 / 6),  # lower case keeps ß: two edits of six
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
    prompts = ['a sign "A"', "a sign", 'half a "quote', "typographic “quotes”", 'empty ""', 'blank "  "', 'fine "B"']
    problems = text_match.check_prompts(prompts)
    wrong = ["no double quotes", "no partner", "typographic", "nothing between", "nothing between"]
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
