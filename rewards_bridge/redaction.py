"""Remove secrets from every output: values of secret options and variables, and logins in addresses.

A secret is recognised by the name of its option, field or variable (api_key, HF_TOKEN), or is the login in an address.
The process that receives it remembers its value and removes it from every text that it emits. The replacement is ***
rather than a digest of the value: short passwords can be guessed from their digests, and a changed secret leaves texts
the same.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
import traceback
import urllib.parse
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO, cast

HIDDEN = "***"
MIN_REMEMBERED = 6
"""Characters; shorter values are hidden only in their own field, because they could be part of any word."""
INTERRUPTED_STATUS = 128 + signal.SIGINT
"""Exit status after Ctrl-C, as in shells."""
MAX_SECRET_BYTES = 64 << 10

_SECRET = re.compile(r"(?:^|[._-]|api)(?:key|token|secret|passwd|password|credentials?)$", re.IGNORECASE)
_NO_SECRET = re.compile(r"(?:prompt|tls)[_-]key$", re.IGNORECASE)  # the name of a field of prompts; a path
_LOGIN = re.compile(r"""(?<=://)[^/@\s"']+(?=@)""")
_PLACES = ("_env", "_file")
_remembered: set[str] = set()  # for the whole process, because any module may print them


def is_secret(name: str) -> bool:
    """Return whether an option, field or variable of this name holds a secret; *_file and *_env only name its place."""
    return bool(_SECRET.search(name)) and not _NO_SECRET.search(name)


def concerns_secret(name: str) -> bool:
    """Return whether an option or field of this name holds a secret or names the variable or file that does."""
    return is_secret(_stem(name))


def hide_logins(text: str) -> str:
    """Return the text without logins in addresses."""
    return _LOGIN.sub(HIDDEN, text)


def shown(name: str, value: str) -> str:
    """Return the value in printable form: *** for a secret, otherwise the value without logins in addresses."""
    return HIDDEN if is_secret(name) else hide_logins(value)


def remember(values: Mapping[str, str], environment: Mapping[str, str] = os.environ) -> None:
    """Remember the secrets among options or variables, so that later texts of this process omit them.

    An option *_env (a variable of `environment`) or *_file (a path) points to a secret if the rest of its name marks
    one. Unreadable ones are ignored here; the code that needs them reports them.
    """
    for name, value in ((name, str(value)) for name, value in values.items()):
        for login in _LOGIN.findall(value):
            _remember_value(login)
            _remember_value(login.partition(":")[2])
        if not concerns_secret(name):
            continue
        if _stem(name) == name:
            _remember_value(environment.get(value[1:].strip("{}"), value) if value.startswith("$") else value)
        elif name.endswith("_env"):
            _remember_value(environment.get(value, ""))
        else:
            with contextlib.suppress(OSError, ValueError):
                _remember_value(_first_bytes(value).decode())


def remember_start(environment: Mapping[str, str] = os.environ, words: Sequence[str] = tuple(sys.argv)) -> None:
    """Remember the values of variables and arguments whose names mark secrets (HF_TOKEN)."""
    for word in words:  # --option=vlm.api_key=VALUE contains two names
        parts = word.split("=")
        for at in range(1, len(parts)):
            remember({parts[at - 1]: "=".join(parts[at:])}, environment)
    remember({name: value for name, value in environment.items() if is_secret(name) and not value.startswith("/")})


def redacted(text: str) -> str:
    """Return the text with *** for every remembered secret and for logins in addresses."""
    for value in sorted(_remembered, key=len, reverse=True):
        text = text.replace(value, HIDDEN)
    return hide_logins(text)


def redacted_texts(value: Any) -> Any:
    """Return nested JSON values with redacted texts; numbers stay, even if they look like a secret."""
    if isinstance(value, Mapping):
        return {redacted_texts(name): redacted_texts(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [redacted_texts(each) for each in value]
    return redacted(value) if isinstance(value, str) else value


def redacted_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested settings with *** for every secret, recognised by its name or its value."""
    return {name: _redacted_value(str(name), value) for name, value in values.items()}


def _redacted_value(name: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        return redacted_values(value)
    if isinstance(value, str):
        return HIDDEN if value and is_secret(name) else redacted(value)
    if isinstance(value, list | tuple):
        return type(value)(_redacted_value(name, each) for each in value)
    return value


def guarded(main: Callable[[], int | None]) -> int:
    """Run a command and return its exit status; secrets are removed from all that it prints, logs and raises.

    Ctrl-C prints one word instead of a traceback.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    remember_start()
    out, err = cast(TextIO, _Redacting(sys.stdout)), cast(TextIO, _Redacting(sys.stderr))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            return main() or 0
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return INTERRUPTED_STATUS
        except Exception:
            traceback.print_exc()
            return 1


def _stem(name: str) -> str:
    return next((name.removesuffix(place) for place in _PLACES if name.endswith(place)), name)


def _remember_value(value: str) -> None:
    value = value.strip()
    if len(value) >= MIN_REMEMBERED and value != HIDDEN:
        _remembered.update((value, json.dumps(value)[1:-1], repr(value)[1:-1], urllib.parse.quote(value, safe="")))


def _first_bytes(path: str) -> bytes:
    with Path(path).expanduser().open("rb") as file:
        return file.read(MAX_SECRET_BYTES)


class _Redacting:
    """A stream that removes secrets and writes to another stream."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(redacted(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        self.write("".join(lines))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
