"""The training command: outputs, resuming, devices and processes, options, and errors for bad input."""

import json
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp
from PIL import Image
from report_runs import write_run
from running import command, metrics, together, train, train_and_kill, train_together
from safetensors.numpy import load_file

from udm_grpo.checkpoints.checkpoint import Checkpoints, read_meta, restore
from udm_grpo.files.atomic import UNFINISHED
from udm_grpo.files.digests import digest_folder
from udm_grpo.released.weights import load_folder
from udm_grpo.reporting.grid_file import CHUNK, run_of
from udm_grpo.reporting.run_folder import read_run

SHORT = (
    *("iterations=2", "optimizer.schedule=constant", "checkpoint.every=1"),
    *("evaluation.every=0", "evaluation.picture_every=0"),
    *("evaluation.final_prompts=4", "evaluation.images_per_prompt=2", "evaluation.picture_prompts=8"),
)
GRADIENT_TOLERANCE = 1e-4
"""Relative to each tensor's largest gradient: other meshes sum over the batch in another order."""
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
AVERAGED = ("optimizer.ema_decay=0.9", "optimizer.ema_every=3")
"""The average is updated between the checkpoints after iterations 2 and 4."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One complete smoke run."""
    output = tmp_path_factory.mktemp("train") / "whole"
    done = train(output, *AVERAGED)
    assert done.returncode == 0, done.stderr
    return output


def test_a_run_leaves_everything(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["iterations"] == 4
    assert summary["seconds"] > 0
    for side in ("base", "final"):
        assert 0 <= summary[side]["strict"] <= 1
        assert np.isfinite(summary[side]["soft"])
        assert set(summary[side]["tags"]) <= {
            "single_object",
            "two_object",
            "counting",
            "colors",
            "position",
            "color_attr",
        }
    rows = metrics(finished)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(np.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert rows[-1]["kl"] > 0
    assert sorted(path.name for path in (finished / "checkpoints").iterdir() if path.name.isdigit()) == [
        "00000002",
        "00000004",
    ]
    for folder in ("pictures", "extremes"):
        names = [path.name for path in sorted((finished / folder).iterdir())]
        assert names == ["000000.png", "000002.png", "000004.png"], folder
    assert len(json.loads((finished / "environment.json").read_text())["starts"]) == 1
    assert "<title>whole</title>" in (finished / "report.html").read_text()
    assert (finished / "before_after.png").stat().st_size > 1000
    assert set(summary["exports"]) == {"export", "export_raw"}
    assert summary["exports"]["export"] == digest_folder(finished / "export")
    assert_one_id(finished)


def assert_one_id(output: Path) -> None:
    """Check that every file that a run writes has its id, and no other."""
    files = {path.relative_to(output).as_posix(): path for path in output.rglob("*") if path.is_file()}
    files = {name: path for name, path in files.items() if not name.startswith(("export", "checkpoints", "older"))}
    assert len(files) > 8
    (said,) = {json.loads((output / "config.json").read_text())["run"]}
    for name, path in files.items():
        if path.suffix == ".jsonl":
            assert {json.loads(line)["run"] for line in path.read_text().splitlines()} == {said}, name
        elif path.suffix == ".json":
            assert json.loads(path.read_text())["run"] == said, name
        else:
            assert (run_of(path) if path.suffix == ".png" else path.read_text().count(said)) in (said, 1), name
    for step in Checkpoints(output / "checkpoints", keep=1).steps():
        assert read_meta(output / "checkpoints" / f"{step:08d}")["run"] == said


def without_id(path: Path) -> object:
    """Return the contents of a file without the run's id."""
    if path.suffix == ".jsonl":
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        return [{name: value for name, value in line.items() if name != "run"} for line in lines]
    with Image.open(path) as image:
        said = json.loads(image.info[CHUNK])
        return np.asarray(image).tobytes(), {name: value for name, value in said.items() if name != "run"}


def test_the_export_is_the_trained_model_in_the_released_format(finished: Path) -> None:
    config = json.loads((finished / "config.json").read_text())
    base = load_folder(config["model"]["path"])
    export = load_folder(finished / "export")
    changed = np.abs(np.asarray(export.transformer["lm_head"]["kernel"] - base.transformer["lm_head"]["kernel"]))
    assert 0 < changed.max() < 0.1
    np.testing.assert_array_equal(export.path_codebook, base.path_codebook)
    assert export.files == base.files


def test_a_killed_run_ends_where_an_uninterrupted_one_does(finished: Path) -> None:
    output = finished.parent / "killed"
    train_and_kill(output, 3, *AVERAGED)
    left = output / "pictures" / f".000002.png.1{UNFINISHED}"
    left.touch()
    done = train(output, *AVERAGED, "checkpoint.resume=latest")
    assert done.returncode == 0, done.stderr
    assert metrics(output) == metrics(finished)
    assert not left.exists()
    for pattern in ("evaluations.jsonl", "pictures/*", "extremes/*", "before_after.png"):
        files = [{path.name: without_id(path) for path in folder.glob(pattern)} for folder in (finished, output)]
        assert files[0] == files[1], pattern
    assert_one_id(output)
    assert len(json.loads((output / "environment.json").read_text())["starts"]) == 2
    for folder in ("export", "export_raw"):
        whole, resumed = load_file(finished / folder / WEIGHTS), load_file(output / folder / WEIGHTS)
        assert whole.keys() == resumed.keys()
        for name, tensor in whole.items():
            np.testing.assert_array_equal(tensor, resumed[name], err_msg=name)
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (finished, output)]
    for summary in summaries:
        del summary["seconds"], summary["run"]
    assert summaries[0] == summaries[1]


def first_step(output: Path) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return (gradients, weights) of iteration 1 by name: Adam's first moment is then 0.1 of the clipped gradient."""
    path = output / "checkpoints" / "00000001"
    tree: dict = {}
    for name, leaf in ocp.metadata(path).metadata.items():
        *folders, last = name.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = np.empty(leaf.shape, leaf.dtype)
    state, _ = restore(path, tree)
    named = {
        jax.tree_util.keystr(at, simple=True, separator="/"): leaf for at, leaf in jax.tree.leaves_with_path(state)
    }
    moments = {name.split("/mu/")[1]: leaf / 0.1 for name, leaf in named.items() if "/mu/" in name}
    return moments, {name: named[f"state/params/{name}"] for name in moments}


@pytest.fixture(scope="module")
def alone(finished: Path) -> Path:
    """Two iterations on one device, in a folder with the files of an older run."""
    output = write_run(finished.parent / "alone")
    assert train(output, *SHORT).returncode == 0
    return output


def test_a_fresh_start_sets_everything_of_an_older_run_aside(alone: Path) -> None:
    older = read_run(alone / "older" / "1")
    assert older.last == 12
    assert older.summary is not None
    assert older.before_after is not None
    assert read_run(alone).notes == []
    assert_one_id(alone)


def test_seven_devices_end_with_the_scores_of_one(finished: Path) -> None:
    """7 divides no batch, so all are padded; of the programs over several devices, only this one is optimized."""
    output = finished.parent / "seven"
    done = train(output, *AVERAGED, devices=7, quickly=False)
    assert done.returncode == 0, done.stderr
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (finished, output)]
    for summary in summaries:
        del summary["seconds"], summary["run"], summary["exports"]  # whose weights differ by rounding
    assert summaries[0] == summaries[1]
    for one, seven in zip(metrics(finished), metrics(output), strict=True):
        assert seven["raw"] == one["raw"]
        for name in ("loss", "kl", "entropy", "logp", "grad_norm"):
            assert seven[name] == pytest.approx(one[name], rel=2e-3, abs=2e-6), name
    for pattern in ("pictures/*.png", "extremes/*.png", "before_after.png"):
        names = [sorted(path.relative_to(folder) for path in folder.glob(pattern)) for folder in (finished, output)]
        assert names[0] == names[1] != [], pattern
        for name in names[0]:
            one, seven = (np.asarray(Image.open(folder / name), np.int16) for folder in (finished, output))
            apart = np.abs(one - seven)
            # The same tokens, decoded in batches of another size: a value may round to the adjacent level.
            assert apart.max() <= 1, name
            assert np.mean(apart > 0) < 1e-3, name


@pytest.mark.parametrize("mesh", ["mesh.data=8", "mesh.data=2", "mesh.data=1"])
def test_eight_devices_equal_one(alone: Path, mesh: str) -> None:
    shape = {"mesh.data=8": (), "mesh.data=2": ("mesh.fsdp=4",), "mesh.data=1": ("mesh.fsdp=4", "mesh.tensor=2")}[mesh]
    output = alone.parent / mesh
    done = train(output, mesh, *shape, *SHORT, devices=8)
    assert done.returncode == 0, done.stderr
    assert len(metrics(output)) == 2
    assert_same_steps(alone, output)


def assert_same_steps(alone: Path, output: Path) -> None:
    """Check for the same tokens, so the same rewards, and the same loss, gradients and weights to float tolerance.

    Adam's first step is the sign of the gradient. Where that is nearly 0, rounding decides the sign, so weights may
    differ there, and the second iteration's KL, itself small, by some hundredths.
    """
    for one, eight in zip(metrics(alone), metrics(output), strict=False):
        assert eight["reward"] == one["reward"]
        for name in ("loss", "logp", "entropy", "grad_norm"):
            assert eight[name] == pytest.approx(one[name], rel=2e-3, abs=2e-5), name
        assert eight["kl"] == pytest.approx(one["kl"], rel=0.1, abs=1e-6)
    assert metrics(alone)[1]["kl"] > 1e-5
    gradients, weights = first_step(alone)
    gradients_of_eight, weights_of_eight = first_step(output)
    for name, gradient in gradients.items():
        rounding = GRADIENT_TOLERANCE * np.abs(gradient).max()
        np.testing.assert_allclose(gradients_of_eight[name], gradient, rtol=0, atol=rounding, err_msg=name)
        certain = np.abs(gradient) > rounding
        assert certain.mean() > 0.5, name
        np.testing.assert_allclose(weights_of_eight[name][certain], weights[name][certain], rtol=0, atol=1e-6)


def test_two_processes_equal_one_stop_when_asked_and_go_on_as_one(alone: Path) -> None:
    """Mesh (2, 2, 2) over two processes; only the second gets SIGTERM; resumed by one process on one device."""
    output = alone.parent / "together"
    shape = ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2", "checkpoint.keep=9", *SHORT[1:])
    processes = train_together(output, 2, 4, *shape, "iterations=50")
    while not metrics(output):
        assert [process.poll() for process in processes] == [None, None], logs(output)
        time.sleep(0.02)
    processes[1].send_signal(signal.SIGTERM)
    assert [process.wait(300) for process in processes] == [0, 0], logs(output)
    stopped = len(metrics(output))
    assert 1 <= stopped < 50
    assert f"stopped by SIGTERM after {stopped} of 50 iterations" in logs(output)[0]
    assert not (output / "summary.json").exists()
    saved = sorted(path.name for path in (output / "checkpoints").iterdir() if path.name.isdigit())
    assert saved == [f"{step + 1:08d}" for step in range(stopped)]
    assert_same_steps(alone, output)
    done = train(output, "checkpoint.resume=latest", "checkpoint.keep=9", f"iterations={stopped + 1}", *SHORT[1:])
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in metrics(output)] == list(range(1, stopped + 2))
    assert_same_steps(alone, output)


FULL = """
import errno, sys
from udm_grpo import train
from udm_grpo.reporting.metrics import JsonLines
append = JsonLines.append
def full(self, step, *rest):
    if step == 2:
        raise OSError(errno.ENOSPC, "No space left on device")
    append(self, step, *rest)
JsonLines.append = full
sys.exit(train.main(sys.argv[1:]))
"""
"""The trainer on a disk that is full when the second line of metrics is written, which only process 0 does."""


def test_of_two_processes_all_save_when_one_cannot_write(alone: Path) -> None:
    output = alone.parent / "full"
    shape = ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2", *SHORT[1:], "iterations=50", "checkpoint.every=0")
    words = command(output, *shape)
    assert words[1:3] == ["-m", "udm_grpo.train"]
    processes = together([words[0], "-c", FULL, *words[3:]], output, 2, 4)
    first, second = (process.wait(300) for process in processes)
    assert {first, second} <= {1, 2}, logs(output)  # one may learn of the other's end before it ends by itself
    for log in logs(output):
        assert "No space left on device" in log
        assert "process 0" in log
    assert "2 of 50 iterations are saved; resume with" in logs(output)[0]
    assert Checkpoints(output / "checkpoints", keep=1).steps() == [2]


def test_four_processes_equal_one(alone: Path) -> None:
    """Mesh (2, 2, 1), one device per process: every process holds half of the weights."""
    output = alone.parent / "four"
    processes = train_together(output, 4, 1, "mesh.data=2", "mesh.fsdp=2", *SHORT)
    assert [process.wait(300) for process in processes] == [0] * 4, logs(output, 4)
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (alone, output)]
    assert [summary["iterations"] for summary in summaries] == [2, 2]
    assert summaries[0]["base"] == summaries[1]["base"]
    assert_same_steps(alone, output)


def logs(output: Path, count: int = 2) -> list[str]:
    return [output.with_name(f"{output.name}-{process}.log").read_text() for process in range(count)]


def test_every_option_at_once(finished: Path) -> None:
    output = finished.parent / "options"
    done = train(
        output,
        "iterations=2",
        "model.dtype=bfloat16",
        "model.remat=full",
        "grpo.trajectory=rollout",
        "grpo.action=intermediate",
        "grpo.updates_per_rollout=2",
        "grpo.minibatches=2",
        "grpo.skip_dead_groups=True",
        "grpo.clip_range=0.2",
        "grpo.global_std=True",
        "rollout.guidance_scale=2.0",
        "rollout.shift=1.5",
        "optimizer.ema_decay=0.9",
        "optimizer.schedule=multistep",
        "optimizer.milestones=(2,)",
        "evaluation.every=1",
        "checkpoint.keep_best=True",
        "checkpoint.keep=1",
        "logging.tensorboard=True",
    )
    assert done.returncode == 0, done.stderr
    rows = metrics(output)
    assert all(np.isfinite(row["loss"]) for row in rows)
    assert list((output / "tensorboard").iterdir())
    assert (output / "export" / "transformer" / "config.json").exists()
    assert len((output / "evaluations.jsonl").read_text().splitlines()) == 2  # the base and iteration 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["nothing=1"], "no such field"),
        (["iterations=0", "rollout.group_size=1"], "rollout.group_size is 1"),
        (["model.path=/nowhere"], "no such folder"),
        (["prompts.train=/nowhere.jsonl"], "no such prompt file"),
        (["model.height=30"], "multiples of 8"),
        (["mesh.data=3"], "does not fit 1 device"),
        (["checkpoint.resume=/nowhere"], "no such folder"),
        (["rewards.scorers.shapes.scorer=beauty"], "shapes"),
        (["rewards.scorers.shapes.scorer=bridge_scorers:Raise"], "Traceback"),
    ],
)
def test_bad_input_is_one_clear_error(tmp_path: Path, overrides: list[str], message: str) -> None:
    done = train(tmp_path / "run", *overrides)
    assert done.returncode == 2
    assert message in done.stderr, done.stderr
    assert "error:" in done.stderr


def test_an_empty_prompt_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "none.jsonl").write_text("\n\n")
    done = train(tmp_path / "run", f"prompts.train={tmp_path / 'none.jsonl'}")
    assert done.returncode == 2
    assert "none.jsonl" in done.stderr


def test_prompts_that_the_scorer_cannot_judge_are_all_named_before_the_first_rollout(tmp_path: Path) -> None:
    lines = [
        {"tag": "single_object", "include": [{"class": name, "count": 1}], "prompt": f"a photo of a {name}"}
        for name in ("circle", "giraffe", "square", "zebra")
    ]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in lines))
    done = train(tmp_path / "run", f"prompts.heldout={file}")
    assert done.returncode == 2
    assert "prompts.heldout: 2 of 4 prompts cannot be scored" in done.stderr
    assert (
        "prompt 2 ('a photo of a giraffe'): shapes: \"include\"[0]: the shapes judge knows no class 'giraffe'"
        in done.stderr
    )
    assert "prompt 4 ('a photo of a zebra')" in done.stderr
    assert not metrics(tmp_path / "run")


def test_several_scorers_and_replicas_train_together(tmp_path: Path) -> None:
    """The weighted sum is optimised; all raw values are logged by the scorer's name."""
    done = train(
        tmp_path / "run",
        "iterations=1",
        "rewards.scorers.shapes.replicas=2",
        "rewards.scorers.mean.scorer=bridge_scorers:Echo",
        "rewards.scorers.mean.weight=0.0",
    )
    assert done.returncode == 0, done.stderr
    (row,) = metrics(tmp_path / "run")
    assert {"shapes/strict", "shapes/soft", "shapes/score", "mean/mean", "mean/score"} <= set(row["raw"])
    assert row["reward"] == pytest.approx(row["raw"]["shapes/score"], abs=1e-6)


def test_a_checkpoint_of_another_run_is_refused(finished: Path) -> None:
    done = train(finished.parent / "other", f"checkpoint.resume={finished}", "grpo.kl_weight=9.0")
    assert done.returncode == 2
    assert "grpo.kl_weight" in done.stderr
