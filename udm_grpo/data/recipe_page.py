"""The commands on a recipe's page that create the files which the recipe reads."""

import ast
import itertools
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

PROGRAMS = ("hf", "curl", "python")
OUTPUTS = ("--local-dir", "-o", "--output")
"""Flags that precede the file or folder that a command creates."""


def page_commands(config_file: str | Path) -> list[list[str]]:
    """Return the commands in the docstring of a config file, as words: indented lines that begin with a program."""
    page = ast.get_docstring(ast.parse(Path(config_file).read_text(encoding="utf-8"))) or ""
    lines = (line for line in page.replace("\\\n", " ").splitlines() if line.startswith("    "))
    words = (shlex.split(line, comments=True) for line in lines)
    return [command for command in words if command and command[0] in PROGRAMS]


def output_of(command: Sequence[str]) -> str | None:
    """Return the file or folder that a command creates; None if it names none."""
    return next((value for flag, value in itertools.pairwise(command) if flag in OUTPUTS), None)


def commands_for(place: str, page: Sequence[Sequence[str]]) -> list[list[str]]:
    """Return the commands of a page that create a file or folder, preceded by those that create what they need.

    The result is empty if the page creates it nowhere. A command that creates a folder creates what is in it. Existing
    inputs are not created again.
    """
    for command in page:
        output = output_of(command)
        if output is None or not _within(place, output):
            continue
        needed = [word for word in command if word != output and any(output_of(other) == word for other in page)]
        before = [earlier for word in needed if not Path(word).exists() for earlier in commands_for(word, page)]
        return [*before, list(command)]
    return []


def fixes(place: str, usual: str, page: Sequence[Sequence[str]]) -> list[str]:
    """Return the commands that create `place`, which the page creates as `usual`, as lines for a shell."""
    target = next((output for command in page if (output := output_of(command)) and _within(usual, output)), None)
    if target is None or not place.endswith(usual.removeprefix(target)):
        return []
    moved = {target: place.removesuffix(usual.removeprefix(target))}
    return [_line(command, moved) for command in commands_for(usual, page)]


def _within(place: str, output: str) -> bool:
    """Return whether a file or folder is, or is in, a command's output; FOLDER:train is a split in a prompt folder."""
    return place == output or place.startswith((f"{output}/", f"{output}:"))


def _line(command: Sequence[str], moved: Mapping[str, str]) -> str:
    return shlex.join([moved.get(word, word) for word in command])
