"""Compare the options of a running server with those that a configuration sets for the same scorer."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

from rewards_bridge import transport
from rewards_bridge.protocol import bridge_pb2
from rewards_bridge.redaction import HIDDEN, shown

PLACES = {"device", "deadline_s"}
"""Options that say where and by when scores are computed; compared only if the configuration sets them."""
MAX_CHARACTERS = 200  # of a value in a message
_TRUTH = {"true": "1", "yes": "1", "1": "1", "false": "0", "no": "0", "0": "0"}


def differences(options: Mapping[str, str], setup: bridge_pb2.Setup) -> list[str]:
    """Return one text for every option whose value at the server differs from the configuration.

    An option that only one side sets is compared with the scorer's default, which the server reports. Secrets are
    compared only by whether they are set, and are never shown.
    """
    texts = []
    for name in sorted({*options, *setup.options} - (PLACES - options.keys())):
        default = setup.defaults.get(name)
        here = shown(name, options[name]) if name in options else default
        there = setup.options.get(name, default)
        if not _alike(here, there):
            texts.append(f"{name} is {_text(there)} at the server and {_text(here)} in this configuration")
    return texts


def _alike(one: str | None, other: str | None) -> bool:
    if one is None or other is None:
        return one is other
    if one == other or _TRUTH.get(one.lower(), one) == _TRUTH.get(other.lower(), other):
        return True
    with contextlib.suppress(ValueError):
        return float(one) == float(other)
    return False


def _text(value: str | None) -> str:
    if value is None:
        return "not set"
    return "set (a secret)" if value == HIDDEN else repr(transport.shorten(value, MAX_CHARACTERS))
