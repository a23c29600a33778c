"""The server a client talks to, its own or somebody else's, and how often it may be lost and found again."""

from __future__ import annotations

import contextlib
import logging
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rewards_bridge import transport
from rewards_bridge.connection import Connection
from rewards_bridge.differences import differences
from rewards_bridge.errors import BridgeError, LostError, UsageError
from rewards_bridge.options import STDIN, as_line
from rewards_bridge.process import ScorerProcess, scorer_environment
from rewards_bridge.protocol import messages
from rewards_bridge.redaction import redacted, remember

_LOG = logging.getLogger("rewards_bridge")
_STOP_GRACE_S = 3.0
_FIRST_PAUSE_S, _LAST_PAUSE_S = 0.5, 30.0
"""From one attempt to start it or to connect to the next, doubling."""
_MAX_SOCKET_PATH = 100  # the kernel allows 107 bytes


@dataclass(frozen=True)
class BridgeConfig:
    """Which scorer, where, and how long to wait for it.

    With an address, what only matters for starting a process is not used: interpreter, environment, device and
    memory_fraction. The options are compared with those of the server, which count.
    """

    scorer: str = "shapes"  # a known name, or "module:Class"
    options: dict[str, str] = field(default_factory=dict)  # of the scorer
    address: str | None = None  # unix:/path or HOST:PORT of a running server; None: start one
    interpreter: str | None = None  # of the started process; None: this one
    environment: dict[str, str] = field(default_factory=dict)  # added for the started process
    device: str | None = None  # cuda:0 or cpu, say, for scorers that take a device, if the options name none
    memory_fraction: float | None = None  # largest part of the GPU's memory for PyTorch in the started process
    deadline_s: float = 300.0  # longest time in which the scorer finishes nothing, of anybody's, while a batch waits
    start_timeout_s: float = 300.0  # for loading the scorer
    max_restarts: int = 3  # of the process, or reconnections to the address, in the client's life
    kept_images: str | None = None  # folder for the images of bad scores
    tls_ca: str | None = None  # PEM
    token_file: str | None = None
    check_example: bool = True  # a wrong verdict on the scorer's test images is an error; False: a warning
    cancelled: Callable[[], bool] | None = None  # asked while the scorer loads first; True ends that with an error

    def __post_init__(self) -> None:
        remember(self.options)
        remember(self.environment)
        if not 0 < self.deadline_s <= messages.MAX_DEADLINE_S or self.start_timeout_s <= 0 or self.max_restarts < 0:
            raise UsageError(
                f"deadline_s has to be in (0, {messages.MAX_DEADLINE_S}], start_timeout_s positive, max_restarts not "
                f"negative; found {self.deadline_s}, {self.start_timeout_s} and {self.max_restarts}"
            )
        if self.address is None:
            if self.tls_ca or self.token_file:
                raise UsageError("tls_ca and token_file are for a running server; give its address, or neither")
        elif not transport.is_local(self.address) and not (self.tls_ca and self.token_file):
            raise UsageError(f"{self.address} is another machine: give tls_ca and token_file")


class Peer:
    """A serving scorer. link is the present connection; recover replaces it.

    warnings: a text for everything about the server that the configuration does not say, or that was let pass.
    """

    def __init__(self, config: BridgeConfig) -> None:
        self.restarts = 0
        self.warnings: tuple[str, ...] = ()
        self._config = config
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._failure: tuple[type[LostError], str] | None = None
        self._process: ScorerProcess | None = None
        self._links: list[Connection] = []
        self._folder = None if config.address else _private_folder()
        try:
            self.link = self._open()
        except BaseException:
            self.close()
            raise

    @property
    def is_own(self) -> bool:
        """Whether we started the process and may kill it."""
        return self._config.address is None

    def has_died(self) -> bool:
        """Whether our own process has ended."""
        return self._process is not None and self._process.exit_code() is not None

    def describe_process(self) -> str:
        """How our process is and what it wrote last; "" for somebody else's."""
        return self._process.describe() if self._process else ""

    def recover(self, link: Connection, kind: type[LostError], problem: str) -> None:
        """Replace a link that failed, once for all who report it; raise kind if it has failed too often."""
        with self._lock:
            if self._closed.is_set():
                raise BridgeError("the client was closed before this batch was scored")
            if self._failure:
                raise self._failure[0](self._failure[1])
            if link is not self.link:
                return
            if self._process:
                # A broken connection is noticed a moment before the process is gone; its own exit code says more.
                if kind is LostError:
                    self._process.exit_code(wait_s=1.0)
                problem = f"{problem}; {self._process.describe()}"
                self._process.stop(grace_s=0)
            self._replace(kind, problem)

    def _replace(self, kind: type[LostError], problem: str) -> None:
        """Open new links until one serves; raise kind, now and at every later failure, when none may be opened."""
        while True:
            if self.restarts >= self._config.max_restarts:
                self._failure = kind, f"{problem}\n(given up after {self.restarts} restarts, max_restarts)"
                raise kind(self._failure[1])
            self.restarts += 1
            verb = "restarting it" if self.is_own else "connecting again"
            _LOG.warning("%s (%s, %d of %d)", problem, verb, self.restarts, self._config.max_restarts)
            began = time.monotonic()
            try:
                self.link = self._open()
                return
            except BridgeError as error:  # such as a device whose memory the one before has not given back yet
                kind, problem = LostError, str(error)
                if self._process:
                    self._process.stop(grace_s=0)
            pause_s = min(_FIRST_PAUSE_S * 2**self.restarts, _LAST_PAUSE_S)
            if self._closed.wait(max(began + pause_s - time.monotonic(), 0.0)):
                raise BridgeError("the client was closed before this batch was scored")

    def close(self) -> None:
        """End our process, close the connections, remove the socket. Safe to call twice."""
        self._closed.set()  # first: a recovery under way holds the lock and looks here
        with self._lock:
            if self._process:
                self._process.stop(_STOP_GRACE_S)
            for link in self._links:
                link.close()
            self._links.clear()
            if self._folder:
                shutil.rmtree(self._folder, ignore_errors=True)

    def _open(self) -> Connection:
        config = self._config
        address = config.address
        if address is None:
            # Another socket each time: an older connection must never reach a newer process.
            address = f"unix:{self._folder}/{self.restarts}"
            try:
                words = ["serve", "--exit-with-parent", "--listen", address, *scorer_arguments(config)]
                words.append(f"--deadline={config.deadline_s:g}")
                if config.memory_fraction:
                    words.append(f"--memory-fraction={config.memory_fraction:g}")
                self._process = ScorerProcess(words, config.interpreter, config.environment, config.options)
            except OSError as error:
                raise BridgeError(
                    f"cannot start the scorer with interpreter {config.interpreter!r}: {error}"
                ) from error
        link = Connection(address, config.tls_ca, config.token_file)
        self._links.append(link)
        try:
            link.wait_until_serving(config.start_timeout_s, self._check_alive)
        except BridgeError as error:
            if self._process and self._process.exit_code() is None:
                raise BridgeError(f"{error}; {self._process.describe()}") from error
            raise
        self._heed(link)
        return link

    def _heed(self, link: Connection) -> None:
        """Raise BridgeError if the scorer is the wrong one or judges wrongly; note what is only to be warned of.

        Whoever opened the client tells the first warnings; those of a server that has changed meanwhile are logged.
        """
        config, reply = self._config, link.describe(self._config.scorer, self._config.start_timeout_s)
        where = "" if self.is_own else f" at {link.address}"
        found = []
        if reply.example_problem:
            problem = f"scorer {config.scorer!r}{where} gets its built-in test images wrong: {reply.example_problem}"
            if config.check_example:
                raise BridgeError(
                    f"{problem}. It has other weights, or another version of a package, than it is made for: fix that, "
                    "or set its check_example to False to continue with a warning."
                )
            found.append(problem)
        if not self.is_own and reply.HasField("setup"):
            found += [f"{config.scorer}{where}: {text}" for text in differences(config.options, reply.setup)]
        for text in found if self.restarts else ():
            if text not in self.warnings:
                _LOG.warning("%s", text)
        self.warnings = tuple(found)

    def _check_alive(self) -> None:
        if self._closed.is_set():
            raise BridgeError("the client was closed while its scorer started")
        if self._config.cancelled and not self.restarts and self._config.cancelled():
            raise BridgeError(f"scorer {self._config.scorer!r} was no longer wanted while it loaded")
        if self.has_died():
            raise BridgeError(f"scorer {self._config.scorer!r} could not be started: {self.describe_process()}")


def scorer_arguments(config: BridgeConfig) -> list[str]:
    """Return what says on a command line of rewards_bridge which scorer and device; options follow on stdin."""
    words = ["--scorer", config.scorer, "--options-file", STDIN]
    return [*words, *(["--device", config.device] if config.device else [])]


def examine(config: BridgeConfig, flags: Sequence[str] = ()) -> tuple[bool, str]:
    """Return (whether the scorer could be started here, in words), as rewards_bridge's doctor says it of this config.

    It runs as the scorer would: under its interpreter, in its environment. flags: of the doctor, further ones.
    """
    command = [
        config.interpreter or sys.executable,
        "-m",
        "rewards_bridge",
        "doctor",
        *scorer_arguments(config),
        *flags,
    ]
    try:
        done = subprocess.run(
            command,
            env=scorer_environment(config.environment, config.options),
            input=as_line(config.options).decode(),
            capture_output=True,
            text=True,
            timeout=config.start_timeout_s,
        )
    except OSError as error:
        return False, f"cannot start the interpreter {command[0]}: {error}"
    except subprocess.TimeoutExpired:
        return False, f"was not loaded after start_timeout_s, {config.start_timeout_s:g} s"
    said = "\n".join(line.removeprefix("  ") for line in done.stdout.splitlines()[1:])
    return done.returncode == 0, redacted(said or transport.shorten(done.stderr.strip(), 2000))


def _private_folder() -> str:
    """Return a new folder only we may enter, its path short enough for a unix socket."""
    folder = tempfile.mkdtemp(prefix="rewards-bridge-")
    if len(folder) < _MAX_SOCKET_PATH:
        return folder
    with contextlib.suppress(OSError):
        Path(folder).rmdir()
    return tempfile.mkdtemp(prefix="rewards-bridge-", dir="/tmp")
