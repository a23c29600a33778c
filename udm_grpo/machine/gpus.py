"""List the GPUs of this machine before CUDA or JAX has initialized any."""

import csv
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Gpus:
    """The GPUs that CUDA would show to this process, in its order."""

    ids: tuple[str, ...]
    """As CUDA_VISIBLE_DEVICES names them."""
    source: str
    """Where the list comes from, for messages that continue with the list."""
    uuids: Mapping[str, str] = field(default_factory=dict)
    """Index -> UUID of all GPUs of the machine; empty if nvidia-smi does not list them."""
    memory: Mapping[str, int] = field(default_factory=dict)
    """Index -> bytes, likewise."""

    def index(self, name: str) -> str:
        """Return the index of a GPU named by index or UUID (or its beginning), or the name if it is unknown."""
        if name.isdecimal():
            return str(int(name))
        return next((index for index, uuid in self.uuids.items() if name and uuid.startswith(name)), name)

    def find(self, name: str) -> str | None:
        """Return the id of a visible GPU by any of its names."""
        return next((known for known in self.ids if self.index(known) == self.index(name)), None)

    def __str__(self) -> str:
        return f"{self.source} {listed(self.ids)}"


def listed(ids: Sequence[str]) -> str:
    """Return ids as text for messages."""
    return ",".join(ids) or "no GPU"


@dataclass(frozen=True)
class ListedGpu:
    """A GPU as nvidia-smi lists it."""

    index: str
    uuid: str
    mib: str
    """Its memory in MiB, or what nvidia-smi prints if it is unknown."""
    name: str


def hides_all(visible: str | None) -> bool:
    """Return whether a value of CUDA_VISIBLE_DEVICES (None: not set) hides every GPU, as "", -1 and NoDevFiles do."""
    return visible is not None and not _is_gpu(visible.split(",")[0].strip())


def visible_gpus(environment: Mapping[str, str]) -> Gpus:
    """List the GPUs that this process may use; none if there is no NVIDIA GPU, no driver, or none is visible."""
    table = query_gpus(environment) or []
    uuids = {gpu.index: gpu.uuid for gpu in table}
    memory = {gpu.index: int(gpu.mib) << 20 for gpu in table if gpu.mib.isdecimal()}
    named = environment.get(VISIBLE)
    if named is None:
        source = "nvidia-smi lists" if table else f"{VISIBLE} is not set, and nvidia-smi lists"
        return Gpus(tuple(uuids), source, uuids, memory)
    ids: list[str] = []
    known = Gpus((), f"by {VISIBLE} there is", uuids, memory)
    for name in (word.strip() for word in named.split(",")):
        # CUDA itself shows only the GPUs before the first name that it does not know.
        if not _is_gpu(name):
            break
        if table and not name.startswith("MIG-") and known.index(name) not in uuids:
            break
        ids.append(name)
    return Gpus(tuple(ids), known.source, uuids, memory)


def _is_gpu(name: str) -> bool:
    return name.isdecimal() or name.startswith(("GPU-", "MIG-"))


def query_gpus(environment: Mapping[str, str]) -> list[ListedGpu] | None:
    """Return all GPUs that nvidia-smi lists: an empty list if it fails, None if it is not installed."""
    program = shutil.which("nvidia-smi", path=environment.get("PATH"))
    if program is None:
        return None
    command = [program, "--query-gpu=index,uuid,memory.total,name", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return []  # it is installed, but there is no GPU or no driver
    rows = csv.reader(done.stdout.splitlines(), skipinitialspace=True)
    return [ListedGpu(*row) for row in rows if len(row) == 4]
