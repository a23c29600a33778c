"""Raw values whose names differ between batches, or equal those of a run's own columns."""

import json
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rewards_bridge.scorers.base import Scores
from udm_grpo import run_reports
from udm_grpo.config import RunConfig
from udm_grpo.evaluation import COLUMNS, change_in_words, joined, summarize
from udm_grpo.reporting.metrics import JsonLines, MetricsWriter, Progress, StageTimer
from udm_grpo.scoring import rewards
from udm_grpo.scoring.evaluation_parts import Part
from udm_grpo.scoring.rewards import Rewards


def ticket(score: list[float], **raw: list[float]) -> "Future[Scores]":
    done: Future[Scores] = Future()
    values = {name: np.array(numbers, np.float32) for name, numbers in raw.items()}
    done.set_result(Scores(np.array(score, np.float32), values, [""] * len(score)))
    return done


def test_batches_with_other_names_lose_nothing() -> None:
    """For example, a judge of colours gives no value for colours where no prompt names one."""
    collected = rewards.collect([ticket([1, 2], a=[1, 2]), ticket([3], b=[3]), ticket([4, 0], a=[4, 0], b=[5, 0])], 4)
    np.testing.assert_array_equal(collected.score, [1, 2, 3, 4])
    np.testing.assert_array_equal(collected.raw["a"], [1, 2, np.nan, 4])
    np.testing.assert_array_equal(collected.raw["b"], [np.nan, np.nan, 3, 5])


@pytest.fixture
def some() -> Rewards:
    nan = np.nan
    raw = {name: np.arange(4, dtype=np.float32) for name in COLUMNS}
    return Rewards(np.float32([0.5, 1, 0.5, 0]), raw | {"few": np.float32([nan, nan, 3, 5]), "no": np.full(4, nan)})


def test_an_evaluation_keeps_its_own_columns(some: Rewards, tmp_path: Path) -> None:
    """A scorer's raw values with the same names are kept, too, under other names."""
    summary = summarize(joined(Part(), some), ["one", "two"], 2)
    assert (summary["score"], summary["prompts"], summary["images"]) == (0.5, 2, 4)
    assert {summary[f"raw/{name}"] for name in COLUMNS} == {1.5}
    assert summary["few"] == 4
    assert summary["missing"] == {"few": 2, "no": 4}
    assert summary["tags"]["one"] == {"score": 0.75, **{f"raw/{name}": 0.5 for name in COLUMNS}}
    assert summary["tags"]["two"] == {"score": 0.25, **{f"raw/{name}": 2.5 for name in COLUMNS}, "few": 4}
    lines = JsonLines(tmp_path / "evaluations.jsonl")
    lines.append(7, summary)
    lines.close()
    (line,) = [json.loads(text) for text in (tmp_path / "evaluations.jsonl").read_text().splitlines()]
    assert (line["step"], line["raw/step"], line.get("nonfinite")) == (7, 1.5, None)


def test_before_and_after_may_have_other_values() -> None:
    words = change_in_words({"score": 0.5, "a": 1.0, "images": 4, "tags": {}}, {"score": 0.25, "b": 2.0})
    assert words == "score 0.500 -> 0.250, a 1.000 -> -, b - -> 2.000"


def test_an_iteration_writes_the_mean_over_the_images_that_have_a_value(some: Rewards, tmp_path: Path) -> None:
    some.raw["reward"] = np.full(4, 9, np.float32)
    config = RunConfig()
    config.rollout.group_size = 2
    with MetricsWriter(tmp_path) as writer, (tmp_path / "log").open("w") as log:
        reports = run_reports.Reports(writer, None, Progress(1, stream=log), StageTimer())
        values: Any = {"kl": 0.25, "entropy": 2.0, "skipped": 0.0}
        run_reports.write_iteration(reports, config, 1, some, run_reports.numbers_of(some, values))
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert (line["step"], line["reward"], line["raw"]["few"], line["raw"]["reward"]) == (1, 0.5, 4, 9)
    assert line["raw_missing"] == {"few": 2, "no": 4}
    assert "nonfinite" not in line
    assert "reward 0.5  " in (tmp_path / "log").read_text()
    assert "raw/reward 9  " in (tmp_path / "log").read_text()
