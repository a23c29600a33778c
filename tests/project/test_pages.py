"""No command of the pages is missed: a rule says how the rehearsal runs it, or which test does."""

import re

import pages
import pytest
from pages import RECIPES, all_inline_commands, commands, inline_commands
from rehearsal import rule_for
from rehearsal_rules import INLINE, RULES
from running import ROOT

PAGES = ("README", *RECIPES)


@pytest.mark.parametrize("page", PAGES)
def test_every_command_has_a_rule(page: str) -> None:
    missed = [command.text for command in commands(page) if not rule_for(command, RULES[page])]
    assert not missed, f"no rule in rehearsal_rules.py matches: {missed}"
    assert len(commands(page)) >= 8


@pytest.mark.parametrize("page", PAGES)
def test_every_rule_is_of_use(page: str) -> None:
    """Rules that all pages share are exempt."""
    used = {rule_for(command, RULES[page]) for command in commands(page)}
    shared = set.intersection(*(set(RULES[other]) for other in PAGES))
    unused = [rule.pattern for rule in RULES[page] if rule not in used | shared]
    assert not unused, f"no command of the page {page} matches {unused}"


def test_what_runs_elsewhere_is_there() -> None:
    places = [rule.test for rules in RULES.values() for rule in rules if rule.how == "elsewhere"]
    for place in [*places, *INLINE.values()]:
        file, _, function = place.partition("::")
        text = (ROOT / file).read_text()
        assert f"def {function}(" in text if function else text, place


def test_every_command_in_running_text_is_one_of_a_page_or_has_a_test() -> None:
    """Each command between backticks is part of a command that is run, or matches INLINE."""
    run = [command.text for page in PAGES for command in commands(page)]
    for code in all_inline_commands():
        assert any(code in text for text in run) or any(re.search(pattern, code) for pattern in INLINE), code


def test_the_rehearsal_covers_devices_processes_and_scorers() -> None:
    """Each published recipe is trained; together they use 1, 7 and 8 devices, 2 processes, local and remote scorers."""
    training = {
        name: [
            rule
            for command in commands(name)
            if "udm_grpo.train " in command.text and "--compile-only" not in command.text
            if (rule := rule_for(command, RULES[name])) and rule.how == "run"
        ]
        for name in RECIPES
    }
    assert all(training.values())
    rules = [rule for several in training.values() for rule in several]
    assert {1, 7, 8} <= {rule.devices for rule in rules}
    assert {1, 2} <= {rule.processes for rule in rules}
    assert {True, False} == {"{remote}" in rule.append for rule in rules}
    assert any(rule.optimised and rule.devices > 1 for rule in rules)


def test_commands_are_found_in_every_form(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    text = """Text with `python -m a
    b` and `hf` and `config.py`.

```bash
# a comment
python -m a --x 1 \\
    --y "2 # 3"      # another
cd models && curl -O https://x/y#z
```
```python
python = 1
```
"""
    (tmp_path / "README.md").write_text(text)
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    assert pages.readme_commands() == ['python -m a --x 1 --y "2 # 3"', "cd models && curl -O https://x/y#z"]
    assert inline_commands(text) == ["python -m a b"]
