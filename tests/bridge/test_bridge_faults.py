"""Tests of scorers that crash, hang, raise or return nonsense, in real processes: an error or the right score."""

from __future__ import annotations

import errno
import json
import time

import bridge_helpers as helpers
import numpy as np
import pytest
from PIL import Image

from rewards_bridge import verdicts
from rewards_bridge.client import BadScoresError, BridgeError, DeadlineError, LostError, RewardsClient, ScorerError
from rewards_bridge.protocol.messages import Batch
from rewards_bridge.scorers.base import Scores


@pytest.mark.parametrize("how", ["exit", "kill"])
def test_a_crash_in_mid_batch_is_survived(tmp_path, how, caplog):
    options = {"flag": str(tmp_path / "crashed"), "how": how}
    with RewardsClient(helpers.config("Crash", options=options)) as client:
        futures = [client.submit(*helpers.batch(10 * i, 5, **({"crash": 1} if i == 2 else {}))) for i in range(6)]
        for i, future in enumerate(futures):
            np.testing.assert_array_equal(future.result(20).score, np.arange(10 * i, 10 * i + 5))
        assert client.stats().restarts == 1
    assert (tmp_path / "crashed").exists()
    (warning,) = caplog.messages
    assert "restarting it, 1 of 1" in warning
    assert ("exit code 7" if how == "exit" else "SIGKILL") in warning
    assert "the card is on fire" in warning


def test_a_scorer_that_always_crashes_is_given_up(caplog):
    begun = time.monotonic()
    with RewardsClient(helpers.config("Crash", max_restarts=2)) as client:
        assert client.submit(*helpers.batch(0, 2)).result(20).score[1] == 1
        futures = [client.submit(*helpers.batch(i, 2, crash=True)) for i in range(4)]
        for future in futures:
            with pytest.raises(BridgeError, match="exit code 7") as caught:
                future.result(20)
            assert "the card is on fire" in str(caught.value)
            assert "gave up after 2 restarts" in str(caught.value)
        with pytest.raises(BridgeError, match="gave up"):
            client.submit(*helpers.batch(0, 2)).result(20)
    assert len(caplog.messages) == 2
    assert time.monotonic() - begun < 15


def test_a_restart_that_fails_is_not_the_last_one(tmp_path, caplog):
    config = helpers.config("FailsToLoadAgain", options={"folder": str(tmp_path)}, max_restarts=2)
    with RewardsClient(config) as client:
        futures = [client.submit(*helpers.batch(10 * i, 5, **({"crash": 1} if i == 1 else {}))) for i in range(4)]
        for i, future in enumerate(futures):
            np.testing.assert_array_equal(future.result(20).score, np.arange(10 * i, 10 * i + 5))
        assert client.stats().restarts == 2
    first, second = caplog.messages
    assert "the card is on fire" in first
    assert "the card's memory is not free yet" in second
    assert "restarting it, 2 of 2" in second


def test_a_restart_that_always_fails_is_given_up_with_its_reason(tmp_path):
    config = helpers.config("FailsToLoadAgain", options={"folder": str(tmp_path)}, max_restarts=1)
    with RewardsClient(config) as client:
        for _ in range(2):
            with pytest.raises(LostError, match=r"(?s)memory is not free yet.*gave up after 1 restarts"):
                client.submit(*helpers.batch(0, 2, crash=1)).result(20)


def test_a_scorer_slower_than_half_its_deadline_is_not_killed():
    """The scorer holds two batches at a time, so each one returns 1.6 s after it was sent; the deadline is 1.2 s."""
    with RewardsClient(helpers.config("Echo", options={"delay": "0.8"}, deadline_s=1.2)) as client:
        futures = [client.submit(*helpers.batch(i, 2)) for i in range(4)]
        assert [future.result(20).score[0] for future in futures] == [0, 1, 2, 3]
        assert client.stats().restarts == 0


def test_a_hanging_scorer_is_killed_and_the_batch_scored_again(tmp_path):
    config = helpers.config("Hang", options={"flag": str(tmp_path / "hung")}, deadline_s=1.0)
    with RewardsClient(config) as client:
        futures = [client.submit(*helpers.batch(i, 3, **({"hang": 1} if i == 1 else {}))) for i in range(4)]
        for i, future in enumerate(futures):
            np.testing.assert_array_equal(future.result(20).score, [i, i + 1, i + 2])
        assert client.stats().restarts == 1


def test_a_scorer_that_always_hangs_is_given_up():
    with RewardsClient(helpers.config("Hang", deadline_s=0.7)) as client:
        begun = time.monotonic()
        expected = r"finished nothing within deadline_s, 0.7 s.*\n.*\n.*gave up after 1 restart"
        with pytest.raises(DeadlineError, match=expected):
            client.submit(*helpers.batch(0, 1, hang=True)).result(20)
        assert time.monotonic() - begun < 2 * 0.7 + 5


def test_a_scorer_that_raises_shows_its_own_traceback_and_lives():
    with RewardsClient(helpers.config("Raise")) as client:
        for _ in range(2):
            with pytest.raises(ScorerError) as caught:
                client.submit(*helpers.batch(5, 2)).result(20)
        text = str(caught.value)
        assert "Traceback (most recent call last)" in text
        assert "in _look_closely" in text
        assert "bridge_scorers.py" in text
        assert "LookupError: the judge is confused by 'prompt 5'" in text
        assert client.stats().restarts == 0


def test_a_traceback_longer_than_grpc_likes_still_arrives():
    with (
        RewardsClient(helpers.config("Raise", options={"length": "100000"})) as client,
        pytest.raises(ScorerError) as caught,
    ):
        client.submit(*helpers.batch(5, 2)).result(20)
    assert "in _look_closely" in str(caught.value)
    assert "characters left out" in str(caught.value)
    assert str(caught.value).endswith("at the end\n")


@pytest.mark.parametrize(
    ("wish", "indexes", "text"),
    [
        ("nan", [1, 3], "image 3 ('prompt 103'): score = nan"),
        ("inf", [0], "image 0 ('prompt 100'): score = -inf"),
        ("raw nan", [0, 1, 2, 3, 4], "image 4 ('prompt 104'): raw['raw'] = nan"),
        ("too few", [0, 1, 2, 3, 4], "image 0 ('prompt 100'): 4 score for 5 images"),
        ("raw too few", [0, 1, 2, 3, 4], "4 raw['raw'] for 5 images"),
        ("too few reasons", [0, 1, 2, 3, 4], "4 reasons for 5 images"),
        ("too few details", [0, 1, 2, 3, 4], "1 details for 5 images"),
    ],
)
def test_wrong_answers_name_the_images(wrong_client, wish, indexes, text):
    images, prompts, metadata = helpers.batch(100, 5, wish=wish)
    with pytest.raises(BadScoresError) as caught:
        wrong_client.submit(images, prompts, metadata).result(20)
    error = caught.value
    assert error.indexes == indexes
    assert error.prompts == [prompts[i] for i in indexes]
    assert text in str(error)
    for index, path in zip(indexes, error.kept, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(path)), images[index])


def test_what_is_kept_can_be_read_back(tmp_path):
    folder = tmp_path / "made" / "when needed"
    images, prompts, metadata = helpers.batch(100, 5, wish="nan")
    with RewardsClient(helpers.config("Wrong", kept_images=str(folder))) as client:
        with pytest.raises(BadScoresError, match="made/when needed"):
            client.submit(images, prompts, metadata).result(20)
        assert client.submit(*helpers.batch(100, 5)).result(20).score[4] == 4, "the server continues"
    record = (folder / "kept.jsonl").read_text()
    lines = [json.loads(line, parse_constant=pytest.fail) for line in record.splitlines()]
    assert [line["prompt"] for line in lines] == ["prompt 101", "prompt 103"]
    assert [line["metadata"] for line in lines] == [metadata[1], metadata[3]]
    assert [line["score"] for line in lines] == ["nan", "nan"]
    assert [line["raw"] for line in lines] == [{"raw": 1.0}, {"raw": 3.0}]
    np.testing.assert_array_equal(np.asarray(Image.open(folder / lines[1]["image"])), images[3])


def test_processes_that_number_their_batches_alike_keep_all_images(tmp_path, monkeypatch):
    monkeypatch.setattr(verdicts.time, "strftime", lambda _: "now")
    batch = Batch(np.zeros((1, 8, 8, 3), np.uint8), ["a"], [{}])
    scores = Scores(np.float32([np.nan]), {}, [""])
    kept = [verdicts.keep_images({0: "nan"}, scores, batch, 0, tmp_path) for _ in range(2)]
    assert len({name for names in kept for name in names}) == len(list(tmp_path.glob("*.png"))) == 2
    assert len((tmp_path / "kept.jsonl").read_text().splitlines()) == 2


def test_another_return_type_is_an_error_that_names_the_expected_one(wrong_client):
    with pytest.raises(ScorerError, match=r"must return .*Scores; found list"):
        wrong_client.submit(*helpers.batch(0, 2, wish="no Scores")).result(20)


def test_a_full_disk_does_not_hide_the_error(tmp_path, monkeypatch):
    def no_space(*_: object) -> list[str]:
        raise OSError(errno.ENOSPC, "No space left on device")

    a_file = tmp_path / "file"
    a_file.touch()
    with RewardsClient(helpers.config("Wrong", kept_images=str(a_file))) as client:
        for reason in ["FileExistsError", "No space left on device"]:
            with pytest.raises(BadScoresError, match=rf"(?s)score = nan.*could not be kept.*{reason}") as caught:
                client.submit(*helpers.batch(0, 5, wish="nan")).result(20)
            assert caught.value.kept == []
            monkeypatch.setattr(verdicts, "keep_images", no_space)


@pytest.mark.parametrize(
    ("scorer", "fields", "match"),
    [
        ("FailsToLoad", {}, "(?s)exit code [12].*Traceback.*no weights in /nowhere"),
        ("NotAScorer", {}, "(?s)exit code 2.*no method score"),
        ("Missing", {}, "(?s)exit code 2.*has no 'Missing'"),
        ("Echo", {"options": {"colour": "red"}}, r"(?s)unexpected keyword argument 'colour'; its options: delay"),
        ("Echo", {"options": {"delay": "long"}}, "(?s)delay='long' is not a valid float"),
        ("Echo", {"environment": {}}, "(?s)No module named 'bridge_scorers'.*PYTHONPATH"),
        ("Echo", {"interpreter": "/no/such/python"}, "cannot start .* interpreter '/no/such/python'"),
        ("Echo", {"interpreter": "/bin/false"}, "could not be started.*exit code 1; it wrote nothing"),
        ("Slow", {"start_timeout_s": 5.0}, "(?s)not serving after 5 s.*is still running.*reading many weights"),
    ],
)
def test_a_process_that_cannot_start_says_why(scorer, fields, match):
    begun = time.monotonic()
    with pytest.raises(BridgeError, match=match):
        RewardsClient(helpers.config(scorer, **fields))
    assert time.monotonic() - begun < 10


def test_a_process_that_is_killed_while_it_loads_is_restarted(tmp_path, caplog):
    with RewardsClient(helpers.config("KilledWhileLoading", options={"folder": str(tmp_path)})) as client:
        assert len(client.submit(*helpers.batch(0, 3)).result(20).score) == 3
    assert "was killed by SIGKILL" in caplog.text
    assert "restarting it, 1 of 1" in caplog.text


def test_one_that_is_killed_again_and_again_says_so(tmp_path):
    options = {"folder": str(tmp_path), "times": 9}
    with pytest.raises(BridgeError, match=r"(?s)was killed by SIGKILL.*gave up after 1 restarts"):
        RewardsClient(helpers.config("KilledWhileLoading", options=options))
    assert len(list(tmp_path.iterdir())) == 2


def test_nothing_is_restarted_for_a_run_that_was_asked_to_stop(tmp_path):
    options = {"folder": str(tmp_path), "times": 9}
    asked = lambda: (tmp_path / "0").exists()  # noqa: E731
    with pytest.raises(BridgeError, match=r"cancelled|killed by SIGKILL"):
        RewardsClient(helpers.config("KilledWhileLoading", options=options, max_restarts=9, cancelled=asked))
    assert len(list(tmp_path.iterdir())) <= 2


@pytest.fixture(scope="module")
def wrong_client(tmp_path_factory):
    with RewardsClient(helpers.config("Wrong", kept_images=str(tmp_path_factory.mktemp("kept")))) as client:
        yield client
