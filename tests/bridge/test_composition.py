"""Tests of compositions of several scorers, replicas of one scorer, and the checks of prompts before training."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import wait

import bridge_helpers as helpers
import numpy as np
import pytest

from rewards_bridge.client import BridgeConfig, RewardsClient
from rewards_bridge.composition import Composition, Part, apart, compose
from rewards_bridge.errors import BadScoresError, BridgeError, DeadlineError, LostError, ScorerError, UsageError
from rewards_bridge.replicas import Replicas
from rewards_bridge.scorers.base import Scores


def part(weight: float, *configs: BridgeConfig) -> Part:
    return Part(weight, configs)


def test_the_weighted_sum_and_everything_raw_by_name():
    two = {"a": part(0.5, helpers.config("Echo")), "b": part(-2.0, helpers.config("First"))}
    images, prompts, metadata = helpers.batch(3, 5)
    with Composition(two) as composition:
        scores = composition.submit(images, prompts, metadata).result(20)
    number, first = np.arange(3, 8, dtype=np.float32), images[:, 0, 0, 0].astype(np.float32)
    np.testing.assert_array_equal(scores.score, 0.5 * number - 2.0 * first)
    assert set(scores.raw) == {"a/score", "a/mean", "a/number", "b/score", "b/raw"}
    np.testing.assert_array_equal(scores.raw["a/number"], number)
    np.testing.assert_array_equal(scores.raw["b/score"], first)
    assert scores.reasons[0] == f"a: seen: {prompts[0]}; b: {prompts[0]}"


def test_one_part_keeps_its_names():
    scores = Scores(np.array([1.0, 2.0], np.float32), {"x": np.zeros(2, np.float32)}, ["p", ""])
    joined = compose({"only": 3.0}, {"only": scores})
    np.testing.assert_array_equal(joined.score, [3.0, 6.0])
    assert joined.score.dtype == np.float32
    assert set(joined.raw) == {"x"}
    assert joined.reasons == ["p", ""]


def test_no_raw_value_takes_the_name_of_another():
    one, two, three = (np.full(2, number, np.float32) for number in (1.0, 2.0, 3.0))
    scores = Scores(one, {"score": two, "raw/score": three}, ["", ""])
    joined = compose({"p": 1.0, "q": 0.0}, {"p": scores, "q": Scores(three, {}, ["", ""])})
    named = {name: float(values[0]) for name, values in joined.raw.items()}
    assert named == {"p/score": 1, "p/raw/raw/score": 2, "p/raw/score": 3, "q/score": 3}
    joined = compose({"p": 1.0, "p/q": 0.0}, {"p": Scores(one, {"q/x": two}, []), "p/q": Scores(one, {"x": three}, [])})
    named = {name: float(values[0]) for name, values in joined.raw.items()}
    assert named == {"p/score": 1, "p/q/score": 1, "p/q/x": 2, "raw/p/q/x": 3}
    assert apart({"a": 1, "b": 2}, ("b", "raw/b")) == {"a": 1, "raw/raw/b": 2}


def test_parts_work_at_the_same_time():
    parts = {name: part(1.0, helpers.config("Echo", options={"delay": "1.0"})) for name in "abc"}
    with Composition(parts) as composition:
        begun = time.monotonic()
        composition.submit(*helpers.batch(0, 2)).result(20)
        assert time.monotonic() - begun < 2.5  # one after the other they take 3 s


def test_a_part_that_raises_is_the_error_of_the_whole():
    parts = {"good": part(1.0, helpers.config("Echo")), "bad": part(1.0, helpers.config("Raise"))}
    with Composition(parts) as composition, pytest.raises(ScorerError, match="the judge is confused"):
        composition.submit(*helpers.batch(0, 2)).result(20)


def test_a_part_that_cannot_be_loaded_leaves_no_process_behind():
    before = set(helpers.children_of(os.getpid()))
    parts = {"good": part(1.0, helpers.config("Echo")), "bad": part(1.0, helpers.config("FailsToLoad"))}
    with pytest.raises(BridgeError, match="no weights in /nowhere"):
        Composition(parts)
    assert set(helpers.children_of(os.getpid())) <= before


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_refused(weight):
    with pytest.raises(UsageError, match=r"finite numbers; found a: (nan|inf)"):
        Composition({"a": part(weight, helpers.config("Echo"))})


def test_nothing_to_compose_is_refused():
    with pytest.raises(UsageError, match="at least one scorer"):
        Composition({})
    with pytest.raises(UsageError, match="at least one replica"):
        Composition({"a": part(1.0)})


def test_replicas_share_the_load(tmp_path):
    """No replica has answered when the batches are distributed, so both get equally many."""
    gate = tmp_path / "gate"
    with Replicas([helpers.config("Gate", options={"gate": str(gate)})] * 2) as replicas:
        futures = [replicas.submit(*helpers.batch(index, 1)) for index in range(9)]
        gate.touch()
        assert [future.result(20).score[0] for future in futures] == list(range(9))
        assert [stats.batches for stats in replicas.stats()] == [5, 4]


def test_results_of_replicas_come_in_the_order_of_the_batches():
    with Replicas([helpers.config("Echo", options={"delay": "0.05"})] * 3) as replicas:
        futures = [replicas.submit(*helpers.batch(10 * index, 3)) for index in range(12)]
        for index, future in enumerate(futures):
            np.testing.assert_array_equal(future.result(20).score, 10 * index + np.arange(3))


def test_a_replica_that_is_lost_is_left_out_and_its_batches_are_scored_by_the_others():
    """The replica is killed while it is scoring, and no restart is allowed."""
    configs = [helpers.config("Echo", options={"delay": "0.3"}, max_restarts=0)] * 2
    before = set(helpers.children_of(os.getpid()))
    with Replicas(configs) as replicas:
        futures = [replicas.submit(*helpers.batch(index, 1)) for index in range(6)]
        time.sleep(0.1)
        victim = next(iter(set(helpers.children_of(os.getpid())) - before))
        os.kill(victim, signal.SIGKILL)
        assert [future.result(20).score[0] for future in futures] == [0, 1, 2, 3, 4, 5]
        later = [replicas.submit(*helpers.batch(index, 1)) for index in range(2)]
        assert [future.result(20).score[0] for future in later] == [0, 1]


def test_when_the_last_replica_is_lost_every_batch_says_why():
    with Replicas([helpers.config("Crash", max_restarts=0)] * 2) as replicas:
        future = replicas.submit(*helpers.batch(0, 1, crash=True))
        with pytest.raises(BridgeError, match="the card is on fire"):
            future.result(20)


def test_a_replica_that_hangs_is_left_out_after_its_deadline(tmp_path):
    flag = {"flag": str(tmp_path / "flag")}  # the second replica that gets the batch answers it
    with Replicas([helpers.config("Hang", options=flag, deadline_s=1.0, max_restarts=0)] * 2) as replicas:
        scores = replicas.submit(*helpers.batch(5, 1, hang=True)).result(20)
    assert scores.score[0] == 5


def test_an_error_of_the_scorer_is_not_tried_on_another_replica():
    with Replicas([helpers.config("Raise")] * 2) as replicas:
        with pytest.raises(ScorerError):
            replicas.submit(*helpers.batch(0, 1)).result(20)
        assert sum(stats.batches for stats in replicas.stats()) == 0
        with pytest.raises(ScorerError):  # and none is left out
            replicas.submit(*helpers.batch(0, 1)).result(20)


def test_a_replica_whose_answer_cannot_be_used_is_not_lost():
    with Replicas([helpers.config("Wrong")] * 2) as replicas:
        for wish, error in [("no Scores", ScorerError), ("nan", BadScoresError)]:
            with pytest.raises(error):
                replicas.submit(*helpers.batch(0, 5, wish=wish)).result(20)
        assert replicas._lost == {}
        replicas.submit(*helpers.batch(0, 5)).result(20)
        assert sum(stats.batches for stats in replicas.stats()) == 2


def test_batches_after_the_last_replica_is_lost_say_why_too():
    with Replicas([helpers.config("Crash", max_restarts=0)] * 2) as replicas:
        for _ in range(3):
            with pytest.raises(LostError, match="the card is on fire"):
                replicas.submit(*helpers.batch(0, 1, crash=True)).result(20)
        with pytest.raises(LostError, match="the card is on fire"):
            replicas.check(["x"], [{}])


def test_closing_fails_what_is_not_scored():
    replicas = Replicas([helpers.config("Echo", options={"delay": "0.5"})] * 2)
    futures = [replicas.submit(*helpers.batch(0, 1)) for _ in range(12)]
    replicas.close()
    replicas.close()
    wait(futures, 20)
    errors = [future.exception() for future in futures]
    assert any(isinstance(error, BridgeError) for error in errors)
    assert not any(isinstance(error, DeadlineError) for error in errors)


def test_prompts_are_checked_by_the_scorer_in_its_own_process():
    numbers = [index for index in range(2105) if index != 13]
    metadata = [{"number": number} for number in numbers]
    with RewardsClient(helpers.config("Picky")) as client:
        problems = client.check([""] * len(numbers), metadata)
        assert problems == {index: f"{number} is odd" for index, number in enumerate(numbers) if number % 2}
        assert client.check([], []) == {}
        with pytest.raises(ScorerError, match="LookupError: thirteen"):
            client.check([""], [{"number": 13}])
        with pytest.raises(ValueError, match="cannot be sent"):
            client.check([""], [{"number": object()}])
        with pytest.raises(ScorerError, match="LookupError: twenty-six"):
            client.notes([""], [{"number": 26}])
        assert client.check([""], [{"number": 26}]) == {}, "a check does not request notes"
        evens = [{"number": number} for number in range(30, 2500, 2)]
        expected = dict.fromkeys(range(1, len(evens), 2), "divisible by four")
        assert client.notes([""] * len(evens), evens) == expected
    with Composition({"a": part(1.0, helpers.config("Picky")), "b": part(1.0, helpers.config("Echo"))}) as both:
        assert both.check(["x"] * 2, [{"number": 2}, {"number": 3}]) == {1: "a: 3 is odd"}
        notes = both.notes(["x"] * 2, [{"number": 2}, {"number": 4}])
        assert notes == {"a": {1: "divisible by four"}, "b": {}}
