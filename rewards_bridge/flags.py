"""One style of flags for every command: words joined by hyphens, but in fields of a configuration (--config.a_b)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any


def flag(name: str) -> str:
    """Return the flag of an argument: --tls-cert for tls_cert."""
    return f"--{name.replace('_', '-')}"


def with_hyphens(words: Sequence[str]) -> list[str]:
    """Return a command line with the names of its flags in that style: --tls_cert is taken for --tls-cert.

    Values, the fields of a configuration and what follows a lone -- stay as they are.
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
    """argparse's parser, for which an underscore in a flag's name is a hyphen; its flags are added with hyphens."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as argparse does; parse_args and the commands of a parser come through here, too."""
        return super().parse_known_args(with_hyphens(sys.argv[1:] if args is None else args), namespace)
