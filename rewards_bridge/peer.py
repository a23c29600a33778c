"""The server that a client uses, its own process or an address, with a limited number of restarts or reconnections."""

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
"""Between attempts to start the process or to connect; the pause doubles each time."""
_MAX_SOCKET_PATH = 100  # the kernel allows 107 bytes


@dataclass(frozen=True)
class BridgeConfig:
    """Which scorer to use, where it runs, and how long to wait for it.

    With an address, the settings for starting a process are ignored: interpreter, environment, device and
    memory_fraction. The options are compared with those of the server, whose own options apply.
    """

    scorer: str = "shapes"  # a known name, or "module:Class"
    options: dict[str, str] = field(default_factory=dict)  # of the scorer
    address: str | None = None  # unix:/path or HOST:PORT of a running server; None: start one
    interpreter: str | None = None  # of the started process; None: this one
    environment: dict[str, str] = field(default_factory=dict)  # extra variables of the started process
    device: str | None = None  # such as cuda:0 or cpu, for scorers that take a device, if the options name none
    memory_fraction: float | None = None  # maximum share of the GPU's memory for PyTorch in the started process
    deadline_s: float = 300.0  # longest time without any finished batch, of any client, while a batch waits
    start_timeout_s: float = 300.0  # for loading the scorer
    max_restarts: int = 3  # of the process, or reconnections to the address, during the client's lifetime
    kept_images: str | None = None  # folder for the images of bad scores
    tls_ca: str | None = None  # PEM
    token_file: str | None = None
    check_example: bool = True  # wrong results on the scorer's test images are an error; False: a warning
    cancelled: Callable[[], bool] | None = None  # polled during the first load of the scorer; True aborts it

    def __post_init__(self) -> None:
        remember(self.options)
        remember(self.environment)
        if not 0 < self.deadline_s <= messages.MAX_DEADLINE_S or self.start_timeout_s <= 0 or self.max_restarts < 0:
            raise UsageError(
                f"deadline_s must be in (0, {messages.MAX_DEADLINE_S}], start_timeout_s positive, max_restarts not "
                f"negative; found {self.deadline_s}, {self.start_timeout_s} and {self.max_restarts}"
            )
        if self.address is None:
            if self.tls_ca or self.token_file:
                raise UsageError("tls_ca and token_file are for a running server; set its address, or remove both")
        elif not transport.is_local(self.address) and not (self.tls_ca and self.token_file):
            raise UsageError(f"{self.address} is another machine: set tls_ca and token_file")


class Peer:
    """A serving scorer. link is the current connection; recover replaces it.

    warnings: one text for each difference between server and configuration and each tolerated problem.
    """

    def __init__(self, config: BridgeConfig) -> None:
        self.restarts = 0
        self.warnings: tuple[str, ...] = ()
        self._config = config
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._failure: tuple[type[LostError], str] | None = None
        self._has_served = False
        self._process: ScorerProcess | None = None
        self._links: list[Connection] = []
        self._folder = None if config.address else _private_folder()
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    @property
    def is_own(self) -> bool:
        """Return whether we started the process and may kill it."""
        return self._config.address is None

    def has_died(self) -> bool:
        """Return whether our own process has ended."""
        return self._process is not None and self._process.exit_code() is not None

    def describe_process(self) -> str:
        """Return the state of our process and the end of its output; "" for a server at an address."""
        return self._process.describe() if self._process else ""

    def recover(self, link: Connection, kind: type[LostError], problem: str) -> None:
        """Replace a failed link, once for all threads that report it; raise kind after too many failures."""
        with self._lock:
            if self._closed.is_set():
                raise BridgeError("the client was closed before this batch was scored")
            if self._failure:
                raise self._failure[0](self._failure[1])
            if link is not self.link:
                return
            if self._process:
                # A broken connection is noticed a moment before the process ends; wait, since its exit code says more.
                if kind is LostError:
                    self._process.exit_code(wait_s=1.0)
                problem = f"{problem}; {self._process.describe()}"
                self._process.stop(grace_s=0)
            self._replace(kind, problem)

    def _start(self) -> None:
        """Open the first link. A process that a signal ended is restarted; one that ended by itself would do so again.

        Raises BridgeError.
        """
        try:
            self.link = self._open()
        except BridgeError as error:
            if not self._process or (self._process.exit_code(wait_s=0.2) or 0) >= 0 or not self._config.max_restarts:
                raise
            self._process.stop(grace_s=0)
            self._replace(LostError, str(error))
        self._has_served = True

    def _is_cancelled(self) -> bool:
        return not self._has_served and self._config.cancelled is not None and self._config.cancelled()

    def _replace(self, kind: type[LostError], problem: str) -> None:
        """Open new links until one serves; once no more are allowed, raise kind, now and at every later failure."""
        while True:
            if self.restarts >= self._config.max_restarts:
                self._failure = kind, f"{problem}\n(gave up after {self.restarts} restarts, max_restarts)"
                raise kind(self._failure[1])
            self.restarts += 1
            verb = "restarting it" if self.is_own else "connecting again"
            _LOG.warning("%s (%s, %d of %d)", problem, verb, self.restarts, self._config.max_restarts)
            began = time.monotonic()
            try:
                self.link = self._open()
                return
            except BridgeError as error:  # e.g. the previous process has not yet released the device's memory
                if self._is_cancelled():
                    raise
                kind, problem = LostError, str(error)
                if self._process:
                    self._process.stop(grace_s=0)
            pause_s = min(_FIRST_PAUSE_S * 2**self.restarts, _LAST_PAUSE_S)
            if self._closed.wait(max(began + pause_s - time.monotonic(), 0.0)):
                raise BridgeError("the client was closed before this batch was scored")

    def close(self) -> None:
        """Stop our process, close the connections and remove the socket. Safe to call twice."""
        self._closed.set()  # first: a running recovery holds the lock and checks this
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
            # A new socket each time, so that an older connection never reaches a newer process.
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
        """Raise BridgeError for a wrong scorer or wrong results on its test images; collect the warnings.

        The code that opened the client reports the first warnings; new ones after a reconnection are logged.
        """
        config, reply = self._config, link.describe(self._config.scorer, self._config.start_timeout_s)
        where = "" if self.is_own else f" at {link.address}"
        warnings = []
        if reply.example_problem:
            problem = f"scorer {config.scorer!r}{where} gets its built-in test images wrong: {reply.example_problem}"
            if config.check_example:
                raise BridgeError(
                    f"{problem}. Use the weights and package versions that the scorer was written for, or set its "
                    "check_example to False to continue with a warning."
                )
            warnings.append(problem)
        if not self.is_own and reply.HasField("setup"):
            warnings += [f"{config.scorer}{where}: {text}" for text in differences(config.options, reply.setup)]
        for text in warnings if self._has_served else ():
            if text not in self.warnings:
                _LOG.warning("%s", text)
        self.warnings = tuple(warnings)

    def _check_alive(self) -> None:
        if self._closed.is_set():
            raise BridgeError("the client was closed while its scorer started")
        if self._is_cancelled():
            raise BridgeError(f"loading scorer {self._config.scorer!r} was cancelled")
        if self.has_died():
            raise BridgeError(f"scorer {self._config.scorer!r} could not be started: {self.describe_process()}")


def scorer_arguments(config: BridgeConfig) -> list[str]:
    """Return the arguments of rewards_bridge that select the scorer and device; the options follow on stdin."""
    words = ["--scorer", config.scorer, "--options-file", STDIN]
    return [*words, *(["--device", config.device] if config.device else [])]


def examine(config: BridgeConfig, flags: Sequence[str] = ()) -> tuple[bool, str]:
    """Return (whether the scorer could be started here, a description) from rewards_bridge's doctor for this config.

    The doctor runs as the scorer would: with its interpreter and in its environment. flags: more flags of the doctor.
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
    report = "\n".join(line.removeprefix("  ") for line in done.stdout.splitlines()[1:])
    return done.returncode == 0, redacted(report or transport.shorten(done.stderr.strip(), 2000))


def _private_folder() -> str:
    """Create a folder that only we may enter, with a path short enough for a unix socket; return its path."""
    folder = tempfile.mkdtemp(prefix="rewards-bridge-")
    if len(folder) < _MAX_SOCKET_PATH:
        return folder
    with contextlib.suppress(OSError):
        Path(folder).rmdir()
    return tempfile.mkdtemp(prefix="rewards-bridge-", dir="/tmp")
