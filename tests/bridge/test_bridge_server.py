"""Tests of the server alone: access, malformed calls, versions, signals and several clients."""

from __future__ import annotations

import collections
import contextlib
import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path

import bridge_helpers as helpers
import grpc
import numpy as np
import pytest
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from rewards_bridge import guard
from rewards_bridge.__main__ import main
from rewards_bridge.client import BridgeError, DeadlineError, RewardsClient
from rewards_bridge.errors import UsageError
from rewards_bridge.protocol import bridge_pb2, messages
from rewards_bridge.scorers import load_scorer
from rewards_bridge.server import MAX_SCORE_CALLS

BAD_REQUEST = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION}


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    listen = f"unix:{tmp_path_factory.mktemp('bridge')}/socket"
    with helpers.running_server("Echo", listen) as (process, said):
        assert said == listen
        yield listen
        assert process.poll() is None, "no test in this file may end the server"


def call_raw(address: str, stream: list[bytes], timeout: float | None = 10.0) -> bridge_pb2.ScoreReply:
    with grpc.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        score = channel.stream_unary(
            messages.SCORE_METHOD, request_serializer=bytes, response_deserializer=bridge_pb2.ScoreReply.FromString
        )
        return score(iter(stream), timeout=timeout)


def good_stream(count: int = 2) -> list[bytes]:
    batch = messages.checked_batch(*helpers.batch(0, count))
    return list(messages.encode(messages.encode_header(batch, 7), batch.images))


def assert_it_still_answers(address: str) -> None:
    assert list(call_raw(address, good_stream()).score) == [0, 1]


def changed_header(**fields: object) -> bytes:
    request = bridge_pb2.ScoreRequest.FromString(good_stream()[0])
    for name, value in fields.items():
        if isinstance(value, list):
            del getattr(request.header, name)[:]
            getattr(request.header, name).extend(value)
        else:
            setattr(request.header, name, value)
    return request.SerializeToString()


def test_the_generated_file_is_that_of_the_proto(tmp_path):
    protoc = pytest.importorskip("grpc_tools.protoc")
    root = Path(messages.__file__).parents[2]
    output = tmp_path / "descriptors"
    assert protoc.main(["", f"-I{root}", f"--descriptor_set_out={output}", "rewards_bridge/protocol/bridge.proto"]) == 0
    (file,) = descriptor_pb2.FileDescriptorSet.FromString(output.read_bytes()).file
    committed = descriptor_pb2.FileDescriptorProto.FromString(bridge_pb2.DESCRIPTOR.serialized_pb)
    pending = list(file.message_type)
    while pending:  # protoc adds the JSON names, which the generated file leaves out
        message = pending.pop()
        pending.extend(message.nested_type)
        for field in message.field:
            field.ClearField("json_name")
    assert file == committed


def test_pixels_are_encoded_as_protobuf_would(address):
    for size in [0, 1, 127, 128, 300, 2_097_152]:
        pixels = np.arange(size, dtype=np.uint8)
        encoded = list(messages.encode(b"", pixels))[1:]
        expected = [bridge_pb2.ScoreRequest(pixels=pixels.tobytes()).SerializeToString()] if size else []
        assert encoded == expected


@pytest.mark.parametrize(
    ("stream", "says"),
    [
        ([], "the stream was empty"),
        ([b""], "must start with a header"),
        ([b"\xff\xff\xff"], "a message of 3 bytes is not a ScoreRequest"),
        (good_stream()[1:], "must start with a header"),
        (good_stream()[:1], "384 bytes of pixels were announced, but 0 came"),
        (good_stream() + good_stream()[1:], "384 bytes of pixels were announced, but at least 768 came"),
        (good_stream()[:1] * 2, "only pixels may follow the header"),
        ([changed_header(count=1 << 31)], "outside the limits"),
        ([changed_header(count=0)], "outside the limits"),
        ([changed_header(height=8192, width=8192, count=4096)], "outside the limits"),
        ([changed_header(height=9)], "the header announces 384 bytes of pixels; 2 images of 9x8x3 are 432"),
        ([changed_header(prompts=["one"])], "2 images with 1 prompts and 2 metadata"),
        ([changed_header(metadata_json=["{}", "{"])], "image 1: its metadata is not JSON"),
        ([changed_header(metadata_json=["{}", "[" * 100_000])], "image 1: its metadata is not JSON"),
        ([changed_header(metadata_json=["3", "{}"])], "image 0: its metadata must be a JSON object; found int"),
        ([changed_header(protocol_version=99)], "version 99 .* version 1"),
    ],
)
def test_malformed_calls_get_a_clear_status(address, stream, says):
    with pytest.raises(grpc.RpcError, match=says) as caught:
        call_raw(address, stream)
    assert caught.value.code() in BAD_REQUEST
    assert_it_still_answers(address)


def test_a_call_without_a_deadline_or_too_long_a_message_is_refused(address):
    with pytest.raises(grpc.RpcError, match="deadline of at most 86400 s"):
        call_raw(address, good_stream(), timeout=None)
    with pytest.raises(grpc.RpcError, match="larger than max"):
        call_raw(address, [good_stream()[0], bytes(messages.MAX_MESSAGE_BYTES + 1)])
    assert_it_still_answers(address)


def test_10_000_malformed_calls_are_answered_with_a_status(address):
    """The calls are made over one connection, 32 at a time."""
    random = np.random.default_rng(0)
    with grpc.insecure_channel(address) as channel:
        score = channel.stream_unary(
            messages.SCORE_METHOD, request_serializer=bytes, response_deserializer=bridge_pb2.ScoreReply.FromString
        )
        describe, check = (channel.unary_unary(name) for name in (messages.DESCRIBE_METHOD, messages.CHECK_METHOD))
        codes = collections.Counter[grpc.StatusCode]()
        while codes.total() < 10_000 + codes[grpc.StatusCode.OK]:  # harmless changes are not counted
            codes.update([answer(call) for call in [send_garbage(random, score, describe, check) for _ in range(32)]])
    assert set(codes) <= BAD_REQUEST | {grpc.StatusCode.OK}
    assert codes[grpc.StatusCode.OK] < codes.total() / 2
    assert_it_still_answers(address)


def answer(call: grpc.Future) -> grpc.StatusCode:
    code: grpc.StatusCode = call.code()
    assert call.details() or code is grpc.StatusCode.OK
    return code


def send_garbage(random: np.random.Generator, score, describe, check) -> grpc.Future:
    """Send random bytes, or a valid stream with bytes changed and messages truncated, dropped or repeated."""
    stream = [bytearray(message) for message in good_stream()]
    kind = random.integers(6)
    if kind == 0:
        stream = [bytearray(random.bytes(random.integers(2000))) for _ in range(random.integers(1, 4))]
    if kind == 1:
        for _ in range(random.integers(1, 20)):
            message = stream[random.integers(len(stream))]
            message[random.integers(min(len(message), 60))] = random.integers(256)
    if kind == 2:
        index = random.integers(len(stream))
        stream[index] = stream[index][: random.integers(len(stream[index]))]
    if kind == 3:
        random.shuffle(stream)
        stream = stream[: random.integers(len(stream))] + stream[: random.integers(len(stream))]
    if kind >= 4:
        return (describe, check)[kind - 4].future(random.bytes(random.integers(1, 50)), timeout=30)
    return score.future(iter([bytes(message) for message in stream]), timeout=30)


def test_200_connections_of_garbage_do_no_harm(address):
    random = np.random.default_rng(1)
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    settings = b"\0\0\0\4\0\0\0\0\0"
    for index in range(200):
        with socket.socket(socket.AF_UNIX) as raw:
            raw.connect(address.removeprefix("unix:"))
            start = [b"", preface, preface + settings, b"GET / HTTP/1.1\r\n\r\n"][index % 4]
            try:
                raw.sendall(start + random.bytes(random.integers(3000)))
            except (BrokenPipeError, ConnectionResetError):
                continue  # the server has already closed the connection, which is allowed
    assert_it_still_answers(address)


def test_a_client_that_goes_away_costs_nothing(tmp_path):
    with helpers.running_server("Echo", f"unix:{tmp_path}/socket", "--option", "delay=0.2") as (_, address):
        with grpc.insecure_channel(address) as channel:
            score = channel.stream_unary(messages.SCORE_METHOD, request_serializer=bytes)
            calls = [score.future(iter(good_stream()), timeout=30) for _ in range(20)]
            unfinished = score.future(endless(), timeout=30)
            time.sleep(0.1)
            for call in [*calls, unfinished]:
                call.cancel()
        begun = time.monotonic()
        assert_it_still_answers(address)
        assert time.monotonic() - begun < 3, "cancelled batches are not scored"


def endless():
    yield good_stream()[0]
    time.sleep(1)


def test_two_trainers_share_a_server(address):
    def train(first: int) -> list[float]:
        with RewardsClient(helpers.config("Echo", address=address)) as client:
            jobs = [client.submit(*helpers.batch(first + i, 1, size=64)) for i in range(30)]
            return [float(job.result(20).score[0]) for job in jobs]

    with futures.ThreadPoolExecutor(2) as pool:
        assert list(pool.map(train, [100, 5000])) == [list(range(100, 130)), list(range(5000, 5030))]
    assert_it_still_answers(address)


def test_health_and_permissions(address):
    with grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for service in ["", messages.SERVICE]:
            reply = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=5)
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
    assert Path(address.removeprefix("unix:")).stat().st_mode & 0o077 == 0


def test_the_client_refuses_another_scorer_or_version(address):
    with pytest.raises(BridgeError, match=r"serves scorer '.*:Echo', but '.*:Hang' is configured"):
        RewardsClient(helpers.config("Hang", address=address))

    def describe(request: bytes, context: grpc.ServicerContext) -> bytes:
        return bridge_pb2.DescribeReply(protocol_version=99, scorer="bridge_scorers:Echo").SerializeToString()

    server = grpc.server(futures.ThreadPoolExecutor(2))
    handlers = {"Describe": grpc.unary_unary_rpc_method_handler(describe)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(messages.SERVICE, handlers),))
    servicer = health.HealthServicer()
    servicer.set(messages.SERVICE, health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with pytest.raises(BridgeError, match=r"speaks version 99 .*, this client version 1"):
            RewardsClient(helpers.config("Echo", address=f"127.0.0.1:{port}"))
    finally:
        server.stop(0).wait()


def test_a_server_that_is_not_there_or_too_slow(tmp_path):
    with pytest.raises(BridgeError, match=r"was not serving after 0.5 s: UNAVAILABLE"):
        RewardsClient(helpers.config("Echo", address=f"unix:{tmp_path}/none", start_timeout_s=0.5))
    with helpers.running_server("Hang", f"unix:{tmp_path}/socket") as (process, address):
        client = RewardsClient(helpers.config("Hang", address=address, deadline_s=0.5))
        with client, pytest.raises(DeadlineError, match=r"finished nothing within deadline_s, 0.5 s"):
            client.submit(*helpers.batch(0, 1, hang=True)).result(5)
        assert process.poll() is None, "the client must not kill a process that it did not start"
        process.send_signal(signal.SIGTERM)
        assert process.wait(8) == 0, "a hanging scorer does not keep the server from exiting"


def test_a_server_that_comes_back_gets_the_batch_again(tmp_path):
    listen, flag = f"unix:{tmp_path}/socket", f"flag={tmp_path}/crashed"
    with (
        helpers.running_server("Crash", listen, "--option", flag) as (first, address),
        RewardsClient(helpers.config("Crash", address=address)) as client,
    ):
        future = client.submit(*helpers.batch(40, 2, crash=True))
        assert first.wait(10) == 7
        with helpers.running_server("Crash", listen, "--option", flag):
            np.testing.assert_array_equal(future.result(20).score, [40, 41])
        assert client.stats().restarts == 1


def test_sigterm_ends_it_cleanly_and_a_taken_address_is_an_error(tmp_path, capsys):
    for listen in [f"unix:{tmp_path}/socket", "127.0.0.1:0"]:
        with helpers.running_server("Echo", listen) as (process, address):
            serve = ["serve", "--scorer", "shapes", "--listen", address]
            assert main(serve) == 2
            assert f"cannot listen on {address}" in capsys.readouterr().err
            assert_it_still_answers(address)
            process.send_signal(signal.SIGTERM)
            assert process.wait(5) == 0
    assert not (tmp_path / "socket").exists()


@pytest.mark.parametrize("arguments", [[], ["--token-file"], ["--tls-cert", "--tls-key"], ["--tls-cert"]])
@pytest.mark.parametrize("listen", ["0.0.0.0:0", "[::]:0", "10.1.2.3:5000", "example.org:5000"])
def test_other_machines_are_refused_without_tls_and_token(listen, arguments, tls, capsys):
    files = [part for name in arguments for part in (name, str(tls[name]))]
    assert main(["serve", "--scorer", "shapes", "--listen", listen, *files]) == 2
    said = capsys.readouterr().err
    assert ("belong together" if arguments == ["--tls-cert"] else "refusing to listen") in said


def test_the_command_line_refuses_too(tls):
    command = [sys.executable, "-m", "rewards_bridge", "serve", "--scorer", "shapes", "--listen", "0.0.0.0:0"]
    done = subprocess.run(command, cwd=helpers.TESTS.parent, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("rewards_bridge serve: refusing to listen on 0.0.0.0:0")


@pytest.mark.parametrize("listen", ["localhost:0", "0.0.0.0:0"])
def test_tls_and_token(listen, tls, tmp_path):
    arguments = [part for name, path in tls.items() for part in (name, str(path))]
    other = tmp_path / "other token"
    other.write_text("0123456789abcdef-but-another")
    with helpers.running_server("Echo", listen, *arguments) as (_, said):
        address = f"localhost:{said.rpartition(':')[2]}"
        secrets = {"tls_ca": str(tls["--tls-cert"]), "token_file": str(tls["--token-file"])}
        with RewardsClient(helpers.config("Echo", address=address, **secrets)) as client:
            assert client.submit(*helpers.batch(3, 2)).result(20).score[1] == 4
        for token in [str(other), None]:
            with pytest.raises(BridgeError, match="UNAUTHENTICATED: this server requires a token"):
                RewardsClient(helpers.config("Echo", address=address, **{**secrets, "token_file": token}))
        with pytest.raises(BridgeError, match=r"not serving after 0.5 s"):
            RewardsClient(helpers.config("Echo", address=address, token_file=str(other), start_timeout_s=0.5))


@pytest.fixture(scope="module")
def tls(tmp_path_factory):
    """Create a certificate for localhost, its key and a token; return their paths by the arguments that name them."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl to create the certificate")
    folder = tmp_path_factory.mktemp("tls")
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    command += f" -addext subjectAltName=DNS:localhost,IP:127.0.0.1 -keyout {folder}/key.pem -out {folder}/cert.pem"
    subprocess.run(command.split(), check=True, capture_output=True)
    (folder / "token").write_text("a-token-that-nobody-guesses\n")
    return {"--tls-cert": folder / "cert.pem", "--tls-key": folder / "key.pem", "--token-file": folder / "token"}


def test_an_unknown_scorer_names_the_known_ones():
    with pytest.raises(UsageError, match=r"unknown scorer 'nosuch'; known: .*shapes.* or your own"):
        load_scorer("nosuch", {})
    assert load_scorer("bridge_scorers:Echo", {"delay": "0.5"}).delay == 0.5


def test_neither_side_imports_jax_or_torch():
    code = "import sys, rewards_bridge.client, rewards_bridge.server, rewards_bridge.__main__; print(*sys.modules)"
    path = {**os.environ, "PYTHONPATH": str(helpers.TESTS.parent)}
    done = subprocess.run([sys.executable, "-c", code], env=path, capture_output=True, text=True, check=True)
    assert not {"jax", "flax", "torch", "udm_grpo", "PIL"} & set(done.stdout.split())
    sources = Path(messages.__file__).parents[1].rglob("*.py")
    assert not [path for path in sources if "import pickle" in path.read_text()]


def test_batches_of_other_trainers_do_not_count_against_the_deadline(tmp_path):
    """Each of 4 clients submits 2 batches; the last of the 8 is scored after 2.4 s."""
    with helpers.running_server("Echo", f"unix:{tmp_path}/s", "--option", "delay=0.3") as (_, address):

        def train(first: int) -> list[float]:
            with RewardsClient(helpers.config("Echo", address=address, deadline_s=0.8)) as client:
                jobs = [client.submit(*helpers.batch(first + i, 1)) for i in range(2)]
                return [float(job.result(20).score[0]) for job in jobs]

        with futures.ThreadPoolExecutor(4) as pool:
            assert list(pool.map(train, [0, 10, 20, 30])) == [[0, 1], [10, 11], [20, 21], [30, 31]]


def test_more_clients_than_the_server_has_places_for(tmp_path):
    """Clients without a place call again later; the server answers health checks all the time."""
    gate = tmp_path / "gate"
    count = MAX_SCORE_CALLS // 2 + 8
    with (
        helpers.running_server("Gate", f"unix:{tmp_path}/s", "--option", f"gate={gate}") as (_, address),
        contextlib.ExitStack() as stack,
    ):
        clients = [stack.enter_context(RewardsClient(helpers.config("Gate", address=address))) for _ in range(count)]
        jobs = [client.submit(*helpers.batch(index, 1)) for index, client in enumerate(clients) for _ in range(2)]
        time.sleep(1.0)  # so that all places are taken
        with pytest.raises(grpc.RpcError, match="64 calls are already waiting here; call again later"):
            call_raw(address, good_stream())
        with RewardsClient(helpers.config("Gate", address=address)):
            gate.touch()
        assert [job.result(20).score[0] for job in jobs] == [index for index in range(count) for _ in range(2)]


def silent(gone: threading.Event) -> Iterator[bytes]:
    """Return a stream that sends nothing."""
    gone.wait(60)
    yield from ()


@contextlib.contextmanager
def silent_calls(address: str, tls: dict[str, Path] | None, count: int, timeout: float | None) -> Iterator[list]:
    """Make calls of every method that send nothing, over one connection."""
    gone = threading.Event()
    if tls:
        credentials = grpc.ssl_channel_credentials(tls["--tls-cert"].read_bytes())
        channel = grpc.secure_channel(address, credentials)
    else:
        channel = grpc.insecure_channel(address)
    health_check = "/grpc.health.v1.Health/Check"
    with channel:
        methods = [messages.SCORE_METHOD, messages.DESCRIBE_METHOD, messages.CHECK_METHOD, health_check]
        calls = [channel.stream_unary(method, request_serializer=bytes) for method in methods]
        yield [calls[index % 4].future(silent(gone), timeout=timeout) for index in range(count)]
        gone.set()


def test_silent_calls_without_a_token_are_refused_before_they_are_read(tls):
    arguments = [part for name, path in tls.items() for part in (name, str(path))]
    with helpers.running_server("Echo", "localhost:0", *arguments) as (_, address):
        secrets = {"tls_ca": str(tls["--tls-cert"]), "token_file": str(tls["--token-file"])}
        with silent_calls(address, tls, 200, None) as calls:
            with RewardsClient(helpers.config("Echo", address=address, **secrets)) as client:
                assert client.submit(*helpers.batch(3, 2)).result(20).score[1] == 4
            assert {call.exception(10).code() for call in calls} == {grpc.StatusCode.UNAUTHENTICATED}


def test_silent_calls_without_a_deadline_are_refused_before_they_are_read(address):
    with silent_calls(address, None, 64, None) as calls:
        assert_it_still_answers(address)
        for call in calls[::4]:  # the calls of Score
            assert call.exception(10).code() is grpc.StatusCode.INVALID_ARGUMENT
            assert "deadline of at most" in call.exception(10).details()


def test_a_silent_call_is_ended_and_watching_is_not_offered(monkeypatch):
    monkeypatch.setattr(guard, "FIRST_MESSAGE_S", 0.2)
    monkeypatch.setattr(guard, "NEXT_MESSAGE_S", 0.2)
    server = grpc.server(futures.ThreadPoolExecutor(2), interceptors=[guard.Guard(None, guard.Patience())])
    handlers = {"Score": grpc.stream_unary_rpc_method_handler(lambda stream, _: b"".join(stream))}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(messages.SERVICE, handlers),))
    health_pb2_grpc.add_HealthServicer_to_server(health.HealthServicer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with silent_calls(f"127.0.0.1:{port}", None, 1, None) as calls:
            assert calls[0].exception(10).code() is grpc.StatusCode.CANCELLED
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            score = channel.stream_unary(messages.SCORE_METHOD)
            with pytest.raises(grpc.RpcError) as caught:
                score(itertools.chain([b"1"], endless()), timeout=20)
            assert caught.value.code() is grpc.StatusCode.CANCELLED
            assert score(iter([b"1", b"2"]), timeout=20) == b"12"
            watched = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=5)
            with pytest.raises(grpc.RpcError) as caught:
                next(iter(watched))
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    finally:
        server.stop(0).wait()


def test_many_clients_wait_for_room(address):
    with grpc.insecure_channel(address) as channel:
        score = channel.stream_unary(
            messages.SCORE_METHOD, request_serializer=bytes, response_deserializer=bridge_pb2.ScoreReply.FromString
        )
        calls = [score.future(iter(good_stream()), timeout=20) for _ in range(60)]
        assert [list(call.result().score) for call in calls] == [[0, 1]] * 60
