"""scripts/ablation.py: its settings, its results and page, and runs that stop, fail and resume."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from running import ROOT, environment

from scripts import ablation_results
from scripts.ablation import main
from scripts.ablation_chart import chart, mean_curve, ticks
from scripts.ablation_page import verdict, write_page
from scripts.ablation_results import PromptScores, difference, joined, mean_interval, read_results, resampled
from scripts.ablation_runs import AblationError, Plan, Run, final_scores, read_sweep, run_name
from scripts.ablation_settings import PUBLISHED, configured, forward_passes, settings
from udm_grpo.config import ConfigError

SHAPES, SMOKE = "configs/shapes.py", "configs/shapes.py:smoke"
METHOD, GUIDED = "clean-forward-free", "clean-forward"
ASSETS = ROOT / "udm_grpo" / "assets" / "shapes-prompts"
TAGS = {"p1": "colors", "p2": "colors", "p3": "position"}


def plan(folder: Path, *names: str, **changes: Any) -> Plan:
    """Return a plan with a sweep of two rates and two seeds."""
    fields = {
        "iterations": 4,
        "sweep_iterations": 2,
        "factors": (0.5, 1.0),
        "seeds": 2,
        "names": names or (METHOD, GUIDED),
    }
    return Plan(**{"folder": folder, "config": SMOKE, "overrides": {}, **fields, **changes})


# ---------------------------------------------------------------- settings


def test_every_setting_is_a_valid_config():
    known = settings(SHAPES, {"iterations": "500"})
    configs = {name: configured(SHAPES, {"iterations": "500"}, one.overrides) for name, one in known.items()}
    assert [known[name].published for name in PUBLISHED] == [0.84, 0.89, 0.94, 0.96]
    assert len({str(config) for config in configs.values()}) == len(configs) == 7
    states = {name: (config.grpo.action, config.grpo.trajectory) for name, config in configs.items()}
    assert states["intermediate-rollout"] == ("intermediate", "rollout")
    assert states["clean-rollout"] == ("clean", "rollout")
    assert {name for name, state in states.items() if state == ("clean", "forward")} == {*states} - {*PUBLISHED[:2]}
    for name, config in configs.items():
        assert (config.rollout.guidance_scale > 1) == (name in PUBLISHED[:3])
        assert config.evaluation.guidance_scales == ((3.0, 1.0) if name in PUBLISHED[:3] else (1.0,))
    assert (configs["all-steps"].grpo.trained_steps, configs["all-steps"].grpo.window_starts) == (10, 1)
    with pytest.raises(ConfigError, match="kl_weight"):
        configured(SHAPES, {"grpo.kl_weight": "-1"})


def test_passes_are_counted_and_compute_is_equal():
    """T = 10, K = 3: 9 or 10 steps of a rollout, 8 or 9 of them guided; 4 passes for each trained step."""
    known = settings(SHAPES, {"iterations": "500"})
    configs = {name: configured(SHAPES, {"iterations": "500"}, one.overrides) for name, one in known.items()}
    passes = {name: forward_passes(config) for name, config in configs.items()}
    assert passes["intermediate-rollout"] == passes["clean-rollout"] == 10 + 9 + 4 * 3
    assert passes["clean-forward"] == 9 + 8 + 4 * 3
    assert passes["clean-forward-free"] == passes["early-windows"] == 9 + 4 * 3
    assert passes["all-steps"] == passes["all-steps-equal-compute"] == 9 + 4 * 10
    assert configs["all-steps-equal-compute"].iterations == round(500 * 21 / 49) == 214
    assert configs["all-steps"].iterations == 500
    config = configs["clean-forward-free"]
    config.grpo.updates_per_rollout = 2
    assert forward_passes(config) == 9 + 3 + 3 + 3 * 3 * 2


def prompts_of(file: Path) -> set[str]:
    return {json.loads(line)["prompt"] for line in file.read_text().splitlines()}


def test_the_sweep_is_not_judged_on_held_out_prompts(tmp_path: Path):
    swept = plan(tmp_path)
    words = swept.sweep_run(GUIDED, 0.5).words
    assert "--config.seed=1000" in words
    assert "--config.optimizer.learning_rate=0.0002" in words
    assert "--config.evaluation.guidance_scales=(3.0,)" in words
    file = swept.validation_file()
    assert f"--config.prompts.heldout={file}" in words
    swept.write_validation()
    prompts, train, heldout = (prompts_of(name) for name in (file, ASSETS / "train.jsonl", ASSETS / "heldout.jsonl"))
    assert len(prompts) >= 90
    assert not prompts & heldout
    assert swept.validation_words() in (f"{len(prompts)} training prompts", f"{len(prompts)} validation prompts")
    own = plan(tmp_path, validation=tmp_path / "own.jsonl")
    shutil.copy(ASSETS / "train.jsonl", tmp_path / "own.jsonl")
    own.write_validation()
    assert own.validation_words() == f"{len(train)} training prompts"
    assert f"--config.prompts.heldout={tmp_path / 'own.jsonl'}" in own.sweep_run(METHOD, 1.0).words
    shutil.copy(ASSETS / "heldout.jsonl", tmp_path / "own.jsonl")
    with pytest.raises(AblationError, match="93 prompts of"):
        own.write_validation()


def test_settings_that_differ_in_length_share_a_sweep(tmp_path: Path):
    both = plan(tmp_path, "all-steps", "all-steps-equal-compute", METHOD)
    assert both.swept() == [METHOD, "all-steps"]
    assert plan(tmp_path, "all-steps-equal-compute").swept() == ["all-steps"]


# ---------------------------------------------------------------- results


def lines(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def finished_run(folder: Path, run: Run, strict: list[float], evaluated: list[float], samplers: list[str]) -> None:
    """Write the files of a finished run: the strict scores of p1, p2 and p3, and of the evaluations after 0, 2, ..."""
    output = folder / "runs" / run.name
    seconds = {"rollout": 1.5, "update": 0.5}
    steps = range(1, run.iterations + 1)
    metrics = [{"step": n, "reward": n / 10, "kl": 0.01 * n, "entropy": 3 - n / 2, "seconds": seconds} for n in steps]
    lines(output / "metrics.jsonl", metrics)
    lines(output / "evaluations.jsonl", [{"step": 2 * n, "strict": score} for n, score in enumerate(evaluated)])
    for sampler in samplers:
        rows = [
            {"prompt": prompt, "tag": tag, "scores": {"strict": [score, score]}}
            for (prompt, tag), score in zip(TAGS.items(), strict, strict=True)
        ]
        lines(output / "heldout_scores" / f"{run.iterations:06d}-{sampler}.jsonl", rows)
    side = {"strict": float(np.mean(strict))}
    pairs = {sampler: {"base": side, "final": side} for sampler in samplers}
    summary = {"iterations": run.iterations, "final": side, "by_steps": pairs}
    (output / "summary.json").write_text(json.dumps(summary))


@pytest.fixture
def done(tmp_path: Path) -> Plan:
    """Return a plan whose sweep is finished, as are the first setting's runs and one of the second's."""
    one = plan(tmp_path)
    for name in one.swept():
        for factor, score in ((0.5, 0.25), (1.0, 0.5)):
            finished_run(tmp_path, one.sweep_run(name, factor), [score] * 3, [], ["10"])
    guided = ["10-guidance-3", "10"]
    finished_run(tmp_path, one.run(METHOD, 0, 4e-4), [1, 0.5, 0], [0.5, 0.9], ["10"])
    finished_run(tmp_path, one.run(METHOD, 1, 4e-4), [1, 1, 1], [0.5, 0.7], ["10"])
    finished_run(tmp_path, one.run(GUIDED, 0, 4e-4), [0.5, 0.5, 0.5], [0.95, 0.6], guided)
    lines(
        tmp_path / "runs" / run_name(GUIDED, 1) / "metrics.jsonl", [{"step": 1, "kl": 0.5, "seconds": {"update": 3.0}}]
    )
    return one


def test_results_equal_those_by_hand(done: Plan):
    results = read_results(done)
    guided, method = results.settings
    assert (guided.name, method.name) == (GUIDED, METHOD)
    assert (method.trained, method.free, guided.trained, guided.free) == ("10", "10", "10-guidance-3", "10")
    assert guided.rate == method.rate == 4e-4
    scores = method.scores("10")
    assert scores is not None
    np.testing.assert_allclose(scores.values, [[1, 0.5, 0], [1, 1, 1]])
    np.testing.assert_allclose(scores.by_seed(), [0.5, 1])
    np.testing.assert_allclose(scores.tags_by_seed(), [(0.75 + 0) / 2, 1])
    mean = mean_interval(scores, False, 0)
    assert mean["value"] == pytest.approx(0.75)
    assert mean["spread"] == pytest.approx(np.std([0.5, 1], ddof=1))
    assert mean_interval(scores, True, 0)["value"] == pytest.approx((0.375 + 1) / 2)
    first = method.runs[0].reached()
    assert first is not None
    # Smoke: 16 images an iteration, 9 + 4 * 3 passes for each; 2 s an iteration.
    assert (first.iterations, first.passes, first.seconds) == (2, 2 * 16 * 21, 4.0)
    assert method.runs[1].reached() is None
    start = guided.runs[0].reached()
    assert start is not None
    assert (start.iterations, start.passes, start.seconds) == (0, 0, 0)
    assert method.runs[0].largest("kl") == pytest.approx(0.04)
    assert method.runs[0].last("entropy") == pytest.approx(np.mean([2.5, 2, 1.5, 1]))
    assert [run.finished for run in guided.runs] == [True, False]
    assert [run.seconds() for run in guided.runs] == [2, 3]


def test_a_run_with_another_number_of_iterations_is_not_finished(done: Plan):
    run = done.run(METHOD, 0, 4e-4)
    assert final_scores(done.folder, run) == {"strict": 0.5}
    assert final_scores(done.folder, Run(run.name, run.overrides, 5)) is None


def test_the_sweep_chooses_the_best_rate_and_of_equal_ones_the_lower(done: Plan):
    sweep = read_sweep(done)["settings"]
    assert sweep[METHOD] == {"scores": {"0.0002": 0.25, "0.0004": 0.5}, "chosen": 4e-4, "failed": []}
    finished_run(done.folder, done.sweep_run(METHOD, 0.5), [0.5] * 3, [], ["10"])
    assert read_sweep(done)["settings"][METHOD]["chosen"] == 2e-4
    (done.folder / "runs" / "sweep-clean-forward-free-x1" / "summary.json").unlink()
    assert read_sweep(done)["settings"][METHOD]["chosen"] is None
    failed = {"sweep-clean-forward-free-x1": {"status": 2, "lines": ["diverged"]}}
    (done.folder / "failures.json").write_text(json.dumps(failed))
    sweep = read_sweep(done)["settings"]
    assert (sweep[METHOD]["chosen"], sweep[METHOD]["failed"]) == (2e-4, ["0.0004"])


def test_intervals_cover_the_spread_of_prompts_and_of_seeds(monkeypatch: pytest.MonkeyPatch):
    """Of n values with the population variance v, the mean of a resample has the variance v / n."""
    monkeypatch.setattr(ablation_results, "RESAMPLES", 40_000)
    prompts = np.arange(8) / 8
    names, tags = tuple("abcdefgh"), ("x",) * 8
    means = resampled(PromptScores(names, tags, prompts[None]), False, 0)
    assert means[0] == prompts.mean()
    assert np.var(means[1:]) == pytest.approx(np.var(prompts) / 8, rel=0.05)
    seeds = np.repeat([[0.2], [0.4], [0.9]], 8, axis=1)
    assert np.var(resampled(PromptScores(names, tags, seeds), False, 0)[1:]) == pytest.approx(
        np.var([0.2, 0.4, 0.9]) / 3, rel=0.05
    )
    two = PromptScores(names, ("x",) * 6 + ("y",) * 2, prompts[None])
    expected = (np.var(prompts[:6]) / 6 + np.var(prompts[6:]) / 2) / 4
    assert np.var(resampled(two, True, 0)[1:]) == pytest.approx(expected, rel=0.05)


def test_a_difference_pairs_the_prompts():
    """Two settings that differ by the same amount on every prompt differ by just that, however the prompts vary."""
    one = joined([{name: ("x", value) for name, value in zip("abcd", (0.1, 0.5, 0.2, 0.4), strict=True)}])
    other = joined([{name: ("x", value) for name, value in zip("dcbaz", (0.5, 0.3, 0.6, 0.2, 9), strict=True)}])
    assert one is not None
    assert other is not None
    gap = difference(one, other, (0, 1))
    assert [gap[name] for name in ("value", "low", "high")] == pytest.approx([0.1] * 3)
    assert verdict(gap) == "agrees"
    assert verdict(difference(other, one, (1, 0))) == "disagrees"
    assert verdict({"value": 0.1, "low": -0.1, "high": 0.3}) == verdict({"value": 1, "low": None, "high": None})
    assert joined([]) is joined([{}]) is None


# ---------------------------------------------------------------- the page


def test_the_page_shows_what_is_there(done: Plan, tmp_path: Path):
    (done.folder / "failures.json").write_text(json.dumps({run_name(GUIDED, 1): {"status": -9, "lines": []}}))
    page = tmp_path / "page" / "ablation.md"
    write_page(read_results(done), page)
    text = page.read_text()
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in text.splitlines() if line.startswith("| ")}
    assert "4 iterations (all settings), 2 seeds, 3 of 4 runs finished" in text.replace("\n", " ")
    order = rows[f"{GUIDED} < {METHOD}"]
    assert "| 0.94 < 0.96 | +0.250 [" in order
    scores = text[text.index("## Scores") : text.index("## What")]
    assert re.search(rf"\| {METHOD} \| .* \| 0.96 \| 0.0004 \| 2 \| 0.750 ± 0.354 \[", scores)
    assert re.search(rf"\| {GUIDED} \| .* \| 0.94 \| 0.0004 \| 1 \| 0.500 \[0.500, 0.500\] \|", scores)
    assert f"| {METHOD} | 1 of 2 | 2 | 0.00 | 4 | 21 | 2.00 | 0.0400 | 1.750 | 0.000 |" in text
    assert f"| {GUIDED} | 1 of 2 | 0 | 0.00 | 0 | 29 | 2.50 | 0.5000 | 1.750 | 0.350 |" in text
    assert f"| {METHOD} | 0.0002: 0.250; 0.0004: 0.500 | 0.0004 |" in text
    assert f"- {GUIDED}, seed 1: 1 of 4 iterations" in text
    assert f"- {run_name(GUIDED, 1)}: failed with status -9" in text
    assert "The start model, before any training: 0.500 by the sampler 10, 0.500 by the sampler 10-guidance-3." in text
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert sorted(links) == [f"ablation-{name}.svg" for name in ("entropy", "heldout", "kl", "reward")]
    for link in links:
        root = ElementTree.fromstring((page.parent / link).read_text())
        assert len(root.findall("{http://www.w3.org/2000/svg}polyline")) == 2
    assert str(tmp_path) not in text


def test_a_page_without_any_run(tmp_path: Path):
    write_page(read_results(plan(tmp_path)), tmp_path / "ablation.md")
    text = (tmp_path / "ablation.md").read_text()
    assert "0 of 4 runs finished" in text
    assert "## Curves" not in text


def test_a_curve_is_the_mean_at_the_steps_of_all_runs():
    curve = mean_curve("a", [[(1, 1.0), (2, 2.0), (3, 9.0)], [(1, 3.0), (2, 4.0)]])
    assert curve is not None
    assert (curve.steps, curve.middle, curve.low, curve.high) == ([1, 2], [2, 3], [1, 2], [3, 4])
    long = mean_curve("a", [[(n, float(n)) for n in range(1, 201)]])
    assert long is not None
    assert (len(long.steps), long.steps[-1], long.middle[0]) == (100, 200, 1.5)
    assert mean_curve("a", []) is None


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-0.3, 0.2), (0, 523), (1e-6, 3e-6), (0.1, 0.6)])
def test_ticks_are_round_and_few(low: float, high: float):
    marks = ticks(low, high)
    assert 3 <= len(marks) <= 7
    assert all(low - 1e-9 <= mark <= high + 1e-9 for mark in marks)


def test_a_constant_curve_is_drawn():
    curve = mean_curve("a & b", [[(1, 0.0), (2, 0.0)]])
    assert curve is not None
    ElementTree.fromstring(chart("<title>", [curve], ["#000000"]))


# ---------------------------------------------------------------- runs that stop, fail and resume

STUB = """
import json, pathlib, signal, sys, time
words = dict(word.removeprefix("--").split("=", 1) for word in sys.argv[1:])
output = pathlib.Path(words["config.output_dir"])
output.mkdir(parents=True, exist_ok=True)
with (output / "starts").open("a") as file:
    file.write("start\\n")
steps, name = int(words["config.iterations"]), output.name
plan = json.loads(pathlib.Path(__file__).with_name("plan.json").read_text())
if name in plan["fail"]:
    sys.exit("the cat sat on the cable")
if name in plan["hang"]:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(int(words["config.checkpoint.stopped_status"])))
    (output / "hangs").touch()
    time.sleep(60)
score = plan["scores"].get(words["config.optimizer.learning_rate"], 0.5)
line = {"reward": 1, "kl": 0, "entropy": 1, "seconds": {"update": 1}}
(output / "metrics.jsonl").write_text("".join(json.dumps({"step": n + 1, **line}) + "\\n" for n in range(steps)))
side = {"strict": score}
pair = {"10": {"base": side, "final": side}}
(output / "summary.json").write_text(json.dumps({"iterations": steps, "final": side, "by_steps": pair}))
"""


class Stub:
    """A trainer that writes the files of a finished run at once, fails, or hangs until SIGTERM."""

    def __init__(self, folder: Path):
        self.folder, self.output = folder, folder / "output"
        (folder / "stub.py").write_text(STUB)
        self.train = (sys.executable, str(folder / "stub.py"))
        self.behave()

    def behave(self, fail: tuple[str, ...] = (), hang: tuple[str, ...] = ()) -> None:
        (self.folder / "plan.json").write_text(json.dumps({"fail": fail, "hang": hang, "scores": {"0.0008": 0.75}}))

    def call(self, *words: str) -> int:
        return main(["--output", str(self.output), *words], self.train)

    def starts(self) -> dict[str, int]:
        """Return the times that each run was started."""
        files = (self.output / "runs").glob("*/starts")
        return {file.parent.name: len(file.read_text().split()) for file in files}


@pytest.fixture
def stub(tmp_path: Path) -> Stub:
    return Stub(tmp_path)


SMALL = ("--config", SMOKE, "--seeds", "2", "--factors", "1", "2", "--settings", METHOD, GUIDED)
SWEPT = [f"sweep-{name}-x{factor}" for name in (GUIDED, METHOD) for factor in (1, 2)]
RUNS = [run_name(name, seed) for seed in (0, 1) for name in (GUIDED, METHOD)]


def test_all_runs_are_started_once_seed_by_seed(stub: Stub, capsys: pytest.CaptureFixture[str]):
    assert stub.call(*SMALL, "--iterations", "3", "--config.grpo.kl_weight=0.2") == 0
    heads = [line.split(":")[0] for line in capsys.readouterr().out.splitlines() if line.endswith("iterations")]
    assert heads == [*SWEPT, *RUNS]
    log = " ".join((stub.output / "runs" / f"{name}.log").name for name in heads)
    assert "sweep-clean-forward-x1.log" in log
    sweep = json.loads((stub.output / "sweep.json").read_text())
    assert sweep["settings"][METHOD]["chosen"] == 8e-4
    assert "4 of 4 runs finished" in (stub.output / "ablation.md").read_text()
    assert stub.call() == 0  # the flags are those of the folder
    assert stub.starts() == dict.fromkeys([*SWEPT, *RUNS], 1)
    assert stub.call("--seeds", "3") == 0
    assert stub.starts()[run_name(METHOD, 2)] == 1
    assert stub.call("--iterations", "4") == 2
    assert "--iterations is 4" in capsys.readouterr().err


def test_a_failed_run_does_not_stop_the_others_and_is_retried_when_asked(stub: Stub):
    stub.behave(fail=(RUNS[0],))
    assert stub.call(*SMALL) == 1
    assert {name for name, count in stub.starts().items() if count == 1} == {*SWEPT, *RUNS}
    failure = json.loads((stub.output / "failures.json").read_text())[RUNS[0]]
    assert failure == {"status": 1, "lines": ["the cat sat on the cable"]}
    stub.behave()
    assert stub.call() == 1
    assert stub.starts()[RUNS[0]] == 1
    assert stub.call("--retry") == 0
    assert stub.starts()[RUNS[0]] == 2
    assert stub.starts()[RUNS[1]] == 1


def test_a_setting_without_any_finished_rate_is_left_out(stub: Stub, capsys: pytest.CaptureFixture[str]):
    stub.behave(fail=tuple(SWEPT[:2]))
    assert stub.call(*SMALL) == 1
    assert {*stub.starts()} == {*SWEPT, *(name for name in RUNS if METHOD in name)}
    assert f"{GUIDED}: no rate of its sweep is finished" in capsys.readouterr().out


def test_the_end_of_the_time_stops_the_present_run(stub: Stub):
    stub.behave(hang=(RUNS[1],))
    assert stub.call(*SMALL, "--minutes", "0.1") == 75
    assert stub.starts()[RUNS[1]] == 1
    assert RUNS[2] not in stub.starts()
    assert not (stub.output / "failures.json").exists()
    assert "1 of 4 runs finished" in (stub.output / "ablation.md").read_text()
    assert stub.call("--minutes", "0") == 75
    stub.behave()
    assert stub.call() == 0
    assert stub.starts() == {**dict.fromkeys([*SWEPT, *RUNS], 1), RUNS[1]: 2}


def test_a_signal_stops_the_present_run(stub: Stub):
    stub.behave(hang=(RUNS[0],))
    sign = stub.output / "runs" / RUNS[0] / "hangs"

    def interrupt() -> None:
        while not sign.exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=interrupt)
    thread.start()
    assert stub.call(*SMALL) == 75
    thread.join()
    assert signal.getsignal(signal.SIGINT) == before
    assert not (stub.output / "failures.json").exists()
    assert RUNS[1] not in stub.starts()


def test_wrong_flags_are_user_errors(stub: Stub, capsys: pytest.CaptureFixture[str]):
    for words, text in (
        (("--settings", "clean"), "clean-forward-free"),
        (("--seeds", "0"), "--seeds is 0"),
        (("--factors", "0"), "--factors is"),
        (("--config.grpo.kl=1",), "grpo.kl"),
        (("--config.iterations=3",), "--iterations"),
    ):
        assert stub.call(*words) == 2
        assert text in capsys.readouterr().err
    with pytest.raises(SystemExit):
        stub.call("--speed", "1")
    assert not (stub.output / "runs").exists()


def test_the_small_version_is_the_published_table_with_one_seed(stub: Stub):
    assert stub.call("--small", "--minutes", "0") == 75
    flags = json.loads((stub.output / "settings.json").read_text())
    assert (flags["settings"], flags["seeds"], flags["iterations"]) == (list(PUBLISHED), 1, 120)


# ---------------------------------------------------------------- real runs

REAL = (
    *("--config", SMOKE, "--seeds", "1", "--iterations", "3", "--sweep-iterations", "1", "--factors", "1"),
    *("--settings", METHOD, GUIDED, "--config.evaluation.every=2", "--config.evaluation.picture_every=0"),
    *("--config.evaluation.final_prompts=4", "--config.evaluation.picture_prompts=4", "--config.evaluation.extremes=0"),
)


def test_real_runs_are_killed_and_resumed(tmp_path: Path):
    """One setting's sweep is a file already, to save a start."""
    validation = tmp_path / "validation.jsonl"
    prompts = (ROOT / "udm_grpo" / "assets" / "shapes-prompts" / "train.jsonl").read_text().splitlines()[:4]
    validation.write_text("\n".join(prompts) + "\n")
    output = tmp_path / "output"
    words = ["--output", str(output), "--validation", str(validation), *REAL]
    finished_run(output, Run(f"sweep-{GUIDED}-x1", (), 1), [0.5] * 3, [], ["10-guidance-3"])
    command = [sys.executable, "-m", "scripts.ablation", *words]
    metrics = output / "runs" / run_name(GUIDED, 0) / "metrics.jsonl"
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=log, stderr=log)
        deadline = time.monotonic() + 300
        while not (metrics.is_file() and metrics.read_text()):
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.terminate()
        assert process.wait(120) == 75, (tmp_path / "log").read_text()
    stopped = len(metrics.read_text().splitlines())
    resumed = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert len(metrics.read_text().splitlines()) == 3 > stopped >= 1
    text = (output / "ablation.md").read_text()
    assert "2 of 2 runs finished" in text
    assert f"{GUIDED} < {METHOD} | 0.94 < 0.96" in text
    assert (output / "ablation-clean-forward-free.png").read_bytes()[:4] == b"\x89PNG"
    names = {file.name for file in metrics.with_name("heldout_scores").iterdir()}
    assert names == {f"{step:06d}-{sampler}.jsonl" for step in (0, 3) for sampler in ("10", "10-guidance-3")}
