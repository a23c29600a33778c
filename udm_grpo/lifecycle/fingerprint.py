"""What decides a run's numbers: the fields and the contents of files that have to be the same when it continues.

Everything in a configuration counts unless `FREE` (or, under a condition, `free_fields`) names it. Files count by what
they hold, not by where they are: model and prompts are compared whole (large transformer and scorer weights by a
sample, see files/digests.py), so a folder may be moved, linked or named by another path.

What it cannot see: files of a scorer at an address, which are on its server; the code of a user's own scorer;
versions of packages and drivers, which environment.json notes at every start.
"""

import inspect
import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rewards_bridge.redaction import concerns_secret, redacted_values
from udm_grpo.config import ConfigError, RunConfig, ScorerConfig
from udm_grpo.configuration.config_fields import field_values
from udm_grpo.data.prompts import PromptSet
from udm_grpo.files.buckets import local
from udm_grpo.files.digests import digest_array, digest_files, digest_json, digest_path
from udm_grpo.grpo.objective import OBJECTIVES, objective_class
from udm_grpo.multihost import hosts
from udm_grpo.released.part_files import open_part
from udm_grpo.released.weights import ReleasedModel, transformer_path

ADDED_FIELDS = {"grpo.objective": "udm_grpo"}
"""Fields that checkpoints of earlier versions do not name -> what they were trained with."""
VERSION = 2
"""Of the form of a fingerprint; those of the first had no version and no contents."""

PLACE = "a place; what is there is compared"
ROUNDING = "how it is computed: the same numbers up to rounding"
PROCESS = "how the scorer is run, not what it says"
FREE = {
    **dict.fromkeys(("output_dir", "checkpoint.resume"), "a place"),
    **dict.fromkeys(("model.path", "model.transformer", "prompts.train", "prompts.heldout"), PLACE),
    **dict.fromkeys(("model.attention", "model.remat", "model.logit_rows"), ROUNDING),
    **dict.fromkeys(("rollout.micro_batch", "optimizer.micro_batch", "evaluation.batch", "mesh.*"), ROUNDING),
    "distributed.*": "how processes find each other",
    "rewards.trainer_memory_fraction": "memory",
    **{
        f"rewards.scorers.*.{name}": PROCESS
        for name in (
            *("replicas", "addresses", "interpreter", "environment", "devices", "memory_fraction", "deadline_s"),
            *("start_timeout_s", "max_restarts", "tls_ca", "token_file", "check_example"),
        )
    },
    **dict.fromkeys(("evaluation.picture_every", "evaluation.picture_prompts", "evaluation.extremes"), "pictures"),
    **dict.fromkeys(("checkpoint.every", "checkpoint.keep", "checkpoint.stopped_status"), "how it is saved"),
    "logging.*": "where it is told",
}
"""Field (or pattern of fields) that may change when a run continues -> why it decides nothing."""
FREE_OPTIONS = (
    *("device", "batch_size", "threads", "cpu_threads", "processes", "concurrency", "timeout_s", "retries"),
    *("url", "api_key_env"),
)
"""Options of scorers that may change; so may secrets, where they are, and the place of files that an option names."""


def free_fields(config: RunConfig) -> dict[str, str]:
    """Return `FREE` with what is free under this configuration alone."""
    free = dict(FREE)
    if config.optimizer.schedule != "cosine":
        free["iterations"] = "only the cosine schedule looks at the end"
    if not config.checkpoint.keep_best:
        free["evaluation.every"] = "without checkpoint.keep_best, evaluations on the way decide nothing"
    return free


def is_free(name: str, free: Mapping[str, str]) -> bool:
    """Return whether a field is among the free ones."""
    return any(fnmatchcase(name, pattern) for pattern in free)


def fingerprint(config: RunConfig, checkpoint: ReleasedModel, train: PromptSet, heldout: PromptSet) -> dict[str, Any]:
    """Return all that decides a run's numbers, as nested JSON under the names of the fields."""
    found: dict[str, Any] = {"version": VERSION}
    free = free_fields(config)
    for name, value in field_values(config):
        if name.startswith("rewards.scorers.") and name.endswith((".options", ".scorer")):
            continue
        if not is_free(name, free):
            _put(found, name, value)
    _put(found, "grpo.objective", _objective(config.grpo.objective))
    for name, scorer in config.rewards.scorers.items():
        _put(found, f"rewards.scorers.{name}.scorer", scorer.scorer or name)
        _put(found, f"rewards.scorers.{name}.options", _options(scorer))
    for name, contents in _model(config, checkpoint).items():
        _put(found, name, contents)
    for name, prompts in (("prompts.train", train), ("prompts.heldout", heldout)):
        _put(found, name, {"prompts": len(prompts), "contents": digest_json(prompts.metadata)})
    return found


def agreed(mine: dict[str, Any]) -> dict[str, Any]:
    """Return the fingerprint of process 0 in every process; raises ConfigError if one has another model or prompts."""
    found = hosts.gather(mine)
    for process, other in enumerate(found):
        for part in ("model", "prompts"):
            wrong = [name for name, value in found[0][part].items() if other[part].get(name) != value]
            if wrong:
                raise ConfigError(
                    f"process {process} reads other files than process 0 for {part}.{f', {part}.'.join(wrong)}; give "
                    "all hosts the same ones."
                )
    return dict(found[0])


def comparable(saved: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the parts of two fingerprints that can be compared: all, unless the first has no version yet.

    Then only the fields that both name count, and a warning says that contents of files could not be compared.
    """
    saved = redacted_values(saved)  # those of earlier versions have logins in them
    if "version" in saved:
        return _with_added_fields(saved, now), dict(now)
    warnings.warn(
        "the checkpoint is of an earlier version, which did not note what its model, prompts and scorers' files hold; "
        "they are taken to be those that it was trained with",
        stacklevel=2,
    )
    return _common(saved, now), _common(now, saved)


def _common(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    both = {name: value for name, value in one.items() if name in other and name != "rewards"}
    return {
        name: _common(value, other[name]) if isinstance(value, Mapping) else value
        for name, value in both.items()
        if isinstance(value, Mapping) == isinstance(other[name], Mapping)
    }


def _with_added_fields(saved: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    tree = dict(saved)
    for name, value in ADDED_FIELDS.items():
        section, field = name.split(".")
        if field in now.get(section, {}):
            tree[section] = {field: value, **tree.get(section, {})}
    return tree


def _put(tree: dict[str, Any], name: str, value: Any) -> None:
    *parts, last = name.split(".")
    for part in parts:
        tree = tree.setdefault(part, {})
    tree[last] = value


def _objective(name: str) -> str | dict[str, Any]:
    """Return the name of an objective; of a user's own also what its file holds."""
    source = inspect.getsourcefile(objective_class(name))
    if name in OBJECTIVES or source is None:
        return name
    return {"class": name, "contents": digest_path(Path(source))}


def _model(config: RunConfig, checkpoint: ReleasedModel) -> dict[str, Any]:
    """Return digests of what the model's folder holds, by the field that names it."""
    weights = transformer_path(local(config.model.path), config.model.transformer or None)
    folder = weights if weights.is_dir() else weights.parent
    tokenizer = {name: content for name, content in checkpoint.files.items() if name.startswith("tokenizer/")}
    return {
        "model.transformer": digest_files(folder / name for name in open_part(weights).layout.files),
        "model.path": {
            "transformer": digest_json([asdict(checkpoint.transformer_config)]),
            "vae": digest_json([asdict(checkpoint.vq_config), *_arrays(checkpoint.vq)]),
            "tokenizer": digest_json(sorted((name, content.hex()) for name, content in tokenizer.items())),
            "scheduler": digest_json([asdict(checkpoint.scheduler), *_arrays(checkpoint.path_codebook)]),
        },
    }


def _arrays(tree: Any) -> list[list[Any]]:
    """Return [name, dtype, shape, digest] of every array, all of whose numbers are read."""
    leaves = [(jax.tree_util.keystr(path), np.asarray(leaf)) for path, leaf in jax.tree.leaves_with_path(tree)]
    return [[name, str(leaf.dtype), leaf.shape, digest_array(leaf)] for name, leaf in leaves]


def _options(scorer: ScorerConfig) -> dict[str, Any]:
    """Return the options that decide what a scorer says; files by what they hold."""
    free = {name for name in scorer.options if name in FREE_OPTIONS or concerns_secret(name)}
    decide = {name: value for name, value in redacted_values(scorer.options).items() if name not in free}
    found: dict[str, Any] = {}
    for name, value in sorted(decide.items()):
        path = Path(value).expanduser()
        if value and path.exists():
            found[name] = {"contents": digest_path(path)}
        elif not (scorer.addresses and value.startswith((os.sep, ".", "~"))):  # else a place on the server
            found[name] = value
    return found
