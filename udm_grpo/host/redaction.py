"""What a report and a run's notes leave out: values of fields that hold secrets, logins in addresses."""

import re
from collections.abc import Sequence

HIDDEN = "***"

_SECRET = re.compile(r"(?:^|[._-]|api)(?:key|token|secret|passwd|password|credentials?)$", re.IGNORECASE)
_LOGIN = re.compile(r"(?<=://)[^/@\s]+(?=@)")


def without_secrets(words: Sequence[str]) -> list[str]:
    """A command line with *** for the value of --name=value where the name ends in key, token, secret, password, ...

    Logins in addresses (https://name:password@host) go too.
    """
    shown = []
    for word in words:
        name, equals, _ = word.partition("=")
        shown.append(f"{name}={HIDDEN}" if equals and is_secret(name) else hide_logins(word))
    return shown


def is_secret(name: str) -> bool:
    """Whether a field or an environment variable of this name holds a secret; a *_file or *_env only names a place."""
    return bool(_SECRET.search(name))


def hide_logins(text: str) -> str:
    """The text without logins in addresses."""
    return _LOGIN.sub(HIDDEN, text)
