"""One style of flags for every command: words joined by underscores, as in --config.optimizer.learning_rate."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any


def with_underscores(words: Sequence[str]) -> list[str]:
    """Return a command line with the names of its flags in that style: --tls-cert is taken for --tls_cert.

    Values, the fields of a configuration (--config.NAME) and what follows a lone -- stay as they are.
    """
    written = list(words)
    for index, word in enumerate(written):
        if word == "--":
            break
        if word.startswith("--") and not word.startswith("--config."):
            name, equals, value = word[2:].partition("=")
            written[index] = f"--{name.replace('-', '_')}{equals}{value}"
    return written


class Parser(argparse.ArgumentParser):
    """argparse's parser, for which a hyphen in the name of a flag is an underscore; its flags are added with those."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as argparse does; parse_args and the commands of a parser come through here, too."""
        return super().parse_known_args(with_underscores(sys.argv[1:] if args is None else args), namespace)
