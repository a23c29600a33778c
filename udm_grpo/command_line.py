"""--config configs/x.py[:variant] --config.field=value -> RunConfig."""

import difflib
import importlib.util
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from functools import reduce
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from udm_grpo.config import ConfigError, RunConfig

_TRUTH = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def field_names(config: Any, prefix: str = "") -> list[str]:
    """Every field of a configuration, dotted; those of a dict of configurations under the names in it."""
    names = []
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            names += field_names(value, f"{prefix}{field.name}.")
        elif _part_type(type(config), field.name):
            for key, part in value.items():
                names += field_names(part, f"{prefix}{field.name}.{key}.")
        else:
            names.append(f"{prefix}{field.name}")
    return names


def _part_type(section: Any, name: str) -> Any:
    """The class of what a field holds by names of the user's own; None for every other field."""
    wanted = get_type_hints(section).get(name)
    held = get_args(wanted)[1] if get_origin(wanted) is dict else None
    return held if is_dataclass(held) else None


def _inside(section: Any, name: str) -> Any:
    return section[name] if isinstance(section, dict) else getattr(section, name)


def field_values(config: Any) -> list[tuple[str, Any]]:
    """Every field of a configuration, dotted, with its value."""
    return [(name, reduce(_inside, name.split("."), config)) for name in field_names(config)]


def parse(argv: Sequence[str]) -> RunConfig:
    """Read the command line (without the program's name); the last value of a field counts.

    Raises ConfigError for an unknown flag or field, a value of the wrong type, or a config file that gives no
    RunConfig.
    """
    file, settings, rest = None, [], []
    words = iter(argv)
    for word in words:
        flag, equals, value = word.partition("=")
        if flag == "--config":
            file = value if equals else next(words, None)
        elif flag.startswith("--config."):
            settings.append((flag.removeprefix("--config."), value if equals else None))
        else:
            rest.append(word)
    if rest:
        raise ConfigError(f"unexpected {' '.join(rest)}; every setting is --config.field=value.")
    if not file:
        raise ConfigError("--config must name a file, as in --config configs/shapes.py.")
    config = _load(file)
    for name, text in settings:
        _set(config, name, text)
    return config


def _load(file: str) -> RunConfig:
    path, colon, variant = file.partition(":")
    if not Path(path).is_file():
        raise ConfigError(f"the config file cannot be read: there is no {path}. Name one, as in configs/shapes.py.")
    spec = importlib.util.spec_from_file_location("config_file", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"the config file cannot be read: {path} is no Python file; its name has to end in .py.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, "get_config", None)):
        raise ConfigError(f"{path} has no get_config(); add one that returns a RunConfig.")
    try:
        config = module.get_config(variant) if colon else module.get_config()
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{file}: get_config failed: {error}") from error
    if not isinstance(config, RunConfig):
        raise ConfigError(f"--config must name a file whose get_config() returns a RunConfig; found {type(config)}.")
    return config


def _set(config: RunConfig, name: str, text: str | None) -> None:
    _add_part(config, name)
    known = field_names(config)
    # options, environment and tag_weights hold names of the user's own: the rest of the dotted name is one of them.
    found = next((field for field in known if name == field or name.startswith(f"{field}.")), None)
    *parents, last = (found or "").split(".")
    section: Any = reduce(_inside, parents, config)
    wanted = get_type_hints(type(section)).get(last)
    key = name.removeprefix(f"{found}.") if found != name else None
    if found is None or (key is not None and get_origin(wanted) is not dict):
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        advice = f"did you mean {' or '.join(near)}?" if near else f"the fields are {', '.join(known)}."
        raise ConfigError(f"--config.{name}: there is no such field; {advice}")
    if key is not None:
        setattr(section, last, getattr(section, last) | {key: _read(name, text, get_args(wanted)[1])})
    elif get_origin(wanted) is dict:
        raise ConfigError(f"--config.{name} holds names of your own; write --config.{name}.NAME=value.")
    else:
        setattr(section, last, _read(name, text, wanted))


def _add_part(config: RunConfig, name: str) -> None:
    """rewards.scorers.NAME.field=value adds a scorer that the config file does not have."""
    section: Any = config
    parts = name.split(".")
    for at, part in enumerate(parts):
        made = _part_type(type(section), part) if is_dataclass(section) else None
        if made and len(parts) > at + 2 and parts[at + 2] in {field.name for field in fields(made)}:
            getattr(section, part).setdefault(parts[at + 1], made())
        if not (isinstance(section, dict) and part in section) and not hasattr(section, part):
            return
        section = _inside(section, part)


def _read(name: str, text: str | None, wanted: Any) -> Any:
    """The value that a text stands for; a bare flag is True."""
    if text is None:
        if wanted is bool:
            return True
        raise ConfigError(f"--config.{name} has no value; write --config.{name}=value.")
    try:
        if get_origin(wanted) is tuple:
            parts = [part.strip(" '\"") for part in text.strip("()[] ").split(",")]
            return tuple(get_args(wanted)[0](part) for part in parts if part)
        return _TRUTH[text.lower()] if wanted is bool else wanted(text)
    except (KeyError, ValueError):
        kind = wanted.__name__ if isinstance(wanted, type) and not get_args(wanted) else str(wanted)
        raise ConfigError(f"--config.{name}={text}: {text!r} is no {kind}; give one.") from None
