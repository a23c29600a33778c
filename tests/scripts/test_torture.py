"""scripts/torture.py: its seeded moments, its comparison of runs, and one trial with real processes."""

import itertools
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest

from scripts import torture
from scripts.torture import PHASES, SIGNALS, TARGETS, differences, main, strikes


def test_moments_are_decided_by_the_seed_and_cover_every_combination():
    first, again, other = (list(itertools.islice(strikes(seed), 54)) for seed in (0, 0, 1))
    assert first == again != other
    assert len({(one.phase, one.signal, one.target) for one in first}) == 54 == 6 * len(SIGNALS) * len(TARGETS)
    assert {one.phase for one in first} == set(PHASES)


def test_every_byte_and_every_line_counts(tmp_path: Path):
    one, other = tmp_path / "one", tmp_path / "other"
    (one / "export").mkdir(parents=True)
    (one / "export" / "weights").write_bytes(b"12")
    (one / "metrics.jsonl").write_text('{"step": 1, "seconds": 1}\n')
    shutil.copytree(one, other)
    (other / "metrics.jsonl").write_text('{"step": 1, "seconds": 2, "run": "b"}\n')
    assert differences(one, other) == []
    (other / "export" / "weights").write_bytes(b"13")
    (other / "export" / "more").touch()
    (other / "metrics.jsonl").write_text('{"step": 2}\n')
    assert differences(one, other) == ["export/more is unexpected", "export/weights differs", "metrics.jsonl differs"]


def test_the_trials_that_are_missing_are_run_and_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    numbers = []

    def trial(number, strike, *_):
        numbers.append(number)
        return {"trial": number, **asdict(strike), "hit": "", "statuses": [0], "problems": []}

    monkeypatch.setattr(torture, "measure", lambda folder: (folder / "reference", None))
    monkeypatch.setattr(torture, "run_trial", trial)
    words = ["--output", str(tmp_path), "--trials", "5", "--seed", "0"]
    assert main(words) == 0
    file = tmp_path / "results.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(line for line in lines if json.loads(line)["trial"] not in (2, 4)))
    assert main(words) == 0
    assert numbers == [1, 2, 3, 4, 5, 2, 4]
    assert "5 trials, failed: none" in capsys.readouterr().out


def test_a_run_that_is_killed_and_resumed_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """The trial takes four starts of a small run; two of them are the uninterrupted runs."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", os.environ["UDM_GRPO_COMPILED"])
    words = ["--output", str(tmp_path), "--trials", "1", "--seed", "0"]
    assert main(words) == 0
    assert "trial 1/1: SIGKILL to both at 33% of save 3" in capsys.readouterr().out
    assert main(words) == 0  # the result is already recorded
