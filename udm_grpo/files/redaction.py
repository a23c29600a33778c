"""Remove secrets from reports and run files: values of fields that hold secrets, logins in addresses."""

import re
from collections.abc import Sequence

from rewards_bridge.redaction import HIDDEN, hide_logins, is_secret, redacted

__all__ = ["HIDDEN", "hide_logins", "is_secret", "without_secrets"]

_QUOTED_KEY = re.compile(r"""['"]([^'"]*)['"]\s*:""")


def without_secrets(words: Sequence[str]) -> list[str]:
    """Return a command line with *** in place of secrets.

    Secrets are the values of --name=value and --name value if the name ends in key, token, secret, password, ..., dicts
    that contain such a name, and logins in addresses (https://name:password@host).
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
