"""Extract every command that README.md and the recipe pages show to users."""

import importlib
import re
from dataclasses import dataclass

from running import ROOT

RECIPES = ("geneval", "pickscore", "ocr")
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.py") if path.stem != "__init__")
PROGRAMS = ("python", "pip", "hf", "pytest", "wget", "curl", "git", "gsutil", "apt-get", "sbatch", "bash")
"""First words of inline commands; a single word alone is the name of a program, not a command."""


MANUAL = (
    "README.md",
    *(f"udm_grpo/{folder}/README.md" for folder in ("reporting", "multihost", "files", "data")),
    "scripts/README.md",
    *(f"udm_grpo/{folder}/README.md" for folder in ("scoring", "released", "model", "worlds")),
    "rewards_bridge/README.md",
    "rewards_bridge/scorers/README.md",
    "configs/README.md",
    "udm_grpo/README.md",
    "tests/README.md",
)
"""The pages with commands, in the order in which they run: later commands use the outputs of earlier ones."""


@dataclass(frozen=True)
class Command:
    """A command line of a page, with continuation lines joined and without its comment."""

    text: str
    page: str
    """README, or the name of a recipe."""


def _lines(block: str) -> list[str]:
    joined = re.sub(r"\\\n\s*", "", block)
    return [line for part in joined.splitlines() if (line := _without_comment(part).strip())]


def _without_comment(line: str) -> str:
    """Return a line of shell up to its comment, which begins with a # at the start of a word, outside quotes."""
    quote = ""
    for index, letter in enumerate(line):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        elif letter == "#" and (index == 0 or line[index - 1].isspace()):
            return line[:index]
    return line


def _tidy(lines: list[str]) -> list[str]:
    return [re.sub(r"\s+", " ", line).strip() for line in lines]


def manual() -> str:
    """Return the text of the README and of the folders' READMEs."""
    return "\n".join((ROOT / name).read_text(encoding="utf-8") for name in MANUAL if (ROOT / name).exists())


def readme_commands() -> list[str]:
    """Return all lines of the shell blocks in the README and the folders' READMEs, in order."""
    blocks = re.findall(r"```(?:bash|sh|shell|console)\n(.*?)```", manual(), re.DOTALL)
    return _tidy([line for block in blocks for line in _lines(block)])


def recipe_commands(name: str) -> list[str]:
    """Return all indented lines of a recipe's docstring, in order."""
    text = importlib.import_module(f"configs.{name}").__doc__ or ""
    indented = re.findall(r"(?:^ {4,}\S.*\n?)+", re.sub(r"\\\n\s*", "", text), re.MULTILINE)
    return _tidy([line for block in indented for line in _lines(block)])


def inline_commands(text: str) -> list[str]:
    """Return the commands between backticks in running text: one of PROGRAMS and at least another word."""
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    codes = (re.sub(r"\s+", " ", code) for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose))
    return [code for code in codes if code.split(" ")[0] in PROGRAMS and " " in code]


def owner(command: str) -> str:
    """Return the recipe whose files a command of the README uses; README if it uses no recipe's files."""
    for name in RECIPES:
        folders = rf"(?:outputs|data)/{name}(?:-(?:before|after|scores)[\w-]*)?(?=[\s/:]|$)"
        if re.search(rf"configs/{name}\.py|{folders}", command):
            return name
    return "README"


def commands(page: str) -> list[Command]:
    """Return the commands of a recipe, those of its own page before those of the README; or all others of the README.

    A command on several pages belongs to the recipe whose page has it, and is returned once.
    """
    own = {name: recipe_commands(name) for name in CONFIGS}
    readme = readme_commands()
    if page == "README":
        elsewhere = {text for name in RECIPES for text in own[name]}
        others = [text for name in CONFIGS if name not in RECIPES for text in own[name]]
        texts = [text for text in readme if owner(text) == page and text not in elsewhere]
        texts += [text for text in others if not any(known.endswith(f"&& {text}") for known in texts)]
    else:
        texts = own[page] + [text for text in readme if owner(text) == page]
    return [Command(text, page) for text in dict.fromkeys(texts)]


def all_inline_commands() -> list[str]:
    """Return the inline commands of the README and of every page in configs/."""
    texts = [manual()]
    texts += [importlib.import_module(f"configs.{name}").__doc__ or "" for name in CONFIGS]
    return list(dict.fromkeys(code for text in texts for code in inline_commands(text)))
