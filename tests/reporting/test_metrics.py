"""Metrics files that survive kills and resumes, TensorBoard, Weights & Biases, progress, stage times, atomic JSON."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from udm_grpo.config import ConfigError, LoggingConfig
from udm_grpo.files.atomic import remove_unfinished, replace_file
from udm_grpo.reporting.metrics import JsonLines, MetricsWriter, Progress, StageTimer, check_tools, to_json, write_json

ROOT = Path(__file__).parents[2]


def read(path: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_each_step_is_one_line_of_json(tmp_path):
    with MetricsWriter(tmp_path / "run") as writer:
        writer.write(
            1, {"reward": np.float32(0.5), "kl": jnp.float32(0.25), "tags": {"colors": 1}, "note": "a", "ids": [1, 2]}
        )
        writer.write(2, {"reward": 0.75})
    lines = read(tmp_path / "run" / "metrics.jsonl")
    assert lines == [
        {"step": 1, "reward": 0.5, "kl": 0.25, "tags": {"colors": 1}, "note": "a", "ids": [1, 2]},
        {"step": 2, "reward": 0.75},
    ]


def test_a_line_is_there_as_soon_as_it_is_written(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"reward": 0.5})
        assert read(tmp_path / "metrics.jsonl") == [{"step": 1, "reward": 0.5}]


def test_numbers_that_are_not_finite_become_null_are_named_and_warn_once(tmp_path):
    with MetricsWriter(tmp_path, LoggingConfig(tensorboard=True)) as writer:
        with pytest.warns(RuntimeWarning, match="step 1: kl is nan; written as null"):
            writer.write(1, {"kl": float("nan"), "reward": 1.0})
        writer.write(2, {"kl": np.float32("nan"), "reward": 1.0})
        with pytest.warns(RuntimeWarning, match="step 3: tags/a is -inf"):
            writer.write(3, {"tags": {"a": -jnp.inf}})
    lines = read(tmp_path / "metrics.jsonl")
    assert lines[0] == {"step": 1, "kl": None, "reward": 1.0, "nonfinite": {"kl": "nan"}}
    assert lines[1]["nonfinite"] == {"kl": "nan"}
    assert lines[2] == {"step": 3, "tags": {"a": None}, "nonfinite": {"tags/a": "-inf"}}


def test_a_step_cannot_be_written_twice_or_out_of_order(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(5, {})
        for step in (5, 4):
            with pytest.raises(ValueError, match=f"step {step} after step 5"):
                writer.write(step, {})


def test_what_json_cannot_hold_is_named(tmp_path):
    with pytest.raises(TypeError, match="tags/a is object, which JSON cannot hold"):
        to_json({"tags": {"a": object()}})


def test_a_resumed_run_has_every_step_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(tmp_path) as writer:
        for step in range(1, 8):
            writer.write(step, {"run": 1})
    with path.open("a") as file:
        file.write('{"step": 8, "ru')  # killed in the middle of a line
    with MetricsWriter(tmp_path, resume_after=5) as writer:
        assert [line["step"] for line in read(path)] == [1, 2, 3, 4, 5]
        with pytest.raises(ValueError, match="step 5 after step 5"):
            writer.write(5, {})
        for step in (6, 7, 8):
            writer.write(step, {"run": 2})
    assert [(line["step"], line["run"]) for line in read(path)] == [
        *((s, 1) for s in range(1, 6)),
        (6, 2),
        (7, 2),
        (8, 2),
    ]


@pytest.mark.parametrize("tail", ['{"step": 4, "kl": 0.', '{"step": 4, "kl": 0.5}', '{"step": 3}\n{"st', "\xff", ""])
def test_any_torn_last_line_is_tolerated(tmp_path, tail):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n' + tail.encode("latin-1"))
    lines = JsonLines(path, resume_after=100)
    lines.append(101, {})
    lines.close()
    steps = [line["step"] for line in read(path)]
    assert steps[:2] == [1, 2]
    assert steps[-1] == 101


def test_a_damaged_line_in_the_middle_warns_and_is_dropped(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.warns(UserWarning, match="line 2 is damaged and was dropped"):
        JsonLines(path, resume_after=3).close()
    assert [line["step"] for line in read(path)] == [1, 3]


def test_a_new_run_keeps_the_old_file_under_another_name(tmp_path):
    for run in (1, 2, 3):
        with MetricsWriter(tmp_path) as writer:
            writer.write(1, {"run": run})
    kept = {path.name: read(path)[0]["run"] for path in tmp_path.iterdir()}
    assert kept == {"metrics.jsonl": 3, "metrics.jsonl.1": 1, "metrics.jsonl.2": 2}


def test_resuming_without_a_file_begins_one(tmp_path):
    with MetricsWriter(tmp_path, resume_after=5) as writer:
        writer.write(6, {})
    assert read(tmp_path / "metrics.jsonl") == [{"step": 6}]


def test_only_the_primary_process_writes(tmp_path):
    with MetricsWriter(tmp_path, LoggingConfig(tensorboard=True), primary=False) as writer:
        writer.write(1, {"reward": 1.0})
        writer.picture(1, "samples", tmp_path / "none.png")
    assert list(tmp_path.iterdir()) == []


def test_a_killed_writer_loses_no_written_line(tmp_path):
    code = (
        "import sys, os, signal; from udm_grpo.reporting.metrics import MetricsWriter; w = MetricsWriter(sys.argv[1]);"
        "[w.write(s, {'reward': 1.0}) for s in range(1, 51)]; os.kill(os.getpid(), signal.SIGKILL)"
    )
    there = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT)
    assert there.returncode == -signal.SIGKILL
    assert [line["step"] for line in read(tmp_path / "metrics.jsonl")] == list(range(1, 51))


def test_tensorboard_gets_the_numbers_and_pictures(tmp_path):
    from PIL import Image

    Image.new("RGB", (4, 4), "red").save(tmp_path / "a.png")
    with MetricsWriter(tmp_path, LoggingConfig(tensorboard=True)) as writer:
        writer.write(1, {"reward": 0.5, "tags": {"colors": 1.0}, "note": "text", "ids": [1]})
        writer.picture(1, "samples", tmp_path / "a.png")
    events = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").iterdir())
    for name in (b"reward", b"tags/colors", b"samples"):
        assert name in events
    assert b"note" not in events


def test_a_tool_that_is_not_installed_is_named_with_the_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    MetricsWriter(tmp_path).close()
    check_tools(LoggingConfig())
    logging = LoggingConfig(tensorboard=True)
    for attempt in (lambda: check_tools(logging), lambda: MetricsWriter(tmp_path, logging, resume_after=3)):
        with pytest.raises(ConfigError, match=r"logging\.tensorboard is True, but tensorboardX is not installed: pip"):
            attempt()


def test_a_run_without_the_wandb_package_warns_before_it_loads_and_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    check_tools(LoggingConfig(wandb=True))
    assert "warning: logging.wandb is True, but wandb is not installed" in capsys.readouterr().err
    with MetricsWriter(tmp_path, LoggingConfig(wandb=True)) as writer:
        writer.write(1, {"reward": 0.5})
        writer.picture(1, "samples", tmp_path / "none.png")
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1


class FakeRun:
    def __init__(self, options: dict[str, Any], identity: str):
        self.options, self.logged, self.finished, self.id = options, [], False, identity
        self.failure: Exception | None = None

    def define_metric(self, name: str, step_metric: str) -> None:
        self.metric = (name, step_metric)

    def log(self, values: dict[str, Any]) -> None:
        if self.failure:
            raise self.failure
        self.logged.append(values)

    def finish(self) -> None:
        self.finished = True


class FakeWandb(types.ModuleType):
    """A stand-in for the wandb package: records the runs, and gives an id to each run that names none."""

    def __init__(self, failure: Exception | None = None):
        super().__init__("wandb")
        self.runs: list[FakeRun] = []
        self.failure, self.broken = failure, False
        self.api = types.SimpleNamespace(api_key="sesame")

    def init(self, **options: Any) -> FakeRun:
        if self.failure and (self.broken or options.get("mode") != "offline"):
            raise self.failure
        self.runs.append(FakeRun(options, options["id"] or f"fresh-{len(self.runs)}"))
        return self.runs[-1]

    @staticmethod
    def Image(path: str) -> tuple[str, str]:  # noqa: N802
        return ("picture", path)


@pytest.fixture
def wandb(monkeypatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_weights_and_biases_gets_numbers_and_pictures(tmp_path, wandb):
    with MetricsWriter(tmp_path, LoggingConfig(wandb=True), config={"lr": 1}) as writer:
        writer.write(1, {"reward": 0.5, "tags": {"colors": 1.0}, "note": "text"})
        writer.picture(1, "samples", "x.png")
    (run,) = wandb.runs
    assert run.logged == [
        {"step": 1, "reward": 0.5, "tags/colors": 1.0},
        {"step": 1, "samples": ("picture", "x.png")},
    ]
    assert run.metric == ("*", "step")
    assert run.options["config"] == {"lr": 1}
    assert run.finished


def test_a_resumed_run_continues_its_run_in_weights_and_biases(tmp_path, wandb):
    plain, named = LoggingConfig(wandb=True), LoggingConfig(wandb=True, wandb_project="udm", wandb_name="a")
    for logging, resume_after in ((plain, None), (plain, 3), (named, 3), (plain, None)):
        MetricsWriter(tmp_path / "run", logging, resume_after=resume_after).close()
    assert [run.id for run in wandb.runs] == ["fresh-0", "fresh-0", "fresh-0", "fresh-3"]
    assert [run.options["project"] for run in wandb.runs] == ["udm-grpo", "udm-grpo", "udm", "udm-grpo"]
    assert [run.options["name"] for run in wandb.runs] == ["run", None, "a", "run"]
    assert {run.options["resume"] for run in wandb.runs} == {"allow"}


def test_the_id_of_a_run_in_weights_and_biases_can_be_chosen(tmp_path, wandb):
    chosen, plain = LoggingConfig(wandb=True, wandb_id="mine"), LoggingConfig(wandb=True)
    for logging, resume_after in ((chosen, None), (plain, 3), (chosen, 4)):
        MetricsWriter(tmp_path, logging, resume_after=resume_after).close()
    assert [run.id for run in wandb.runs] == ["mine", "mine", "mine"]


def test_only_the_primary_process_opens_a_run_in_weights_and_biases(tmp_path, wandb):
    with MetricsWriter(tmp_path, LoggingConfig(wandb=True), primary=False) as writer:
        writer.write(1, {"reward": 0.5})
        writer.picture(1, "samples", "x.png")
    assert wandb.runs == []
    assert list(tmp_path.iterdir()) == []


def test_weights_and_biases_gets_no_secrets_and_leaves_no_key(tmp_path, wandb, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "sesame")
    options = {"api_key": "sesame", "key_env": "JUDGE_KEY", "endpoint": "https://me:sesame@judge.example"}
    config = {"rewards": {"scorers": {"vlm": {"options": options}}}, "milestones": (1, 2)}
    MetricsWriter(tmp_path, LoggingConfig(wandb=True), config=config).close()
    shown = wandb.runs[0].options["config"]
    assert shown["rewards"]["scorers"]["vlm"]["options"]["key_env"] == "JUDGE_KEY"
    assert shown["milestones"] == (1, 2)
    assert "sesame" not in repr(wandb.runs[0].options)
    assert all("sesame" not in path.read_text() for path in tmp_path.iterdir())


def test_a_run_without_a_key_is_kept_offline(tmp_path, wandb, monkeypatch, capsys):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    wandb.api.api_key = None
    check_tools(LoggingConfig(wandb=True))
    assert "no API key is known" in capsys.readouterr().err
    MetricsWriter(tmp_path, LoggingConfig(wandb=True)).close()
    assert [run.options.get("mode") for run in wandb.runs] == ["offline"]
    monkeypatch.setenv("WANDB_API_KEY", "sesame")
    check_tools(LoggingConfig(wandb=True))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("broken", [False, True])
def test_a_run_that_weights_and_biases_refuses_goes_on(tmp_path, wandb, capsys, broken):
    """The run is kept offline if that is possible."""
    wandb.failure, wandb.broken = ArithmeticError("no connection"), broken
    with MetricsWriter(tmp_path, LoggingConfig(wandb=True)) as writer:
        writer.write(1, {"reward": 0.5})
    said = capsys.readouterr().err
    assert "'udm-grpo' (ArithmeticError: no connection)" in said
    assert ("not even offline" in said) == broken
    assert [run.options["mode"] for run in wandb.runs] == ([] if broken else ["offline"])
    assert all(run.logged and run.finished for run in wandb.runs)


def test_weights_and_biases_that_dies_is_one_warning(tmp_path, wandb, capsys):
    with MetricsWriter(tmp_path, LoggingConfig(wandb=True)) as writer:
        writer.write(1, {"reward": 0.5})
        wandb.runs[0].failure = ConnectionError("gone")
        writer.write(2, {"reward": 0.5})
        writer.write(3, {"reward": 0.5})
    said = capsys.readouterr().err
    assert said.count("warning") == 1
    assert "ConnectionError: gone" in said
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_progress_is_plain_lines_when_it_is_no_terminal():
    stream = io.StringIO()
    progress = Progress(total=5, done=1, plain_every=2, stream=stream)
    for _ in range(4):
        progress.update({"reward": np.float32(0.5), "accuracy": 0.25, "kl": 1e-5}, {"rollout": 1.25, "update": 0.5})
    progress.message("saved")
    progress.close()
    lines = stream.getvalue().splitlines()
    assert [line.split()[0] for line in lines] == ["2/5", "4/5", "5/5", "saved"]
    assert "reward 0.5  accuracy 0.25  kl 1e-05  [rollout 1.2s update 0.5s]" in lines[0]
    assert lines[0].split("  ")[-1].startswith("ETA 0:0")
    assert "\r" not in stream.getvalue()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_a_live_bar_on_a_terminal():
    stream = Terminal()
    progress = Progress(total=4, done=1, stream=stream)
    for _ in range(3):
        progress.update({"reward": 0.5}, {"rollout": 1.0})
    progress.message("saved")
    progress.close()
    assert "4/4" in stream.getvalue()
    assert "reward 0.5  [rollout 1.0s]" in stream.getvalue()
    assert "saved\n" in stream.getvalue()
    assert "\r" in stream.getvalue()


def test_stage_times_add_up_and_start_anew():
    now = [0.0]

    def spend(seconds: float) -> None:
        now[0] += seconds

    timer = StageTimer(clock=lambda: now[0])
    for _ in range(2):
        with timer("rollout"):
            spend(1.5)
    with timer("update"):
        spend(1.0)
        with timer("save"):
            spend(0.25)
    with contextlib.suppress(RuntimeError), timer("reward"):
        spend(2.0)
        raise RuntimeError("stop")
    assert list(timer.take().items()) == [("rollout", 3.0), ("update", 1.25), ("save", 0.25), ("reward", 2.0)]
    assert timer.take() == {}


def test_json_files_are_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "summary.json"
    write_json(path, {"strict": np.float32(0.5), "tags": {"a": float("inf")}, "path": Path("x")})
    assert json.loads(path.read_text()) == {
        "strict": 0.5,
        "tags": {"a": None},
        "path": "x",
        "nonfinite": {"tags/a": "inf"},
    }
    before = path.read_text()
    with pytest.raises(TypeError, match="bad is object"):
        write_json(path, {"bad": object()})

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        replace_file(path, fail)
    assert path.read_text() == before
    assert os.listdir(path.parent) == ["summary.json"]


def test_a_kill_leaves_nothing_that_looks_like_the_file_and_the_next_run_clears_it(tmp_path):
    program = (
        "import os; from pathlib import Path; from udm_grpo.files.atomic import replace_file\n"
        "def write(path): path.write_text('half'); os.kill(os.getpid(), 9)\n"
        "replace_file(Path('pictures/000001.png'), write)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    killed = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    folder = tmp_path / "pictures"
    assert len(os.listdir(folder)) == 1
    assert list(folder.glob("*.png")) == []
    (folder / ".mine").touch()
    remove_unfinished(tmp_path)
    assert os.listdir(folder) == [".mine"]
