"""Tests of the limits on waiting images: callers that exceed them block, on either side of the bridge."""

import threading
import time

import bridge_helpers as helpers
import pytest

from rewards_bridge import client as client_module
from rewards_bridge.client import BridgeError, RewardsClient
from rewards_bridge.room import Room


def enter(room: Room, size: int, entered: list[int]) -> threading.Thread:
    thread = threading.Thread(target=lambda: room.enter(size, lambda: False) and entered.append(size))
    thread.start()
    time.sleep(0.05)
    return thread


def test_room_is_given_in_the_order_in_which_it_was_asked_for():
    room, entered = Room(10), list[int]()
    assert room.enter(25, lambda: True), "nothing else is there"
    waiting = [enter(room, size, entered) for size in (8, 1, 2)]
    assert entered == []
    room.leave(25)
    time.sleep(0.05)
    assert entered == [8, 1], "the small one did not overtake, and the last one waits"
    room.leave(8)
    for thread in waiting:
        thread.join(5)
    assert entered == [8, 1, 2]
    room.squeeze_in(20)
    assert not room.enter(1, lambda: True)


@pytest.mark.parametrize("end", ["scored", "closed"])
def test_a_slow_scorer_holds_back_who_submits(tmp_path, monkeypatch, end):
    """There is room for 4 batches of 192 bytes; 6 are submitted while the scorer's gate is closed."""
    monkeypatch.setattr(client_module, "MAX_WAITING_BYTES", 4 * 192)
    gate, jobs, errors = tmp_path / "gate", [], []

    def submit() -> None:
        try:
            jobs.extend(client.submit(*helpers.batch(index, 1)) for index in range(6))
        except BridgeError as error:
            errors.append(str(error))

    with RewardsClient(helpers.config("Gate", options={"gate": str(gate)})) as client:
        thread = threading.Thread(target=submit)
        thread.start()
        time.sleep(0.3)
        assert len(jobs) == 4
        jobs.append(client.submit(*helpers.batch(9, 1), wait=False))
        if end == "scored":
            gate.touch()
            thread.join(10)
            assert sorted(job.result(10).score[0] for job in jobs) == [0, 1, 2, 3, 4, 5, 9]
    thread.join(10)
    assert not thread.is_alive()
    assert len(errors) == (0 if end == "scored" else 1)
    assert all("the client " in error and "closed" in error for error in errors)
