"""Which GPUs the scorers have and which the trainer.

`ScorerConfig.devices` names GPUs for a scorer; `split` gives the others to the trainer, and `reserved` hides from JAX
what is not the trainer's. All of it comes before JAX uses a device.
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
"""JAX's variables for the part of a GPU's memory that it takes, newest first; it refuses both at once."""
TRAINER_FRACTION = 0.85
"""What JAX takes of a GPU that it shares with scorers, unless the configuration or the environment says otherwise."""
USABLE = 0.97
"""The part of a GPU's memory that is given away; the rest is for CUDA itself."""

Scorers = Mapping[str, ScorerConfig]


@dataclass(frozen=True)
class Split:
    """Who computes where."""

    scorers: Scorers
    """Those that are started on devices; the devices are ids of GPUs, or "cpu" alone."""
    sharing: frozenset[str]
    """Names of those that share their GPUs with the trainer."""
    trainer: tuple[str, ...]
    """The GPUs that are left to the trainer."""
    fraction: float = 0.0
    """Of the memory of each of them, for JAX; 0: nothing is said."""


def started_on_devices(scorers: Scorers) -> dict[str, ScorerConfig]:
    """Return the scorers that are started here and say on which devices, by name."""
    return {name: given for name, given in scorers.items() if given.devices and not given.addresses}


def device_problems(scorers: Scorers) -> list[str]:
    """Return what is wrong with the scorers' devices on any machine, a sentence each."""
    problems = []
    places: dict[str, list[str]] = {}
    for name, given in started_on_devices(scorers).items():
        at, words = f"rewards.scorers.{name}.devices", given.devices
        alone = {AUTO, CPU} & set(words) and len(words) > 1
        if alone or not all(words) or SHARED in words[1:]:
            problems.append(
                f"{at} is {','.join(words)!r}; give GPUs as in 6,7, or auto, cpu or shared alone, or shared and then "
                "GPUs as in shared,6."
            )
            continue
        if given.replicas > 1:
            problems.append(f"{at} starts one process for each GPU, but replicas is {given.replicas}; leave that at 1.")
        if VISIBLE in given.environment:
            problems.append(f"{at} and its environment.{VISIBLE} both say what the scorer sees; give one of them.")
        for gpu in words:
            if gpu not in (AUTO, CPU, SHARED):
                places.setdefault(gpu, []).append(f"{at}{' (shared)' if SHARED in words else ''}")
    for gpu, named in places.items():
        if len(named) > len({place for place in named if place.endswith("(shared)")}) and len(named) > 1:
            where = " and ".join(dict.fromkeys(named))
            problems.append(f"GPU {gpu} is named {len(named)} times, in {where}; a GPU is one scorer's: name another.")
    return problems


def uses_gpus(environment: Mapping[str, str]) -> bool:
    """Return whether JAX takes GPUs where there are some: unless JAX_PLATFORMS names other platforms only."""
    platforms = environment.get("JAX_PLATFORMS", "")
    return not platforms or bool({"cuda", "gpu"} & set(platforms.lower().split(",")))


def split(scorers: Scorers, gpus: Gpus, trainer: bool) -> Split:
    """Decide who computes where; `trainer`: whether JAX takes the GPUs that are left over.

    auto is the last GPU that nobody names, one for all scorers that say so, if the trainer keeps another; else the CPU.
    Raises ConfigError for GPUs that are not there or named twice, and when none is left to the trainer.
    """
    _refuse(device_problems(scorers))
    asked = _by_their_ids(started_on_devices(scorers), gpus)
    _refuse(device_problems(asked))  # now also those that two names stand for
    sharing = frozenset(name for name, given in asked.items() if SHARED in given.devices)
    devices = {name: [word for word in given.devices if word not in (AUTO, SHARED)] for name, given in asked.items()}
    taken = {gpu for name, ids in devices.items() if name not in sharing for gpu in ids}
    free = [gpu for gpu in gpus.ids if gpu not in taken]
    if trainer and gpus.ids and not free:
        _refuse([f"the scorers have every GPU ({gpus}); leave at least one to the trainer."])
    for name in sharing:
        if not free:
            _refuse([f"rewards.scorers.{name}.devices is {SHARED}, but {gpus}."])
        devices[name] = devices[name] or free[-1:]
    automatic = [name for name, given in asked.items() if AUTO in given.devices]
    nobodys = [gpu for gpu in free if not any(gpu in devices[name] for name in sharing)]
    chosen = nobodys[-1:] if automatic and len(free) > int(trainer) else []
    devices |= dict.fromkeys(automatic, chosen)
    placed = {name: replace(given, devices=tuple(devices[name]) or (CPU,)) for name, given in asked.items()}
    return Split(placed, sharing, tuple(gpu for gpu in free if gpu not in chosen))


def _refuse(problems: Sequence[str]) -> None:
    if problems:
        raise ConfigError("the scorers' devices cannot be had:\n" + "\n".join(f"  - {line}" for line in problems))


def _by_their_ids(scorers: Scorers, gpus: Gpus) -> dict[str, ScorerConfig]:
    """Return the scorers with every GPU by the id that this process sees.

    Raises ConfigError listing those not there.
    """
    problems: list[str] = []
    renamed = {}
    for name, given in scorers.items():
        ids = []
        for word in given.devices:
            found = word if word in (AUTO, CPU, SHARED) else gpus.find(word)
            if found is None:
                problems.append(f"rewards.scorers.{name}.devices names GPU {word}, but {gpus}.")
            ids.append(found or word)
        renamed[name] = replace(given, devices=tuple(ids))
    _refuse(problems)
    return renamed


def with_fractions(made: Split, trainer_fraction: float, environment: Mapping[str, str]) -> Split:
    """Return the split with JAX's part of each GPU's memory and that of every scorer that shares one.

    Raises ConfigError where more than all of a GPU is given away.
    """
    if not made.sharing:
        return replace(made, fraction=trainer_fraction)
    named = next((environment[name] for name in FRACTIONS if environment.get(name)), "")
    try:
        fraction = trainer_fraction or float(named or TRAINER_FRACTION)
    except ValueError:
        raise ConfigError(f"{' or '.join(FRACTIONS)} is {named!r}; set it to a number above 0 and below 1.") from None
    processes = Counter(gpu for name in made.sharing for gpu in made.scorers[name].devices)
    scorers = dict(made.scorers)
    given_away: dict[str, float] = {}
    for name in made.sharing:
        left = (USABLE - fraction) / max(processes[gpu] for gpu in scorers[name].devices)
        part = scorers[name].memory_fraction or max(round(left, 4), 0.0)
        scorers[name] = replace(scorers[name], memory_fraction=part)
        for gpu in scorers[name].devices:
            given_away[gpu] = given_away.get(gpu, 0.0) + part
    for gpu, part in given_away.items():
        if part <= 0 or part + fraction > 1:
            raise ConfigError(
                f"GPU {gpu} is shared: {fraction:g} of its memory is for the trainer and {part:g} for scorers; lower "
                "rewards.trainer_memory_fraction or a memory_fraction of rewards.scorers, for both must fit into 1."
            )
    return replace(made, scorers=scorers, fraction=fraction)


def describe(made: Split, scorers: Scorers, gpus: Gpus, trainer: bool) -> tuple[str, ...]:
    """Return the split for people, a line each."""
    lines = []
    for name, placed in made.scorers.items():
        line = f"scorer {name}: " + ("CPU" if CPU in placed.devices else f"GPU {listed(placed.devices)}")
        if name in made.sharing:
            line += f" with the trainer, {placed.memory_fraction:g} of its memory"
        if AUTO in scorers[name].devices:
            line += f" (devices is auto; {gpus})"
            if CPU in placed.devices:
                line += f"; large models are slow there: rewards.scorers.{name}.devices or addresses name another place"
        lines.append(line)
    if trainer and gpus.ids:
        part = f", {made.fraction:g} of their memory" if made.fraction else ""
        lines.append(f"trainer: GPU {listed(made.trainer)}{part}")
    return tuple(lines)


@contextlib.contextmanager
def reserved(
    rewards: RewardsConfig, environment: MutableMapping[str, str] = os.environ, trainer: bool = True
) -> Iterator[tuple[RewardsConfig, tuple[str, ...]]]:
    """Keep the scorers' GPUs from JAX for the length of the block, which must begin before JAX uses a device.

    Gives the rewards with devices that are ids or "cpu" alone, as `rewards.connect` takes them, and the split for
    people. trainer: whether JAX computes in this process. Raises ConfigError for devices that cannot be had.
    """
    if not started_on_devices(rewards.scorers) and not rewards.trainer_memory_fraction:
        yield rewards, ()
        return
    gpus, on_gpus = visible_gpus(environment), trainer and uses_gpus(environment)
    made = split(rewards.scorers, gpus, on_gpus)
    if on_gpus:
        made = with_fractions(made, rewards.trainer_memory_fraction, environment)
    changes: dict[str, str] = {}
    if gpus.ids and VISIBLE not in environment and ORDER not in environment:
        changes[ORDER] = "PCI_BUS_ID"  # the order of nvidia-smi; CUDA's own is by speed
    if on_gpus and len(made.trainer) < len(gpus.ids):
        changes[VISIBLE] = ",".join(made.trainer)
    if made.fraction:
        changes[next((name for name in FRACTIONS if environment.get(name)), FRACTIONS[1])] = f"{made.fraction:g}"
    before = {name: environment.get(name) for name in changes}
    environment.update(changes)
    try:
        if VISIBLE in changes:
            _check_hidden(made.trainer)
        placed = replace(rewards, scorers={**rewards.scorers, **made.scorers})
        yield placed, describe(made, rewards.scorers, gpus, on_gpus)
    finally:
        for name, value in before.items():
            if value is None:
                environment.pop(name, None)
            else:
                environment[name] = value


def _check_hidden(trainer: Sequence[str]) -> None:
    """Raise ConfigError if JAX has the scorers' GPUs already, as in a notebook that has computed before."""
    count = sum(device.platform == "gpu" for device in jax.local_devices())
    if count > len(trainer):
        raise ConfigError(
            f"JAX already uses {count} GPUs of this process; it is too late to leave it only {listed(trainer)}. Start "
            "in a new process."
        )
