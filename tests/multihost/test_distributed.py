"""How processes connect, and how the end of one ends the others, with an error that names it.

Run as a program (`python test_distributed.py WHAT port process count`) this file is one process of its own tests.
"""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoint_helpers import ROOT
from running import free_port

from udm_grpo.config import ConfigError, DistributedConfig
from udm_grpo.multihost import distributed
from udm_grpo.multihost import peers as peers_module
from udm_grpo.multihost.distributed import joined
from udm_grpo.multihost.handshake import Line, Member, hello
from udm_grpo.multihost.peers import Peers, PeersError, meet
from udm_grpo.multihost.process_place import Place, find_place

SLURM = {
    "SLURM_JOB_ID": "4096",
    "SLURM_STEP_NODELIST": "node[007-009],other",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
}
OPEN_MPI_4 = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
}
EXPLICIT = {"JAX_COORDINATOR_ADDRESS": "node-0:8476", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}


@pytest.mark.parametrize(
    ("config", "environment", "place"),
    [
        (DistributedConfig(), {}, None),
        (DistributedConfig(processes=1), {}, None),
        (DistributedConfig("a:1", 3, 2), {}, Place("a:1", 3, 2)),
        (DistributedConfig(), EXPLICIT, Place("node-0:8476", 2, 1)),
        (DistributedConfig(process_id=0), EXPLICIT, Place("node-0:8476", 2, 0)),
        (DistributedConfig(), SLURM, Place("node007:61440", 4, 2)),
        (DistributedConfig("b:5"), SLURM | {"JAX_COORDINATOR_PORT": "7"}, Place("b:5", 4, 2)),
        (DistributedConfig(), SLURM | {"JAX_COORDINATOR_PORT": "7"}, Place("node007:7", 4, 2)),
        (DistributedConfig(), SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),
        (DistributedConfig(), SLURM | {"SLURM_STEP_NUM_TASKS": "3"}, Place("node007:61440", 3, 2)),
        # The shell of `salloc --ntasks=8`: a step of one task.
        (DistributedConfig(), SLURM | {"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, None),
        (DistributedConfig(processes=1), SLURM | {"SLURM_NTASKS": "8(x2)"}, None),
        (DistributedConfig(processes=2, process_id=1), SLURM | {"SLURM_NTASKS": "8(x2)"}, Place("node007:61440", 2, 1)),
        (DistributedConfig(), SLURM | {"SLURM_STEP_NODELIST": "gpu-a,gpu-b"}, Place("gpu-a:61440", 4, 2)),
        (DistributedConfig(), {"SLURM_NTASKS": "8", "SLURM_JOB_ID": "1", "SLURM_PROCID": "0"}, None),
        (DistributedConfig(), OPEN_MPI_4, Place("10.96.0.1:62624", 8, 3)),
        (DistributedConfig("c:9"), {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, Place("c:9", 2, 1)),
    ],
)
def test_the_place_of_a_process_comes_from_the_config_or_the_scheduler(monkeypatch, config, environment, place):
    for name in {*SLURM, *OPEN_MPI_4, *EXPLICIT, "JAX_COORDINATOR_PORT", "SLURM_STEP_NUM_TASKS"}:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert find_place(config, os.environ) == place


@pytest.mark.parametrize(
    ("config", "environment", "message"),
    [
        (
            DistributedConfig(processes=4),
            {},
            r"only processes 4 \(from distributed.processes\) is known; distributed.coordinator and distributed",
        ),
        (DistributedConfig("a:1", 2), {}, "distributed.process_id is missing: set it, or the environment"),
        (DistributedConfig("a", 2, 0), {}, "distributed.coordinator is 'a'; give host:port of process 0"),
        (
            DistributedConfig("a:1", 2, 2),
            {},
            r"process_id is 2 of 2 processes \(distributed.processes\); the ids go from 0 to 1",
        ),
        (DistributedConfig(), EXPLICIT | {"JAX_PROCESS_ID": "one"}, "JAX_PROCESS_ID is 'one'; expected a whole number"),
        (DistributedConfig(), EXPLICIT | {"JAX_NUM_PROCESSES": "-2"}, "JAX_NUM_PROCESSES is '-2'; expected a whole"),
        (DistributedConfig(), EXPLICIT | {"JAX_COORDINATOR_ADDRESS": "node"}, "JAX_COORDINATOR_ADDRESS is 'node'"),
        (
            DistributedConfig(),
            SLURM | {"SLURM_NTASKS": "8(x2)"},
            r"SLURM_NTASKS is '8\(x2\)'; .*distributed.processes=1",
        ),
        (DistributedConfig(), SLURM | {"SLURM_PROCID": ""}, "SLURM_PROCID is ''; expected a whole number"),
        (DistributedConfig(), SLURM | {"SLURM_PROCID": "4"}, r"SLURM_PROCID is 4 of 4 processes \(SLURM_NTASKS\)"),
        (DistributedConfig(), SLURM | {"SLURM_JOB_ID": "12_3"}, "SLURM_JOB_ID is '12_3'; expected a whole number"),
        (DistributedConfig(), SLURM | {"SLURM_STEP_NODELIST": ""}, "SLURM_STEP_NODELIST is ''; expected names"),
        (DistributedConfig(), SLURM | {"JAX_COORDINATOR_PORT": "http"}, "JAX_COORDINATOR_PORT is 'http'"),
        (DistributedConfig("a:1"), {"OMPI_COMM_WORLD_SIZE": "two"}, "OMPI_COMM_WORLD_SIZE is 'two'; expected"),
    ],
)
def test_half_a_place_is_refused(config, environment, message):
    with pytest.raises(ConfigError, match=message):
        find_place(config, environment)


@pytest.mark.parametrize(
    ("process_id", "said"),
    [
        ("0", "process 0 of 3 waits up to 0.5 s for processes 1 to 2 at port "),
        ("2", "process 2 of 3 waits up to 0.5 s for process 0 at localhost:"),
    ],
)
def test_a_process_says_at_once_for_whom_it_waits_and_the_way_out(monkeypatch, capsys, process_id, said):
    """For example, in an interactive shell whose SLURM_NTASKS is that of the job; the error repeats the text."""
    for name in (*EXPLICIT, "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    changes = {"SLURM_NTASKS": "3", "SLURM_PROCID": process_id, "SLURM_STEP_NODELIST": "localhost"}
    for name, value in (SLURM | changes | {"JAX_COORDINATOR_PORT": str(free_port())}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as caught, joined(DistributedConfig(initialization_timeout_s=0.5)):
        pass
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    for text in (line, str(caught.value)):
        assert (
            "number of processes from SLURM_NTASKS, process id from SLURM_PROCID, coordinator from SLURM_STEP" in text
        )
        assert text.endswith("To run it alone, give --config.distributed.processes=1.")


def test_the_watch_has_the_next_port():
    assert Place("node:65535", 2, 0).watch() == ("node", 65534)
    assert Place("[::1]:8476", 2, 0).watch() == ("::1", 8477)


def member(process: int) -> Member:
    return Member(process, f"host-{process}", 100 + process)


class Meeting:
    """Processes, here threads, that try to connect; secrets: those that are not the first's, by position."""

    def __init__(
        self,
        calls: list[tuple[Member, int]],
        timeout_s: float = 5.0,
        silence_s: float = 0.4,
        secrets: dict[int, str] | None = None,
    ):
        self.address, self.ended = ("127.0.0.1", free_port()), list[tuple[int, str]]()
        self.secrets = secrets or {}
        self.results: list[Peers | PeersError] = [PeersError("not yet")] * len(calls)
        threads = [
            threading.Thread(target=self._meet, args=(at, *call, timeout_s, silence_s)) for at, call in enumerate(calls)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _meet(self, at: int, me: Member, count: int, timeout_s: float, silence_s: float) -> None:
        def ended(reason: str) -> None:
            self.ended.append((me.process, reason))

        try:
            secret = self.secrets.get(at, "of this run")
            self.results[at] = meet(me, count, self.address, timeout_s, silence_s, ended, secret)
        except PeersError as error:
            self.results[at] = error

    def close(self) -> None:
        closing = [threading.Thread(target=peers.close) for peers in self.results if isinstance(peers, Peers)]
        for thread in closing:
            thread.start()
        for thread in closing:
            thread.join()

    def wait(self, ends: int) -> dict[int, str]:
        """Return the reason that each process got at its end."""
        deadline = time.monotonic() + 10
        while len(self.ended) < ends and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        assert len(self.ended) == ends
        return dict(self.ended)


def test_all_processes_meet_and_leave_in_peace():
    meeting = Meeting([(member(i), 4) for i in (2, 0, 3, 1)], silence_s=2.0)
    time.sleep(2.5)  # longer than the heartbeat timeout
    assert all(isinstance(peers, Peers) for peers in meeting.results)
    meeting.close()
    assert meeting.wait(0) == {}


def test_no_process_goes_before_all_have_finished():
    meeting = Meeting([(member(i), 3) for i in range(3)])
    gone: list[int] = []

    def finish(process: int) -> None:
        meeting.results[process].wait_for_all()
        gone.append(process)

    threads = [threading.Thread(target=finish, args=(process,)) for process in (1, 2, 0)]
    for thread in threads[:2]:
        thread.start()
    time.sleep(0.6)  # longer than the heartbeat timeout
    assert gone == []
    threads[2].start()
    for thread in threads:
        thread.join()
    assert sorted(gone) == [0, 1, 2]
    meeting.close()
    assert meeting.wait(0) == {}


def test_a_failure_reaches_every_process_with_its_reason():
    meeting = Meeting([(member(i), 3) for i in range(3)])
    meeting.results[2].fail("ValueError: no such prompt")
    expected = "process 2 (host host-2, pid 102) failed: ValueError: no such prompt"
    assert meeting.wait(2) == {0: expected, 1: expected}
    meeting.close()


def test_a_process_that_stands_still_is_named_to_the_others():
    meeting = Meeting([(member(i), 3) for i in range(3)])
    meeting.results[1]._closed.set()  # its beat stops, its connection stays
    reasons = meeting.wait(2)
    meeting.close()
    for process in (0, 2):
        assert (
            reasons[process] == "process 1 (host host-1, pid 101) sent no heartbeat for 0.4 s (distributed.silence_s)"
        )


@pytest.mark.parametrize("garbage", [b"3\n[]\nnull\n", b"\xff\xfe{\n", b"[" * 60_000 + b"\n"])
def test_a_line_that_says_nothing_is_survived_and_the_end_after_it_is_noticed(garbage):
    meeting = Meeting([(member(i), 3) for i in range(3)], silence_s=2.0)
    (to_process_0,) = meeting.results[1]._connections
    to_process_0.line._socket.sendall(garbage)
    time.sleep(0.2)
    assert meeting.ended == []
    to_process_0.line.end()
    expected = "process 1 (host host-1, pid 101) ended unexpectedly: it was killed or crashed; see its own log"
    assert meeting.wait(3) == {0: expected, 1: expected, 2: expected}
    meeting.close()


def test_a_line_without_an_end_is_an_end():
    meeting = Meeting([(member(i), 2) for i in range(2)], silence_s=2.0)
    meeting.results[1]._connections[0].line._socket.sendall(b"x" * 70_000)
    reasons = meeting.wait(2)
    assert "process 1 (host host-1, pid 101) is lost: sent a line of more than 65536 bytes" in reasons[0]
    meeting.close()


def refusals(calls: list[tuple[Member, int]], timeout_s: float = 5.0, **more: dict[int, str]) -> list[str]:
    results = Meeting(calls, timeout_s, **more).results
    assert all(isinstance(error, PeersError) for error in results), results
    return [str(error) for error in results]


def test_two_processes_with_the_same_id_are_refused_and_both_named():
    twin = Member(1, "host-9", 109)
    for text in refusals([(member(0), 3), (member(1), 3), (twin, 3)]):
        assert "two processes have the id 1: process 1 (host host-" in text
        assert "pid 101" in text
        assert "pid 109" in text
        assert "give every process its own id" in text


def test_two_processes_0_on_one_host_are_refused():
    assert any("cannot listen on port" in text for text in refusals([(member(0), 2), (member(0), 2)], timeout_s=0.5))


def test_processes_that_disagree_on_their_number_are_refused():
    for text in refusals([(member(0), 2), (member(1), 4)]):
        assert text.startswith("process 1 (host host-1, pid 101) was started as one of 4 processes, process 0")


def test_a_process_that_does_not_come_is_named_after_the_timeout():
    for text in refusals([(member(0), 4), (member(2), 4)], timeout_s=0.5):
        assert (
            "after 0.5 s process(es) 1, 3 of 4 have not connected (here: process 0 (host host-0, pid 100); process 2"
            in text
        )


def test_a_missing_coordinator_is_an_error_with_the_address_that_was_tried():
    began = time.monotonic()
    (text,) = refusals([(member(1), 2)], timeout_s=0.5)
    assert time.monotonic() - began < 5
    assert "could not reach the coordinator, process 0, at 127.0.0.1:" in text
    assert "for 0.5 s ([Errno 111] Connection refused); start process 0 on that host" in text


def test_a_process_with_another_secret_is_turned_away_by_both_sides():
    first, second = refusals([(member(0), 2), (member(1), 2)], timeout_s=0.5, secrets={1: "of another run"})
    assert "process(es) 1 of 2 have not connected" in first
    assert "127.0.0.1 (it does not know this run's secret (UDM_GRPO_SECRET))" in first
    assert "called by process 1 (host host-1, pid 101), does not have the same secret; export the same" in second


def claim(**changes: object) -> bytes:
    """Return the message of a stranger that knows this code but not the secret."""
    return json.dumps({**hello(member(1), 2, "challenge", "nonce", "guessed"), **changes}).encode() + b"\n"


STRANGERS = [
    b"GET / HTTP/1.1\r\n\r\n",
    claim(),
    claim(process=99),
    claim(process=True, pid=None),
    claim(host=["a"], count=2.0),
    claim(host="h" * 1000),
    claim(proof={}),
    b"3\n",
    b"[" * 60_000 + b"\n",
    b"\xff" * 70_000,
    b"{}",
    b"",
]


@pytest.fixture
def waiting_process_0():
    """Start process 0 of two as a thread that waits for the other; yield its address and its peers."""
    address, met = ("127.0.0.1", free_port()), list[Peers]()
    server = threading.Thread(target=lambda: met.append(meet(member(0), 2, address, 20.0, 5.0, print, "of this run")))
    server.start()
    yield address, met
    server.join()
    for peers in met:
        peers.close()


def call(address: tuple[str, int]) -> socket.socket:
    deadline = time.monotonic() + 5
    while True:
        try:
            return socket.create_connection(address)
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_strangers_are_not_believed_and_hold_nobody_up(waiting_process_0):
    """They send garbage, guesses or nothing, and each of them stays connected."""
    address, met = waiting_process_0
    strangers = [call(address) for _ in [*STRANGERS, *[b""] * 30]]
    for stranger, said in zip(strangers, STRANGERS, strict=False):
        stranger.sendall(said)
    time.sleep(0.2)
    assert met == []
    began = time.monotonic()
    met.append(meet(member(1), 2, address, 5.0, 5.0, print, "of this run"))
    assert time.monotonic() - began < 2, "silent strangers do not delay it"
    for stranger in strangers:
        stranger.close()


def test_an_id_outside_of_the_run_does_not_complete_the_meeting(waiting_process_0):
    """This holds even if the process knows the secret."""
    address, met = waiting_process_0
    with pytest.raises(
        PeersError, match=r"process 99 \(host host-99, pid 199\) cannot be one of 2; their ids go from 0"
    ):
        meet(member(99), 2, address, 5.0, 5.0, print, "of this run")
    assert met == []
    met.append(meet(member(1), 2, address, 5.0, 5.0, print, "of this run"))


def test_a_process_that_is_started_again_takes_its_place():
    """Process 1 of 3 connects, dies while process 2 is still missing, and connects again."""

    class Dies(Meeting):
        def _meet(self, at: int, me: Member, *rest: Any) -> None:
            if at == 1:
                with contextlib.closing(Line(call(self.address), 5.0)) as first:
                    first.send(**hello(me, 3, first.read(5.0)["challenge"], "nonce", "of this run"))
                    time.sleep(0.1)
            if at == 2:
                time.sleep(0.5)
            super()._meet(at, me, *rest)

    meeting = Dies([(member(i), 3) for i in range(3)])
    assert all(isinstance(peers, Peers) for peers in meeting.results), meeting.results
    meeting.close()
    assert meeting.wait(0) == {}


def test_a_caller_does_not_believe_another_program(monkeypatch):
    """The other program answers, but not as process 0 does."""
    monkeypatch.setattr(peers_module, "HELLO_TIMEOUT_S", 0.5)
    for said in [b"220 mail.example ESMTP\r\n", b"5\n", b'{"challenge": 3}\n', b""]:
        with socket.create_server(("127.0.0.1", 0)) as other:
            thread = threading.Thread(target=lambda: [answer_with(other, said) for _ in range(20)], daemon=True)  # noqa: B023
            thread.start()
            with pytest.raises(PeersError, match="could not reach the coordinator, process 0"):
                meet(member(1), 2, other.getsockname(), 0.5, 5.0, print, "of this run")
    with socket.create_server(("127.0.0.1", 0)) as other:
        said = b'{"challenge": "a"}\n{"welcome": {"process": 0, "host": "h", "pid": 1}}\n'
        threading.Thread(target=answer_with, args=(other, said), daemon=True).start()
        with pytest.raises(PeersError, match="does not have the same secret"):
            meet(member(1), 2, other.getsockname(), 0.5, 5.0, print, "of this run")


def answer_with(other: socket.socket, said: bytes) -> None:
    try:
        connected, _ = other.accept()
        with connected:
            connected.sendall(said)
            connected.recv(1000)
    except OSError:
        pass


def test_one_process_joins_nothing(monkeypatch):
    for name in EXPLICIT:
        monkeypatch.delenv(name, raising=False)
    with joined(DistributedConfig()):
        pass
    with pytest.raises(KeyError), joined(DistributedConfig()):
        raise KeyError("passes through")


def start(what: str, count: int, tmp: Path) -> list[subprocess.Popen]:
    """Start `count` processes of this file that work together until one of them does WHAT."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "JAX_PLATFORMS": "cpu"}
    port = free_port()
    processes = []
    for process in range(count):
        words = [sys.executable, __file__, what, str(port), str(process), str(count)]
        with (tmp / f"{process}.log").open("w") as log:
            processes.append(subprocess.Popen(words, env=environment, stdout=log, stderr=subprocess.STDOUT))
    return processes


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("1 dies", r"error: this run has ended, because process 1 \(host .*, pid {pid}\) ended unexpectedly"),
        ("0 dies", r"error: this run has ended, because process 0 \(host .*, pid {pid}\) ended unexpectedly"),
        ("1 raises", r"error: this run has ended, because process 1 \(host .*, pid {pid}\) failed: KeyError: 'mine'"),
    ],
)
def test_the_end_of_a_process_ends_the_others_with_an_error_that_names_it(tmp_path, what, message):
    """They end within 10 s, although the heartbeat timeout is 60 s; these are real processes, inside a collective."""
    processes = start(what, 2, tmp_path)
    lost = int(what[0])
    processes[lost].wait(120)
    died = time.monotonic()
    assert processes[1 - lost].wait(120) == 1
    assert time.monotonic() - died < 10
    text = (tmp_path / f"{1 - lost}.log").read_text()
    assert re.search(message.format(pid=processes[lost].pid), text), text
    if what == "1 raises":
        assert processes[1].returncode == 2
        assert "\nerror: process 1 (host " in (tmp_path / "1.log").read_text()


def test_a_long_end_of_process_0_is_no_abort_of_the_others(tmp_path):
    """Process 0 writes an export for longer than jax's barrier waits, which is 1 s here."""
    processes = start("0 exports", 2, tmp_path)
    logs = [tmp_path / f"{process}.log" for process in range(2)]
    assert [process.wait(120) for process in processes] == [0, 0], [log.read_text() for log in logs]


def work(what: str, port: str, process: str, count: str) -> None:
    """Gather numbers with the others, and act as WHAT says in the third turn."""
    config = DistributedConfig(f"127.0.0.1:{port}", int(count), int(process), 60.0, 60.0)
    act: dict[str, Callable[[], None]] = {
        f"{process} dies": lambda: os.kill(os.getpid(), signal.SIGKILL),
        f"{process} raises": fail,
        f"{process} exports": lambda: None,
    }
    distributed.SHUTDOWN_S = 1
    with joined(config, (KeyError,)):
        from udm_grpo.multihost import hosts

        for turn in range(1000):
            assert hosts.gather([turn, int(process)]) == [[turn, i] for i in range(int(count))]
            if turn == 2 and what in act:
                act[what]()
            if turn == 2 and what.endswith("exports"):
                time.sleep(4.0 * (what in act))
                return


def fail() -> None:
    raise KeyError("mine")


if __name__ == "__main__":
    work(*sys.argv[1:])
