"""Pass options to a scorer: as pairs, in a private file or over standard input, with secrets from variables or files.

Every user of a machine can read its command lines. Processes that are started here therefore get their options over
standard input, and users can set a secret option NAME as NAME_env=VARIABLE or NAME_file=PATH, or all options with
--options-file.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from rewards_bridge.errors import UsageError
from rewards_bridge.redaction import MAX_SECRET_BYTES, is_secret, redacted, remember

STDIN = "-"
"""File name that stands for the first line of standard input."""
MAX_BYTES = 48 << 10
"""Limit for all options together; a pipe buffers 64 KiB before anyone reads."""


def parse_pairs(pairs: Sequence[str]) -> dict[str, str]:
    """Return KEY=VALUE pairs as a dict; raises UsageError for another form."""
    options = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise UsageError(f"--option {pair!r}: expected KEY=VALUE")
        options[key] = os.path.expanduser(value)  # shells do not expand the ~ in KEY=~/x
    remember(options)
    return options


def as_line(options: Mapping[str, str]) -> bytes:
    """Return options as the line that read_file reads from standard input; raises UsageError if they are too long."""
    line = json.dumps(dict(options)).encode() + b"\n"
    if len(line) > MAX_BYTES:
        raise UsageError(
            f"the options of a scorer take {len(line)} bytes; the limit is {MAX_BYTES}: put the long one in a file"
        )
    return line


def read_file(path: str) -> dict[str, str]:
    """Return the options in a file (one JSON object of texts) or in the first line of standard input ("-").

    Raises UsageError, which never shows any of the content.
    """
    try:
        text = sys.stdin.buffer.readline(MAX_BYTES + 1) if path == STDIN else Path(path).read_bytes()
        options = json.loads(text)
    except OSError as error:
        raise UsageError(f"--options-file {path} cannot be read: {error.strerror}") from error
    except ValueError:
        raise UsageError(f'--options-file {path} is not JSON; expected an object such as {{"quality": "90"}}') from None
    if not isinstance(options, dict) or not all(isinstance(value, str | int | float) for value in options.values()):
        raise UsageError(f'--options-file {path}: expected a JSON object of texts, such as {{"quality": "90"}}')
    texts = {
        str(key): os.path.expanduser(value) if isinstance(value, str) else json.dumps(value)
        for key, value in options.items()
    }
    remember(texts)
    return texts


def resolve_secrets(scorer: str, options: Mapping[str, str], parameters: Collection[str]) -> dict[str, str]:
    """Return the options with secrets that are set as NAME_env or NAME_file replaced by their values.

    Applies only to secret parameters NAME of the scorer for which it has no such parameter itself. Raises UsageError
    for a variable that is not set or a file that cannot be read.
    """
    resolved: dict[str, str] = {}
    for key, value in options.items():
        name, _, place = key.rpartition("_")
        if key in parameters or name not in parameters or place not in ("env", "file") or not is_secret(name):
            resolved[key] = value
        elif name in options or name in resolved:
            raise UsageError(f"scorer {scorer!r}: {name} is set twice, also by {key}; remove one of them")
        else:
            resolved[name] = _from_environment(scorer, key, value) if place == "env" else _from_file(scorer, key, value)
    remember({key: value for key, value in resolved.items() if options.get(key) != value})
    return resolved


def resolve_environment(extra: Mapping[str, str], environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the variables, with values $NAME taken from our own environment; UsageError if NAME is not set."""
    resolved = {}
    for key, value in extra.items():
        name = value[1:].removeprefix("{").removesuffix("}") if value.startswith("$") else ""
        if name.isidentifier():
            if name not in environment:
                raise UsageError(f"environment.{key} is {value}, but {name} is not set; export it first")
            value = environment[name]
        resolved[key] = value
    return resolved


def _from_environment(scorer: str, key: str, variable: str) -> str:
    value = os.environ.get(variable, "").strip()
    if not value:
        raise UsageError(f"scorer {scorer!r}: {key} names {variable}, which is not set in its process; export it")
    return value


def _from_file(scorer: str, key: str, path: str) -> str:
    try:
        with Path(path).expanduser().open("rb") as file:
            value = file.read(MAX_SECRET_BYTES).decode().strip()
    except (OSError, ValueError) as error:
        raise UsageError(f"scorer {scorer!r}: {key}: {redacted(str(error))}") from None
    if not value:
        raise UsageError(f"scorer {scorer!r}: {key} names {path}, which is empty")
    return value
