"""Divide the GPUs between the scorers and the trainer.

`ScorerConfig.devices` names GPUs for a scorer; `split` gives the others to the trainer, and `reserved` hides from JAX
all that are not the trainer's. Both must run before JAX uses a device.
"""

import contextlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace

import jax

from udm_grpo.config import ConfigError, RewardsConfig, ScorerConfig
from udm_grpo.machine.gpus import VISIBLE, Gpus, listed, visible_gpus

AUTO, SHARED, CPU = "auto", "shared", "cpu"
ORDER = "CUDA_DEVICE_ORDER"
FRACTIONS = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
"""JAX's variables for the fraction of a GPU's memory that it reserves, newest first; it refuses both at once."""
TRAINER_FRACTION = 0.85
"""Fraction of a shared GPU's memory for JAX, unless the configuration or the environment says otherwise."""
USABLE = 0.97
"""Fraction of a GPU's memory that is allotted; the rest is for CUDA itself."""

Scorers = Mapping[str, ScorerConfig]


@dataclass(frozen=True)
class Split:
    """Which GPUs the scorers and the trainer use."""

    scorers: Scorers
    """Scorers that are started on devices; the devices are ids of GPUs, or "cpu" alone."""
    sharing: frozenset[str]
    """Names of the scorers that share their GPUs with the trainer."""
    trainer: tuple[str, ...]
    """The GPUs that are left to the trainer."""
    fraction: float = 0.0
    """Fraction of the memory of each of these GPUs for JAX; 0: not set."""


def started_on_devices(scorers: Scorers) -> dict[str, ScorerConfig]:
    """Return the scorers that are started here and name their devices, by name."""
    return {name: scorer for name, scorer in scorers.items() if scorer.devices and not scorer.addresses}


def device_problems(scorers: Scorers) -> list[str]:
    """Return the problems of the scorers' devices that exist on any machine, one sentence each."""
    problems = []
    places: dict[str, list[str]] = {}
    for name, scorer in started_on_devices(scorers).items():
        at, words = f"rewards.scorers.{name}.devices", scorer.devices
        alone = {AUTO, CPU} & set(words) and len(words) > 1
        if alone or not all(words) or SHARED in words[1:]:
            problems.append(
                f"{at} is {','.join(words)!r}; give GPUs as in 6,7, or auto, cpu or shared alone, or shared and then "
                "GPUs as in shared,6."
            )
            continue
        if scorer.replicas > 1:
            problems.append(
                f"{at} starts one process for each GPU, but replicas is {scorer.replicas}; leave that at 1."
            )
        if VISIBLE in scorer.environment:
            problems.append(f"{at} and its environment.{VISIBLE} both say what the scorer sees; give one of them.")
        for gpu in words:
            if gpu not in (AUTO, CPU, SHARED):
                places.setdefault(gpu, []).append(f"{at}{' (shared)' if SHARED in words else ''}")
    for gpu, named in places.items():
        if len(named) > len({place for place in named if place.endswith("(shared)")}) and len(named) > 1:
            where = " and ".join(dict.fromkeys(named))
            problems.append(f"GPU {gpu} is named {len(named)} times, in {where}; give each GPU to one scorer only.")
    return problems


def uses_gpus(environment: Mapping[str, str]) -> bool:
    """Return whether JAX uses GPUs if there are any: unless JAX_PLATFORMS names only other platforms."""
    platforms = environment.get("JAX_PLATFORMS", "")
    return not platforms or bool({"cuda", "gpu"} & set(platforms.lower().split(",")))


def split(scorers: Scorers, gpus: Gpus, trainer: bool) -> Split:
    """Assign devices to the scorers and the trainer; `trainer`: whether JAX uses the remaining GPUs.

    auto is the last GPU that no scorer names, shared by all scorers with auto, if the trainer keeps another; else the
    CPU. Raises ConfigError for GPUs that do not exist or are named twice, and if none is left to the trainer.
    """
    _refuse(device_problems(scorers))
    asked = _by_their_ids(started_on_devices(scorers), gpus)
    _refuse(device_problems(asked))  # again: two names may stand for the same GPU
    sharing = frozenset(name for name, scorer in asked.items() if SHARED in scorer.devices)
    devices = {name: [word for word in scorer.devices if word not in (AUTO, SHARED)] for name, scorer in asked.items()}
    taken = {gpu for name, ids in devices.items() if name not in sharing for gpu in ids}
    free = [gpu for gpu in gpus.ids if gpu not in taken]
    if trainer and gpus.ids and not free:
        _refuse([f"the scorers have every GPU ({gpus}); leave at least one to the trainer."])
    for name in sharing:
        if not free:
            _refuse([f"rewards.scorers.{name}.devices is {SHARED}, but {gpus}."])
        devices[name] = devices[name] or free[-1:]
    automatic = [name for name, scorer in asked.items() if AUTO in scorer.devices]
    unnamed = [gpu for gpu in free if not any(gpu in devices[name] for name in sharing)]
    chosen = unnamed[-1:] if automatic and len(free) > int(trainer) else []
    devices |= dict.fromkeys(automatic, chosen)
    placed = {name: replace(scorer, devices=tuple(devices[name]) or (CPU,)) for name, scorer in asked.items()}
    return Split(placed, sharing, tuple(gpu for gpu in free if gpu not in chosen))


def _refuse(problems: Sequence[str]) -> None:
    if problems:
        raise ConfigError("the scorers' devices are not available:\n" + "\n".join(f"  - {line}" for line in problems))


def _by_their_ids(scorers: Scorers, gpus: Gpus) -> dict[str, ScorerConfig]:
    """Return the scorers with every GPU by the id that this process sees.

    Raises ConfigError listing the GPUs that do not exist.
    """
    problems: list[str] = []
    renamed = {}
    for name, scorer in scorers.items():
        ids = []
        for word in scorer.devices:
            gpu = word if word in (AUTO, CPU, SHARED) else gpus.find(word)
            if gpu is None:
                problems.append(f"rewards.scorers.{name}.devices names GPU {word}, but {gpus}.")
            ids.append(gpu or word)
        renamed[name] = replace(scorer, devices=tuple(ids))
    _refuse(problems)
    return renamed


def with_fractions(allocation: Split, trainer_fraction: float, environment: Mapping[str, str]) -> Split:
    """Return the split with the fraction of each GPU's memory for JAX and for every scorer that shares one.

    Raises ConfigError if more than the whole memory of a GPU would be allotted.
    """
    if not allocation.sharing:
        return replace(allocation, fraction=trainer_fraction)
    named = next((environment[name] for name in FRACTIONS if environment.get(name)), "")
    try:
        fraction = trainer_fraction or float(named or TRAINER_FRACTION)
    except ValueError:
        raise ConfigError(f"{' or '.join(FRACTIONS)} is {named!r}; set it to a number above 0 and below 1.") from None
    processes = Counter(gpu for name in allocation.sharing for gpu in allocation.scorers[name].devices)
    scorers = dict(allocation.scorers)
    allotted: dict[str, float] = {}
    for name in allocation.sharing:
        left = (USABLE - fraction) / max(processes[gpu] for gpu in scorers[name].devices)
        part = scorers[name].memory_fraction or max(round(left, 4), 0.0)
        scorers[name] = replace(scorers[name], memory_fraction=part)
        for gpu in scorers[name].devices:
            allotted[gpu] = allotted.get(gpu, 0.0) + part
    for gpu, part in allotted.items():
        if part <= 0 or part + fraction > 1:
            raise ConfigError(
                f"GPU {gpu} is shared: {fraction:g} of its memory is for the trainer and {part:g} for scorers; lower "
                "rewards.trainer_memory_fraction or a memory_fraction of rewards.scorers: the sum must not exceed 1."
            )
    return replace(allocation, scorers=scorers, fraction=fraction)


def describe(allocation: Split, scorers: Scorers, gpus: Gpus, trainer: bool) -> tuple[str, ...]:
    """Return a readable description of the split, one line for each scorer and the trainer."""
    lines = []
    for name, placed in allocation.scorers.items():
        line = f"scorer {name}: " + ("CPU" if CPU in placed.devices else f"GPU {listed(placed.devices)}")
        if name in allocation.sharing:
            line += f" with the trainer, {placed.memory_fraction:g} of its memory"
        if AUTO in scorers[name].devices:
            line += f" (devices is auto; {gpus})"
            if CPU in placed.devices:
                line += f"; large models are slow there: set rewards.scorers.{name}.devices or addresses to move it"
        lines.append(line)
    if trainer and gpus.ids:
        part = f", {allocation.fraction:g} of their memory" if allocation.fraction else ""
        lines.append(f"trainer: GPU {listed(allocation.trainer)}{part}")
    return tuple(lines)


@contextlib.contextmanager
def reserved(
    rewards: RewardsConfig, environment: MutableMapping[str, str] = os.environ, trainer: bool = True
) -> Iterator[tuple[RewardsConfig, tuple[str, ...]]]:
    """Hide the scorers' GPUs from JAX inside the block, which must be entered before JAX uses a device.

    Yields the rewards with devices that are ids or "cpu" alone, as `rewards.connect` takes them, and a description of
    the split. trainer: whether JAX computes in this process. Raises ConfigError for devices that are not available.
    """
    if not started_on_devices(rewards.scorers) and not rewards.trainer_memory_fraction:
        yield rewards, ()
        return
    gpus, on_gpus = visible_gpus(environment), trainer and uses_gpus(environment)
    allocation = split(rewards.scorers, gpus, on_gpus)
    if on_gpus:
        allocation = with_fractions(allocation, rewards.trainer_memory_fraction, environment)
    changes: dict[str, str] = {}
    if gpus.ids and VISIBLE not in environment and ORDER not in environment:
        changes[ORDER] = "PCI_BUS_ID"  # the order of nvidia-smi; CUDA's own is by speed
    if on_gpus and len(allocation.trainer) < len(gpus.ids):
        changes[VISIBLE] = ",".join(allocation.trainer)
    if allocation.fraction:
        changes[next((name for name in FRACTIONS if environment.get(name)), FRACTIONS[1])] = f"{allocation.fraction:g}"
    before = {name: environment.get(name) for name in changes}
    environment.update(changes)
    try:
        if VISIBLE in changes:
            _check_hidden(allocation.trainer)
        placed = replace(rewards, scorers={**rewards.scorers, **allocation.scorers})
        yield placed, describe(allocation, rewards.scorers, gpus, on_gpus)
    finally:
        for name, value in before.items():
            if value is None:
                environment.pop(name, None)
            else:
                environment[name] = value


def _check_hidden(trainer: Sequence[str]) -> None:
    """Raise ConfigError if JAX already uses the scorers' GPUs, as in a notebook that has computed before."""
    count = sum(device.platform == "gpu" for device in jax.local_devices())
    if count > len(trainer):
        raise ConfigError(
            f"JAX already uses {count} GPUs of this process; it is too late to limit it to {listed(trainer)}. Start a "
            "new process."
        )
