"""Read --config configs/x.py[:variant] --config.field=value into a RunConfig.

The library ml_collections parses the settings (config_flags, on absl's flags). config_overrides.py prepares them for
it; the config file is loaded here, because the library's own loader keeps a module's names between two files.
"""

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from absl import flags
from ml_collections import config_dict, config_flags

from rewards_bridge.redaction import remember
from udm_grpo.config import ConfigError, RunConfig
from udm_grpo.configuration.config_fields import fill, help_text, settle
from udm_grpo.configuration.config_overrides import Overrides
from udm_grpo.files import places

_OVERRIDE = re.compile(r"--?(?P<no>no)?config\.(?P<name>[^=]*)(?:=(?P<text>.*))?", re.DOTALL)
INSTALLED = Path(__file__).resolve().parents[2]
"""The folder that holds udm_grpo/ and configs/: a checkout, or site-packages."""


def parse(argv: Sequence[str]) -> RunConfig:
    """Read the command line (without the program's name); the last value of a field wins.

    Raises ConfigError for an unknown flag or field, a value of the wrong type, or a config file that gives no
    configuration.
    """
    file, rest = _config_file(argv)
    if not file:
        raise ConfigError("--config must name a file, as in --config configs/shapes.py.")
    config = load(file)
    overrides = Overrides(config)
    unexpected = _read(rest, overrides)
    if unexpected:
        raise ConfigError(f"unexpected {' '.join(unexpected)}; write every setting as --config.field=value.")
    overrides.check_entries()
    return _parsed(config, overrides)


def usage(argv: Sequence[str]) -> str:
    """Return every field with its documentation, with the values of the config file if one is named."""
    file, _ = _config_file([word for word in argv if word not in ("-h", "--help")])
    return help_text(load(file) if file else RunConfig())


def _config_file(argv: Sequence[str]) -> tuple[str, list[str]]:
    """Return the value of --config and the other arguments, with --flagfile expanded by absl."""
    known = flags.FlagValues()
    flags.DEFINE_string("config", None, "The config file.", flag_values=known)
    known.set_gnu_getopt(True)
    try:
        _, *rest = known(["udm_grpo", *argv], known_only=True)
    except flags.Error as error:
        raise ConfigError(f"the command line cannot be read: {error}.") from None
    return known["config"].value or "", rest


def load(file: str) -> RunConfig:
    """Return the configuration of FILE.py or FILE.py:variant; raises ConfigError if there is none.

    configs/NAME.py is the installed file if the working folder has none.
    """
    if problem := places.problem("--config", file):
        raise ConfigError(problem)
    name, colon, variant = places.with_home("--config", file).partition(":")
    path = Path(name)
    if not path.exists() and path.parts[:1] == ("configs",):
        path = INSTALLED / path
    if not path.is_file():
        raise ConfigError(f"the config file cannot be read: there is no {name}. Name one, as in configs/shapes.py.")
    get_config = getattr(_module(path), "get_config", None)
    if not callable(get_config):
        raise ConfigError(f"{name} has no get_config(); add one that returns a RunConfig.")
    try:
        config = get_config(variant) if colon else get_config()
    except (TypeError, ValueError, LookupError, AttributeError, NameError, ImportError) as error:
        raise ConfigError(f"{file}: get_config failed: {' '.join(str(error).split())}") from error
    try:
        return _run_config(config)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None


def _module(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location("config_file", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"the config file cannot be read: {path} is not a Python file; its name must end in .py.")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (SyntaxError, ImportError, NameError) as error:
        raise ConfigError(f"the config file cannot be read: {path}: {type(error).__name__}: {error}") from error
    return module


def _run_config(config: Any) -> RunConfig:
    """Return a RunConfig itself, or the defaults with the values of a ConfigDict; checked."""
    if isinstance(config, config_dict.ConfigDict):
        try:
            values = config.to_dict()
        except config_dict.RequiredValueError as error:
            raise ConfigError(f"a placeholder of the ConfigDict has no value: {error}") from None
        config = fill(RunConfig(), values)
    if not isinstance(config, RunConfig):
        raise ConfigError(
            f"get_config() must return a RunConfig or an ml_collections ConfigDict; found {type(config)}."
        )
    settle(config)
    return config


def _read(words: Sequence[str], overrides: Overrides) -> list[str]:
    """Pass every setting to `overrides`; return the arguments that are not settings.

    A flag without a value is true, or takes the next argument, as in absl.
    """
    unexpected, pending = [], list(words)
    while pending:
        word = pending.pop(0)
        match = _OVERRIDE.fullmatch(word)
        if not match:
            unexpected.append(word)
            continue
        name, text = match["name"], match["text"]
        if match["no"] or (text is None and overrides.is_bool(name)):
            if text is not None or not overrides.is_bool(name):
                raise ConfigError(f"{word}: only a bool can be set without a value; write --config.{name}=value.")
            text = "false" if match["no"] else "true"
        elif text is None and pending and not pending[0].startswith("-"):
            text = pending.pop(0)
        overrides.add(name, text)
    return unexpected


def _parsed(config: RunConfig, overrides: Overrides) -> RunConfig:
    """Return the configuration with all overrides, as the library parses them."""
    words = ["udm_grpo", *overrides.words()]
    values = flags.FlagValues()
    try:
        config_flags.DEFINE_config_dataclass("config", config, flag_values=values, sys_argv=words)
        values(words)
    except (flags.Error, ValueError, LookupError) as error:
        raise overrides.explained(error) from None
    parsed: Any = values["config"].value
    settle(parsed)
    for scorer in parsed.rewards.scorers.values():
        remember({**scorer.options, **scorer.environment})
    try:
        places.expand_config(parsed)
    except places.PlaceError as error:
        raise ConfigError(str(error)) from None
    return cast(RunConfig, parsed)
