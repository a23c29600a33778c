"""Tests of scorers' return values: every common form is accepted, others are refused with the expected form."""

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from rewards_bridge.answers import AnswerError, encode_reply
from rewards_bridge.scorers.base import Scores


@dataclass
class Tensor:
    """A stand-in for a torch tensor with a gradient, in bfloat16, on a GPU, which numpy cannot read directly."""

    values: list[float]
    steps: tuple[str, ...] = ()

    def __array__(self, *_: Any) -> np.ndarray:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def detach(self) -> "Tensor":
        return Tensor(self.values, (*self.steps, "detach"))

    def cpu(self) -> "Tensor":
        return Tensor(self.values, (*self.steps, "cpu"))

    def double(self) -> "Tensor":
        return Tensor(self.values, (*self.steps, "double"))

    def numpy(self) -> np.ndarray:
        assert self.steps == ("detach", "cpu", "double")
        return np.array(self.values)


@pytest.mark.parametrize(
    "score",
    [
        [0.5, 1],
        (0.5, np.float64(1)),
        np.array([0.5, 1]),
        np.array([0.5, 1], ml_dtypes.bfloat16),
        Tensor([0.5, 1.0]),
    ],
)
def test_numbers_of_many_kinds_are_taken(score):
    reply = encode_reply(7, Scores(score, {"x": [True, False]}, ["", "why"]))
    assert list(reply.score) == [0.5, 1]
    assert list(reply.raw["x"].values) == [1, 0]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ([0.5, 1.0], "must return rewards_bridge.scorers.base.Scores; found list"),
        (None, "found NoneType"),
        (
            Scores(np.zeros((2, 1)), {}, ["", ""]),
            r"score must be f32\[B\], one number per image; found shape \(2, 1\)",
        ),
        (Scores(np.float32(0.5), {}, ["", ""]), r"found shape \(\)"),
        (Scores([0.5, None], {}, ["", ""]), r"found score\[1\] = None"),
        (Scores(["0.5", "1"], {}, ["", ""]), r"found score\[0\] = .*'0.5'"),
        (Scores([[1], [2, 3]], {}, ["", ""]), "one number per image; setting an array element"),
        (Scores([1j, 2], {}, ["", ""]), r"found score\[0\] = .*1j"),
        (Scores([10**400, 2], {}, ["", ""]), "one number per image; int too large"),
        (Scores([0.5, 1e39], {}, ["", ""]), r"score\[1\] = 1e\+39 does not fit into float32"),
        (Scores([0.5, 1], {"x": np.zeros((2, 2))}, ["", ""]), r"raw\['x'\] must be .* shape \(2, 2\)"),
        (Scores([0.5, 1], {3: [1, 2]}, ["", ""]), "name of a raw value must be .*; found 3"),
        (Scores([0.5, 1], [[1, 2]], ["", ""]), "raw must be a dict of arrays, .*; found list"),
        (Scores([0.5, 1], {}, None), "reasons must be a list of texts, .* found NoneType"),
        (Scores([0.5, 1], {}, "no"), "found str"),
        (Scores([0.5, 1], {}, ["", 3]), "found one that contains int"),
        (Scores([0.5, 1], {}, ["x" * 2**24, ""]), r"1677723\d of at most 16777216 bytes; shorten its texts"),
    ],
)
def test_other_answers_are_refused_with_what_is_expected(answer, words):
    with pytest.raises(AnswerError, match=words):
        encode_reply(7, answer)


def test_values_that_are_not_finite_are_left_to_the_client_which_keeps_the_images():
    reply = encode_reply(7, Scores([np.nan, -np.inf], {}, ["\ud800", ""]))
    assert np.isnan(reply.score[0])
    assert reply.score[1] == -np.inf
    assert reply.reasons[0] == "?"
