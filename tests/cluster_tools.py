"""Stand-ins for gcloud, SLURM's commands and kubectl that do on one machine what the real tools do on a cluster.

`install` creates a folder of commands for PATH. Each command is a function of this module that rejects arguments which
the launch scripts should not use, and starts real processes, the workers, tasks or pods, all on this machine.
"""

import argparse
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import yaml

WORKERS = int(os.environ.get("CLUSTER_WORKERS", "2"))
"""Workers of a TPU slice."""
CLUSTER = Path(os.environ.get("CLUSTER", "."))
"""The cluster's state: home folders of workers, the job's id, process ids, calls."""


def install(folder: Path) -> Path:
    """Create the commands in `folder`, which belongs at the front of PATH; return the folder."""
    folder.mkdir(parents=True)
    for name in ("gcloud", "sbatch", "srun", "scancel", "scontrol", "kubectl"):
        text = f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        (folder / name).write_text(f"{text}import cluster_tools\nsys.exit(cluster_tools.{name}(sys.argv[1:]))\n")
        (folder / name).chmod(0o755)
    return folder


def free_port(low: int = 20000, high: int = 32000) -> int:
    """Return a port of this range that is free together with the next one."""
    for port in range(low + os.getpid() % (high - low), high):
        try:
            with socket.create_server(("", port)), socket.create_server(("", port + 1)):
                return port
        except OSError:
            continue
    raise OSError(f"no two free ports from {low} to {high}")


def note(*words: str) -> None:
    """Record the call of a command."""
    with (CLUSTER / "calls").open("a") as file:
        file.write(json.dumps(words) + "\n")


def calls(cluster: Path) -> list[list[str]]:
    """Return the recorded calls."""
    file = cluster / "calls"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def start(words: list[str], log: str, **options: Any) -> subprocess.Popen:
    """Start a process; its output goes to CLUSTER/LOG and its id to CLUSTER/pids."""
    with (CLUSTER / log).open("a") as output:
        process = subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT, **options)
    with (CLUSTER / "pids").open("a") as file:
        file.write(f"{process.pid}\n")
    return process


def started(cluster: Path) -> list[int]:
    """Return the ids of all processes that were started, in order."""
    file = cluster / "pids"
    return [int(line) for line in file.read_text().split()] if file.exists() else []


def family(pid: int) -> list[int]:
    """Return the ids of a process and its descendants, parents first."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            words = stat.read_text().rpartition(")")[2].split()
        except (OSError, IndexError):
            continue  # the process has ended meanwhile
        children.setdefault(int(words[1]), []).append(int(stat.parent.name))
    members, generation = [], [pid]
    while generation:
        members += generation
        generation = [child for parent in generation for child in children.get(parent, [])]
    return members


def end_family(pid: int, cluster: Path) -> None:
    """Kill a process of a cluster and its descendants."""
    for member in family(pid):
        try:
            environment = Path(f"/proc/{member}/environ").read_bytes()
            if f"CLUSTER={cluster}".encode() in environment:  # not another process that has reused the id
                os.kill(member, signal.SIGKILL)
        except OSError:
            continue


def end(cluster: Path) -> None:
    """Kill all processes of a cluster that are still running."""
    for pid in started(cluster):
        end_family(pid, cluster)


# ---------------------------------------------------------------- Cloud TPU


def _worker(number: int, port: int) -> tuple[Path, dict[str, str]]:
    """Return the home folder and the environment of a worker; the variables replace the TPU's metadata."""
    home = CLUSTER / f"worker-{number}"
    tools = home / "bin"
    tools.mkdir(parents=True, exist_ok=True)
    (tools / "hostname").write_text(f"#!/bin/sh\necho t1v-n-0-w-{number}\n")
    (tools / "hostname").chmod(0o755)
    environment = os.environ | {
        "HOME": str(home),
        "PATH": os.pathsep.join([str(tools), str(Path(sys.executable).parent), "/usr/bin", "/bin"]),
        # Packages are not downloaded: those of this environment are visible, and pip installs the project alone.
        "PYTHONPATH": sysconfig.get_paths()["purelib"],
        "PIP_NO_DEPS": "1",
        "PIP_NO_INDEX": "1",
        "PIP_NO_BUILD_ISOLATION": "0",  # pip's spelling of --no-build-isolation
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(WORKERS),
        "JAX_PROCESS_ID": str(number),
    }
    return home, environment


def gcloud(words: list[str]) -> int:
    """`gcloud compute tpus tpu-vm ssh|scp ... --worker=all`: run a command, or copy files, on every worker."""
    note("gcloud", *words)
    assert words[:3] == ["compute", "tpus", "tpu-vm"], words
    parser = argparse.ArgumentParser("gcloud", allow_abbrev=False)
    parser.add_argument("action", choices=("ssh", "scp"))
    parser.add_argument("places", nargs="+")
    for name in ("--zone", "--worker", "--command", "--project"):
        parser.add_argument(name)
    parser.add_argument("--recurse", action="store_true")
    args = parser.parse_args(words[3:])
    assert (args.zone, args.worker) == ("us-east5-a", "all"), words
    port = free_port()
    workers = [_worker(number, port) for number in range(WORKERS)]
    if args.action == "scp":
        source, target = args.places
        name, _, below = target.partition(":")
        assert name == "udm", target
        for home, _ in workers:
            _copy(Path(source), home, below, args.recurse)
        return 0
    assert args.places == ["udm"], args.places
    processes = [
        start(["bash", "-c", args.command], f"worker-{number}.log", cwd=home, env=environment, stdin=subprocess.DEVNULL)
        for number, (home, environment) in enumerate(workers)
    ]
    for number, status in enumerate([process.wait() for process in processes]):
        if status:
            print(f"##### Command execution on worker {number} failed with exit status {status}.", file=sys.stderr)
            return status
    return 0


def _copy(source: Path, home: Path, below: str, recurse: bool) -> None:
    target = home / below
    if source.is_dir():
        assert recurse, f"{source} is a folder: scp needs --recurse"
    if below.endswith("/"):
        assert target.is_dir(), f"scp: {target}: no such folder"
        target = target / source.name
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)
    else:
        shutil.copy(source, target)


# ---------------------------------------------------------------- SLURM


def sbatch(words: list[str]) -> int:
    """Run a job to its end, and again whenever it is requeued, as SLURM would on nodes with GPUs."""
    script = next(index for index, word in enumerate(words) if not word.startswith("--"))
    copy = CLUSTER / "slurm_script"
    shutil.copy(words[script], copy)
    directives = [
        line.removeprefix("#SBATCH ").strip() for line in copy.read_text().splitlines() if line.startswith("#SBATCH")
    ]
    options = dict(option.removeprefix("--").partition("=")[::2] for option in (*directives, *words[:script]))
    assert int(options["ntasks-per-node"]) == 1, options
    # The port is 61440 + the job's id modulo 4096; see jax's SlurmCluster.
    environment = os.environ | {
        "SLURM_JOB_ID": str(free_port(61440, 65000) - 61440 + 4096),
        "SLURM_SUBMIT_DIR": os.getcwd(),
        "SLURM_NNODES": options["nodes"],
        "SLURM_NTASKS": options["nodes"],
        "CUDA_VISIBLE_DEVICES": ",".join(str(gpu) for gpu in range(int(options["gpus-per-node"]))),
    }
    requeued = CLUSTER / "requeued"
    for restart in range(9):
        requeued.unlink(missing_ok=True)
        environment["SLURM_RESTART_COUNT"] = str(restart)
        job = start(["bash", str(copy), *words[script + 1 :]], "job.log", env=environment, cwd="/")
        (CLUSTER / "job").write_text(f"{job.pid} {environment['SLURM_JOB_ID']}")
        status = job.wait()
        if status or not requeued.exists() or "requeue" not in options:
            return status
    return 1


def srun(words: list[str]) -> int:
    """Run the tasks of a step, one per node; return the highest of their exit statuses."""
    note("srun", *words)
    parser = argparse.ArgumentParser("srun", allow_abbrev=False)
    for name in ("--kill-on-bad-exit", "--wait", "--export", "--ntasks", "--ntasks-per-node"):
        parser.add_argument(name)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    args = parser.parse_args(words)
    assert args.export == "ALL", args
    count = int(args.ntasks)
    assert (args.ntasks, args.ntasks_per_node) == (os.environ["SLURM_NNODES"], "1"), args
    tasks = []
    for number in range(count):
        place = {"SLURM_PROCID": str(number), "SLURM_LOCALID": "0", "SLURM_STEP_NODELIST": "localhost"}
        place["SLURM_STEP_NUM_TASKS"] = place["SLURM_NTASKS"] = str(count)
        log = f"task-{number}.log"
        tasks.append(start(args.command, log, env=os.environ | place, start_new_session=True, stdin=subprocess.DEVNULL))
    (CLUSTER / "step").write_text(" ".join(str(task.pid) for task in tasks))
    first = 0.0
    while any(task.poll() is None for task in tasks):
        ended = [task.returncode for task in tasks if task.returncode is not None]
        first = first or (time.monotonic() if ended else 0.0)
        bad = any(ended) and args.kill_on_bad_exit == "1"
        if first and (bad or time.monotonic() - first > float(args.wait)):
            for task in tasks:
                task.kill()
        time.sleep(0.05)
    return max(task.returncode if task.returncode >= 0 else 128 - task.returncode for task in tasks)


def scancel(words: list[str]) -> int:
    """Signal every process of the job's steps, children included, but not the job's own shell."""
    note("scancel", *words)
    option, job = words
    assert job == (CLUSTER / "job").read_text().split()[1], words
    number = signal.Signals[f"SIG{option.removeprefix('--signal=')}"]
    for pid in (CLUSTER / "step").read_text().split():
        for member in family(int(pid)):
            os.kill(member, number)
    return 0


def scontrol(words: list[str]) -> int:
    """Mark a job as requeued."""
    note("scontrol", *words)
    assert words == ["requeue", (CLUSTER / "job").read_text().split()[1]], words
    (CLUSTER / "requeued").touch()
    return 0


# ---------------------------------------------------------------- Kubernetes


def kubectl(words: list[str]) -> int:
    """`kubectl apply -f -` of a JobSet, with its controller, which restarts all pods when one has failed."""
    note("kubectl", *words)
    assert words == ["apply", "-f", "-"], words
    manifest = yaml.safe_load(sys.stdin)
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert manifest["spec"]["network"]["enableDNSHostnames"]
    (group,) = manifest["spec"]["replicatedJobs"]
    job = group["template"]["spec"]
    assert (job["completionMode"], job["backoffLimit"]) == ("Indexed", 0)
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never"
    name = f"{manifest['metadata']['name']}-{group['name']}-0"
    for _ in range(manifest["spec"]["failurePolicy"]["maxRestarts"] + 1):
        port = free_port()
        pods = [_pod(pod, name, index, port) for index in range(job["completions"])]
        while all(process.poll() in (None, 0) for process in pods) and any(process.poll() is None for process in pods):
            time.sleep(0.05)
        if all(process.poll() == 0 for process in pods):
            return 0
        for process in pods:
            if process.poll() is None:
                process.terminate()
        for process in pods:
            process.wait(pod["terminationGracePeriodSeconds"])
    return 1


def _pod(pod: dict[str, Any], name: str, index: int, port: int) -> subprocess.Popen:
    """Start a pod's container: its command with its variables, its mounted volume, and the address of the first pod."""
    (container,) = pod["containers"]
    host = f"{name}-0.{name.split('-')[0]}"
    open_ports = {entry["containerPort"] for entry in container["ports"]}
    variables = {}
    for entry in container["env"]:
        if "valueFrom" in entry:
            if "secretKeyRef" in entry["valueFrom"]:
                assert entry["valueFrom"]["secretKeyRef"]["optional"]  # this cluster has none
                continue
            path = entry["valueFrom"]["fieldRef"]["fieldPath"]
            assert path == "metadata.annotations['batch.kubernetes.io/job-completion-index']", path
            variables[entry["name"]] = str(index)
        else:
            variables[entry["name"]] = entry["value"]
    name_of_first, _, coordinator = variables["JAX_COORDINATOR_ADDRESS"].partition(":")
    assert name_of_first == host, f"{name_of_first}: no such name in this cluster, which has {host}"
    assert {int(coordinator), int(coordinator) + 1} <= open_ports, f"{coordinator} and the next port are not open"
    variables["JAX_COORDINATOR_ADDRESS"] = f"127.0.0.1:{port}"
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    claims = [volume for volume in pod["volumes"] if "persistentVolumeClaim" in volume]
    command = container["command"]
    for claim in claims:
        disk = CLUSTER / claim["persistentVolumeClaim"]["claimName"]
        disk.mkdir(exist_ok=True)
        command = [word.replace(mounts[claim["name"]], str(disk)) for word in command]
    note("pod", str(index), shlex.join(command))
    process = start(command, f"pod-{index}.log", env=os.environ | variables, stdin=subprocess.DEVNULL)
    (CLUSTER / f"pod-{index}").write_text(str(process.pid))
    return process
