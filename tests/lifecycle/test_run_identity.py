"""Tests of run ids, of what a fresh start sets aside, and of which weights count as a run's best."""

import contextlib
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from pages import manual
from report_runs import write_run

from udm_grpo.batches import TrainState
from udm_grpo.checkpoints.checkpoint import CheckpointError, Checkpoints
from udm_grpo.config import ConfigError, RunConfig
from udm_grpo.files.set_aside import RUN_FILES, set_aside
from udm_grpo.lifecycle import best_weights
from udm_grpo.lifecycle.best_weights import best_or_last, save_best, take_over
from udm_grpo.lifecycle.identity import Identity, identify
from udm_grpo.lifecycle.output_folder import check_inputs_stay, set_aside_older
from udm_grpo.reporting.grid_file import run_of
from udm_grpo.reporting.metrics import JsonLines, write_json
from udm_grpo.reporting.pictures import image_grid
from udm_grpo.reporting.run_folder import read_run
from udm_grpo.run import Position

SAME = {"version": 1, "seed": 0}


def names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def config_in(output: Path, resume: str = "none", keep_best: bool = True) -> RunConfig:
    config = RunConfig(output_dir=str(output))
    config.checkpoint.resume, config.checkpoint.keep_best = resume, keep_best
    return config


def test_everything_of_an_older_run_is_set_aside_as_a_run_of_its_own(tmp_path: Path, capsys) -> None:
    run = write_run(tmp_path / "run")
    (run / "export").mkdir()
    (run / "checkpoints" / "best").mkdir(parents=True)
    (run / "notes.txt").write_text("my own")
    before = names(run) - {"notes.txt"}
    set_aside_older(config_in(run), run, None)
    assert names(run) == {"notes.txt", "older"}
    assert names(run / "older" / "1") == before
    assert read_run(run / "older" / "1").summary is not None
    assert str(run / "older" / "1") in capsys.readouterr().err
    set_aside_older(config_in(run), run, None)  # nothing is left to be moved
    assert names(run / "older") == {"1"}
    write_json(run / "config.json", {})
    assert set_aside(run) == str(run / "older" / "2")


def test_all_that_the_readme_says_a_run_leaves_is_set_aside() -> None:
    """Parts of an evaluation stay: they record their run, and a start without a checkpoint continues with them."""
    table = manual().split("| in `output_dir` | |")[1].split("\n\n")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    said = {name.rstrip("/") for row in rows for name in re.findall(r"`([^`]+)`", row)}
    assert len(said) > 15
    assert said - set(RUN_FILES) == {"evaluation_parts"}


def test_a_move_that_was_interrupted_is_completed(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    whole = names(run)
    (run / "older" / "1").mkdir(parents=True)
    (run / "summary.json").rename(run / "older" / "1" / "summary.json")
    set_aside(run)
    assert names(run / "older") == {"1"}
    assert names(run / "older" / "1") == whole


@pytest.mark.parametrize(
    ("own_step", "iterations", "moved"),
    [(12, 12, False), (12, 24, True), (8, 12, True)],
    ids=["at its end", "made longer", "from an earlier step"],
)
def test_results_of_an_earlier_end_are_set_aside_by_a_run_that_goes_on(
    tmp_path: Path, own_step: int, iterations: int, moved: bool
) -> None:
    run = write_run(tmp_path / "run")
    (run / "export").mkdir()
    config = config_in(run)
    config.iterations = iterations
    set_aside_older(config, run, own_step)
    results = {"summary.json", "before_after.png", "export"}
    assert names(run) & results == (set() if moved else results)
    assert {"metrics.jsonl", "config.json", "pictures"} <= names(run)
    if moved:
        assert names(run / "older" / "1") == results


def test_a_model_or_prompts_that_the_run_would_move_away_are_refused(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    config.model.path, config.prompts.train = str(tmp_path / "export"), str(tmp_path / "pictures" / "x.txt")
    config.prompts.heldout = str(tmp_path / "mine.txt")
    with pytest.raises(ConfigError, match=r"(?s)model\.path is .*export, .*prompts\.train is .*x\.txt, ") as refused:
        check_inputs_stay(config, tmp_path)
    assert "heldout" not in str(refused.value)


def test_an_id_is_kept_in_its_own_folder_and_new_in_another(tmp_path: Path) -> None:
    own = Checkpoints(tmp_path / "run" / "checkpoints", keep=2)
    first = identify(config_in(tmp_path / "run"), own, SAME)
    assert (first.resume, first.here, first.origin) == (None, False, None)
    assert first.id != identify(config_in(tmp_path / "run"), own, SAME).id
    path = own.save(1, {"a": jnp.zeros(2)}, first.saved_with())
    again = identify(config_in(tmp_path / "run", "latest"), own, SAME)
    assert (again.id, again.here, again.origin) == (first.id, True, None)
    branch = identify(config_in(tmp_path / "b", str(path)), Checkpoints(tmp_path / "b" / "checkpoints", 2), SAME)
    assert branch.id != first.id
    assert branch.origin == {"run": first.id, "checkpoint": str(path)}
    with pytest.raises(CheckpointError, match="seed: saved 0, now 1"):
        identify(config_in(tmp_path / "run", "latest"), own, {**SAME, "seed": 1})


def test_lines_of_another_run_are_dropped_on_resume(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "run": "a"}\n{"step": 2, "run": "b"}\n{"step": 3}\n')
    with pytest.warns(UserWarning, match="line 2 is of the run b and was dropped"):
        lines = JsonLines(file, 3, "a")
    lines.append(4, {"kl": 0.5})
    lines.close()
    assert [json.loads(line) for line in file.read_text().splitlines()][-1] == {"step": 4, "run": "a", "kl": 0.5}
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 3, 4]


def test_a_report_leaves_out_what_is_of_another_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", run="a")
    assert not read_run(run).notes
    other = write_run(tmp_path / "other", run="b", seed=1)
    shutil.copy(other / "summary.json", run)
    shutil.copy(other / "before_after.png", run)
    shutil.copy(other / "pictures" / "000004.png", run / "pictures")
    contents = read_run(run)
    assert contents.summary is None
    assert 4 not in contents.pictures
    assert contents.before_after is None
    assert [note.split(":")[0].split(" is ")[0] for note in contents.notes] == ["summary.json", "pictures"]


def test_a_picture_bears_the_run_that_drew_it(tmp_path: Path) -> None:
    for run in ("", "20260101-000000-abcdef01"):
        image_grid(np.zeros((1, 8, 8, 3), np.uint8), ["a star"], 1, tmp_path / "x.png", run=run)
        assert run_of(tmp_path / "x.png") == (run or None)


class Branch:
    """The parts of a run that matter for its best weights: folder, position, and weights with a single value."""

    def __init__(self, output: Path, identity: Identity, keep: int = 2):
        self.run: Any = SimpleNamespace(
            config=config_in(output), identity=identity, checkpoints=Checkpoints(output / "checkpoints", keep)
        )
        self.position = Position(0, 0.0, {}, None)

    def look(self, step: int, score: float) -> None:
        """Save the best weights so far, as after an evaluation, and then a checkpoint."""
        save_best(self.run, step, {"w": jnp.full(2, step, jnp.float32)}, score)
        self.position = Position(step, 0.0, {}, score)
        self.checkpoint(step)

    def checkpoint(self, step: int) -> None:
        self.position = Position(step, 0.0, {}, self.position.best)
        self.run.checkpoints.save(step, state(step), self.run.identity.saved_with())

    def best(self) -> float:
        return float(best_or_last(self.run, state(-1), self.position)["w"][0])

    def kept(self) -> list[str]:
        return sorted(names(self.run.checkpoints.folder / "best"))


def state(step: int) -> TrainState:
    return TrainState(params={"w": jnp.full(2, step, jnp.float32)}, opt_state=(), ema=None, step=jnp.int32(step))


def test_the_best_is_that_of_the_position_not_the_newest_in_the_folder(tmp_path: Path) -> None:
    here, other = (Branch(tmp_path / name, Identity(name, SAME)) for name in ("a", "b"))
    here.look(1, 0.5)
    save_best(other.run, 1, {"w": jnp.full(2, 99.0)}, 0.5)
    other.run.checkpoints.finish()
    shutil.copytree(other.run.checkpoints.folder / "best" / "1-step-1", here.run.checkpoints.folder / "best/7-step-1")
    assert here.best() == 1
    here.position = Position(1, 0.0, {}, None)
    assert here.best() == -1, "a run without best weights ends with its last weights"


def test_a_best_of_an_abandoned_branch_never_wins(tmp_path: Path) -> None:
    branch = Branch(tmp_path, Identity("a", SAME), keep=3)
    branch.look(1, 0.5)
    at_one = branch.position
    branch.look(2, 0.9)
    assert branch.best() == 2
    branch.run.checkpoints.set_aside_after(1)
    branch.position = at_one
    assert branch.best() == 1
    assert branch.kept() == ["1-step-1", "2-step-2.aside"]


def test_a_best_stays_as_long_as_a_kept_checkpoint_would_go_on_with_it(tmp_path: Path) -> None:
    branch = Branch(tmp_path, Identity("a", SAME), keep=2)
    branch.look(1, 0.5)
    branch.checkpoint(2)
    branch.look(3, 0.7)
    assert branch.kept() == ["1-step-1", "2-step-3"], "checkpoint 2 continues with the best of step 1"
    branch.checkpoint(4)
    assert branch.kept() == ["2-step-3"]


def test_the_best_goes_along_into_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Branch(tmp_path / "one", Identity("a", SAME))
    first.look(1, 0.5)
    first.checkpoint(2)
    source = str(first.run.checkpoints.path(2))
    second = Branch(tmp_path / "two", Identity("b", SAME, source, False, first.run.identity.saved_with()))
    monkeypatch.setattr(best_weights, "begin", lambda run, *_: run)
    with contextlib.ExitStack() as stack:
        take_over(second.run, state(0), first.position, stack)
    second.position = first.position
    assert second.best() == 1
    assert second.kept() == ["1-step-1"]
    shutil.rmtree(tmp_path / "one" / "checkpoints" / "best")
    with contextlib.ExitStack() as stack, pytest.raises(CheckpointError, match=r"score 0\.5, are not in .*one"):
        take_over(second.run, state(0), first.position, stack)
