"""The check that a machine can read the inputs of a run."""

from pathlib import Path

import pytest
from running import SMOKE

from udm_grpo.check_inputs import main


def test_a_run_whose_files_are_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", SMOKE]) == 0
    assert "can be read" in capsys.readouterr().out


def test_every_file_that_is_missing_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fields = {
        "model.path": tmp_path / "model",
        "prompts.train": tmp_path / "train.jsonl",
        "prompts.heldout": tmp_path / "heldout.txt",
        "rewards.scorers.shapes.tls_ca": tmp_path / "ca.pem",
        "rewards.scorers.shapes.token_file": tmp_path / "token",
    }
    words = [f"--config.{name}={file}" for name, file in fields.items()]
    assert main(["--config", SMOKE, "--config.rewards.scorers.shapes.addresses=judge:7000", *words]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == len(fields)
    for line, (name, file) in zip(said, fields.items(), strict=True):
        assert line.startswith(f"error: {name}: ")
        assert str(file) in line


def test_a_configuration_that_cannot_run_is_an_error_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", SMOKE, "--config.iterations=0"]) == 2
    assert "iterations is 0" in capsys.readouterr().err
