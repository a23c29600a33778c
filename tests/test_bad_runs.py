"""Runs whose numbers go wrong: they end before anything bad is saved, or say that they learn nothing."""

from pathlib import Path

import numpy as np
from orbax.checkpoint import v1 as ocp
from running import metrics, train

from udm_grpo.host.checkpoint import restore

QUICK = (
    *("evaluation.every=0", "evaluation.picture_every=0", "evaluation.final_prompts=2", "evaluation.batch=4"),
    *("evaluation.picture_prompts=4", "checkpoint.every=1"),
)


def leaves_of(checkpoint: Path) -> dict[str, np.ndarray]:
    """The arrays of a checkpoint by name."""
    infos = ocp.metadata(checkpoint).metadata
    return restore(checkpoint, {name: np.empty(info.shape, info.dtype) for name, info in infos.items()})[0]


def test_a_run_that_diverges_ends_with_an_error_and_keeps_its_last_finite_checkpoint(tmp_path: Path) -> None:
    output = tmp_path / "run"
    done = train(output, *QUICK, "optimizer.learning_rate=1e30", "checkpoint.keep=1")
    assert done.returncode == 1
    assert "error: iteration 2: grad_norm is nan" in done.stderr, done.stderr
    assert [row.get("nonfinite") for row in metrics(output)] == [None, {"grad_norm": "nan"}]
    assert [row["skipped"] for row in metrics(output)] == [0, 1]
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["00000001"]
    leaves = leaves_of(output / "checkpoints" / "00000001")
    assert np.abs(leaves["state/params/lm_head/kernel"]).max() > 1e29
    assert [name for name, leaf in leaves.items() if not np.isfinite(leaf).all()] == []
    for name in ("export", "summary.json", "before_after.png", "report.html"):
        assert not (output / name).exists(), name
