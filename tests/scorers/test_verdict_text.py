"""Tests of reading a judge's answer: the one number that it clearly gives as its score, or an error."""

import contextlib
import re
import time

import pytest

from rewards_bridge.scorers.verdict_text import UnreadableError, read_verdict

THINK = "<think>The prompt wants a red circle. A score: 2 would be for nothing at all right, "
CLEAR = [
    ("Score: 8", 8),
    ("**Score:** 8/10", 8),
    ("Score (0-10): 8", 8),
    ("Score [0 to 10] = 8", 8),
    ("Score: (0-10) 8", 8),
    ("Score (out of 10): 8", 8),
    ("Score (0 = bad, 10 = good): 8", 8),
    ("Score: [8]", 8),
    ("Score: (8) 5 circles", 8),
    ("Score: 8 out of 10", 8),
    ("Score: 8 (previous score 3)", 8),
    ("Score: 6. It would deserve a perfect score, 10, if the circle were red.", 6),
    ("Overall score: 4\n\nPer item: colour score: 9, shape score: 10", 4),
    ("Colour score: 9\nShape score: 10\nOverall score: 4", 4),
    ("The scale goes from Score: 0 to Score: 10.\nScore: 7", 7),
    ("Score: 8\n\nScore: 8", 8),
    ("I would say 55. Score: 9", 9),
    ("I rate it so: Score: 8", 8),
    ("1. Score: 8", 8),
    ("| Score | 8 |", 8),
    ("# Score\n\n8/10", 8),
    ("<answer>Score: 8</answer>", 8),
    ("The score for this image is 8 because it is there", 8),
    ("Score: \\boxed{8}", 8),
    ("Score: .5", 0.5),
    ("Score: 7,5", 7.5),
    ("Score: 0.", 0),
    ("Score: -1", -1),
    ("Score \u2013 8", 8),
    ("Score: 8 \u2013 the circle is there", 8),
    ("Score\uff1a\uff18", 8),
    ("Score: 8\u00a0/ 10", 8),
    ("8", 8),
    ("**8/10**", 8),
    ('{"score": 7, "reason": "blue"}', 7),
    ('```json\n{"score": 7, "reason": "Score: 3 would be blue"}\n```', 7),
    ('Here:\n```json\n{"Overall score": "6/10"}\n```\nThe score: 3 is for another', 6),
    (THINK + "so maybe higher.</think>\n\nScore: 5", 5),
    ("so maybe Score: 2</think>Score: 5", 5),
    ("[THINK]Score: 2[/THINK]Score: 5", 5),
    ("<|channel|>analysis<|message|>Score: 2<|end|><|channel|>final<|message|>Score: 6", 6),
]
UNCLEAR = [
    "",
    "Score: eight",
    "Score: 4/5",
    "4/5",
    "Score: 8/100",
    "Score: 5 out of 5",
    "Score: 8 % of what was asked for is there",
    "Score: 8 percent",
    "Score: 7-8",
    "Score: 7 \u2013 8",
    "Score: 7 to 8",
    "Score: 7 or 8",
    "Score: 8, 9",
    "Score: 1 0",
    "Score: 1,000",
    "Score: 8.5.2",
    "Score: 7\u00bd",
    "Score: 8\u00b2",
    "Score: 8+",
    "Score: ~8",
    "Score: 8:10",
    "Score 1: 7, Score 2: 9",
    "Score: 0, no: Score: 1",
    "Score: 3\nScore: 8",
    "Score:\n\n1. The circle is blue",
    "I'm sorry, but I can't help with that. Score: N/A",
    "The score would be 8 if it were red",
    "Colour score: 9",
    "Underscore: 8",
    "The last one had a score: 3",
    THINK + "and a score: 10 only if everything is there",
    "Score: 5 <think>or rather",
    "<|channel|>analysis<|message|>Score: 2",
    '{"score": 3, "score": 7}',
    '{"score": true}',
    '{"score": null}',
    '{"rating": 7}',
    '{"score": 1' + "0" * 400 + "}",
]


@pytest.mark.parametrize(("answer", "number"), CLEAR)
def test_a_clear_answer_is_read_as_a_person_reads_it(answer, number):
    assert read_verdict(answer, 10.0) == number


@pytest.mark.parametrize("answer", UNCLEAR)
def test_an_unclear_answer_is_not_guessed_at(answer):
    with pytest.raises(UnreadableError):
        read_verdict(answer, 10.0)


def test_a_pattern_reads_what_another_template_asks_for():
    pattern = re.compile(r"(?i)rating: (\S+) stars")
    assert read_verdict("<think>Rating: 1 stars</think>Rating: 4,5 stars", 5.0, pattern) == 4.5
    for answer in ["Rating: 4 stars or Rating: 5 stars", "Rating: many stars", "Score: 3"]:
        with pytest.raises(UnreadableError):
            read_verdict(answer, 5.0, pattern)
    with pytest.raises(UnreadableError):
        read_verdict("Rating 12", 5.0, re.compile(r"Rating (\d)"))


@pytest.mark.parametrize(
    "answer",
    [
        "Score" + " " * 10**6,
        "score " * 3300,
        "<think>" * 10**5,
        "```{" * 4900,
        "Score: " + "1" * 19_000,
        "Score (" + "1-" * 9000,
    ],
)
def test_no_answer_takes_long(answer):
    begun = time.process_time()
    with contextlib.suppress(UnreadableError):
        assert read_verdict(answer, 10.0) > 10
    assert time.process_time() - begun < 2
