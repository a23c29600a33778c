"""--config configs/x.py[:variant] --config.field=value -> RunConfig."""

import difflib
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from absl import flags
from ml_collections import config_flags

from udm_grpo.config import ConfigError, RunConfig


def field_names(config: Any, prefix: str = "") -> list[str]:
    """Every field of a configuration, dotted."""
    names = []
    for field in fields(config):
        value = getattr(config, field.name)
        names += field_names(value, f"{prefix}{field.name}.") if is_dataclass(value) else [f"{prefix}{field.name}"]
    return names


def _unknown_field(argument: str) -> ConfigError:
    name = argument.removeprefix("--").removeprefix("config.").split("=")[0]
    known = field_names(RunConfig())
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    advice = f"did you mean {' or '.join(near)}?" if near else f"the fields are {', '.join(known)}."
    return ConfigError(f"--config.{name}: there is no such field; {advice}")


def _is_field(name: str) -> bool:
    # options, environment and tag_weights hold names of the user's own.
    known = field_names(RunConfig())
    return name in known or any(name.startswith(f"{field}.") for field in known)


def parse(argv: Sequence[str]) -> RunConfig:
    """Read the command line (without the program's name).

    Raises ConfigError for an unknown flag or field, a value of the wrong type, or a config file that gives no
    RunConfig.
    """
    for argument in argv:
        if argument.startswith("--config.") and not _is_field(argument.removeprefix("--config.").split("=")[0]):
            raise _unknown_field(argument)
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "configs/x.py or configs/x.py:variant", flag_values=values)
    try:
        rest = values(["train", *argv])
        config = values.config
    except (flags.Error, KeyError, TypeError) as error:
        text = error.args[0] if error.args else str(error)
        raise ConfigError(f"the command line cannot be read: {text}") from error
    except OSError as error:
        raise ConfigError(f"the config file cannot be read: {error}. Name one, as in configs/shapes.py.") from error
    if len(rest) > 1:
        raise ConfigError(f"unexpected {' '.join(rest[1:])}; every setting is --config.field=value.")
    if not isinstance(config, RunConfig):
        raise ConfigError(f"--config must name a file whose get_config() returns a RunConfig; found {type(config)}.")
    return config
