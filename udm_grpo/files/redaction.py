"""What a report and a run's notes leave out: values of fields that hold secrets, logins in addresses."""

import re
from collections.abc import Sequence

from rewards_bridge.redaction import HIDDEN, hide_logins, is_secret, redacted

__all__ = ["HIDDEN", "hide_logins", "is_secret", "without_secrets"]

_QUOTED_KEY = re.compile(r"""['"]([^'"]*)['"]\s*:""")


def without_secrets(words: Sequence[str]) -> list[str]:
    """Return a command line with *** for the value of --name=value where the name ends in key, token, secret, password,
    ...

    So for --name value, and for a dict with such a name in it. Logins in addresses (https://name:password@host) go too.
    """
    shown: list[str] = []
    secret_next = False
    for word in words:
        name, equals, _ = word.partition("=")
        is_flag = word.startswith("-")
        if equals and is_secret(name):
            shown.append(f"{name}={HIDDEN}")
        elif any(is_secret(key) for key in _QUOTED_KEY.findall(word)):
            shown.append(f"{name}={HIDDEN}" if is_flag and equals else HIDDEN)
        elif secret_next and not is_flag:
            shown.append(HIDDEN)
        else:
            shown.append(redacted(word))
        secret_next = is_flag and not equals and is_secret(word)
    return shown
