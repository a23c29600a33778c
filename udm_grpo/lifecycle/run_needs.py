"""Check everything that a configured run needs, one by one, for `udm_grpo.doctor`."""

import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rewards_bridge.client import BridgeError, RewardsClient, examine
from rewards_bridge.errors import UsageError, UserError
from udm_grpo.config import ConfigError, RunConfig, ScorerConfig
from udm_grpo.configuration.command_line import INSTALLED, parse
from udm_grpo.configuration.config_checks import validate
from udm_grpo.data.prompts import read_prompts
from udm_grpo.data.recipe_page import fixes, page_commands
from udm_grpo.files.buckets import local, local_prompts
from udm_grpo.machine.gpu_split import CPU, reserved, uses_gpus
from udm_grpo.machine.gpus import Gpus, visible_gpus
from udm_grpo.released.weights import load_folder
from udm_grpo.scoring.rewards import bridge_configs

PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")
CALL_S = 10.0
"""Seconds that a server at an address may take to answer."""


@dataclass(frozen=True)
class Finding:
    """The result of one check: what was checked, whether it is ready, and lines of explanation."""

    what: str
    ready: bool
    lines: tuple[str, ...] = ()


@dataclass(frozen=True)
class Needs:
    """A run to check."""

    config: RunConfig
    usual: RunConfig
    """The same without overrides of the command line, as the page's commands assume."""
    page: list[list[str]]
    """Commands on the recipe's page."""
    environment: Mapping[str, str]


def report(words: Sequence[str], environment: Mapping[str, str]) -> int:
    """Print the checks of the run that this command line describes; return the exit status of `udm_grpo.doctor`."""
    try:
        config = parse(words)
        validate(config)
        file = _config_file(words)
        needs = Needs(config, parse(["--config", file]), _page(file), environment)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    missing = 0
    for finding in findings(needs):
        missing += not finding.ready
        print(f"{finding.what}: {'ready' if finding.ready else 'NOT READY'}", flush=True)
        for line in finding.lines:
            print("\n".join(f"  {part}" for part in line.splitlines()), flush=True)
    print(f"not ready: {missing} of the above" if missing else "all is ready", flush=True)
    return 1 if missing else 0


def _config_file(words: Sequence[str]) -> str:
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word == "--config":
            return following
        if word.startswith("--config="):
            return word.removeprefix("--config=")
    return ""


def _page(file: str) -> list[list[str]]:
    name = Path(file.partition(":")[0])
    return page_commands(name if name.exists() else INSTALLED / name)


def findings(needs: Needs) -> Iterator[Finding]:
    """Yield the result of every check, the cheap ones first."""
    config, usual = needs.config, needs.usual
    length = config.model.text_length or None
    yield _file(
        *("model.path", config.model.path, usual.model.path, needs),
        lambda: load_folder(local(config.model.path), prompt_length=length, read_transformer=False),
    )
    for name in ("train", "heldout"):
        place = getattr(config.prompts, name)
        yield _file(
            f"prompts.{name}",
            place,
            getattr(usual.prompts, name),
            needs,
            lambda place=place: read_prompts(local_prompts(place)),
        )
    gpus = visible_gpus(needs.environment)
    yield from _jax(gpus, needs.environment)
    try:
        with reserved(config.rewards, dict(needs.environment)) as (placed, lines):
            scorers = dict(placed.scorers)
    except ConfigError as error:
        yield Finding("GPUs", False, (str(error),))
        return
    yield Finding("GPUs", True, lines or (f"no scorer names devices; {gpus}",))
    for name, scorer in scorers.items():
        usual_options = usual.rewards.scorers[name].options if name in usual.rewards.scorers else {}
        yield _remote(name, scorer) if scorer.addresses else _local(name, scorer, usual_options, gpus, needs)


def _file(what: str, place: str, usual: str, needs: Needs, read: Callable[[], object]) -> Finding:
    """Check that a file or folder of the trainer can be read."""
    try:
        read()
    except (UserError, OSError) as error:
        commands = fixes(place, usual, needs.page)
        return Finding(f"{what} {place}", False, (str(error), *(f"fix: {command}" for command in commands)))
    return Finding(f"{what} {place}", True)


def _jax(gpus: Gpus, environment: Mapping[str, str]) -> Iterator[Finding]:
    """Check that JAX can use this machine's GPUs."""
    if gpus.ids and uses_gpus(environment):
        installed = any(importlib.util.find_spec(plugin) for plugin in PLUGINS)
        version = importlib.metadata.version("jax")
        fix = f"this JAX computes on the CPU only; fix: {sys.executable} -m pip install 'jax[cuda13]=={version}'"
        yield Finding("JAX on NVIDIA GPUs", installed, () if installed else (fix,))


def _local(name: str, scorer: ScorerConfig, usual: Mapping[str, str], gpus: Gpus, needs: Needs) -> Finding:
    """Check that a scorer can be started, by rewards_bridge's own doctor under the scorer's interpreter."""
    lines = []
    for option, place in scorer.options.items():
        commands = fixes(place, usual.get(option, ""), needs.page)
        if commands and not Path(place).exists():
            lines.append(f"options.{option}: {place} is missing")
            lines += [f"fix: {command}" for command in commands]
    config = bridge_configs(name, scorer, None)[0]
    limits = [f"--memory={memory:.1f}"] if (memory := _memory_gib(scorer, gpus)) is not None else []
    if lines:
        limits.append("--no-load")
    if not scorer.check_example:
        limits.append("--no-check-example")
    ready, said = examine(config, limits)
    return Finding(f"scorer {name}", ready and not lines, (*lines, said))


def _memory_gib(scorer: ScorerConfig, gpus: Gpus) -> float | None:
    """Return the memory in GiB that one process of the scorer may use; None if it is unknown."""
    if not scorer.devices:
        return None
    if CPU in scorer.devices:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    capacities = [gpus.memory.get(gpus.index(gpu)) for gpu in scorer.devices]
    sizes = [size for size in capacities if size is not None]
    return min(sizes) * (scorer.memory_fraction or 1.0) / 2**30 if sizes else None


def _remote(name: str, scorer: ScorerConfig) -> Finding:
    """Check that the servers of a scorer answer, serve this scorer and score their test images correctly."""
    ready, lines = True, []
    for config in bridge_configs(name, scorer, None):
        try:
            with RewardsClient(replace(config, start_timeout_s=CALL_S, max_restarts=0)) as client:
                lines += [f"{config.address}: serving", *(f"warning: {text}" for text in client.warnings())]
        except (BridgeError, UsageError) as error:
            ready = False
            lines.append(str(error))
    return Finding(f"scorer {name}", ready, tuple(lines))
