"""The launch scripts run a training of two processes to its end; only the cluster's tools are stand-ins.

Each run is stopped on the way, as its cluster would stop it, and started again by the same script.
"""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import cluster_tools
import pytest
from running import COMPILED_QUICKLY, ROOT, SMOKE, environment, metrics

ITERATIONS = 6
PATIENCE_S = 500
"""Seconds that a script, or a run's first iteration, may take."""
ASSETS = ROOT / "udm_grpo" / "assets"
CONFIG = (
    *("--config", SMOKE, f"--config.iterations={ITERATIONS}", "--config.optimizer.schedule=constant"),
    *("--config.checkpoint.every=0", "--config.evaluation.every=0", "--config.evaluation.picture_every=0"),
    *("--config.evaluation.final_prompts=4", "--config.evaluation.images_per_prompt=2"),
    "--config.evaluation.picture_prompts=8",
)
SLICE = {"TPU_NAME": "udm", "ZONE": "us-east5-a"}


@dataclass
class Cluster:
    """The folder that holds a cluster's state; commands that were started for it end with the test."""

    folder: Path
    started: list[subprocess.Popen] = field(default_factory=list)

    @property
    def tools(self) -> Path:
        return self.folder.parent / "tools"

    def start(self, *words: str, **variables: str) -> subprocess.Popen:
        """Start a script; its output goes to launch.log."""
        variables |= environment() | COMPILED_QUICKLY | {"CLUSTER": str(self.folder)}
        variables["PATH"] = os.pathsep.join([str(self.tools), variables["PATH"]])
        with (self.folder / "launch.log").open("a") as log:
            self.started.append(subprocess.Popen(words, cwd=ROOT, env=variables, stdout=log, stderr=subprocess.STDOUT))
        return self.started[-1]

    def run(self, *words: str, **variables: str) -> int:
        """Run a script to its end; return its exit status."""
        return self.start(*words, **variables).wait(PATIENCE_S)

    def until(self, ready: Callable[[], object]) -> None:
        """Wait until `ready` returns something true while the last script runs."""
        deadline = time.monotonic() + PATIENCE_S
        while not ready():
            assert self.started[-1].poll() is None, self.logs()
            assert time.monotonic() < deadline, self.logs()
            time.sleep(0.02)

    def logs(self) -> str:
        """Return the end of every log."""
        return "\n".join(f"== {file.name}\n{file.read_text()[-4000:]}" for file in sorted(self.folder.glob("*.log")))

    def log(self, name: str) -> str:
        """Return the output of one worker, task or pod."""
        return (self.folder / f"{name}.log").read_text()

    def calls(self) -> list[str]:
        """Return the names of the tools that were called and of the pods that were started."""
        return [call[0] for call in cluster_tools.calls(self.folder)]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    folder = tmp_path / "cluster"
    folder.mkdir()
    simulated = Cluster(folder)
    cluster_tools.install(simulated.tools)
    yield simulated
    for process in simulated.started:
        cluster_tools.end_family(process.pid, folder)  # before pods and tasks, which it would restart
        process.wait()
    cluster_tools.end(folder)


def assert_resumed(cluster: Cluster, output: Path) -> None:
    """Assert that the run finished in two starts and logged every iteration once."""
    assert [row["step"] for row in metrics(output)] == list(range(1, ITERATIONS + 1)), cluster.logs()
    starts = json.loads((output / "environment.json").read_text())["starts"]
    assert [start["processes"] for start in starts] == [2, 2]
    assert 1 <= starts[1]["after_step"] < ITERATIONS
    assert json.loads((output / "summary.json").read_text())["iterations"] == ITERATIONS


def test_a_tpu_slice_is_set_up_checked_trained_stopped_and_resumed(cluster: Cluster) -> None:
    script, shared = "scripts/launch_tpu_pod.sh", cluster.folder / "shared"
    local = ROOT / "outputs" / f"launch-{os.getpid()}"
    shutil.copytree(ASSETS / "ursa-shapes", local / "model")
    for name in ("train.jsonl", "heldout.jsonl"):
        shutil.copy(ASSETS / "shapes-prompts" / name, local)
    below = local.relative_to(ROOT)
    words = (*CONFIG, f"--config.output_dir={shared}", f"--config.model.path={below}/model")
    words = (*words, *(f"--config.prompts.{name}={below}/{name}.jsonl" for name in ("train", "heldout")))
    files = [f"{below}/{name}" for name in ("model", "train.jsonl", "heldout.jsonl")]
    try:
        assert cluster.run(script, "setup", **SLICE, PYTHON="python", CLUSTER_WORKERS="1") == 0, cluster.logs()
        # The second worker is a copy of the first, since setting it up would take as long again.
        shutil.copytree(cluster.folder / "worker-0", cluster.folder / "worker-1", symlinks=True)
        assert cluster.run(script, "train", *words, **SLICE) == 2, cluster.logs()
        for number in (0, 1):
            said = cluster.log(f"worker-{number}")
            assert f"worker t1v-n-0-w-{number}: error: model.path: {below}/model: no such folder" in said
            assert f"worker t1v-n-0-w-{number}: error: prompts.train: " in said
        assert not shared.exists()
        assert cluster.run(script, "copy", *files, **SLICE) == 0, cluster.logs()
    finally:
        shutil.rmtree(local)
    job = cluster.start(script, "train", *words, **SLICE)
    cluster.until(lambda: metrics(shared))
    assert cluster.run(script, "check", *words, **SLICE) == 1, "a second training must be refused"
    assert "worker t1v-n-0-w-1: error: a training is already running" in cluster.log("worker-1")
    assert cluster.run(script, "stop", **SLICE) == 0, cluster.logs()
    assert job.wait(PATIENCE_S) == 0, cluster.logs()
    assert not (shared / "summary.json").exists()
    assert cluster.run(script, "train", *words, **SLICE) == 0, cluster.logs()
    assert_resumed(cluster, shared)
    assert cluster.run(script, "stop", **SLICE) == 1
    assert "worker t1v-n-0-w-0: no training is running" in cluster.log("worker-0")


JOB = ("--nodes=2", "--gpus-per-node=1", "scripts/launch_slurm.sbatch", "--", *CONFIG)


def test_a_slurm_job_is_stopped_at_its_time_limit_requeued_and_resumed(cluster: Cluster) -> None:
    output = cluster.folder / "run"
    job = cluster.start("sbatch", *JOB, f"--config.output_dir={output}")
    cluster.until(lambda: metrics(output))
    os.kill(int((cluster.folder / "job").read_text().split()[0]), signal.SIGTERM)  # as --signal=B:TERM@300 does
    assert job.wait(PATIENCE_S) == 0, cluster.logs()
    assert cluster.calls() == ["srun", "scancel", "scontrol", "srun"]
    assert_resumed(cluster, output)


def test_a_preempted_slurm_job_is_requeued_and_one_that_fails_is_not(cluster: Cluster) -> None:
    """Preemption signals only the processes of the step; their exit status says that they have saved."""
    step = 'if [ -e "$CLUSTER/again" ]; then exit 3; fi\ntouch "$CLUSTER/again"\nexit 75\n'
    (cluster.tools / "srun").write_text(f"#!/bin/sh\n{step}")
    assert cluster.run("sbatch", *JOB) == 3
    assert cluster.calls() == ["scontrol"]


def test_a_jobset_whose_pod_is_evicted_starts_again_and_resumes(cluster: Cluster) -> None:
    kind = ("gpu", "--name", "udm", "--hosts", "2", "--chips", "1", "--claim", "disk")
    words = (*kind, "--", *CONFIG, "--config.output_dir=/mnt/shared/run")
    job = cluster.start("scripts/launch_jobset.sh", *words, IMAGE="registry/udm-grpo:1")
    output = cluster.folder / "disk" / "run"
    cluster.until(lambda: metrics(output))
    os.kill(int((cluster.folder / "pod-1").read_text()), signal.SIGTERM)
    assert job.wait(PATIENCE_S) == 0, cluster.logs()
    assert cluster.calls() == ["kubectl", "pod", "pod", "pod", "pod"]
    assert_resumed(cluster, output)
