"""Tests of scorers at an address: their options, wrong scorers, and recipe settings for starting a process."""

from __future__ import annotations

import re
import warnings
from concurrent import futures
from pathlib import Path

import bridge_helpers as helpers
import grpc
import numpy as np
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from PIL import Image

from rewards_bridge.__main__ import main
from rewards_bridge.client import BridgeError, RewardsClient
from rewards_bridge.differences import differences
from rewards_bridge.protocol import bridge_pb2, messages
from udm_grpo.config import RewardsConfig, ScorerConfig
from udm_grpo.scoring.rewards import connect, warn_of


@pytest.mark.parametrize(
    ("here", "there", "defaults", "expected"),
    [
        ({"dtype": "float32"}, {"dtype": "float16"}, {}, ["dtype is 'float16' at the server and 'float32' in this"]),
        ({"dtype": "float32"}, {}, {"dtype": "float32"}, []),
        ({}, {"dtype": "float32"}, {"dtype": "float32"}, []),
        ({"dtype": "float32"}, {}, {"dtype": "bfloat16"}, ["'bfloat16' at the server"]),
        ({"high": "1", "antialias": "yes"}, {"high": "1.0", "antialias": "True"}, {}, []),
        ({"model": "a"}, {}, {}, ["model is not set at the server and 'a' in this configuration"]),
        ({}, {"device": "cuda:0"}, {"device": "cpu"}, []),
        ({"device": "cpu"}, {"device": "cuda:0"}, {}, ["device is 'cuda:0' at the server"]),
        ({"url": "http://me:word@host"}, {"url": "http://***@host"}, {}, []),
        ({"api_key": "mine"}, {"api_key": "***"}, {}, []),
        ({"api_key": "mine"}, {}, {"api_key": "***"}, []),
        ({"api_key": "mine"}, {}, {}, ["api_key is not set at the server and set (a secret) in this configuration"]),
        ({"b": "2", "a": "1"}, {"a": "3", "b": "4"}, {}, ["a is '3'", "b is '4'"]),
    ],
)
def test_options_are_compared_by_what_they_mean(here, there, defaults, expected):
    texts = differences(here, bridge_pb2.Setup(options=there, defaults=defaults))
    assert len(texts) == len(expected)
    assert all(part in text for part, text in zip(expected, texts, strict=True))
    assert not any("mine" in text or "word" in text for text in texts)


def test_a_recipe_reaches_its_servers_with_one_warning_of_what_differs(tmp_path: Path):
    """Settings for starting a process are ignored rather than refused."""
    arguments = ("--option", "delay=0.01")
    recipe = {
        "scorer": "bridge_scorers:Echo",
        "options": {"delay": "0.02"},
        "interpreter": "/nowhere/python",
        "environment": {"A": "b"},
        "replicas": 2,
    }
    with helpers.running_server("Echo", f"unix:{tmp_path}/s", *arguments) as (_, address):
        config = RewardsConfig({"mine": ScorerConfig(**recipe, addresses=(address, address))})
        with connect(config, tmp_path) as client:
            assert client.submit(*helpers.batch(3, 1)).result(20).score == [3]
            with pytest.warns(UserWarning, match="mine: bridge_scorers:Echo at unix") as caught:
                warn_of([client])
        alike = RewardsConfig({"mine": ScorerConfig(**{**recipe, "options": {"delay": "0.010"}}, addresses=(address,))})
        with connect(alike, tmp_path) as client, warnings.catch_warnings():
            warnings.simplefilter("error")
            warn_of([client])
    (warning,) = caught
    assert str(warning.message).count("delay is '0.01' at the server and '0.02' in this configuration") == 1


def test_a_server_tells_its_setup_without_secrets(tmp_path: Path):
    arguments = ("--option", "api_key=very-secret", "--option", "url=http://me:word@host/v1")
    with (
        helpers.running_server("WithSecrets", f"unix:{tmp_path}/s", *arguments) as (_, address),
        grpc.insecure_channel(address) as channel,
    ):
        describe = channel.unary_unary(
            messages.DESCRIBE_METHOD, response_deserializer=bridge_pb2.DescribeReply.FromString
        )
        reply = describe(b"", timeout=5)
    assert dict(reply.setup.options) == {"api_key": "***", "url": "http://***@host/v1"}
    assert dict(reply.setup.defaults) == {"retries": "3"}
    assert reply.example_problem == ""


@pytest.fixture
def described():
    """Return a function that starts a server with this description and returns its address."""
    servers = []

    def start(reply: bridge_pb2.DescribeReply) -> str:
        def describe(request: bytes, context: grpc.ServicerContext) -> bytes:
            return reply.SerializeToString()

        server = grpc.server(futures.ThreadPoolExecutor(2))
        servers.append(server)
        handlers = {"Describe": grpc.unary_unary_rpc_method_handler(describe)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(messages.SERVICE, handlers),))
        servicer = health.HealthServicer()
        servicer.set(messages.SERVICE, health_pb2.HealthCheckResponse.SERVING)
        health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        return f"127.0.0.1:{port}"

    yield start
    for server in servers:
        server.stop(0).wait()


def test_a_server_older_than_the_field_is_not_said_to_differ(described):
    address = described(bridge_pb2.DescribeReply(protocol_version=1, scorer="bridge_scorers:Echo"))
    with RewardsClient(helpers.config("Echo", address=address, options={"delay": "1"})) as client:
        assert client.warnings() == ()


def test_a_wrong_scorer_is_an_error_that_one_field_makes_a_warning(described, tmp_path: Path):
    problem = "expected that a red circle is seen; the scores are 0"
    address = described(bridge_pb2.DescribeReply(protocol_version=1, scorer="shapes", example_problem=problem))
    config = ScorerConfig(addresses=(address,))
    with pytest.raises(BridgeError, match=f"scorer 'shapes' at {address} gets .* wrong: {problem}.* check_example"):
        connect(RewardsConfig({"shapes": config}), tmp_path)
    config.check_example = False
    with connect(RewardsConfig({"shapes": config}), tmp_path) as client, pytest.warns(UserWarning, match=problem):
        warn_of([client])


def test_the_score_command_refuses_a_wrong_scorer_too(described, tmp_path: Path, capsys):
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a.png")
    reply = bridge_pb2.DescribeReply(protocol_version=1, scorer="shapes", example_problem="expected a circle")
    command = ["score", "--scorer", "shapes", "--prompt", "x", "--address", described(reply), str(tmp_path / "a.png")]
    assert main(command) == 2
    assert "wrong: expected a circle" in capsys.readouterr().err
    main([*command, "--no-check-example"])  # it continues, although this server cannot score
    assert "warning: scorer 'shapes' at " in capsys.readouterr().err


def test_a_wrong_scorer_of_our_own_is_an_error(tmp_path: Path):
    """The scorer runs in a real process and is patched to score 0."""
    (tmp_path / "sitecustomize.py").write_text(
        "import numpy as np\n"
        "from rewards_bridge.scorers.base import Scores\n"
        "from rewards_bridge.scorers.jpeg import JpegScorer\n"
        "zero = np.zeros(1, np.float32)\n"
        'JpegScorer.score = lambda *_: Scores(zero, {"jpeg_kilobytes": zero}, [""])\n'
    )
    config = ScorerConfig(environment={"PYTHONPATH": str(tmp_path)}, start_timeout_s=60)
    with pytest.raises(BridgeError, match=r"scorer 'jpeg' gets .* expected that 5.1 kilobytes; the scores are 0"):
        connect(RewardsConfig({"jpeg": config}), tmp_path)
    config.check_example = False
    with connect(RewardsConfig({"jpeg": config}), tmp_path) as client, pytest.warns(UserWarning, match="5.1 kilo"):
        warn_of([client])


BAD = {"OneForAll": "1 score for 2 images", "Raise": "LookupError: the judge is confused by 'x'"}


@pytest.mark.parametrize("name", BAD)
def test_a_scorer_of_ones_own_is_tried_before_anything_else_and_refused_in_the_same_words(name, tmp_path: Path, capsys):
    """A process of its own, tried by training, and a server, tried by the command, report the same error."""
    Image.fromarray(np.zeros((8, 6, 3), np.uint8)).save(tmp_path / "a.png")
    words, said = ["score", "--scorer", f"bridge_scorers:{name}", "--prompt", "x", str(tmp_path / "a.png")], []
    with helpers.running_server(name, f"unix:{tmp_path}/s") as (_, address):
        assert main([*words, "--address", address]) == 2
        said.append(capsys.readouterr().err.removeprefix("rewards_bridge score: ").strip())
    config = ScorerConfig(scorer=f"bridge_scorers:{name}", environment=helpers.ENVIRONMENT)
    with connect(RewardsConfig({"mine": config}), tmp_path / "kept") as client, pytest.raises(BridgeError) as caught:
        client.try_out("x", {}, 8, 6)
    said.append(str(caught.value).strip())
    assert re.search(BAD[name], said[0])
    assert said[0] == said[1]
    assert not (tmp_path / "kept").exists()
