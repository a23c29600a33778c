"""Several processes as one run: how they find each other, what they tell each other, and how they end.

Where a process gets its place from, each item from the first that has it:

| | fields of the config | environment | else |
|---|---|---|---|
| address of process 0 | distributed.coordinator | JAX_COORDINATOR_ADDRESS | SLURM, Open MPI 4, TPU pods |
| number of processes | distributed.processes | JAX_NUM_PROCESSES | SLURM_NTASKS, OMPI_COMM_WORLD_SIZE, TPU pods |
| this process's id, from 0 | distributed.process_id | JAX_PROCESS_ID | SLURM_PROCID, OMPI_COMM_WORLD_RANK, TPU pods |

The scheduler's own variables are read as jax reads them: SLURM inside `srun` (SLURM_JOB_ID, SLURM_STEP_NODELIST,
SLURM_NTASKS, SLURM_PROCID, SLURM_LOCALID), Open MPI 4 (OMPI_MCA_orte_hnp_uri), TPU pods by their metadata.
JAX_COORDINATOR_PORT changes the port that is derived from them, JAX_LOCAL_DEVICE_IDS limits the devices of a process
(otherwise it has all that it sees: one process a host is the plain way). Nothing of all this: one process.
UDM_GRPO_SECRET, a text that is the same in all processes of a run, keeps strangers and other runs out of their meeting
(`host/handshake.py`); scripts/launch_slurm.sbatch makes one for each job.

Two ports of process 0 are used: the coordinator's for jax, and the next one (for 65535 the one before) for the line on
which a process's end is noticed. All processes need the same output_dir, and each the start model's folder and
the prompt files; each starts or reaches its own scorers.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
from jax._src import clusters  # jax has no public name for what jax.distributed.initialize detects

from udm_grpo.config import ConfigError, DistributedConfig
from udm_grpo.host.handshake import SECRET_VARIABLE, Member
from udm_grpo.host.peers import Peers, PeersError, meet

BACKSTOP = 2
"""jax's own watch, which ends processes without a clear message, waits this many times as long as ours."""
GRACE_S = 3.0
"""An error of one process often comes of another's death; so long the news of that may take."""


@dataclass(frozen=True)
class Place:
    """This process among the processes of a run."""

    coordinator: str
    """host:port of process 0."""
    processes: int
    process_id: int

    def watch(self) -> tuple[str, int]:
        """Return host and port of the line on which a process's end is noticed."""
        host, _, port = self.coordinator.rpartition(":")
        return host.strip("[]"), int(port) + (1 if int(port) < 65535 else -1)


def find_place(config: DistributedConfig, environment: Mapping[str, str]) -> Place | None:
    """Return this process's place, or None if it is the only one.

    Raises ConfigError if only some of the three items are known, or if they cannot be.
    """
    coordinator = config.coordinator or environment.get("JAX_COORDINATOR_ADDRESS", "")
    processes = _number(config.processes or None, environment, "JAX_NUM_PROCESSES")
    process_id = _number(None if config.process_id < 0 else config.process_id, environment, "JAX_PROCESS_ID")
    if not coordinator or processes is None or process_id is None:
        coordinator, processes, process_id = _detected(coordinator, processes, process_id, environment, config)
    if processes == 1 or (not coordinator and processes is None and process_id is None):
        return None
    known = {"coordinator": coordinator or None, "processes": processes, "process_id": process_id}
    absent = [f"distributed.{name}" for name, value in known.items() if value is None]
    if absent:
        found = ", ".join(f"{name} {value}" for name, value in known.items() if value is not None)
        advice = "set them or their environment variables (JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID)"
        raise ConfigError(f"of several processes only {found} is known; {' and '.join(absent)} is missing: {advice}.")
    assert processes is not None
    assert process_id is not None
    host, colon, port = coordinator.rpartition(":")
    if not colon or not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(
            f"distributed.coordinator is {coordinator!r}; give host:port of process 0, as in node-0:8476."
        )
    if not 0 <= process_id < processes:
        raise ConfigError(
            f"distributed.process_id is {process_id} of {processes} processes; the ids go from 0 to {processes - 1}."
        )
    return Place(coordinator, processes, process_id)


def _number(given: int | None, environment: Mapping[str, str], name: str) -> int | None:
    if given is not None:
        return given
    text = environment.get(name)
    if text is None:
        return None
    if not text.strip().lstrip("-").isdigit():
        raise ConfigError(f"the environment variable {name} is {text!r}; give a whole number.")
    return int(text)


def _detected(
    coordinator: str,
    processes: int | None,
    process_id: int | None,
    environment: Mapping[str, str],
    config: DistributedConfig,
) -> tuple[str, int | None, int | None]:
    """Fill in what the scheduler says."""
    known = (clusters.SlurmCluster, clusters.OmpiCluster, clusters.GkeTpuCluster, clusters.GceTpuCluster)
    for cluster in known:
        if not cluster.is_env_present():
            continue
        processes = cluster.get_process_count() if processes is None else processes
        process_id = cluster.get_process_id() if process_id is None else process_id
        if not coordinator and processes > 1:
            port = environment.get("JAX_COORDINATOR_PORT")
            coordinator = cluster.get_coordinator_address(int(config.initialization_timeout_s), port)
        return coordinator, processes, process_id
    if processes is None:
        processes = _number(None, environment, "OMPI_COMM_WORLD_SIZE")  # Open MPI 5 tells no address
    if process_id is None:
        process_id = _number(None, environment, "OMPI_COMM_WORLD_RANK")
    return coordinator, processes, process_id


@contextlib.contextmanager
def joined(config: DistributedConfig, expected: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Be one of the processes of a run for the length of the block; with one process, nothing happens.

    With several, an exception inside ends this process with status 1, after a line on stderr (for `expected` ones;
    a traceback for others), and all other processes with a line that names this one. A process that dies does the same
    to the others, at once, or after distributed.silence_s if its machine is gone.

    Raises ConfigError and PeersError when the processes do not find each other. Must come before jax uses a device.
    """
    place = find_place(config, os.environ)
    if place is None:
        yield
        return
    me = Member(place.process_id, socket.gethostname(), os.getpid())
    try:
        peers = meet(
            me,
            place.processes,
            place.watch(),
            config.initialization_timeout_s,
            config.silence_s,
            _end_with_the_others,
            os.environ.get(SECRET_VARIABLE, ""),
        )
    except PeersError as error:
        raise ConfigError(str(error)) from None
    try:
        _initialize(place, config)
        yield
        jax.distributed.shutdown()
        peers.close()
    except BaseException as error:
        _end(me, peers, error, expected)


def _initialize(place: Place, config: DistributedConfig) -> None:
    # A notice of preemption is agreed on by `any_process`; jax's own service would take SIGTERM from us.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        place.coordinator,
        place.processes,
        place.process_id,
        cluster_detection_method="deactivate",
        initialization_timeout=int(config.initialization_timeout_s),
        heartbeat_timeout_seconds=max(int(BACKSTOP * config.silence_s), 10),
    )


@dataclass
class Interruption:
    """Whether this process has been asked to stop."""

    requested: bool = False


@contextlib.contextmanager
def interruption() -> Iterator[Interruption]:
    """Take SIGTERM (a preemption, a scheduler's time limit) for a wish to stop, for the length of the block."""
    asked = Interruption()

    def ask(_number: int, _frame: Any) -> None:
        asked.requested = True

    if threading.current_thread() is not threading.main_thread():
        yield asked  # only the main thread may take signals
        return
    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)


def _end_with_the_others(reason: str) -> None:
    print(f"error: this run has ended, because {reason}", file=sys.stderr, flush=True)
    os._exit(1)  # the main thread may wait for the lost process for ever


def _end(me: Member, peers: Peers, error: BaseException, expected: tuple[type[Exception], ...]) -> None:
    """Say what happened, here and to the others, and end; in this order, for the news may end this process first."""
    if not isinstance(error, expected):
        threading.Event().wait(GRACE_S)
        traceback.print_exception(error)
    else:
        print(f"error: {me}: {error}", file=sys.stderr, flush=True)
    peers.fail(f"{type(error).__name__}: {str(error)[:2000]}")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)  # an orderly end would wait for the others
