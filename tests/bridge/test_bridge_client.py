"""Tests of the client with a real scorer process of its own: order, environment, speed, and clean shutdown."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import bridge_helpers as helpers
import grpc
import numpy as np
import pytest
from PIL import Image

from rewards_bridge.client import BridgeConfig, BridgeError, RewardsClient
from rewards_bridge.connection import Connection
from rewards_bridge.errors import UsageError


def test_concurrent_micro_batches_keep_their_order():
    with RewardsClient(helpers.config("Echo")) as client:
        sizes = [1, 7, 16, 3, 32, 5] * 8
        firsts = np.cumsum([0, *sizes[:-1]]).tolist()
        futures = [client.submit(*helpers.batch(first, size)) for first, size in zip(firsts, sizes, strict=True)]
        for first, size, future in reversed(list(zip(firsts, sizes, futures, strict=True))):
            images, prompts, _ = helpers.batch(first, size)
            scores = future.result(20)
            np.testing.assert_array_equal(scores.score, np.arange(first, first + size, dtype=np.float32))
            np.testing.assert_array_equal(scores.raw["number"], scores.score)
            np.testing.assert_allclose(scores.raw["mean"], images.mean((1, 2, 3)), rtol=1e-6)
            assert scores.reasons == [f"seen: {prompt}" for prompt in prompts]
            assert scores.score.dtype == scores.raw["mean"].dtype == np.float32
        stats = client.stats()
    assert (stats.batches, stats.images, stats.restarts) == (len(sizes), sum(sizes), 0)


def test_submit_from_several_threads():
    results: dict[int, np.ndarray] = {}

    def work(number: int) -> None:
        futures = [client.submit(*helpers.batch(1000 * number + i, 2)) for i in range(10)]
        results[number] = np.stack([future.result(20).score for future in futures])

    with RewardsClient(helpers.config("Echo")) as client:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for number in range(4):
        first = 1000 * number + np.arange(10)
        np.testing.assert_array_equal(results[number], np.stack([first, first + 1], 1))


def test_submit_returns_before_anything_is_scored():
    with RewardsClient(helpers.config("Echo", options={"delay": "0.3"})) as client:
        begun = time.monotonic()
        futures = [client.submit(*helpers.batch(i, 2)) for i in range(3)]
        assert time.monotonic() - begun < 0.25
        assert not futures[-1].done()
        assert futures[2].cancel(), "a waiting batch can be cancelled"
        assert [future.result(20).score[0] for future in futures[:2]] == [0, 1]
        assert client.stats().seconds_scoring >= 0.6


def test_the_process_has_its_own_interpreter_and_environment(tmp_path):
    interpreter = tmp_path / "python"
    interpreter.write_text(f'#!/bin/sh\nexport VIA_WRAPPER=yes\nexec {sys.executable} "$@"\n')
    interpreter.chmod(0o755)
    environment = {**helpers.ENVIRONMENT, "CUDA_VISIBLE_DEVICES": "6"}
    config = helpers.config("Where", interpreter=str(interpreter), environment=environment)
    with RewardsClient(config) as client:
        process = json.loads(client.submit(*helpers.batch(0, 1)).result(20).reasons[0])
    assert process["pid"] != os.getpid()
    assert process["environment"]["VIA_WRAPPER"] == "yes"
    assert process["environment"]["CUDA_VISIBLE_DEVICES"] == "6"
    assert process["environment"]["OMP_WAIT_POLICY"] == os.environ.get("OMP_WAIT_POLICY", "passive")
    half = str(max(1, (os.cpu_count() or 1) // 2))
    assert process["environment"]["OMP_NUM_THREADS"] == os.environ.get("OMP_NUM_THREADS", half)


def test_close_leaves_nothing_behind():
    with RewardsClient(helpers.config("WithChild")) as client:
        server, child = json.loads(client.submit(*helpers.batch(0, 1)).result(20).reasons[0])
        socket = helpers.socket_of(server)
        assert socket.exists()
        assert socket.parent.stat().st_mode & 0o777 == 0o700
        waiting = client.submit(*helpers.batch(0, 1, hang=True))
    assert not helpers.is_running(server)
    assert helpers.wait_until_gone(child, 2)
    assert not socket.parent.exists()
    with pytest.raises(BridgeError, match="closed"):
        waiting.result(0)
    client.close()
    with pytest.raises(BridgeError, match="closed"):
        client.submit(*helpers.batch(0, 1))


TRAINER = """
import sys, time
import bridge_helpers as helpers
from rewards_bridge.client import RewardsClient
client = RewardsClient(helpers.config("Hang"))
if sys.argv[1] == "hanging":
    waiting = client.submit(*helpers.batch(0, 1, hang=True))
time.sleep(0.3)
print("ready", flush=True)
time.sleep(1000)
"""


@pytest.mark.parametrize("state", ["idle", "hanging"])
def test_the_server_ends_when_its_trainer_is_killed(state):
    path = os.pathsep.join([str(helpers.TESTS.parent), str(helpers.TESTS)])
    with subprocess.Popen(
        [sys.executable, "-c", TRAINER, state], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path}
    ) as trainer:
        assert trainer.stdout is not None
        trainer.stdout.readline()
        (server,) = helpers.children_of(trainer.pid)
        socket = helpers.socket_of(server)
        assert socket.exists()
        trainer.send_signal(signal.SIGKILL)
    assert helpers.wait_until_gone(server, 6)
    assert not socket.parent.exists()


def test_128_images_of_512x512_cross_within_a_quarter_of_a_second():
    """Takes the best of at most 40 tries, since other tests share the cores; on an idle machine the first ones do."""
    images, prompts, metadata = helpers.batch(0, 128, size=512)
    times = []
    with RewardsClient(helpers.config("First")) as client:
        while len(times) < 3 or (min(times) >= 0.25 and len(times) < 40):
            begun = time.perf_counter()
            parts = [slice(start, start + 16) for start in range(0, 128, 16)]
            futures = [client.submit(images[part], prompts[part], metadata[part]) for part in parts]
            score = np.concatenate([future.result(20).score for future in futures])
            times.append(time.perf_counter() - begun)
            np.testing.assert_array_equal(score, np.arange(128))
    print(f"\n128 x 512x512x3 to the scorer and back: {[f'{t:.3f}' for t in times]} s (8 micro-batches of 16)")
    assert min(times) < 0.25


def test_arguments_are_checked_before_anything_is_sent():
    with RewardsClient(helpers.config("Echo")) as client:
        images, prompts, metadata = helpers.batch(0, 2)
        wrong = [
            (images.astype(np.float32), prompts, metadata, "uint8.*float32"),
            (images[0], prompts, metadata, r"\[B,H,W,3\].*\(8, 8, 3\)"),
            (images[..., :1], prompts, metadata, r"\(2, 8, 8, 1\)"),
            (images[:0], [], [], r"\(0, 8, 8, 3\)"),
            (images, prompts[:1], metadata, "2 images came with 1 prompts and 2 metadata"),
            (images, prompts, metadata * 2, "2 images came with 2 prompts and 4 metadata"),
            (images, [b"bytes", "x"], metadata, "image 0.*bytes"),
            (images, prompts, [{}, {"a": np.zeros(2)}], "image 1: its metadata is not JSON"),
            (images, ["\ud800", "x"], metadata, "not valid Unicode"),
            (images, ["x" * (17 << 20), "x"], metadata, "prompts and metadata of one batch take"),
            (np.broadcast_to(images[:1], (5000, 8, 8, 3)), prompts * 2500, metadata * 2500, "smaller batches"),
        ]
        for pixels, texts, items, match in wrong:
            with pytest.raises(ValueError, match=match):
                client.submit(pixels, texts, items)
        not_contiguous = np.asfortranarray(images)[:, ::-1]
        scores = client.submit(not_contiguous, prompts, metadata).result(20)
        np.testing.assert_allclose(scores.raw["mean"], images.mean((1, 2, 3)), rtol=1e-6)


def test_impossible_configs_say_what_to_change(tmp_path):
    token = tmp_path / "token"
    token.write_text("short")
    for fields, match in [
        ({"deadline_s": 0.0}, "deadline_s"),
        ({"max_restarts": -1}, "max_restarts"),
        ({"address": "nowhere"}, "HOST:PORT"),
        ({"address": "unix:relative"}, "unix:/path"),
        ({"address": "gpu7:5000"}, "tls_ca and token_file"),
        ({"tls_ca": "ca.pem"}, "running server"),
    ]:
        with pytest.raises(UsageError, match=match):
            BridgeConfig(**fields)
    with pytest.raises(UsageError, match="at least 16"):
        RewardsClient(BridgeConfig(address="127.0.0.1:5000", token_file=str(token)))


def test_score_command_prints_a_line_an_image(tmp_path):
    for name, number in [("a.png", 3), ("b.png", 4)]:
        Image.fromarray(helpers.batch(number, 1)[0][0]).save(tmp_path / name)
    command = [sys.executable, "-m", "rewards_bridge", "score", "--scorer", "bridge_scorers:Echo"]
    command += ["--prompt", "two birds", "--metadata", '{"number": 9}', "a.png", "b.png"]
    path = os.pathsep.join([str(helpers.TESTS.parent), str(helpers.TESTS)])
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(line["image"], line["score"]) for line in lines] == [("a.png", 3), ("b.png", 4)]
    assert lines[0]["raw"]["number"] == 9
    assert lines[0]["reasons"] == "seen: two birds"
    assert lines[0]["scorer"] == "bridge_scorers:Echo"
    missing = subprocess.run(
        [*command, "nofile.png"], cwd=Path("/"), env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert missing.returncode == 2
    assert missing.stderr.startswith("rewards_bridge score: cannot score a.png: it cannot be opened: No such file")


def test_score_command_uses_a_running_server(tmp_path):
    Image.fromarray(helpers.batch(3, 1)[0][0]).save(tmp_path / "a.png")
    command = [sys.executable, "-m", "rewards_bridge", "score", "--scorer", "bridge_scorers:Echo", "--prompt", "x"]
    path = {**os.environ, "PYTHONPATH": str(helpers.TESTS.parent)}
    with helpers.running_server("Echo", f"unix:{tmp_path}/s") as (_, address):
        command += ["--address", address, str(tmp_path / "a.png")]
        done = subprocess.run(command, env=path, capture_output=True, text=True, check=True)
        assert json.loads(done.stdout)["score"] == 3
        other = subprocess.run([*command, "--option", "delay=1"], env=path, capture_output=True, text=True, check=True)
        assert json.loads(other.stdout)["score"] == 3
        assert "warning: bridge_scorers:Echo" in other.stderr
        assert "delay is '0.0' at the server and '1' in this configuration" in other.stderr
        assert "warning" not in done.stderr
    gone = subprocess.run(command, env=path, capture_output=True, text=True)
    assert gone.returncode == 2
    assert "was not serving" in gone.stderr


class NoPlaceError(grpc.RpcError):
    """The error that a client gets from a server without a place for its call."""

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.RESOURCE_EXHAUSTED

    def details(self) -> str:
        return "64 calls are already waiting here"


@pytest.mark.parametrize("call", ["describe", "wait_until_serving"])
def test_a_server_that_has_no_place_yet_is_asked_again(call, tmp_path, monkeypatch):
    with helpers.running_server("Echo", f"unix:{tmp_path}/s") as (_, address):
        connection = Connection(address)
        stub, name = (connection, "_describe") if call == "describe" else (connection._health, "Check")
        real, refusals = getattr(stub, name), iter([NoPlaceError(), NoPlaceError()])

        def busy(*args, **kwargs):
            for error in refusals:
                raise error
            return real(*args, **kwargs)

        monkeypatch.setattr(stub, name, busy)
        if call == "describe":
            assert "Echo" in connection.describe("bridge_scorers:Echo").scorer
        else:
            connection.wait_until_serving(20, lambda: None)
        assert next(refusals, None) is None
        connection.close()
