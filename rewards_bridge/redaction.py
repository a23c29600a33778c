"""What no output may show: values of names that hold secrets, logins in addresses."""

from __future__ import annotations

import re

HIDDEN = "***"

_SECRET = re.compile(r"(?:^|[._-]|api)(?:key|token|secret|passwd|password|credentials?)$", re.IGNORECASE)
_LOGIN = re.compile(r"(?<=://)[^/@\s]+(?=@)")


def is_secret(name: str) -> bool:
    """Return whether an option, field or variable of this name holds a secret; a *_file or *_env only names a place."""
    return bool(_SECRET.search(name))


def hide_logins(text: str) -> str:
    """Return the text without logins in addresses."""
    return _LOGIN.sub(HIDDEN, text)


def shown(name: str, value: str) -> str:
    """Return the value as it may be shown: *** for a secret, else the value without logins in addresses."""
    return HIDDEN if is_secret(name) else hide_logins(value)
