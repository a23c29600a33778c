"""Connections between the processes of a run, which show which processes run and which have ended.

Process 0 listens; every other process calls it, identifies itself, and keeps the connection. If a process is killed or
crashes, the system closes its connection at once; if its machine or network is gone, or it hangs, its heartbeats stop.
Either way process 0 tells the others which process it was.

`jax.distributed` does the computation, the collectives and the shutdown; these connections report what it does not. In
jax 0.10.2 a missing coordinator, a missing process and two processes with the same id all end in an abort of the
process that cannot be caught (DEADLINE_EXCEEDED or ALREADY_EXISTS, without an address or advice; a Python callback in
its place ends in std::bad_cast), a death is noticed only after the heartbeat's timeout, and the reason of a process
that fails is not passed on. Process 0 listens until all have connected. It answers every caller in a thread of its own,
so that none delays another, and accepts only those that know the run's secret (`handshake`). jax's coordinator, on the
neighbouring port, is not authenticated: keep both ports inside the cluster.
"""

import contextlib
import queue
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from rewards_bridge.errors import UserError
from udm_grpo.multihost.handshake import Line, Member, answer, hello, read_answer, read_hello

HELLO_TIMEOUT_S = 10.0
"""Seconds that a caller may take to identify itself, and process 0 to answer it."""
RETRY_S = 0.2
LAST_WORDS_S = 2.0
"""Seconds that a process that leaves waits for the others to read why."""
MAX_GREETED = 256
"""Callers handled at a time; more are turned away until one of these has answered or timed out."""
MAX_STRANGERS_NAMED = 5


class PeersError(UserError, RuntimeError):
    """The processes of a run cannot connect; the message says what to change."""


@dataclass
class _Connection:
    member: Member
    line: Line
    nonce: str = ""
    """Of a caller: the nonce that the answer to it has to prove the secret with."""
    count: int = 0
    """Of a caller: the number of processes that it expects."""
    left: bool = False
    """It has announced that it leaves."""
    finished: threading.Event = field(default_factory=threading.Event)
    """It has announced that it (process 0: that every process) has finished."""


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
        for listener in self._listeners:
            listener.start()
        threading.Thread(target=self._beat, name="peers-beat", daemon=True).start()

    def fail(self, reason: str) -> None:
        """Tell the others that this process ends, and why."""
        self._closed.set()
        self._leave(failed=f"{self._me} failed: {reason}")

    def wait_for_all(self) -> None:
        """Return once all processes have called this, however long that takes: process 0 may export for an hour.

        Meanwhile a process that fails, dies or falls silent still ends the others.
        """
        if self._me.process != 0:
            self._connections[0].line.send(finished=True)
        for connection in self._connections:
            connection.finished.wait()
        if self._me.process == 0:
            for connection in self._connections:
                connection.line.send(finished=True)

    def close(self) -> None:
        """Leave normally, without reporting an error to the others."""
        self._closed.set()
        self._leave(leaves=True)

    def _leave(self, **message: Any) -> None:
        """Send a last message, and wait until it is read: a system that closes too early may drop it."""
        for connection in self._connections:
            connection.line.send(**message)
            connection.line.end()
        deadline = time.monotonic() + LAST_WORDS_S
        for listener in self._listeners:
            if listener is not threading.current_thread():
                listener.join(max(deadline - time.monotonic(), 0))

    def _beat(self) -> None:
        while not self._closed.wait(self._silence_s / 4):
            for connection in self._connections:
                connection.line.send(alive=True)

    def _listen(self, connection: _Connection) -> None:
        with contextlib.closing(connection.line):
            reason = self._read(connection)
            if reason is not None:
                self._end(reason)

    def _read(self, connection: _Connection) -> str | None:
        """Read until the connection ends, ignoring unknown messages; return why this run has to end, or None."""
        try:
            while True:
                message = connection.line.read(self._silence_s)
                connection.left |= "leaves" in message
                if "finished" in message:
                    connection.finished.set()
                if "failed" in message:
                    return str(message["failed"])
        except EOFError:
            reason = "ended unexpectedly: it was killed or crashed; see its own log"
        except TimeoutError:
            reason = f"sent no heartbeat for {self._silence_s:g} s (distributed.silence_s)"
        except (OSError, ValueError) as error:
            reason = f"is lost: {error}"
        return None if connection.left else f"{connection.member} {reason}"

    def _end(self, reason: str) -> None:
        if self._closed.is_set() or not self._over.acquire(blocking=False):
            return
        self._leave(failed=reason)
        self._ended(reason)


def meet(
    me: Member,
    count: int,
    address: tuple[str, int],
    timeout_s: float,
    silence_s: float,
    ended: Callable[[str], None],
    secret: str = "",
) -> Peers:
    """Wait until all `count` processes are connected through process 0 at `address` (host, port).

    ended: called once, from a thread, with a text that names the process that failed, died or fell silent (for
    `silence_s` seconds). secret: that of `handshake`, the same in all processes. Raises PeersError in every process if
    they do not all connect within `timeout_s`, if two have the same id, or if they disagree on their number.
    """
    until = time.monotonic() + timeout_s
    if me.process == 0:
        with _door(address[1], max(silence_s, 1.0), secret) as callers:
            connections = _receive(me, count, callers, until, timeout_s, secret)
    else:
        connections = _call(me, count, address, until, timeout_s, max(silence_s, 1.0), secret)
    return Peers(me, connections, silence_s, ended)


def _receive(
    me: Member, count: int, callers: "queue.SimpleQueue[_Connection | str]", until: float, timeout_s: float, secret: str
) -> list[_Connection]:
    """Wait, as process 0, until all the others have called."""
    joined, strangers = dict[int, _Connection](), list[str]()
    while len(joined) < count - 1:
        try:
            caller = callers.get(timeout=max(until - time.monotonic(), 0.001))
        except queue.Empty:
            raise _refuse(joined.values(), _absent(me, count, joined, strangers, timeout_s), secret) from None
        if isinstance(caller, str):
            strangers.append(caller)
            continue
        process = caller.member.process
        if process in joined and joined[process].line.is_gone():
            joined.pop(process).line.close()  # it was restarted
        known = {0: me} | {number: there.member for number, there in joined.items()}
        if caller.count != count:
            problem = f"{caller.member} was started as one of {caller.count} processes, {me} as one of {count}"
        elif process in known:
            problem = f"two processes have the id {process}: {known[process]} and {caller.member}"
        elif process >= count:
            strangers.append(f"{caller.member}, of {count} processes")
            _refuse([caller], f"{caller.member} cannot be one of {count}; their ids go from 0 to {count - 1}", secret)
            continue
        else:
            joined[process] = caller
            continue
        problem += "; give every process its own id, from 0, and all the same number of processes"
        raise _refuse([*joined.values(), caller], problem, secret)
    for connection in joined.values():
        connection.line.send(**answer("welcome", asdict(me), connection.nonce, secret))
    return list(joined.values())


def _absent(me: Member, count: int, joined: dict[int, _Connection], strangers: list[str], timeout_s: float) -> str:
    absent = ", ".join(str(i) for i in range(count) if i not in {0, *joined})
    here = "; ".join([str(me), *(str(connection.member) for connection in joined.values())])
    advice = f"start them with the same coordinator address as this one, or correct their number, {count}"
    text = f"after {timeout_s:g} s process(es) {absent} of {count} have not connected (here: {here}); {advice}"
    return f"{text}. Others called and were turned away: {_listed(strangers)}" if strangers else text


def _listed(strangers: list[str]) -> str:
    kinds = list(dict.fromkeys(strangers))
    more = [f"and {len(kinds) - MAX_STRANGERS_NAMED} more"] if len(kinds) > MAX_STRANGERS_NAMED else []
    return "; ".join([*kinds[:MAX_STRANGERS_NAMED], *more])


def _refuse(callers: Iterable[_Connection], problem: str, secret: str) -> PeersError:
    for connection in callers:
        with contextlib.closing(connection.line):
            connection.line.send(**answer("refused", problem, connection.nonce, secret))
    return PeersError(problem)


def _listener(port: int) -> socket.socket:
    try:
        if socket.has_dualstack_ipv6():
            with contextlib.suppress(OSError):  # IPv6 is compiled in but disabled
                return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        return socket.create_server(("", port))
    except OSError as error:
        advice = "another process of this host also has id 0, or another program uses the port; change one of them"
        raise PeersError(f"process 0 cannot listen on port {port} ({error.strerror}): {advice}") from None


@contextlib.contextmanager
def _door(port: int, send_timeout_s: float, secret: str) -> "Iterator[queue.SimpleQueue[_Connection | str]]":
    """Listen inside the block; yield a queue of callers: accepted ones, and texts about the others."""
    callers: queue.SimpleQueue[_Connection | str] = queue.SimpleQueue()
    greeted = threading.BoundedSemaphore(MAX_GREETED)
    closed = threading.Event()

    def greet(connected: socket.socket, where: str) -> None:
        line, challenge = Line(connected, send_timeout_s), secrets.token_hex(16)
        try:
            line.send(challenge=challenge)
            member, count, nonce = read_hello(line.read(HELLO_TIMEOUT_S), challenge, secret)
        except (OSError, EOFError, ValueError) as error:
            callers.put(f"{where} ({error or 'it did not identify itself'})")
            if isinstance(error, ValueError):
                line.send(**answer("refused", str(error), "", secret))
            line.close()
        else:
            callers.put(_Connection(member, line, nonce, count))
            if closed.is_set():
                _turn_away(callers)
        finally:
            greeted.release()

    def accept() -> None:
        while not closed.is_set():
            try:
                connected, address = listener.accept()
            except TimeoutError:
                continue
            except OSError:  # for example, no file descriptor is left
                closed.wait(RETRY_S)
                continue
            if greeted.acquire(blocking=False):
                threading.Thread(target=greet, args=(connected, address[0]), name="peers-hello", daemon=True).start()
            else:
                connected.close()

    with _listener(port) as listener:
        listener.settimeout(RETRY_S)
        thread = threading.Thread(target=accept, name="peers-door", daemon=True)
        thread.start()
        try:
            yield callers
        finally:
            closed.set()
            thread.join()
            _turn_away(callers)


def _turn_away(callers: "queue.SimpleQueue[_Connection | str]") -> None:
    """Close the connections of those that called too late."""
    with contextlib.suppress(queue.Empty):
        while True:
            caller = callers.get_nowait()
            if isinstance(caller, _Connection):
                caller.line.close()


def _call(
    me: Member,
    count: int,
    address: tuple[str, int],
    until: float,
    timeout_s: float,
    send_timeout_s: float,
    secret: str,
) -> list[_Connection]:
    """Call process 0, as another process, and wait until all have connected."""
    line, challenge = _reach(me, address, until, timeout_s, send_timeout_s)
    nonce = secrets.token_hex(16)
    line.send(**hello(me, count, challenge, nonce, secret))
    where = f"process 0 at {address[0]}:{address[1]}"
    try:
        # Process 0 knows which processes are missing, so wait a little longer for its answer.
        left_s = max(until - time.monotonic(), 0) + HELLO_TIMEOUT_S
        kind, content = read_answer(line.read(left_s), nonce, secret)
        if kind == "welcome":
            return [_Connection(Member(**content), line)]
    except (OSError, EOFError):
        line.close()
        advice = "see the log of process 0; if another program answers there, choose another port"
        raise PeersError(f"{where} accepted {me}'s call and then did not answer; {advice}") from None
    except ValueError as error:
        line.close()
        raise PeersError(f"{where}, called by {me}, {error}") from None
    line.close()
    raise PeersError(str(content))


def _reach(
    me: Member, address: tuple[str, int], until: float, timeout_s: float, send_timeout_s: float
) -> tuple[Line, str]:
    """Return the connection to process 0, and the random number that it sends to every caller."""
    while True:
        try:
            left_s = max(until - time.monotonic(), RETRY_S)
            line = Line(socket.create_connection(address, timeout=left_s), send_timeout_s)
            try:
                challenge = line.read(min(left_s, HELLO_TIMEOUT_S)).get("challenge")
                if isinstance(challenge, str):
                    return line, challenge
                raise ValueError("another program answers there")
            except BaseException:
                line.close()
                raise
        except (OSError, EOFError, ValueError) as error:
            if time.monotonic() + RETRY_S > until:
                advice = "start process 0 on that host, open the port, or correct distributed.coordinator"
                attempt = f"{address[0]}:{address[1]} for {timeout_s:g} s ({error or 'it closed the connection'})"
                raise PeersError(f"{me} could not reach the coordinator, process 0, at {attempt}; {advice}") from None
        time.sleep(RETRY_S)
