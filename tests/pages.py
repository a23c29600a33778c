"""The commands that README.md and the recipe pages give to users, taken from their text so that none is missed."""

import importlib
import re
from dataclasses import dataclass

from running import ROOT

RECIPES = ("geneval", "pickscore", "ocr")
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.py") if path.stem != "__init__")
PROGRAMS = ("python", "pip", "hf", "pytest", "wget", "curl", "git", "gsutil", "apt-get", "sbatch", "bash")
"""What an inline command begins with; a single word alone names the program and is no command."""


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
"""The pages with commands, in the order in which they are run: what one leaves, later ones use."""


@dataclass(frozen=True)
class Command:
    """A command line as a page has it, continuation lines joined and the comment after it dropped."""

    text: str
    page: str
    """README, or a recipe of configs/."""


def _lines(block: str) -> list[str]:
    joined = re.sub(r"\\\n\s*", "", block)
    return [line for part in joined.splitlines() if (line := _without_comment(part).strip())]


def _without_comment(line: str) -> str:
    """A line of shell up to the # that begins a comment: at the start of a word, outside quotes."""
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
    """The text of the README and of the folders' READMEs."""
    return "\n".join((ROOT / name).read_text(encoding="utf-8") for name in MANUAL if (ROOT / name).exists())


def readme_commands() -> list[str]:
    """All lines of the shell blocks of the README and of the folders' READMEs, in their order."""
    blocks = re.findall(r"```(?:bash|sh|shell|console)\n(.*?)```", manual(), re.DOTALL)
    return _tidy([line for block in blocks for line in _lines(block)])


def recipe_commands(name: str) -> list[str]:
    """All indented lines of a recipe's docstring, in the order of the page."""
    text = importlib.import_module(f"configs.{name}").__doc__ or ""
    indented = re.findall(r"(?:^ {4,}\S.*\n?)+", re.sub(r"\\\n\s*", "", text), re.MULTILINE)
    return _tidy([line for block in indented for line in _lines(block)])


def inline_commands(text: str) -> list[str]:
    """Commands between backticks in running text: those of PROGRAMS with a word after it."""
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    found = (re.sub(r"\s+", " ", code) for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose))
    return [code for code in found if code.split(" ")[0] in PROGRAMS and " " in code]


def owner(command: str) -> str:
    """Which recipe's files a command of the README works with; README where it is none's."""
    for name in RECIPES:
        folders = rf"(?:outputs|data)/{name}(?:-(?:before|after|scores)[\w-]*)?(?=[\s/:]|$)"
        if re.search(rf"configs/{name}\.py|{folders}", command):
            return name
    return "README"


def commands(page: str) -> list[Command]:
    """The commands of a recipe, first of its own page and then of the README; or all others of the README.

    A command that stands on several pages is one of the recipe whose page has it, and comes once.
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
    """Those of the README and of every page in configs/."""
    texts = [manual()]
    texts += [importlib.import_module(f"configs.{name}").__doc__ or "" for name in CONFIGS]
    return list(dict.fromkeys(code for text in texts for code in inline_commands(text)))
