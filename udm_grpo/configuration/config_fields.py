"""The fields of a RunConfig by their dotted names: values, types, documentation, and conversion from nested dicts."""

import ast
import difflib
import inspect
import math
import numbers
import operator
import os
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import reduce
from typing import Any, get_args, get_origin, get_type_hints

from udm_grpo.config import ConfigError, RunConfig


def field_names(config: Any, prefix: str = "") -> list[str]:
    """Return the dotted names of all fields; those in a dict of configurations include the key of their entry."""
    names = []
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            names += field_names(value, f"{prefix}{field.name}.")
        elif part_type(type(config), field.name):
            for key, part in value.items():
                names += field_names(part, f"{prefix}{field.name}.{key}.")
        else:
            names.append(f"{prefix}{field.name}")
    return names


def member(section: Any, name: str) -> Any:
    """Return the field of a dataclass, or the entry of a dict, with this name."""
    return section[name] if isinstance(section, dict) else getattr(section, name)


def field_values(config: Any) -> list[tuple[str, Any]]:
    """Return every field of a configuration as (dotted name, value)."""
    return [(name, reduce(member, name.split("."), config)) for name in field_names(config)]


def field_type(section: Any, name: str) -> Any:
    """Return the annotated type of a dataclass's field; None if there is no such field."""
    return get_type_hints(section).get(name)


def part_type(section: Any, name: str) -> Any:
    """Return the dataclass that a dict field holds under user-chosen names; None for every other field."""
    annotation = field_type(section, name)
    held = get_args(annotation)[1] if get_origin(annotation) is dict else None
    return held if is_dataclass(held) else None


def unknown_field(name: str, known: Sequence[str], prefix: str = "--config.") -> ConfigError:
    """Return the error for a dotted name that is not a field; it suggests the nearest ones, or lists all."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    advice = f"did you mean {' or '.join(near)}?" if near else f"the fields are {', '.join(known)}."
    return ConfigError(f"{prefix}{name}: there is no such field; {advice}")


def type_name(annotation: Any) -> str:
    """Return a type as a user writes it: int, tuple of int, dict of str."""
    args = [arg for arg in get_args(annotation) if arg is not Ellipsis]
    return f"{get_origin(annotation).__name__} of {args[-1].__name__}" if args else annotation.__name__


def typed(name: str, value: Any, annotation: Any) -> Any:
    """Return a value converted to its field's type: paths to text, lists to tuples, numbers in a dict of text to text.

    Raises ConfigError for a value of another type.
    """
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(typed(f"{name}[{at}]", item, args[0]) for at, item in enumerate(value))
    if origin is dict and isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _entry(f"{name}.{key}", item, args[1]) for key, item in value.items()}
    if annotation is bool and isinstance(value, bool):
        return value
    if annotation is int and hasattr(value, "__index__") and not isinstance(value, bool):
        return operator.index(value)
    if annotation is float and isinstance(value, numbers.Real) and not isinstance(value, bool):
        return value if isinstance(value, int | float) else float(value)
    if annotation is str and isinstance(value, str | os.PathLike):
        return os.fspath(value)
    raise ConfigError(f"{name} is {value!r}, of type {type(value).__name__}; its type is {type_name(annotation)}.")


def _entry(name: str, value: Any, annotation: Any) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{name} is {value}; set it to a finite number.")
    return str(value) if annotation is str and number else typed(name, value, annotation)


def settle(section: Any, prefix: str = "") -> None:
    """Check the names and types of a configuration that user code built, and convert values as `typed` does.

    Raises ConfigError for an attribute that is not a field, and for a value of the wrong type.
    """
    names = [field.name for field in fields(section)]
    for name in sorted(vars(section).keys() - set(names)):
        raise unknown_field(f"{prefix}{name}", [f"{prefix}{known}" for known in names], "config.")
    for name in names:
        value, held, dotted = getattr(section, name), part_type(type(section), name), f"{prefix}{name}"
        annotation = field_type(type(section), name)
        if is_dataclass(annotation):
            _settle_part(value, annotation, dotted)
        elif held:
            if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
                raise ConfigError(f"{dotted} is {value!r}; set it to a dict of {held.__name__}.")
            for key, part in value.items():
                _settle_part(part, held, f"{dotted}.{key}")
        else:
            setattr(section, name, typed(dotted, value, annotation))


def _settle_part(value: Any, expected: Any, dotted: str) -> None:
    if not isinstance(value, expected):
        raise ConfigError(f"{dotted} is {value!r}; set it to an instance of {expected.__name__}.")
    settle(value, f"{dotted}.")


def fill(section: Any, values: Mapping[str, Any], prefix: str = "") -> Any:
    """Set the fields of a configuration that a nested dict contains; return the configuration.

    A dict of configurations is replaced, each entry starting from defaults. Raises ConfigError for unknown names.
    """
    names = [field.name for field in fields(section)]
    for name, value in values.items():
        dotted = f"{prefix}{name}"
        if name not in names:
            raise unknown_field(dotted, [f"{prefix}{known}" for known in names], "config.")
        annotation, held = field_type(type(section), name), part_type(type(section), name)
        if not (is_dataclass(annotation) or held):
            setattr(section, name, value)
            continue
        entries = value.items() if isinstance(value, Mapping) else []
        if not isinstance(value, Mapping) or (held and not all(isinstance(part, Mapping) for _, part in entries)):
            raise ConfigError(f"{dotted} is {value!r}; set it to a dict of {(held or annotation).__name__}'s fields.")
        if held:
            setattr(section, name, {key: fill(held(), part, f"{dotted}.{key}.") for key, part in entries})
        else:
            fill(getattr(section, name), value, f"{dotted}.")
    return section


def documentation(section: Any) -> dict[str, str]:
    """Return the docstring below each field of a dataclass, as one paragraph."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(section))).body
    assert isinstance(definition, ast.ClassDef)
    described = {}
    for statement, below in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign) and isinstance(below, ast.Expr):
            described[ast.unparse(statement.target)] = " ".join(str(ast.literal_eval(below.value)).split())
    return described


def help_text(config: RunConfig) -> str:
    """Return every field with its type, its value in this configuration and its documentation."""
    return "\n".join(_help_lines(config, ""))


def _help_lines(section: Any, prefix: str) -> list[str]:
    lines, later = [], []
    for field in fields(section):
        value, dotted = getattr(section, field.name), f"{prefix}{field.name}"
        description = documentation(type(section)).get(field.name, "")
        if is_dataclass(value):
            later += ["", f"{dotted}: {inspect.getdoc(value)}", *_help_lines(value, f"{dotted}.")]
        elif part_type(type(section), field.name):
            later += ["", f"{dotted}.NAME: {description}"]
            for key, part in value.items():
                later += [f"{dotted}.{key}: {inspect.getdoc(part)}", *_help_lines(part, f"{dotted}.{key}.")]
        else:
            lines.append(f"  --config.{dotted}={value if value != '' else repr('')}")
            kind = type_name(field_type(type(section), field.name))
            lines.append(
                textwrap.fill(f"{kind}. {description}", 110, initial_indent=" " * 6, subsequent_indent=" " * 6)
            )
    return lines + later
