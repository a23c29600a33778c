"""Tests that a refused start or resume leaves output_dir byte for byte as it was, whatever the reason."""

import os
import shutil
from pathlib import Path

import jax.numpy as jnp
import pytest
from report_runs import write_run
from running import ROOT

from udm_grpo import train
from udm_grpo.checkpoints.checkpoint import Checkpoints
from udm_grpo.configuration.command_line import parse
from udm_grpo.data.prompts import read_prompts
from udm_grpo.lifecycle.fingerprint import fingerprint
from udm_grpo.released.weights import load_folder

SMOKE = ("--config", str(ROOT / "configs" / "shapes.py:smoke"))
RESUME = "checkpoint.resume=latest"


@pytest.fixture
def older(tmp_path: Path) -> Path:
    """Return the folder of an older run with a checkpoint whose arrays fit no model."""
    output = write_run(tmp_path / "run")
    config = parse(SMOKE)
    train_set, heldout = (read_prompts(file) for file in (config.prompts.train, config.prompts.heldout))
    said = fingerprint(config, load_folder(config.model.path, read_transformer=False), train_set, heldout)
    meta = {"fingerprint": said, "position": {}}
    Checkpoints(output / "checkpoints", keep=1).save(4, {"state": jnp.zeros(3)}, meta)
    return output


def contents(folder: Path) -> dict[str, bytes | None]:
    """Return every file with its bytes and every folder below this one."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def refused(output: Path, *overrides: str) -> int:
    return train.main([*SMOKE, *(f"--config.{word}" for word in (f"output_dir={output}", *overrides))])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((RESUME, "seed=7"), "seed"),
        ((RESUME, "grpo.kl_weight=9.0"), "grpo.kl_weight"),
        ((RESUME, "evaluation.steps=(10,25)"), "evaluation.steps"),
        ((RESUME, "evaluation.final_prompts=13"), "evaluation.final_prompts: saved 12, now 13"),
        ((RESUME, "iterations=5"), "iterations: saved 4, now 5"),
        ((RESUME,), "is a checkpoint of another model"),  # the fingerprint is the same
        (("checkpoint.resume=/nowhere",), "no such folder"),
        (("rollout.group_size=1",), "rollout.group_size is 1"),
        (("model.path=/nowhere",), "no such folder"),
        (("model.height=30",), "multiples of 8"),
        (("prompts.heldout=/nowhere.jsonl",), "no such prompt file"),
        (("mesh.data=3",), "does not fit"),
        (("rewards.scorers.shapes.options={'nothing':'1'}",), "nothing"),
    ],
)
def test_a_refused_start_changes_nothing(older: Path, capsys, overrides: tuple[str, ...], message: str) -> None:
    before = contents(older)
    assert refused(older, *overrides) == 2
    assert message in capsys.readouterr().err
    assert contents(older) == before


def test_places_and_the_way_a_scorer_is_run_may_change(older: Path, tmp_path: Path, capsys) -> None:
    """The start is refused only later, because the arrays of the checkpoint fit no model."""
    model = shutil.copytree(parse(SMOKE).model.path, tmp_path / "moved")
    prompts = shutil.copy(parse(SMOKE).prompts.train, tmp_path / "moved.jsonl")
    moved = shutil.move(older, tmp_path / "elsewhere")
    places = (f"model.path={os.path.relpath(model)}", f"prompts.train={prompts}")
    assert refused(moved, RESUME, *places, "rewards.scorers.shapes.replicas=2", "evaluation.every=1") == 2
    assert "is a checkpoint of another model" in capsys.readouterr().err


def test_a_refused_first_start_makes_no_folder(tmp_path: Path, capsys) -> None:
    assert refused(tmp_path / "new" / "run", "rewards.scorers.shapes.options={'nothing':'1'}") == 2
    assert "nothing" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("below", ["", "run"])
def test_an_output_dir_that_cannot_be_is_refused_before_anything_loads(tmp_path: Path, capsys, below: str) -> None:
    file = tmp_path / "file"
    file.touch()
    assert refused(file / below if below else file, "model.path=/nowhere") == 2
    assert f"{file} is a file; name a folder" in capsys.readouterr().err
