"""The launch scripts through to a finished training of two processes, with stand-ins for cluster tools only.

Each training is stopped on its way, as its cluster would, and started again by the same script.
"""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import cluster_tools
import pytest
from running import COMPILED_QUICKLY, ROOT, SMOKE, environment, metrics

ITERATIONS = 8
ASSETS = ROOT / "udm_grpo" / "assets"
CONFIG = (
    *("--config", SMOKE, f"--config.iterations={ITERATIONS}", "--config.optimizer.schedule=constant"),
    *("--config.checkpoint.every=0", "--config.evaluation.every=0", "--config.evaluation.picture_every=0"),
    *("--config.evaluation.final_prompts=4", "--config.evaluation.images_per_prompt=2", "--config.evaluation.batch=8"),
    "--config.evaluation.picture_prompts=8",
)
SLICE = {"TPU_NAME": "udm", "ZONE": "us-east5-a"}


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Path]:
    """The folder in which a cluster remembers what it has; its processes end with the test."""
    folder = tmp_path / "cluster"
    folder.mkdir()
    cluster_tools.install(tmp_path / "tools")
    yield folder
    cluster_tools.end(folder)


def launch(cluster: Path, *words: str, **variables: str) -> subprocess.Popen:
    """Start a script; its output goes to launch.log."""
    variables |= environment() | COMPILED_QUICKLY | {"CLUSTER": str(cluster)}
    variables["PATH"] = os.pathsep.join([str(cluster.parent / "tools"), variables["PATH"]])
    with (cluster / "launch.log").open("a") as log:
        return subprocess.Popen(words, cwd=ROOT, env=variables, stdout=log, stderr=subprocess.STDOUT)


def finished(cluster: Path, *words: str, **variables: str) -> int:
    """Run a script to its end; its exit status."""
    return launch(cluster, *words, **variables).wait(500)


def logs(cluster: Path) -> str:
    """What was printed, everywhere."""
    return "\n".join(f"== {file.name}\n{file.read_text()[-4000:]}" for file in sorted(cluster.glob("*.log")))


def wait(cluster: Path, job: subprocess.Popen, ready: Callable[[], object]) -> None:
    """Wait for something to be there while a job runs."""
    deadline = time.monotonic() + 400
    while not ready():
        assert job.poll() is None, logs(cluster)
        assert time.monotonic() < deadline, logs(cluster)
        time.sleep(0.02)


def assert_resumed(cluster: Path, output: Path) -> None:
    """The run has finished, in two starts, with every iteration once."""
    assert [row["step"] for row in metrics(output)] == list(range(1, ITERATIONS + 1)), logs(cluster)
    starts = json.loads((output / "environment.json").read_text())["starts"]
    assert [start["processes"] for start in starts] == [2, 2]
    assert 1 <= starts[1]["after_step"] < ITERATIONS
    assert json.loads((output / "summary.json").read_text())["iterations"] == ITERATIONS


def test_a_tpu_slice_is_set_up_checked_trained_stopped_and_resumed(cluster: Path) -> None:
    script, shared = "scripts/launch_tpu_pod.sh", cluster / "shared"
    local = ROOT / "outputs" / f"launch-{cluster.parent.name}"
    shutil.copytree(ASSETS / "ursa-shapes", local / "model")
    shutil.copy(ASSETS / "shapes-prompts" / "train.jsonl", local)
    below = local.relative_to(ROOT)
    words = (*CONFIG, f"--config.output_dir={shared}", f"--config.model.path={below}/model")
    words = (*words, f"--config.prompts.train={below}/train.jsonl")
    try:
        assert finished(cluster, script, "setup", **SLICE, PYTHON="python", CLUSTER_WORKERS="1") == 0, logs(cluster)
        shutil.copytree(cluster / "worker-0", cluster / "worker-1", symlinks=True)  # setup again would take 15 s
        assert finished(cluster, script, "train", *words, **SLICE) == 1, logs(cluster)
        for number in (0, 1):
            said = (cluster / f"worker-{number}.log").read_text()
            assert f"worker t1v-n-0-w-{number}: error: model.path: {below}/model: no such folder" in said
            assert f"worker t1v-n-0-w-{number}: error: prompts.train: " in said
        assert not shared.exists()
        assert finished(cluster, script, "copy", f"{below}/model", f"{below}/train.jsonl", **SLICE) == 0, logs(cluster)
    finally:
        shutil.rmtree(local)
    job = launch(cluster, script, "train", *words, **SLICE)
    wait(cluster, job, lambda: metrics(shared))
    assert finished(cluster, script, "check", *words, **SLICE) == 1, "a second training has to be refused"
    assert "worker t1v-n-0-w-1: error: a training runs already" in (cluster / "worker-1.log").read_text()
    assert finished(cluster, script, "stop", **SLICE) == 0, logs(cluster)
    assert job.wait(300) == 0, logs(cluster)
    assert not (shared / "summary.json").exists()
    assert finished(cluster, script, "train", *words, **SLICE) == 0, logs(cluster)
    assert_resumed(cluster, shared)
    assert finished(cluster, script, "stop", **SLICE) == 1
    assert "worker t1v-n-0-w-0: no training runs" in (cluster / "worker-0.log").read_text()


def test_a_slurm_job_is_stopped_at_its_time_limit_requeued_and_resumed(cluster: Path) -> None:
    output = cluster / "run"
    words = ("--nodes=2", "--gpus-per-node=1", "scripts/launch_slurm.sbatch", "--", *CONFIG)
    job = launch(cluster, str(cluster.parent / "tools" / "sbatch"), *words, f"--config.output_dir={output}")
    wait(cluster, job, lambda: metrics(output))
    shell = int((cluster / "job").read_text().split()[0])
    os.kill(shell, 15)  # as --signal=B:TERM@300 does
    assert job.wait(500) == 0, logs(cluster)
    names = [call[0] for call in cluster_tools.calls(cluster)]
    assert names == ["srun", "scancel", "scontrol", "srun"]
    assert_resumed(cluster, output)


def test_a_preempted_slurm_job_is_requeued_and_one_that_fails_is_not(cluster: Path) -> None:
    """Preemption signals the processes of the step alone; the exit status says that they have saved."""
    step = 'if [ -e "$CLUSTER/again" ]; then exit 3; fi\ntouch "$CLUSTER/again"\nexit 75\n'
    (cluster.parent / "tools" / "srun").write_text(f"#!/bin/sh\n{step}")
    words = ("--nodes=2", "--gpus-per-node=1", "scripts/launch_slurm.sbatch", "--", *CONFIG)
    assert finished(cluster, str(cluster.parent / "tools" / "sbatch"), *words) == 3
    assert [call[0] for call in cluster_tools.calls(cluster)] == ["scontrol"]


def test_a_jobset_whose_pod_is_evicted_starts_again_and_resumes(cluster: Path) -> None:
    kind = ("gpu", "--name", "udm", "--hosts", "2", "--chips", "1", "--claim", "disk")
    words = (*kind, "--", *CONFIG, "--config.output_dir=/mnt/shared/run")
    job = launch(cluster, "scripts/launch_jobset.sh", *words, IMAGE="registry/udm-grpo:1")
    output = cluster / "disk" / "run"
    wait(cluster, job, lambda: metrics(output))
    os.kill(int((cluster / "pod-1").read_text()), 15)
    assert job.wait(500) == 0, logs(cluster)
    assert [call[0] for call in cluster_tools.calls(cluster)] == ["kubectl", "pod", "pod", "pod", "pod"]
    assert_resumed(cluster, output)
