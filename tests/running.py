"""Run the trainer as a user would: in a process of its own, by its command line."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SMOKE = "configs/shapes.py:smoke"
TOGETHER = (
    "JAX_COORDINATOR_ADDRESS=node-0:8476 JAX_NUM_PROCESSES=2 JAX_PROCESS_ID=0 "
    "python -m udm_grpo.train --config configs/shapes.py"
)
"""The README's command for one of several processes."""
ONE_AVERAGED = (
    *("iterations=1", "optimizer.schedule=constant", "optimizer.warmup_updates=0", "optimizer.ema_decay=0.5"),
    *("evaluation.every=0", "evaluation.picture_every=0", "evaluation.final_prompts=4", "evaluation.picture_prompts=1"),
)
"""One iteration with a moving average of the weights; only the update differs from the smoke run's programs."""
COMPILED_QUICKLY = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
"""For programs over several devices or processes, which take longer to optimize than to run."""


def free_port() -> int:
    """Return a port that is free together with the next one."""
    while True:
        with socket.create_server(("", 0)) as first:
            port = first.getsockname()[1]
            try:
                with socket.create_server(("", port + 1)):
                    return port
            except OSError:
                continue


def environment(devices: int = 1, quickly: bool | None = None) -> dict[str, str]:
    """Return the environment of a run with `devices` virtual devices; all tests share one compilation cache.

    quickly: whether to compile without optimizations; None: only for several devices.
    """
    return (
        os.environ
        | (COMPILED_QUICKLY if (devices > 1 if quickly is None else quickly) else {})
        | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "JAX_COMPILATION_CACHE_DIR": os.environ["UDM_GRPO_COMPILED"],
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
            "PYTHONWARNINGS": "error::UserWarning:udm_grpo",
        }
    )


def command(output: Path, *overrides: str, config: str = SMOKE) -> list[str]:
    """Return the command line of a run with the output folder `output`."""
    words = [f"--config.{override}" for override in (f"output_dir={output}", *overrides)]
    return [sys.executable, "-m", "udm_grpo.train", "--config", config, *words]


def train(
    output: Path, *overrides: str, devices: int = 1, config: str = SMOKE, quickly: bool | None = None
) -> subprocess.CompletedProcess[str]:
    """Train to the end; see `environment`."""
    return subprocess.run(
        command(output, *overrides, config=config),
        cwd=ROOT,
        env=environment(devices, quickly),
        capture_output=True,
        text=True,
        timeout=500,
    )


def together(words: list[str], output: Path, count: int, devices: int) -> list[subprocess.Popen]:
    """Start `count` processes of one command with `devices` virtual devices each; logs are output-0.log and so on."""
    with socket.create_server(("", 0)) as first:
        port = first.getsockname()[1]
    address, number, identity = (word.partition("=")[0] for word in TOGETHER.split()[:3])
    shared = environment(devices) | COMPILED_QUICKLY
    processes = []
    for process in range(count):
        with output.with_name(f"{output.name}-{process}.log").open("w") as log:
            env = shared | {address: f"127.0.0.1:{port}", number: str(count), identity: str(process)}
            processes.append(subprocess.Popen(words, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT))
    return processes


def train_together(output: Path, count: int, devices: int, *overrides: str) -> list[subprocess.Popen]:
    """Start a run of `count` processes; see `together`."""
    return together(command(output, *overrides), output, count, devices)


def train_and_kill(output: Path, after: int, *overrides: str) -> None:
    """Start a run and kill it with SIGKILL when metrics.jsonl has `after` lines."""
    log = output.parent / "killed.log"
    with log.open("w") as file:
        process = subprocess.Popen(command(output, *overrides), cwd=ROOT, env=environment(), stdout=file, stderr=file)
    deadline = time.monotonic() + 400
    while len(metrics(output)) < after:
        assert process.poll() is None, f"the run ended before it was killed:\n{log.read_text()}"
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()


def metrics(output: Path) -> list[dict[str, Any]]:
    """Return the complete lines of metrics.jsonl, without the times and the run's id."""
    file = output / "metrics.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return [
        {name: value for name, value in json.loads(line).items() if name not in ("seconds", "run")} for line in lines
    ]
