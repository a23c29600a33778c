"""One flag style for all commands: words joined by hyphens, except configuration fields (--config.a_b)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any


def flag(name: str) -> str:
    """Return the flag for an argument name: --tls-cert for tls_cert."""
    return f"--{name.replace('_', '-')}"


def with_hyphens(words: Sequence[str]) -> list[str]:
    """Return a command line with hyphens in its flag names: --tls_cert becomes --tls-cert.

    Values, configuration fields and everything after a lone -- are unchanged.
    """
    written = list(words)
    for index, word in enumerate(written):
        if word == "--":
            break
        if word.startswith("--") and not word.startswith("--config."):
            name, equals, value = word[2:].partition("=")
            written[index] = f"{flag(name)}{equals}{value}"
    return written


class Parser(argparse.ArgumentParser):
    """An argument parser that accepts underscores for hyphens in flag names; define its flags with hyphens."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as argparse does; parse_args and subcommands also pass through here."""
        return super().parse_known_args(with_hyphens(sys.argv[1:] if args is None else args), namespace)
