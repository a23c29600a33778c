"""Read which process of a run this is: the number of processes, this one's id, and the address of process 0.

Each of the three comes from the first source that has it:

| | fields of the config | environment | else |
|---|---|---|---|
| address of process 0 | distributed.coordinator | JAX_COORDINATOR_ADDRESS | SLURM, Open MPI 4, TPU pods |
| number of processes | distributed.processes | JAX_NUM_PROCESSES | SLURM, OMPI_COMM_WORLD_SIZE, TPU pods |
| this process's id, from 0 | distributed.process_id | JAX_PROCESS_ID | SLURM_PROCID, OMPI_COMM_WORLD_RANK, TPU pods |

SLURM's variables count only inside `srun`, where SLURM_JOB_ID, SLURM_STEP_NODELIST and SLURM_PROCID are set. The number
of processes is that of the step (SLURM_STEP_NUM_TASKS), or SLURM_NTASKS where the step does not say: the shell that
`salloc` opens is a step of one task with the SLURM_NTASKS of the whole job. Open MPI 4 is recognised by
OMPI_MCA_orte_hnp_uri, TPU pods by their metadata. JAX_COORDINATOR_PORT changes the port that is derived from them.
Without any of these there is one process.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from jax._src import clusters  # jax has no public name for what jax.distributed.initialize detects

from udm_grpo.config import ConfigError, DistributedConfig

FIRST_PORT, PORTS = 61440, 4096
"""Ports among which a SLURM job's number selects, as in jax."""
ALONE = "--config.distributed.processes=1"
COORDINATOR, PROCESSES, PROCESS_ID = "coordinator", "processes", "process_id"
VARIABLES = {
    COORDINATOR: "JAX_COORDINATOR_ADDRESS",
    PROCESSES: "JAX_NUM_PROCESSES",
    PROCESS_ID: "JAX_PROCESS_ID",
}

Items = dict[str, tuple[str | int, str]]
"""Item -> (value, what it was read from)."""


@dataclass(frozen=True)
class Place:
    """This process among the processes of a run."""

    coordinator: str
    """host:port of process 0."""
    processes: int
    process_id: int
    origins: Mapping[str, str] = field(default_factory=dict, compare=False)
    """Item (coordinator, processes, process_id) -> the field or variable that it was read from."""

    def watch(self) -> tuple[str, int]:
        """Return host and port of the connections that detect the end of a process."""
        host, _, port = self.coordinator.rpartition(":")
        return host.strip("[]"), int(port) + (1 if int(port) < 65535 else -1)

    def waiting(self, timeout_s: float) -> str:
        """Return a text: which processes this one waits for, where the items were read from, how to run it alone."""
        host, port = self.watch()
        others = f"process 0 at {host}:{port}"
        if self.process_id == 0:
            last = self.processes - 1
            others = f"process{'' if last == 1 else 'es'} 1{f' to {last}' if last > 1 else ''} at port {port}"
        own = f"process {self.process_id} of {self.processes} waits up to {timeout_s:g} s for {others}"
        return f"{own} ({self.counted()}). {self.way_out()}"

    def counted(self) -> str:
        """Return where the items were read from."""
        names = {PROCESSES: "number of processes", PROCESS_ID: "process id", COORDINATOR: "coordinator"}
        return ", ".join(f"{words} from {self.origins[item]}" for item, words in names.items() if item in self.origins)

    def way_out(self) -> str:
        """Return how to run this process on its own."""
        return f"To run it alone, give {ALONE}."


def find_place(config: DistributedConfig, environment: Mapping[str, str]) -> Place | None:
    """Return this process's place, or None if it is the only one.

    Raises ConfigError, naming the variable, if only some of the three items are known or one is invalid.
    """
    if config.processes == 1:
        return None
    items = _configured(config, environment)
    for detect in (_slurm, _open_mpi, _tpu_pod):
        if len(items) < len(VARIABLES):
            items = detect(config, environment, items) | items
    count = items.get(PROCESSES, (None, ""))[0]
    own = items.get(PROCESS_ID, (0, ""))[0]
    if not items or (count == 1 and own == 0):
        return None
    _refuse_half(items)
    coordinator, processes, process_id = (items[item][0] for item in VARIABLES)
    host, colon, port = str(coordinator).rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(
            f"{items[COORDINATOR][1]} is {coordinator!r}; give host:port of process 0, as in node-0:8476."
        )
    if not 0 <= int(process_id) < int(processes):
        raise ConfigError(
            f"{items[PROCESS_ID][1]} is {process_id} of {processes} processes ({items[PROCESSES][1]}); the ids go from "
            f"0 to {int(processes) - 1}. To run this process alone, give {ALONE}."
        )
    return Place(
        str(coordinator), int(processes), int(process_id), {item: origin for item, (_, origin) in items.items()}
    )


def _configured(config: DistributedConfig, environment: Mapping[str, str]) -> Items:
    """Return the items that the config or JAX's own variables set."""
    items: Items = {}
    if config.coordinator:
        items[COORDINATOR] = config.coordinator, "distributed.coordinator"
    elif environment.get(VARIABLES[COORDINATOR]):
        items[COORDINATOR] = environment[VARIABLES[COORDINATOR]], VARIABLES[COORDINATOR]
    for item, value in ((PROCESSES, config.processes or None), (PROCESS_ID, config.process_id)):
        if value is not None and value >= 0:
            items[item] = value, f"distributed.{item}"
        elif VARIABLES[item] in environment:
            items[item] = _number(environment, VARIABLES[item]), VARIABLES[item]
    return items


def _refuse_half(items: Items) -> None:
    missing = [item for item in VARIABLES if item not in items]
    if not missing:
        return
    known = ", ".join(f"{item} {value} (from {origin})" for item, (value, origin) in items.items())
    names = " and ".join(f"distributed.{item}" for item in missing)
    variables = ", ".join(VARIABLES[item] for item in missing)
    raise ConfigError(
        f"of several processes only {known} is known; {names} is missing: set it, or the environment variable(s) "
        f"{variables}. To run this process alone, give {ALONE}."
    )


def _number(environment: Mapping[str, str], name: str, least: int = 0) -> int:
    text = environment[name].strip()
    if not text.isdecimal() or int(text) < least:
        raise ConfigError(
            f"the environment variable {name} is {environment[name]!r}; expected a whole number of at least {least}. "
            f"Unset or correct it, or give {ALONE} to run this process alone."
        )
    return int(text)


def _port(environment: Mapping[str, str]) -> str | None:
    return str(_number(environment, "JAX_COORDINATOR_PORT", 1)) if "JAX_COORDINATOR_PORT" in environment else None


def _slurm(config: DistributedConfig, environment: Mapping[str, str], known: Items) -> Items:
    counts = [name for name in ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS") if name in environment]
    if not counts or not {"SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID"} <= set(environment):
        return {}
    processes = known[PROCESSES][0] if PROCESSES in known else _number(environment, counts[0], 1)
    if processes == 1 and PROCESSES not in known:
        return {PROCESSES: (1, counts[0]), PROCESS_ID: (0, counts[0])}
    items: Items = {PROCESSES: (processes, counts[0])}
    if PROCESS_ID not in known:
        items[PROCESS_ID] = _number(environment, "SLURM_PROCID"), "SLURM_PROCID"
    if COORDINATOR not in known:
        nodes = environment["SLURM_STEP_NODELIST"]
        first = re.match(r"([^\[\],]+)(?:\[(\w+))?", nodes)  # node[001-015,020],other
        if not first:
            raise ConfigError(
                f"the environment variable SLURM_STEP_NODELIST is {nodes!r}; expected names of nodes as in "
                f"node[001-004]. Give distributed.coordinator=HOST:PORT, or {ALONE} to run this process alone."
            )
        port = _port(environment) or FIRST_PORT + _number(environment, "SLURM_JOB_ID") % PORTS
        items[COORDINATOR] = f"{first[1]}{first[2] or ''}:{port}", "SLURM_STEP_NODELIST and SLURM_JOB_ID"
    return items


def _open_mpi(config: DistributedConfig, environment: Mapping[str, str], known: Items) -> Items:
    items: Items = {}
    for item, name in ((PROCESSES, "OMPI_COMM_WORLD_SIZE"), (PROCESS_ID, "OMPI_COMM_WORLD_RANK")):
        if item not in known and name in environment:
            items[item] = _number(environment, name), name
    uri = "OMPI_MCA_orte_hnp_uri"  # Open MPI 5 provides no address
    if COORDINATOR not in known and uri in environment and items.get(PROCESSES, (0, ""))[0] != 1:
        try:
            address = clusters.OmpiCluster.get_coordinator_address(None, _port(environment))
        except (RuntimeError, ValueError):
            raise ConfigError(
                f"the environment variable {uri} is {environment[uri]!r}, which names no address; give "
                f"distributed.coordinator=HOST:PORT, or {ALONE} to run this process alone."
            ) from None
        items[COORDINATOR] = address, uri
    return items


def _tpu_pod(config: DistributedConfig, environment: Mapping[str, str], known: Items) -> Items:
    for cluster in (clusters.GkeTpuCluster, clusters.GceTpuCluster):
        try:
            if not cluster.is_env_present():
                continue
            items: Items = {
                PROCESSES: (cluster.get_process_count(), "the TPU's metadata"),
                PROCESS_ID: (cluster.get_process_id(), "the TPU's metadata"),
            }
            processes = (items | known)[PROCESSES][0]
            if COORDINATOR not in known and int(processes) > 1:
                timeout = int(config.initialization_timeout_s)
                address = cluster.get_coordinator_address(timeout, _port(environment))
                items[COORDINATOR] = address, "the TPU's metadata"
            return items
        except (RuntimeError, ValueError, TypeError, KeyError, IndexError, OSError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise ConfigError(
                f"the TPU pod's metadata and variables (TPU_WORKER_ID, TPU_WORKER_HOSTNAMES) do not say which process "
                f"this is ({reason}); set distributed.coordinator, .processes and .process_id, or {ALONE}."
            ) from None
    return {}
