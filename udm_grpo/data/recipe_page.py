"""The commands on the page of a recipe that make the files it reads."""

import ast
import itertools
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

PROGRAMS = ("hf", "curl", "python")
OUTPUTS = ("--local-dir", "-o", "--output")
"""Flags before the file or folder that a command makes."""


def page_commands(config_file: str | Path) -> list[list[str]]:
    """Return the commands in the docstring of a config file, in words: its indented lines that begin with a program."""
    page = ast.get_docstring(ast.parse(Path(config_file).read_text(encoding="utf-8"))) or ""
    lines = (line for line in page.replace("\\\n", " ").splitlines() if line.startswith("    "))
    words = (shlex.split(line, comments=True) for line in lines)
    return [command for command in words if command and command[0] in PROGRAMS]


def output_of(command: Sequence[str]) -> str | None:
    """Return the file or folder that a command makes; None if it does not say."""
    return next((value for flag, value in itertools.pairwise(command) if flag in OUTPUTS), None)


def commands_for(place: str, page: Sequence[Sequence[str]]) -> list[list[str]]:
    """Return the commands of a page that make a file or folder, those that make what they need first; none if none do.

    A command that makes a folder makes what is in it. What is there already is not made again.
    """
    for command in page:
        made = output_of(command)
        if made is None or not _within(place, made):
            continue
        needed = [word for word in command if word != made and any(output_of(other) == word for other in page)]
        before = [found for word in needed if not Path(word).exists() for found in commands_for(word, page)]
        return [*before, list(command)]
    return []


def fixes(place: str, usual: str, page: Sequence[Sequence[str]]) -> list[str]:
    """Return the commands that make `place`, which the page makes as `usual`, as lines for a shell."""
    target = next((made for command in page if (made := output_of(command)) and _within(usual, made)), None)
    if target is None or not place.endswith(usual.removeprefix(target)):
        return []
    moved = {target: place.removesuffix(usual.removeprefix(target))}
    return [_line(command, moved) for command in commands_for(usual, page)]


def _within(place: str, made: str) -> bool:
    """Whether a file or folder is, or is in, what a command made; FOLDER:train is a split in a folder of prompts."""
    return place == made or place.startswith((f"{made}/", f"{made}:"))


def _line(command: Sequence[str], moved: Mapping[str, str]) -> str:
    return shlex.join([moved.get(word, word) for word in command])
