"""Runs whose numbers become invalid: they end before anything bad is saved, or report that they learn nothing."""

import json
from pathlib import Path

import numpy as np
from orbax.checkpoint import v1 as ocp
from running import metrics, train

from udm_grpo.checkpoints.checkpoint import restore
from udm_grpo.released.weights import load_folder

QUICK = (
    *("evaluation.every=0", "evaluation.picture_every=0", "evaluation.final_prompts=2", "evaluation.batch=4"),
    *("evaluation.picture_prompts=4", "checkpoint.every=1"),
)


def leaves_of(checkpoint: Path) -> dict[str, np.ndarray]:
    """Return the arrays of a checkpoint by name."""
    infos = ocp.metadata(checkpoint).metadata
    return restore(checkpoint, {name: np.empty(info.shape, info.dtype) for name, info in infos.items()})[0]


def test_a_run_that_diverges_ends_with_an_error_and_keeps_its_last_finite_checkpoint(tmp_path: Path) -> None:
    output = tmp_path / "run"
    done = train(output, *QUICK, "optimizer.learning_rate=1e30", "checkpoint.keep=1")
    assert done.returncode == 2
    assert "error: iteration 2: grad_norm is nan" in done.stderr, done.stderr
    assert [row.get("nonfinite") for row in metrics(output)] == [None, {"grad_norm": "nan"}]
    assert [row["skipped"] for row in metrics(output)] == [0, 1]
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["00000001"]
    leaves = leaves_of(output / "checkpoints" / "00000001")
    assert np.abs(leaves["state/params/lm_head/kernel"]).max() > 1e29
    assert [name for name, leaf in leaves.items() if not np.isfinite(leaf).all()] == []
    for name in ("export", "summary.json", "before_after.png", "report.html"):
        assert not (output / name).exists(), name


def test_a_run_whose_groups_are_all_dead_moves_nothing_and_says_so(tmp_path: Path) -> None:
    """The names of its scorer's raw values neither end the run nor replace a column, although batches differ."""
    output = tmp_path / "run"
    judge = ("rewards.scorers={}", "rewards.scorers.equal.scorer=bridge_scorers:Equal")
    done = train(output, *QUICK, *judge, "optimizer.ema_decay=0.5", "optimizer.weight_decay=1.0", "iterations=3")
    assert done.returncode == 0, done.stderr
    assert "warning: iterations 1 to 3 made no update" in done.stderr
    assert "3 iterations made no update" in done.stderr
    rows = metrics(output)
    assert [(row["step"], row["skipped"], row["dead_groups"]) for row in rows] == [(n, 1, 1) for n in (1, 2, 3)]
    assert rows[0]["raw"] == {"score": 2, "tags": 2, "step": 2, "even": 2, "odd": 2}
    assert rows[0]["raw_missing"] == {"even": 8, "odd": 8}
    leaves = leaves_of(output / "checkpoints" / "00000003")
    start = load_folder(json.loads((output / "config.json").read_text())["model"]["path"]).transformer
    for part in ("params", "ema"):
        np.testing.assert_array_equal(leaves[f"state/{part}/lm_head/kernel"], start["lm_head"]["kernel"])
    moments = {name: np.abs(leaf).max() for name, leaf in leaves.items() if "opt_state" in name or name == "state/step"}
    assert set(moments.values()) == {0}
    base, final = (json.loads((output / "summary.json").read_text())[side] for side in ("base", "final"))
    assert (final["score"], final["raw/score"], final["raw/tags"], final["images"]) == (np.float32(0.7), 2, 2, 4)
    assert set(base) ^ set(final) == {"even", "odd"}
    report = (output / "report.html").read_text()
    assert "3 of 3 iterations made no update" in report
    assert "raw/even: some images have no such value" in report
