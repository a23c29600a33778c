"""What a report and a run's notes leave out: values of fields that hold secrets, logins in addresses."""

from collections.abc import Sequence

from rewards_bridge.redaction import HIDDEN, hide_logins, is_secret

__all__ = ["HIDDEN", "hide_logins", "is_secret", "without_secrets"]


def without_secrets(words: Sequence[str]) -> list[str]:
    """A command line with *** for the value of --name=value where the name ends in key, token, secret, password, ...

    Logins in addresses (https://name:password@host) go too.
    """
    shown = []
    for word in words:
        name, equals, _ = word.partition("=")
        shown.append(f"{name}={HIDDEN}" if equals and is_secret(name) else hide_logins(word))
    return shown
