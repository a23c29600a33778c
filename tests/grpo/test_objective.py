"""Tests of the objective interface: the example in grpo/README.md trains a run, and invalid objectives are refused."""

import ast
import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from running import ROOT, command, environment

from udm_grpo.config import ConfigError, RunConfig
from udm_grpo.configuration.config_checks import validate
from udm_grpo.grpo.objective import METHODS, OBJECTIVES, Objective, objective_class

PAGE = ROOT / "udm_grpo" / "grpo" / "README.md"
MAX_LINES = 45


def shown() -> str:
    """Return the objective that the page shows."""
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    return block


def test_the_objective_of_the_page_trains(tmp_path: Path) -> None:
    """It has no KL and no entropy; its own metrics are logged, and the report is written."""
    (tmp_path / "best_of_group.py").write_text(shown())
    assert shown().count("\n") <= MAX_LINES
    output = tmp_path / "run"
    done = subprocess.run(
        command(output, "grpo.objective=best_of_group:BestOfGroup", "evaluation.every=0", "evaluation.picture_every=0"),
        cwd=ROOT,
        env=environment() | {"PYTHONPATH": os.pathsep.join([str(tmp_path), environment()["PYTHONPATH"]])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 4
    for line in lines:
        assert {"loss", "logp", "grad_norm", "skipped", "reward"} <= line.keys()
        assert not {"kl", "entropy"} & line.keys()
    assert lines[0]["loss"] != lines[-1]["loss"]
    assert "kl " not in done.stderr.splitlines()[-4]
    assert (output / "report.html").exists()


def test_every_objective_has_the_methods() -> None:
    protocol = {name for name in vars(Objective) if not name.startswith("_")}
    assert protocol == set(METHODS)
    for name, objective in OBJECTIVES.items():
        assert objective_class(name) is objective
        assert all(hasattr(objective, method) for method in METHODS), name
        first, second = (objective.from_config(RunConfig(), 1.0, 4) for _ in range(2))
        assert first == second  # static under jit
    (shown_class,) = (node for node in ast.parse(shown()).body if isinstance(node, ast.ClassDef))
    assert {"freeze", "weights", "loss"} <= {
        node.name for node in shown_class.body if isinstance(node, ast.FunctionDef)
    }


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("grpo", r"grpo\.objective is 'grpo'; choose udm_grpo or module:Class"),
        ("no_such_module:Loss", r"cannot be imported: No module named 'no_such_module'"),
        ("json:NoSuchClass", r"cannot be imported: module 'json' has no attribute 'NoSuchClass'"),
        (
            "json:JSONDecoder",
            r"lacks from_config, needs_rollout, states, freeze, weights, loss; see udm_grpo/grpo/README",
        ),
    ],
)
def test_what_is_no_objective_is_refused(name: str, problem: str) -> None:
    config = RunConfig()
    config.grpo.objective = name
    with pytest.raises(ConfigError, match=problem):
        validate(config)
