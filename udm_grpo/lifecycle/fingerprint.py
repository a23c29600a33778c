"""The fingerprint of a run: the fields and file contents that determine its numbers and must be the same on resume.

Every field of the configuration counts unless `FREE` (or, under a condition, `free_fields`) names it. Files count by
content, not by location: model and prompts are compared whole (large transformer and scorer weights by a sample, see
files/digests.py), so a folder may be moved, linked or named by another path.

Not covered: files of a scorer at an address, which are on its server; the code of a user's own scorer; versions of
packages and drivers, which environment.json records at every start.
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

ADDED_FIELDS: dict[str, Any] = {"grpo.objective": "udm_grpo", "evaluation.guidance_scales": (1.0,)}
"""Fields that checkpoints of earlier versions do not name -> the values they were trained with."""
VERSION = 2
"""Version of the fingerprint format; those of version 1 had neither a version nor contents."""

PLACE = "a location; its contents are compared"
ROUNDING = "how it is computed: the same numbers up to rounding"
PROCESS = "how the scorer is run, not what it returns"
FREE = {
    **dict.fromkeys(("output_dir", "checkpoint.resume"), "a location"),
    **dict.fromkeys(("model.path", "model.transformer", "prompts.train", "prompts.heldout"), PLACE),
    **dict.fromkeys(("model.attention", "model.remat", "model.compute_weights", "model.logit_rows"), ROUNDING),
    **dict.fromkeys(("rollout.micro_batch", "optimizer.micro_batch", "evaluation.batch", "mesh.*"), ROUNDING),
    "distributed.*": "how processes find each other",
    "compilation_cache": "what the next start need not compile",
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
    "logging.*": "where metrics are logged",
}
"""Field (or pattern of fields) that may change on resume -> why it does not affect the numbers."""
FREE_OPTIONS = (
    *("device", "batch_size", "threads", "cpu_threads", "processes", "concurrency", "timeout_s", "retries"),
    *("url", "api_key_env"),
)
"""Options of scorers that may change; so may secrets, their locations, and the location of files an option names."""


def free_fields(config: RunConfig) -> dict[str, str]:
    """Return `FREE` and the fields that are free under this configuration only."""
    free = dict(FREE)
    if config.optimizer.schedule != "cosine":
        free["iterations"] = "only the cosine schedule depends on the last iteration"
    if not config.checkpoint.keep_best:
        free["evaluation.every"] = "without checkpoint.keep_best, evaluations during training affect nothing"
    return free


def is_free(name: str, free: Mapping[str, str]) -> bool:
    """Return whether one of the patterns matches this field."""
    return any(fnmatchcase(name, pattern) for pattern in free)


def fingerprint(config: RunConfig, released: ReleasedModel, train: PromptSet, heldout: PromptSet) -> dict[str, Any]:
    """Return everything that determines a run's numbers, as nested JSON under the names of the fields."""
    tree: dict[str, Any] = {"version": VERSION}
    free = free_fields(config)
    for name, value in field_values(config):
        if name.startswith("rewards.scorers.") and name.endswith((".options", ".scorer")):
            continue
        if not is_free(name, free):
            _put(tree, name, value)
    _put(tree, "grpo.objective", _objective(config.grpo.objective))
    for name, scorer in config.rewards.scorers.items():
        _put(tree, f"rewards.scorers.{name}.scorer", scorer.scorer or name)
        _put(tree, f"rewards.scorers.{name}.options", _options(scorer))
    for name, contents in _model(config, released).items():
        _put(tree, name, contents)
    for name, prompts in (("prompts.train", train), ("prompts.heldout", heldout)):
        _put(tree, name, {"prompts": len(prompts), "contents": digest_json(prompts.metadata)})
    return tree


def agreed(mine: dict[str, Any]) -> dict[str, Any]:
    """Return the fingerprint of process 0 in every process; raise ConfigError where models or prompts differ."""
    fingerprints = hosts.gather(mine)
    for process, other in enumerate(fingerprints):
        for part in ("model", "prompts"):
            wrong = [name for name, value in fingerprints[0][part].items() if other[part].get(name) != value]
            if wrong:
                raise ConfigError(
                    f"process {process} reads other files than process 0 for {part}.{f', {part}.'.join(wrong)}; give "
                    "all hosts the same ones."
                )
    return dict(fingerprints[0])


def comparable(saved: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the parts of two fingerprints that can be compared: all of them if the saved one has a version.

    Otherwise only the fields that both have are compared, and a warning says that file contents were not.
    """
    saved = redacted_values(saved)  # those of earlier versions contain logins
    if "version" in saved:
        return _with_added_fields(saved, now), dict(now)
    warnings.warn(
        "the checkpoint is of an earlier version, which did not record the contents of the model, prompts and "
        "scorers' files; they are assumed to be the same",
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
    """Return the name of an objective; for a user's own, with a digest of its source file."""
    source = inspect.getsourcefile(objective_class(name))
    if name in OBJECTIVES or source is None:
        return name
    return {"class": name, "contents": digest_path(Path(source))}


def _model(config: RunConfig, released: ReleasedModel) -> dict[str, Any]:
    """Return digests of the contents of the model folder, by the field that names it."""
    weights = transformer_path(local(config.model.path), config.model.transformer or None)
    folder = weights if weights.is_dir() else weights.parent
    tokenizer = {name: content for name, content in released.files.items() if name.startswith("tokenizer/")}
    return {
        "model.transformer": digest_files(folder / name for name in open_part(weights).layout.files),
        "model.path": {
            "transformer": digest_json([asdict(released.transformer_config)]),
            "vae": digest_json([asdict(released.vq_config), *_arrays(released.vq)]),
            "tokenizer": digest_json(sorted((name, content.hex()) for name, content in tokenizer.items())),
            "scheduler": digest_json([asdict(released.scheduler), *_arrays(released.path_codebook)]),
        },
    }


def _arrays(tree: Any) -> list[list[Any]]:
    """Return [name, dtype, shape, digest] of every array; the digest covers all of its values."""
    leaves = [(jax.tree_util.keystr(path), np.asarray(leaf)) for path, leaf in jax.tree.leaves_with_path(tree)]
    return [[name, str(leaf.dtype), leaf.shape, digest_array(leaf)] for name, leaf in leaves]


def _options(scorer: ScorerConfig) -> dict[str, Any]:
    """Return the options that affect a scorer's scores; files by their contents."""
    free = {name for name in scorer.options if name in FREE_OPTIONS or concerns_secret(name)}
    decide = {name: value for name, value in redacted_values(scorer.options).items() if name not in free}
    options: dict[str, Any] = {}
    for name, value in sorted(decide.items()):
        path = Path(value).expanduser()
        if value and path.exists():
            options[name] = {"contents": digest_path(path)}
        elif not (scorer.addresses and value.startswith((os.sep, ".", "~"))):  # else a path on the server
            options[name] = value
    return options
