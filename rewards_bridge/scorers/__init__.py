"""Load scorers by name. A user's own scorer is named "module:Class"; its options are the arguments of the class."""

from __future__ import annotations

import importlib
import inspect
import math
import sys
from collections.abc import Callable, Mapping

from rewards_bridge.errors import UsageError
from rewards_bridge.options import resolve_secrets
from rewards_bridge.redaction import shown
from rewards_bridge.scorers.base import Scorer, Scores
from rewards_bridge.scorers.records import SCORERS

__all__ = ["SCORERS", "Scorer", "Scores", "default_options", "load_scorer", "with_defaults", "with_device"]


def load_scorer(name: str, options: Mapping[str, str]) -> Scorer:
    """Create the scorer of this name or "module:Class" with these options; UsageError for an invalid name or option.

    Option values are texts (from a config or a command line) and are converted for arguments annotated as int, float
    or bool.
    """
    scorer_class = _find_class(name)
    parameters = inspect.signature(scorer_class).parameters
    scorer = scorer_class(**_convert(name, scorer_class, resolve_secrets(name, options, parameters)))
    if not callable(getattr(scorer, "score", None)):
        raise UsageError(f"scorer {name!r}: {_target(name)} has no method score(images, prompts, metadata)")
    return scorer


def default_options(name: str) -> dict[str, str]:
    """Return the defaults of this scorer's optional options, as text; UsageError if there is no such scorer."""
    parameters = inspect.signature(_find_class(name)).parameters.values()
    return {each.name: str(each.default) for each in parameters if each.default is not inspect.Parameter.empty}


def with_defaults(name: str, options: Mapping[str, str], defaults: Mapping[str, str | None]) -> dict[str, str]:
    """Return the options, completed with those of `defaults` that the scorer takes and that are not empty."""
    known = inspect.signature(_find_class(name)).parameters
    return {**{key: value for key, value in defaults.items() if value and key in known}, **options}


def with_device(name: str, options: Mapping[str, str], device: str | None) -> dict[str, str]:
    """Return the options, completed with `device` if the scorer takes one and they name none."""
    return with_defaults(name, options, {"device": device})


def _target(name: str) -> str:
    if name in SCORERS:
        return SCORERS[name].target
    if ":" in name:
        return name
    raise UsageError(f'unknown scorer {name!r}; known: {", ".join(sorted(SCORERS))}, or your own as "module:Class"')


def _find_class(name: str) -> Callable[..., Scorer]:
    target = _target(name)
    module_name, _, class_name = target.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        from rewards_bridge.doctor import pin  # here, because the doctor imports this package

        requirement = pin((error.name or "").partition(".")[0])
        advice = f"{sys.executable} -m pip install {requirement}" if "==" in requirement else "add it to PYTHONPATH"
        raise UsageError(
            f"scorer {name!r}: {error} while importing {module_name!r} with {sys.executable}; install it there "
            f"({advice}) or choose another interpreter"
        ) from error
    if not hasattr(module, class_name):
        raise UsageError(f"scorer {name!r}: module {module_name!r} ({module.__file__}) has no {class_name!r}")
    scorer_class: Callable[..., Scorer] = getattr(module, class_name)
    return scorer_class


def _convert(name: str, scorer: Callable[..., Scorer], options: Mapping[str, str]) -> dict[str, object]:
    signature = inspect.signature(scorer)
    converted: dict[str, object] = {}
    for key, value in options.items():
        annotation = signature.parameters[key].annotation if key in signature.parameters else str
        converted[key] = _convert_one(name, key, value, annotation)
    try:
        signature.bind(**converted)
    except TypeError as error:
        known = ", ".join(str(parameter) for parameter in signature.parameters.values()) or "none"
        raise UsageError(f"scorer {name!r}: {error}; its options: {known}") from None
    return converted


def _convert_one(name: str, key: str, value: str, annotation: object) -> object:
    truth = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    try:
        if annotation in (bool, "bool"):
            return truth[value.lower()]
        if annotation in (int, "int"):
            return int(value)
        if annotation in (float, "float"):
            number = float(value)
            if not math.isfinite(number):
                raise ValueError(value)
            return number
    except (ValueError, KeyError):
        raise UsageError(f"scorer {name!r}: option {key}={shown(key, value)!r} is not a valid {annotation}") from None
    return value
