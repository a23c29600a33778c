"""The launch scripts: the output of their dry runs and their errors; test_launch_runs.py trains with them."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from running import ROOT

from udm_grpo.configuration.command_line import parse

CONFIG = ("--config", "configs/shapes.py", "--config.output_dir=outputs/a run")
RESUME = "--config.checkpoint.resume=latest"
RECORD = """#!/usr/bin/env bash
printf '%s\\0' "$(basename "$0")" "$@" >> "$RECORD"
printf '\\n' >> "$RECORD"
"""


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A folder of commands that only record their calls, each as a line of NUL-terminated words."""
    folder = tmp_path / "tools"
    folder.mkdir()
    for name in ("gcloud", "srun", "scontrol", "scancel", "kubectl", "nvidia-smi", "python-of-mine"):
        (folder / name).write_text(RECORD)
        (folder / name).chmod(0o755)
    return folder


def launch(tools: Path, script: str, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    environment |= {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "RECORD": str(tools / "record"), **variables}
    return subprocess.run(
        ["bash", f"scripts/{script}", *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )


def calls(tools: Path) -> list[list[str]]:
    record = tools / "record"
    return [line.split("\0")[:-1] for line in record.read_text().split("\n")[:-1]] if record.exists() else []


def printed(done: subprocess.CompletedProcess[str]) -> list[list[str]]:
    """Return the commands that a dry run printed, split into words."""
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


def trainer(words: list[str]) -> list[str]:
    """Return the trainer's arguments in a command line, after checking that the trainer accepts them."""
    arguments = words[words.index("udm_grpo.train") + 1 :]
    parse(arguments)
    return arguments


# ---------------------------------------------------------------- one node of GPUs


def test_a_node_leaves_the_split_to_the_config(tools: Path) -> None:
    """The script then needs neither a GPU nor nvidia-smi."""
    (command,) = printed(launch(tools, "launch_gpu_node.sh", "--dry-run", "--", *CONFIG))
    assert command == ["python", "-m", "udm_grpo.train", RESUME, *CONFIG]
    assert calls(tools) == []


def test_a_node_gives_its_last_gpus_to_the_scorers(tools: Path) -> None:
    words = ("--scorers", "shapes", "--scorer-gpus", "1", "--dry-run", "--", *CONFIG)
    (command,) = printed(launch(tools, "launch_gpu_node.sh", *words, CUDA_VISIBLE_DEVICES="0,1,2,3,4,5,6,7"))
    assert trainer(command) == [RESUME, "--config.rewards.scorers.shapes.devices=7", *CONFIG]
    assert calls(tools) == []


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--scorers", "a,b"), ["6", "7"]),
        (("--scorers", "a", "--scorer-gpus", "3"), ["5,6,7"]),
        (("--scorers", "a,b", "--scorer-gpus", "3"), ["5,7", "6"]),
    ],
)
def test_several_scorers_take_the_gpus_in_turn(tools: Path, words: tuple[str, ...], expected: list[str]) -> None:
    added = [f"--config.rewards.scorers.{name}.weight=1" for name in words[1].split(",")]
    words = (*words, "--dry-run", "--", *CONFIG, *added)
    done = launch(tools, "launch_gpu_node.sh", *words, CUDA_VISIBLE_DEVICES="4,5,6,7")
    (command,) = printed(done)
    assert [word.rpartition("=")[2] for word in command if ".devices=" in word] == expected
    trainer(command)


def test_a_shared_node_bounds_the_memory_of_the_trainer(tools: Path) -> None:
    words = ("--scorers", "shapes", "--share", "0.8", "--dry-run", "--", *CONFIG)
    (command,) = printed(launch(tools, "launch_gpu_node.sh", *words, CUDA_VISIBLE_DEVICES="0,1"))
    settings = ["--config.rewards.trainer_memory_fraction=0.8", "--config.rewards.scorers.shapes.devices=shared"]
    assert trainer(command) == [RESUME, *settings, *CONFIG]


def test_a_node_runs_what_the_dry_run_prints(tools: Path) -> None:
    words = ("--scorers", "shapes", "--", *CONFIG)
    variables = {"CUDA_VISIBLE_DEVICES": "0,1", "PYTHON": "python-of-mine"}
    (dry,) = printed(launch(tools, "launch_gpu_node.sh", "--dry-run", *words, **variables))
    assert launch(tools, "launch_gpu_node.sh", *words, **variables).returncode == 0
    assert calls(tools) == [dry[dry.index("python-of-mine") :]]


@pytest.mark.parametrize("hidden", ["", "-1", "NoDevFiles"])
def test_hidden_gpus_are_not_assigned_to_scorers(tools: Path, hidden: str) -> None:
    (tools / "nvidia-smi").write_text("#!/usr/bin/env bash\nprintf '0\\n1\\n'\n")
    words = ("--scorers", "shapes", "--dry-run", "--", *CONFIG)
    done = launch(tools, "launch_gpu_node.sh", *words, CUDA_VISIBLE_DEVICES=hidden)
    assert done.returncode == 2
    assert f"CUDA_VISIBLE_DEVICES is '{hidden}', which hides every GPU" in done.stderr


def test_gpus_are_counted_by_nvidia_smi(tools: Path) -> None:
    (tools / "nvidia-smi").write_text("#!/usr/bin/env bash\nprintf '0\\n1\\n2\\n'\n")
    (command,) = printed(launch(tools, "launch_gpu_node.sh", "--scorers", "shapes", "--dry-run", "--", *CONFIG))
    assert "--config.rewards.scorers.shapes.devices=2" in command


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--scorers", "a", "--scorer-gpus", "2", "--", *CONFIG), "leave at least one for the trainer"),
        (("--scorers", "a,b", "--scorer-gpus", "1", "--", *CONFIG), "--scorer-gpus is 1 for 2 scorers"),
        (("--scorers", "a", "--scorer-gpus", "two", "--", *CONFIG), "--scorer-gpus is two; choose a whole number"),
        (("--scorers", "a", "--share", "8", "--", *CONFIG), "--share is 8; choose a fraction below 1"),
        (("--scorers", "a", "--share", "0.8", "--scorer-gpus", "1", "--", *CONFIG), "exclude each other"),
        (("--scorer-gpus", "1", "--", *CONFIG), "--scorer-gpus and --share need --scorers"),
        (("--scorers", "shapes"), "needs --config FILE"),
        (("--gpus", "2", "--", *CONFIG), "unknown argument --gpus"),
    ],
)
def test_a_node_that_cannot_be_split_is_refused(tools: Path, words: tuple[str, ...], said: str) -> None:
    done = launch(tools, "launch_gpu_node.sh", *words, CUDA_VISIBLE_DEVICES="0,1")
    assert done.returncode == 2
    assert said in done.stderr


# ---------------------------------------------------------------- SLURM


def test_slurm_runs_the_node_script_on_every_node(tools: Path) -> None:
    words = ("--scorers", "shapes", "--", *CONFIG)
    (dry,) = printed(launch(tools, "launch_slurm.sbatch", "--dry-run", *words))
    assert dry[:3] == ["srun", "--ntasks=1", "--ntasks-per-node=1"]
    assert dry[3:6] == ["--kill-on-bad-exit=0", "--wait=60", "--export=ALL"]
    assert dry[6:] == ["bash", "scripts/launch_gpu_node.sh", *words, "--config.checkpoint.stopped_status=75"]
    done = launch(tools, "launch_slurm.sbatch", *words, SLURM_SUBMIT_DIR=str(ROOT), SLURM_JOB_ID="7")
    assert done.returncode == 0, done.stderr
    assert calls(tools) == [dry]


def test_slurm_starts_one_process_a_node_and_warns_before_the_time_limit() -> None:
    text = (ROOT / "scripts" / "launch_slurm.sbatch").read_text()
    options = {line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")}
    assert {"--ntasks-per-node=1", "--signal=B:TERM@300", "--requeue"} <= options


@pytest.mark.parametrize(("variables", "seconds"), [({}, "300"), ({"UDM_GRPO_LOCK_WAIT_S": "20"}, "20")])
def test_a_job_that_was_queued_again_waits_for_its_old_process(tools: Path, variables, seconds) -> None:
    """The job waits as long as the notice before the time limit, which the test above checks."""
    (tools / "srun").write_text('#!/usr/bin/env bash\necho "$UDM_GRPO_LOCK_WAIT_S"\n')
    job = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "7"}
    done = launch(tools, "launch_slurm.sbatch", "--", *CONFIG, **job, **variables)
    assert (done.returncode, done.stdout) == (0, f"{seconds}\n"), done.stderr


def test_slurm_starts_one_task_a_node_though_the_job_has_more(tools: Path) -> None:
    variables = {"SLURM_NNODES": "3", "SLURM_NTASKS": "24"}
    (dry,) = printed(launch(tools, "launch_slurm.sbatch", "--dry-run", "--", *CONFIG, **variables))
    assert dry[:3] == ["srun", "--ntasks=3", "--ntasks-per-node=1"]


def test_slurm_without_a_config_is_refused(tools: Path) -> None:
    done = launch(tools, "launch_slurm.sbatch", "configs/shapes.py")
    assert done.returncode == 2
    assert "needs -- --config FILE" in done.stderr


# ---------------------------------------------------------------- a TPU pod


def test_a_pod_is_set_up_trained_and_stopped_on_all_workers(tools: Path) -> None:
    variables = {"TPU_NAME": "udm", "ZONE": "us-east5-a", "PROJECT": "mine", "PYTHON": "python3.12"}
    ends = ["--zone", "us-east5-a", "--worker=all", "--project", "mine"]
    setup = printed(launch(tools, "launch_tpu_pod.sh", "setup", "--dry-run", **variables, TOKEN_FILE="a token"))
    python, pack, copy, unpack, token, install = setup
    assert "python3.12 -c" in python[-1]
    assert pack[0] == "tar"
    assert not {"tests", "requirements.txt"} & set(pack)
    assert copy[:5] == token[:5] == ["gcloud", "compute", "tpus", "tpu-vm", "scp"]
    assert copy[6:] == ["udm:udm-grpo.tar.gz", "--recurse", *ends]
    assert token[5:7] == ["a token", "udm:udm-grpo/"]
    assert install[:-2] == unpack[:-2] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "udm", *ends]
    assert install[-1].startswith("python3.12 -m venv udm-grpo/.venv && ")
    assert install[-1].endswith("pip install -e '.[tpu]'")
    check, train = printed(launch(tools, "launch_tpu_pod.sh", "train", "--dry-run", *CONFIG, **variables))
    assert "udm_grpo.check_inputs" in check[-1]
    assert trainer(shlex.split(train[-1])) == [RESUME, *CONFIG]
    (stop,) = printed(launch(tools, "launch_tpu_pod.sh", "stop", "--dry-run", **variables))
    assert "kill -TERM" in stop[-1]
    assert calls(tools) == []


def test_models_come_to_the_workers_from_here_or_from_a_bucket(tools: Path) -> None:
    variables = {"TPU_NAME": "udm", "ZONE": "z"}
    words = ("copy", "configs/shapes.py", "udm_grpo/assets/", "--dry-run")
    commands = printed(launch(tools, "launch_tpu_pod.sh", *words, **variables))
    assert [command[4] for command in commands] == ["ssh", "scp", "ssh", "scp"]
    assert [command[5:7] for command in commands[1::2]] == [
        ["configs/shapes.py", "udm:udm-grpo/configs/"],
        ["udm_grpo/assets", "udm:udm-grpo/udm_grpo/"],
    ]
    bucket = {"BUCKET": "gs://mine/udm"}
    commands = printed(launch(tools, "launch_tpu_pod.sh", "copy", "models/a", "--dry-run", **variables, **bucket))
    assert commands[1][-1] == "cd udm-grpo && gcloud storage cp --recursive gs://mine/udm/models/a models/"


def test_a_python_that_is_too_old_is_an_error_that_says_how_to_install_one(tools: Path, tmp_path: Path) -> None:
    """The stand-in runs the command as a worker would, with the python3 of Ubuntu 22.04."""
    (tools / "gcloud").write_text('#!/usr/bin/env bash\nbash -c "${@: -1}"\n')
    (tools / "python3").write_text("#!/usr/bin/env bash\necho Python 3.10\nexit 1\n")
    (tools / "python3").chmod(0o755)
    for python, version in (("python3", "Python 3.10"), ("python3.99", "not installed")):
        done = launch(tools, "launch_tpu_pod.sh", "setup", TPU_NAME="udm", ZONE="z", PYTHON=python)
        assert done.returncode == 1
        assert f": {python} is {version}; Python 3.11 or later is required" in done.stderr
        assert "apt-get install --yes python3.12 python3.12-venv" in done.stderr
        assert "uv python install 3.12" in done.stderr


@pytest.mark.parametrize(
    ("words", "variables", "said"),
    [
        (("train", *CONFIG), {"TPU_NAME": "udm"}, "ZONE is not set"),
        (("train",), {"TPU_NAME": "udm", "ZONE": "z"}, "train needs --config FILE"),
        (("copy",), {"TPU_NAME": "udm", "ZONE": "z"}, "copy needs files or folders"),
        (("copy", "models/none"), {"TPU_NAME": "udm", "ZONE": "z"}, "models/none: no such file or folder"),
        (("copy", "/etc"), {"TPU_NAME": "udm", "ZONE": "z"}, "/etc: use paths inside this folder"),
        (
            ("begin",),
            {"TPU_NAME": "udm", "ZONE": "z"},
            "unknown action 'begin'; expected setup, copy, check, train or stop",
        ),
    ],
)
def test_a_pod_that_is_not_named_is_refused(
    tools: Path, words: tuple[str, ...], variables: dict[str, str], said: str
) -> None:
    done = launch(tools, "launch_tpu_pod.sh", *words, **variables)
    assert done.returncode == 2
    assert said in done.stderr


# ---------------------------------------------------------------- Kubernetes

TPU = ("tpu", "--name", "udm", "--hosts", "4", "--chips", "4", "--accelerator", "tpu-v5p-slice", "--topology", "2x2x4")
GPU = ("gpu", "--name", "udm", "--hosts", "2", "--chips", "8")


@pytest.mark.parametrize("kind", [TPU, GPU])
def test_the_manifest_of_a_jobset(tools: Path, kind: tuple[str, ...]) -> None:
    words = (*kind, "--claim", "disk", "--dry-run", "--", *CONFIG, '--config.model.path=/mnt/"a": b')
    done = launch(tools, "launch_jobset.sh", *words, IMAGE="registry/udm-grpo:1")
    assert done.returncode == 0, done.stderr
    manifest = yaml.safe_load(done.stdout)
    (group,) = manifest["spec"]["replicatedJobs"]
    job = group["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    hosts, chips = int(kind[4]), int(kind[6])
    assert job["parallelism"] == job["completions"] == hosts
    environment = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert environment["JAX_COORDINATOR_ADDRESS"] == "udm-trainer-0-0.udm:8476"
    assert environment["JAX_NUM_PROCESSES"] == str(hosts)
    assert "JAX_PROCESS_ID" in environment
    assert environment["UDM_GRPO_LOCK_WAIT_S"] == str(
        pod["terminationGracePeriodSeconds"]
    )  # an evicted pod's time to end
    (secret,) = (entry["valueFrom"] for entry in container["env"] if entry["name"] == "UDM_GRPO_SECRET")
    assert secret == {"secretKeyRef": {"name": "udm", "key": "secret", "optional": True}}
    resource = "google.com/tpu" if kind is TPU else "nvidia.com/gpu"
    assert container["resources"]["limits"] == {resource: chips}
    assert ("nodeSelector" in pod) == (kind is TPU)
    assert trainer(container["command"])[2:] == [*CONFIG, '--config.model.path=/mnt/"a": b']
    assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "disk"}
    assert calls(tools) == []


@pytest.mark.parametrize(
    ("words", "image", "said"),
    [
        (("--name", "udm"), "x", "expected tpu or gpu"),
        (("gpu", "--name", "udm", "--hosts", "2", "--chips", "8", "--", *CONFIG), "x", "--claim is missing"),
        ((*GPU, "--claim", "disk", "--", *CONFIG), "", "IMAGE is not set"),
        ((*TPU[:-4], "--claim", "disk", "--", *CONFIG), "x", "tpu needs --accelerator and --topology"),
        ((*GPU, "--claim", "disk"), "x", "needs --config FILE"),
    ],
)
def test_a_jobset_that_lacks_something_is_refused(tools: Path, words: tuple[str, ...], image: str, said: str) -> None:
    done = launch(tools, "launch_jobset.sh", *words, IMAGE=image)
    assert done.returncode == 2
    assert said in done.stderr


@pytest.mark.parametrize(
    "script", ["launch_gpu_node.sh", "launch_slurm.sbatch", "launch_tpu_pod.sh", "launch_jobset.sh"]
)
def test_help_is_the_head_of_the_script(tools: Path, script: str) -> None:
    done = launch(tools, script, "--help")
    assert done.returncode == 0, done.stderr
    assert f"scripts/{script}" in done.stdout
    assert "--dry-run" in done.stdout
    assert "set -euo" not in done.stdout
