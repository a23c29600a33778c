"""Tests of what is saved when a run ends early: partial evaluations and the last complete iteration."""

import json
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rewards_bridge.errors import BridgeError
from rewards_bridge.scorers.base import Scores
from udm_grpo import mesh as meshes
from udm_grpo.batches import Rollout
from udm_grpo.config import EvaluationConfig, RunConfig
from udm_grpo.data.prompts import PromptSet
from udm_grpo.evaluation import EvaluationFiles, Sampler, evaluate, write_scores
from udm_grpo.lifecycle import endings
from udm_grpo.lifecycle.endings import Standing
from udm_grpo.lifecycle.identity import Identity
from udm_grpo.lifecycle.interruption import Interruption, StopRequestedError
from udm_grpo.reporting.extremes import Judged
from udm_grpo.reporting.grid_file import read_grid
from udm_grpo.run import Position
from udm_grpo.scoring.evaluation_parts import FOLDER, Part, part_file, read_part, remove_parts, write_part

PROMPTS = PromptSet(tuple(f"prompt {i}" for i in range(7)), ({},) * 7, ("a", "b", "a", "b", "a", "a", "b"))


class Client:
    """Scores an image by its first byte; fails at batch `fail_at`, and requests a stop at batch `stop_at`."""

    def __init__(self, asked: Interruption, fail_at: int = -1, stop_at: int = -1):
        self.asked, self.fail_at, self.stop_at, self.images = asked, fail_at, stop_at, list[int]()
        self._batches = 0

    def submit(self, images: np.ndarray, prompts: list[str], metadata: list[dict]) -> "Future[Scores]":
        done: Future[Scores] = Future()
        if self._batches == self.fail_at:
            done.set_exception(BridgeError("the judge has gone"))
        else:
            values = images[:, 0, 0, 0].astype(np.float32)
            self.images += [int(value) for value in values]
            done.set_result(Scores(values / 3, {"raw": values}, [""] * len(prompts)))
        self.asked.requested |= self._batches == self.stop_at
        self._batches += 1
        return done


def a_run(output: Path, batch: int, fail_at: int = -1, stop_at: int = -1) -> Any:
    """Return a run whose images encode their index."""
    asked = Interruption()
    config = RunConfig(evaluation=EvaluationConfig(images_per_prompt=2, extremes=2))

    def rollout(policy: Any, ids: Any, empty: Any, index: Any, key: Any) -> Rollout:
        return Rollout(clean=index)

    return SimpleNamespace(
        config=config,
        mesh=meshes.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}),
        asked=asked,
        client=Client(asked, fail_at, stop_at),
        heldout=PROMPTS,
        output=output,
        identity=SimpleNamespace(id="this", fingerprint={"seed": 0}),
        vq_params={},
        key=lambda stage, step: jax.random.key(0),
        prompt_ids=lambda texts: None,
        empty_ids=lambda: None,
        steps=SimpleNamespace(
            sizes=SimpleNamespace(evaluation=batch),
            rollout_in=lambda steps, guidance_scale: rollout,
            decode=lambda params, clean: jnp.broadcast_to(
                ((clean * 37) % 101).astype(jnp.uint8)[:, None, None, None], (len(clean), 4, 4, 3)
            ),
        ),
    )


def result_of(run: Any, name: str = "extremes.png") -> tuple[dict[str, Any], list[Any]]:
    file = run.output / name
    metrics = evaluate(run, {}, 7, Sampler(10), 0, EvaluationFiles(file, run.output / "scores.jsonl"))
    return metrics, [(cell.caption, cell.details) for cell in read_grid(file)]


@pytest.mark.parametrize("end", ["stop", "failure"])
@pytest.mark.parametrize("batch", [3, 4])
def test_an_evaluation_continues_where_it_was_ended(tmp_path, end, batch):
    """The result equals that of an uninterrupted one, for any batch size, and only the remaining images are scored."""
    expected = result_of(a_run(tmp_path / "whole", 5))
    output = tmp_path / "parts"
    if end == "stop":
        run = a_run(output, 3, stop_at=1)
        with pytest.raises(StopRequestedError):
            result_of(run)
    else:
        run = a_run(output, 3, fail_at=2)
        with pytest.raises(BridgeError, match="the judge has gone"):
            result_of(run)
    assert len(run.client.images) == 6
    assert not (output / "extremes.png").exists()
    again = a_run(output, batch)
    assert result_of(again) == expected
    assert len(again.client.images) == 14 - 6
    finished = a_run(output, batch)
    assert result_of(finished) == expected
    assert finished.client.images == []
    other = a_run(output, batch)
    other.identity.fingerprint = {"seed": 1}
    result_of(other)
    assert len(other.client.images) == 14


def test_an_evaluation_that_is_asked_to_stop_at_once_draws_nothing(tmp_path):
    run = a_run(tmp_path, 3)
    run.asked.requested = True
    with pytest.raises(StopRequestedError):
        evaluate(run, {}, 7, Sampler(10), 0)
    assert run.client.images == []
    assert list(tmp_path.iterdir()) == []


def test_the_scores_of_every_prompt_are_written(tmp_path):
    """Their means are those of the evaluation; a value that an image lacks is null."""
    metrics, _ = result_of(a_run(tmp_path, 3))
    lines = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert sorted(line["prompt"] for line in lines) == sorted(PROMPTS.prompts)
    assert {(line["prompt"], line["tag"]) for line in lines} == set(zip(PROMPTS.prompts, PROMPTS.tags, strict=True))
    assert all(line["run"] == "this" and len(line["scores"]["raw"]) == 2 for line in lines)
    scores = [score for line in lines for score in line["scores"]["score"]]
    assert np.mean(scores) == pytest.approx(metrics["score"])
    columns = {"score": np.float32([1, 0]), "some": np.float32([np.nan, 2])}
    write_scores(tmp_path / "few.jsonl", a_run(tmp_path, 3), [1], columns)
    assert json.loads((tmp_path / "few.jsonl").read_text())["scores"] == {"score": [1, 0], "some": [None, 2]}


def test_a_part_is_read_as_it_was_written_and_only_for_the_same_evaluation(tmp_path):
    judged = Judged(3, np.arange(48, dtype=np.uint8).reshape(4, 4, 3), "Ähre", 0.5, {"raw": 1.0}, "why")
    part = Part({"score": np.float32([0.1, 0.2]), "a/b": np.float32([1, 2])}, (judged,), ())
    identity = {"fingerprint": {"a": (1, 2)}, "step": 4}
    file = part_file(tmp_path, 4, "25")
    assert read_part(file, identity) == Part()
    write_part(file, identity, part)
    back = read_part(file, identity)
    assert back.done == 2
    assert {name: values.tolist() for name, values in back.columns.items()} == {
        name: values.tolist() for name, values in part.columns.items()
    }
    np.testing.assert_array_equal(back.best[0].image, judged.image)
    assert (back.best[0].prompt, back.best[0].raw, back.worst) == ("Ähre", {"raw": 1.0}, ())
    assert read_part(file, {**identity, "step": 5}) == Part()
    for damage in (file.read_bytes()[:-30], b"", b"x" * 100):
        file.write_bytes(damage)
        assert read_part(file, identity) == Part()
    remove_parts(tmp_path)
    assert not file.exists()


class Checkpoints:
    """Records which steps are saved."""

    def __init__(self, failure: Exception | None = None):
        self.failure, self.saved, self.finished = failure, list[int](), 0

    def begin(self, step: int, state: Any, meta: Any) -> None:
        if self.failure:
            raise self.failure
        json.dumps(meta)
        self.saved.append(step)

    def finish(self) -> None:
        self.finished += 1


def ended(
    tmp_path: Path, step: int, *, saved: int | None = None, base: bool = True, failure: Exception | None = None
) -> tuple[list[int], str]:
    """Return the steps saved after an error, and the messages."""
    run: Any = SimpleNamespace(
        config=RunConfig(),
        checkpoints=Checkpoints(failure),
        mirror=None,
        output=tmp_path,
        asked=Interruption(),
        identity=Identity("this", {}),
    )
    said: list[str] = []
    reports: Any = SimpleNamespace(progress=SimpleNamespace(message=said.append))
    position = Position(step, 1.0, {"25": {"score": 0.5}} if base else {}, None)
    standing: Any = Standing({"x": jnp.zeros(2)}, position, saved)
    endings.save_after(BridgeError("gone"), run, reports, {}, standing)
    return run.checkpoints.saved, " ".join(said)


def test_the_last_whole_iteration_is_saved_after_an_error(tmp_path):
    assert ended(tmp_path, 7)[0] == [7]
    assert "7 of 1000 iterations are saved; resume with" in ended(tmp_path, 7)[1]
    assert ended(tmp_path, 7, saved=7)[0] == []
    assert ended(tmp_path, 7, saved=6)[0] == [7]
    assert ended(tmp_path, 0)[0] == [0]
    assert ended(tmp_path, 0, base=False) == ([], "")
    (tmp_path / FOLDER).mkdir()
    assert ended(tmp_path, 0, base=False)[0] == [0]
    saved, said = ended(tmp_path, 7, failure=OSError("no space"))
    assert saved == []
    assert "the 7 complete iterations could not be saved: no space" in said


def test_a_state_that_an_update_has_used_up_is_not_saved(tmp_path):
    run: Any = SimpleNamespace(config=RunConfig(), checkpoints=Checkpoints(), mirror=None, output=tmp_path)
    leaf = jnp.zeros(2)
    leaf.delete()
    endings.save_after(ValueError(), run, run, {}, Standing({"x": leaf}, Position(3, 1.0, {}, None), None))  # type: ignore[arg-type]
    assert run.checkpoints.saved == []
