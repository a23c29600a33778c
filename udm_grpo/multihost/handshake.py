"""How the processes of a run recognise each other on a new connection, and the lines of JSON that they exchange.

Process 0 sends every caller a random number. The caller answers with who it is, a random number of its own, and a proof
that it knows the secret of the run: an HMAC of all of it. Process 0 answers with the same kind of proof. Whoever cannot
prove it is not believed, whatever it says. The secret itself is never sent. Nothing that comes in is executed.

The secret is the text of the environment variable UDM_GRPO_SECRET, the same in every process of a run. Without it the
proof shows only that the other side is a process of this program.
"""

import contextlib
import hmac
import json
import select
import socket
import threading
import time
from dataclasses import asdict, dataclass
from typing import Any

SECRET_VARIABLE = "UDM_GRPO_SECRET"
MAX_LINE_BYTES = 1 << 16
MAX_HOST_CHARACTERS = 255


@dataclass(frozen=True)
class Member:
    """One process of a run."""

    process: int
    host: str
    pid: int

    def __str__(self) -> str:
        return f"process {self.process} (host {self.host}, pid {self.pid})"


class Line:
    """A connection on which each side sends JSON objects, one a line."""

    def __init__(self, connected: socket.socket, send_timeout_s: float) -> None:
        self._socket = connected
        self._socket.settimeout(send_timeout_s)
        self._rest = b""
        self._lock = threading.Lock()

    def send(self, **message: Any) -> None:
        """Send one object; whoever reads this connection sees if it is gone."""
        with contextlib.suppress(OSError), self._lock:
            self._socket.sendall(json.dumps(message).encode() + b"\n")

    def read(self, timeout_s: float) -> dict[str, Any]:
        """Return the next object, {} for a line that is not one.

        Raises TimeoutError when no whole line comes within timeout_s, however slowly it trickles in, EOFError at the
        end of the connection, ValueError for a line that does not end, OSError when the connection breaks.
        """
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._rest:
            if len(self._rest) > MAX_LINE_BYTES:
                raise ValueError(f"sent a line of more than {MAX_LINE_BYTES} bytes")
            if not self._is_readable(deadline - time.monotonic()):
                raise TimeoutError
            chunk = self._socket.recv(4096)
            if not chunk:
                raise EOFError
            self._rest += chunk
        line, _, self._rest = self._rest.partition(b"\n")
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            return {}
        return message if isinstance(message, dict) else {}

    def is_gone(self) -> bool:
        """Whether the other side has closed the connection."""
        try:
            return self._is_readable(0.0) and self._socket.recv(1, socket.MSG_PEEK) == b""
        except OSError:
            return True

    def _is_readable(self, timeout_s: float) -> bool:
        ready = select.poll()
        ready.register(self._socket, select.POLLIN)
        return bool(ready.poll(max(timeout_s, 0) * 1000))

    def end(self) -> None:
        """Say that nothing more will be sent."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()


def hello(me: Member, count: int, challenge: str, nonce: str, secret: str) -> dict[str, Any]:
    """Return what a caller says of itself, with its proof; nonce is a random text of its own."""
    said = {**asdict(me), "count": count, "nonce": nonce}
    return {**said, "proof": _proof(secret, "caller", challenge, said)}


def read_hello(message: dict[str, Any], challenge: str, secret: str) -> tuple[Member, int, str]:
    """Return the caller, its number of processes and its nonce. ValueError, with the reason, if it is not believed."""
    said: dict[str, Any] = {name: message.get(name) for name in ("process", "host", "pid", "count", "nonce")}
    numbers = all(type(said[name]) is int and said[name] >= 0 for name in ("process", "pid", "count"))
    if not numbers or not isinstance(said["host"], str) or not isinstance(said["nonce"], str):
        raise ValueError("what it said is not what a process of a run says")
    if len(said["host"]) > MAX_HOST_CHARACTERS:
        raise ValueError("its host's name is too long")
    if not _is_proof(message.get("proof"), _proof(secret, "caller", challenge, said)):
        raise ValueError(f"it does not know this run's secret ({SECRET_VARIABLE})")
    return Member(said["process"], said["host"], said["pid"]), said["count"], said["nonce"]


def answer(kind: str, content: Any, nonce: str, secret: str) -> dict[str, Any]:
    """Return process 0's answer to a caller, of the kind "welcome" (its own Member) or "refused" (a text)."""
    return {kind: content, "proof": _proof(secret, kind, nonce, content)}


def read_answer(message: dict[str, Any], nonce: str, secret: str) -> tuple[str, Any]:
    """Return the kind and the content of process 0's answer; ValueError if it is none, or if its proof is wrong."""
    for kind in ("welcome", "refused"):
        if kind in message:
            if not _is_proof(message.get("proof"), _proof(secret, kind, nonce, message[kind])):
                raise ValueError(f"does not have the same secret; export the same {SECRET_VARIABLE} in every process")
            return kind, message[kind]
    raise ValueError("gave no answer that a process 0 gives")


def _proof(secret: str, *parts: Any) -> str:
    text = json.dumps(parts, sort_keys=True).encode()
    return hmac.new(secret.encode(errors="surrogateescape"), text, "sha256").hexdigest()


def _is_proof(received: Any, expected: str) -> bool:
    return isinstance(received, str) and hmac.compare_digest(received.encode(errors="replace"), expected.encode())
