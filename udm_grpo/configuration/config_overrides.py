"""Convert the settings of a command line to a form that ml_collections' config_flags can parse.

The library sets existing fields, by their types. This module adds suggestions for unknown names, and lets dict fields,
which the library does not know, be set, extended and cleared: an entry that a setting adds is created with an empty
value, for the library to fill.
"""

import ast
import re
from dataclasses import dataclass, is_dataclass
from typing import Any, get_args, get_origin

from udm_grpo.config import ConfigError, RunConfig
from udm_grpo.configuration.config_fields import field_names, field_type, part_type, type_name, unknown_field

ADDING = ("weight", "scorer")
"""Fields whose setting adds an entry to a dict of configurations; the others only change an existing entry."""
_TRUTH = {"yes": "true", "no": "false"}


@dataclass(frozen=True)
class _Setting:
    """A setting of one value."""

    name: str
    text: str
    """Both as the user wrote them."""
    annotation: Any
    """The type of the field."""


class Overrides:
    """The settings of a command line, in order; `add` prepares the configuration for them."""

    def __init__(self, config: RunConfig):
        self.config = config
        self._settings: dict[str, _Setting] = {}
        """By the library's path of the field, such as prompts.tag_weights['counting']."""
        self._absent: dict[str, tuple[str, list[str]]] = {}
        """Path of a missing entry -> (the first setting of one of its fields, the entries that exist)."""

    def is_bool(self, name: str) -> bool:
        """Return whether this is the dotted name of a bool."""
        return _annotation(RunConfig, name.split(".")) is bool

    def words(self) -> list[str]:
        """Return the command line for the library."""
        settings = self._settings.items()
        return [f"--config.{path}={_library_text(setting.text, setting.annotation)}" for path, setting in settings]

    def explained(self, error: Exception) -> ConfigError:
        """Return the library's error as an error about the setting that the user wrote."""
        for path, setting in self._settings.items():
            if re.search(rf"config\.{re.escape(path)}(?![\w.\[])", str(error)):
                kind, shown = type_name(setting.annotation), f"--config.{setting.name}={setting.text}"
                return ConfigError(f"{shown}: {setting.text!r} cannot be read as {kind}; --help lists the types.")
        return ConfigError(f"the command line cannot be read: {error}")

    def add(self, name: str, text: str | None) -> None:
        """Add --config.NAME=TEXT; raise ConfigError for an unknown name, a missing value, or an unreadable dict."""
        parts = name.split(".")
        if _annotation(RunConfig, parts) is None:
            raise unknown_field(name, field_names(self.config))
        if text is None:
            raise ConfigError(f"--config.{name} has no value; write --config.{name}=value.")
        path = ""
        section: Any = self.config
        while True:
            part, *parts = parts
            path = f"{path}.{part}".removeprefix(".")
            annotation, held = field_type(type(section), part), part_type(type(section), part)
            if is_dataclass(annotation):
                section = getattr(section, part)
            elif held and len(parts) > 1:
                entries, path = getattr(section, part), _entry(path, parts[0])
                if parts[0] not in entries:
                    self._absent[path] = name, list(entries)
                if parts[1] in ADDING:
                    self._absent.pop(path, None)
                section = entries.setdefault(parts.pop(0), held())
            elif held:
                return self._set_parts(getattr(section, part), path, _Setting(name, text, held), *parts)
            elif get_origin(annotation) is dict:
                return self._set_dict(section, part, path, _Setting(name, text, get_args(annotation)[1]), *parts)
            else:
                return self._set(path, _Setting(name, text, annotation))

    def check_entries(self) -> None:
        """Raise ConfigError for a setting of an entry (a scorer) that the configuration lacks and that nothing adds."""
        for name, known in self._absent.values():
            entry = ".".join(name.split(".")[:3])
            raise ConfigError(
                f"--config.{name}: this configuration has no {entry}; it has {', '.join(known) or 'none'}. Correct the "
                f"name, or add the entry with --config.{entry}.{ADDING[0]}=... or {ADDING[1]}=..."
            )

    def _set(self, path: str, setting: _Setting) -> None:
        self._settings.pop(path, None)  # so that the order is that of the last settings
        self._settings[path] = setting

    def _forget(self, path: str) -> None:
        """Drop earlier settings below a path that is set again."""
        for other in [other for other in self._absent if other.startswith(path)]:
            del self._absent[other]
        for other in [other for other in self._settings if other.startswith((f"{path}.", f"{path}["))]:
            del self._settings[other]

    def _set_dict(self, section: Any, field: str, path: str, setting: _Setting, *key: str) -> None:
        """Set a dict of plain values as a whole, or one entry of it, whose name may have dots."""
        name, kind = setting.name, setting.annotation
        if key:
            settings = {".".join(key): setting}
        else:
            entries = _literal(name, setting.text).items()
            settings = {key: _Setting(f"{name}.{key}", _as_text(value), kind) for key, value in entries}
            setattr(section, field, {})
            self._forget(path)
        for entry, one in settings.items():
            getattr(section, field)[entry] = kind()  # its type tells the library how to read the text
            self._set(_entry(path, entry), one)

    def _set_parts(self, parts: dict[str, Any], path: str, setting: _Setting, *key: str) -> None:
        """Set a dict of configurations as a whole, or one of them, from a literal."""
        values = _literal(setting.name, setting.text)
        if key:
            parts[key[0]] = setting.annotation()
            self._forget(_entry(path, key[0]))
        else:
            parts.clear()
            self._forget(path)
        for field, value in values.items():
            self.add(f"{setting.name}.{field}", _as_text(value))


def _annotation(section: Any, parts: list[str]) -> Any:
    """Return the type of the value that this dotted name sets; None if there is no such value."""
    annotation, held, rest = field_type(section, parts[0]), part_type(section, parts[0]), parts[1:]
    if is_dataclass(annotation):
        return _annotation(annotation, rest) if rest else None
    if held and len(rest) > 1:
        return _annotation(held, rest[1:])
    if get_origin(annotation) is dict and rest:
        return get_args(annotation)[1]
    return None if rest else annotation


def _entry(path: str, key: str) -> str:
    """Return the library's path of a dict entry: a Python subscript without characters that end a flag's name."""
    return f"{path}[{key!r}]".replace(" ", "\\x20").replace("=", "\\x3d")


def _literal(name: str, text: str) -> dict[str, Any]:
    try:
        value: Any = ast.literal_eval(text.strip()) if text.strip() else {}
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        value = None
    if isinstance(value, dict) and all(isinstance(key, str) and key for key in value) and None not in value.values():
        return value
    raise ConfigError(
        f"--config.{name}={text}: {text!r} cannot be read as a dict; write --config.{name}.NAME=value for one entry, "
        f"--config.{name}={{}} to clear it, or --config.{name}=\"{{'NAME': value}}\" for all of it."
    )


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else repr(value)


def _library_text(text: str, annotation: Any) -> str:
    """Return the text in the form that the library's parsers of bools and tuples expect."""
    if annotation is bool:
        return _TRUTH.get(text.lower(), text)
    if get_origin(annotation) is not tuple:
        return text
    if get_args(annotation)[0] is not str:
        return text if text.strip("()[] ,") else "()"
    return repr(_texts(text))


def _texts(text: str) -> tuple[str, ...]:
    """Return a tuple of texts, quoted as in Python or unquoted: ('a', 'b') or a,b."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        value = None
    if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
        return tuple(value)
    return tuple(filter(None, (item.strip(" '\"") for item in text.strip("()[] ").split(","))))
