"""Authenticate the processes of a run on a new connection, and exchange lines of JSON.

Process 0 sends every caller a random number. The caller answers with its identity, a random number of its own, and a
proof that it knows the secret of the run: an HMAC of all of these. Process 0 answers with the same kind of proof. A
side without a valid proof is rejected. The secret itself is never sent. Nothing that is received is executed.

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
    """A connection on which each side sends JSON objects, one per line."""

    def __init__(self, connected: socket.socket, send_timeout_s: float) -> None:
        self._socket = connected
        self._socket.settimeout(send_timeout_s)
        self._rest = b""
        self._lock = threading.Lock()

    def send(self, **message: Any) -> None:
        """Send one object; a broken connection is reported by `read`, not here."""
        with contextlib.suppress(OSError), self._lock:
            self._socket.sendall(json.dumps(message).encode() + b"\n")

    def read(self, timeout_s: float) -> dict[str, Any]:
        """Return the next object, or {} for a line that is not one.

        Raises TimeoutError if no whole line arrives within timeout_s, however slowly it trickles in, EOFError at the
        end of the connection, ValueError for a line that does not end, OSError if the connection breaks.
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
        """Return whether the other side has closed the connection."""
        try:
            return self._is_readable(0.0) and self._socket.recv(1, socket.MSG_PEEK) == b""
        except OSError:
            return True

    def _is_readable(self, timeout_s: float) -> bool:
        ready = select.poll()
        ready.register(self._socket, select.POLLIN)
        return bool(ready.poll(max(timeout_s, 0) * 1000))

    def end(self) -> None:
        """Tell the other side that nothing more will be sent."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()


def hello(me: Member, count: int, challenge: str, nonce: str, secret: str) -> dict[str, Any]:
    """Return the message in which a caller identifies itself, with its proof; nonce is a random text of its own."""
    said = {**asdict(me), "count": count, "nonce": nonce}
    return {**said, "proof": _proof(secret, "caller", challenge, said)}


def read_hello(message: dict[str, Any], challenge: str, secret: str) -> tuple[Member, int, str]:
    """Return the caller, its number of processes and its nonce; raise ValueError with the reason to reject it."""
    said: dict[str, Any] = {name: message.get(name) for name in ("process", "host", "pid", "count", "nonce")}
    numbers = all(type(said[name]) is int and said[name] >= 0 for name in ("process", "pid", "count"))
    if not numbers or not isinstance(said["host"], str) or not isinstance(said["nonce"], str):
        raise ValueError("its message is not one that a process of a run sends")
    if len(said["host"]) > MAX_HOST_CHARACTERS:
        raise ValueError("its host name is too long")
    if not _is_proof(message.get("proof"), _proof(secret, "caller", challenge, said)):
        raise ValueError(f"it does not know this run's secret ({SECRET_VARIABLE})")
    return Member(said["process"], said["host"], said["pid"]), said["count"], said["nonce"]


def answer(kind: str, content: Any, nonce: str, secret: str) -> dict[str, Any]:
    """Return process 0's answer to a caller, of the kind "welcome" (its own Member) or "refused" (a text)."""
    return {kind: content, "proof": _proof(secret, kind, nonce, content)}


def read_answer(message: dict[str, Any], nonce: str, secret: str) -> tuple[str, Any]:
    """Return the kind and content of process 0's answer; raise ValueError if it is none or its proof is wrong."""
    for kind in ("welcome", "refused"):
        if kind in message:
            if not _is_proof(message.get("proof"), _proof(secret, kind, nonce, message[kind])):
                raise ValueError(f"does not have the same secret; export the same {SECRET_VARIABLE} in every process")
            return kind, message[kind]
    raise ValueError("did not answer as process 0 of a run does")


def _proof(secret: str, *parts: Any) -> str:
    text = json.dumps(parts, sort_keys=True).encode()
    return hmac.new(secret.encode(errors="surrogateescape"), text, "sha256").hexdigest()


def _is_proof(received: Any, expected: str) -> bool:
    return isinstance(received, str) and hmac.compare_digest(received.encode(errors="replace"), expected.encode())
