"""Tests of the flag style: hyphens in names, with underscores accepted."""

import ast
import re
from pathlib import Path

import pytest

from rewards_bridge.flags import Parser, with_hyphens

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--tls_cert", "a_b.pem"], ["--tls-cert", "a_b.pem"]),
        (["--prompt_key=a_b", "--no-load"], ["--prompt-key=a_b", "--no-load"]),
        (["--config.rewards.scorers.my_judge.weight=2"], ["--config.rewards.scorers.my_judge.weight=2"]),
        (["-h", "--", "--my_file", "a_b"], ["-h", "--", "--my_file", "a_b"]),
    ],
)
def test_names_of_flags_alone_are_rewritten(arguments: list[str], expected: list[str]) -> None:
    assert with_hyphens(arguments) == expected


def test_a_parser_and_its_commands_take_both() -> None:
    parser = Parser()
    command = parser.add_subparsers().add_parser("serve")
    command.add_argument("--tls-cert")
    for flag in ("--tls-cert", "--tls_cert", "--tls_c"):
        assert parser.parse_args(["serve", flag, "a-b"]).tls_cert == "a-b"


def test_no_command_has_a_flag_with_an_underscore_nor_a_parser_of_another_kind() -> None:
    violations = []
    for folder in ("udm_grpo", "rewards_bridge", "scripts"):
        for path in (ROOT / folder).rglob("*.py"):
            if path.name in ("flags.py", "torch_reference.py"):  # the latter runs without the project's packages
                continue
            text = path.read_text()
            violations += [f"{path}: ArgumentParser"] if re.search(r"ArgumentParser\(", text) else []
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
                    flags = [word.value for word in node.args if isinstance(word, ast.Constant)]
                    violations += [f"{path}: {flag}" for flag in flags if re.fullmatch(r"--.*_.*", str(flag))]
    assert not violations
