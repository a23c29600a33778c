"""The line between the processes of a run: who is there, and who has gone.

Process 0 listens; every other process calls it, says who it is, and keeps the connection. A process that ends without a
word closes its connection at once (the system does, however it was killed); one whose machine or network is gone, or
that stands still, sends no sign of life. Either way process 0 tells the others which process it was. Messages are
lines of JSON; nothing that comes in is executed.

Computing, collectives and shutting down are `jax.distributed`'s; this line is there for what that does not say. In jax
0.10.2 a coordinator that is not there, a process that does not come and two with the same id all end in an abort of
the process that cannot be caught (DEADLINE_EXCEEDED or ALREADY_EXISTS, without an address or an advice; a Python
callback in its place ends in std::bad_cast), a death is noticed after the heartbeat's time-out, and the reason of a
process that fails is not passed on. Like jax's coordinator, whose port is the next one, process 0 listens to whoever
reaches it, but only until all have come: keep both ports inside the cluster.
"""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, TextIO

HELLO_TIMEOUT_S = 10.0
"""How long a caller may take to say who it is."""
RETRY_S = 0.2
LAST_WORDS_S = 2.0
"""How long a process that leaves waits until the others have read why."""


class PeersError(RuntimeError):
    """The processes of a run do not find each other; the message says what to change."""


@dataclass(frozen=True)
class Member:
    """One process of a run."""

    process: int
    host: str
    pid: int

    def __str__(self) -> str:
        return f"process {self.process} (host {self.host}, pid {self.pid})"


@dataclass
class _Connection:
    member: Member
    socket: socket.socket
    lines: TextIO
    left: bool = False
    """It has said that it leaves."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def send(self, **message: Any) -> None:
        with contextlib.suppress(OSError), self.lock:  # whoever reads this connection sees that it is gone
            self.socket.sendall(json.dumps(message).encode() + b"\n")


class Peers:
    """The other processes, as connections: one to process 0, or process 0's to all the others."""

    def __init__(self, me: Member, connections: list[_Connection], silence_s: float, ended: Callable[[str], None]):
        self._me, self._connections, self._silence_s, self._ended = me, connections, silence_s, ended
        self._closed = threading.Event()
        self._over = threading.Lock()
        self._listeners = [
            threading.Thread(target=self._listen, args=(connection,), name="peers", daemon=True)
            for connection in connections
        ]
        for connection, listener in zip(connections, self._listeners, strict=True):
            connection.socket.settimeout(silence_s)
            listener.start()
        threading.Thread(target=self._beat, name="peers-beat", daemon=True).start()

    def fail(self, reason: str) -> None:
        """Tell the others that this process ends, and why."""
        self._closed.set()
        self._leave(failed=f"{self._me} failed: {reason}")

    def close(self) -> None:
        """Leave in peace; the others are not told that anything is wrong."""
        self._closed.set()
        self._leave(leaves=True)

    def _leave(self, **message: Any) -> None:
        """Send last words, and wait until they are read: a system that closes too early may drop them."""
        for connection in self._connections:
            connection.send(**message)
            with contextlib.suppress(OSError):
                connection.socket.shutdown(socket.SHUT_WR)
        deadline = time.monotonic() + LAST_WORDS_S
        for listener in self._listeners:
            if listener is not threading.current_thread():
                listener.join(max(deadline - time.monotonic(), 0))

    def _beat(self) -> None:
        while not self._closed.wait(self._silence_s / 4):
            for connection in self._connections:
                connection.send(alive=True)

    def _listen(self, connection: _Connection) -> None:
        with connection.socket, connection.lines:
            reason = self._read(connection)
            if reason is not None:
                self._end(reason)

    def _read(self, connection: _Connection) -> str | None:
        """Read until the connection ends; return why this run has to end, or None."""
        try:
            for line in connection.lines:
                message = json.loads(line)
                connection.left |= "leaves" in message
                if "failed" in message:
                    return str(message["failed"])
            reason = "ended without a word: it was killed, or it crashed; its own log says more"
        except TimeoutError:
            reason = f"gave no sign of life for {self._silence_s:g} s (distributed.silence_s)"
        except (OSError, ValueError) as error:
            reason = f"is lost: {error}"
        return None if connection.left else f"{connection.member} {reason}"

    def _end(self, reason: str) -> None:
        if self._closed.is_set() or not self._over.acquire(blocking=False):
            return
        self._leave(failed=reason)
        self._ended(reason)


def meet(
    me: Member, count: int, address: tuple[str, int], timeout_s: float, silence_s: float, ended: Callable[[str], None]
) -> Peers:
    """Wait until all `count` processes are connected through process 0 at `address` (host, port).

    ended: called once, from a thread, with a text that names the process that failed, died or fell silent (for
    `silence_s` seconds). Raises PeersError in every process when they do not all come within `timeout_s`, when two have
    the same id, or when they disagree on their number.
    """
    gather = _receive if me.process == 0 else _call
    return Peers(me, gather(me, count, address, time.monotonic() + timeout_s, timeout_s), silence_s, ended)


def _receive(me: Member, count: int, address: tuple[str, int], deadline: float, timeout_s: float) -> list[_Connection]:
    """Process 0: accept all the others."""
    found = dict[int, _Connection]()
    with _listener(address[1]) as listener:
        while len(found) < count - 1:
            listener.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                connection = _accept(listener, count, {0: me} | {i: there.member for i, there in found.items()})
            except TimeoutError:
                raise _refused(found, _absent(me, count, found, timeout_s)) from None
            except PeersError as error:
                raise _refused(found, str(error)) from None
            if connection:
                found[connection.member.process] = connection
    for connection in found.values():
        connection.send(welcome=asdict(me))
    return list(found.values())


def _absent(me: Member, count: int, found: dict[int, _Connection], timeout_s: float) -> str:
    absent = ", ".join(str(i) for i in range(count) if i not in {0, *found})
    here = "; ".join([str(me), *(str(connection.member) for connection in found.values())])
    advice = f"start them with the same coordinator's address as this one, or correct their number, {count}"
    return f"after {timeout_s:g} s process(es) {absent} of {count} have not come (here: {here}); {advice}"


def _listener(port: int) -> socket.socket:
    try:
        if socket.has_dualstack_ipv6():
            with contextlib.suppress(OSError):  # IPv6 is compiled in but switched off
                return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        return socket.create_server(("", port))
    except OSError as error:
        advice = "another process of this host has the id 0 too, or another program the port; change one of them"
        raise PeersError(f"process 0 cannot listen on port {port} ({error.strerror}): {advice}") from None


def _accept(listener: socket.socket, count: int, known: dict[int, Member]) -> _Connection | None:
    """Accept one process; None for a caller that is none. Raises PeersError for one that cannot be right."""
    connected, _ = listener.accept()
    connected.settimeout(HELLO_TIMEOUT_S)
    lines = connected.makefile("r", encoding="utf-8")
    try:
        hello = json.loads(lines.readline(4096))
        member, its_count = Member(int(hello["process"]), str(hello["host"]), int(hello["pid"])), int(hello["count"])
    except (OSError, ValueError, KeyError, TypeError):
        lines.close()
        connected.close()
        return None
    connection = _Connection(member, connected, lines)
    problem = None
    if its_count != count:
        problem = f"{member} was started as one of {its_count} processes, {known[0]} as one of {count}"
    elif member.process in known:
        problem = f"two processes have the id {member.process}: {known[member.process]} and {member}"
    if problem:
        problem += "; give every process its own id, from 0, and all the same number of processes"
        raise _refused({member.process: connection}, problem)
    return connection


def _refused(found: dict[int, _Connection], problem: str) -> PeersError:
    for connection in found.values():
        with connection.socket, connection.lines:
            connection.send(refused=problem)
    return PeersError(problem)


def _call(me: Member, count: int, address: tuple[str, int], deadline: float, timeout_s: float) -> list[_Connection]:
    """Another process: reach process 0 and wait until all are there."""
    where = f"{address[0]}:{address[1]}"
    connected = _reach(me, address, deadline, timeout_s)
    connected.sendall(json.dumps({**asdict(me), "count": count}).encode() + b"\n")
    connected.settimeout(max(deadline - time.monotonic(), 0) + HELLO_TIMEOUT_S)  # process 0 knows best who is missing
    lines = connected.makefile("r", encoding="utf-8")
    try:
        message = json.loads(lines.readline())
    except (OSError, ValueError):
        message = {}
    if "welcome" in message:
        return [_Connection(Member(**message["welcome"]), connected, lines)]
    lines.close()
    connected.close()
    if "refused" not in message:
        advice = "see the log of process 0; if what answers there is another program, choose another port"
        raise PeersError(f"process 0 at {where} took {me}'s call and then did not answer; {advice}")
    raise PeersError(str(message["refused"]))


def _reach(me: Member, address: tuple[str, int], deadline: float, timeout_s: float) -> socket.socket:
    while True:
        try:
            return socket.create_connection(address, timeout=max(deadline - time.monotonic(), RETRY_S))
        except OSError as error:
            if time.monotonic() + RETRY_S > deadline:
                advice = "start process 0 on that host, open the port, or correct distributed.coordinator"
                found = f"{address[0]}:{address[1]} for {timeout_s:g} s ({error})"
                raise PeersError(f"{me} could not reach the coordinator, process 0, at {found}; {advice}") from None
        time.sleep(RETRY_S)
