"""A run on devices whose memory is known settles at its start what its configuration leaves open."""

import json
import subprocess
import sys
from pathlib import Path

from running import ONE_AVERAGED, ROOT, command, environment

PROGRAM = """
import sys
from udm_grpo.compile_check import measure
measure.usable_bytes = lambda device: 2**30
from udm_grpo.train import main
sys.exit(main(sys.argv[1:]))
"""
"""Trains on devices that seem to have 1 GiB each."""


def test_a_run_says_what_it_takes_and_trains_with_it(tmp_path: Path) -> None:
    settings = ("mesh.data=1", "mesh.fsdp=2", "rollout.micro_batch=0", "optimizer.micro_batch=16")
    words = command(tmp_path / "run", *ONE_AVERAGED, *settings, "evaluation.batch=4")[3:]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *words], cwd=ROOT, env=environment(2), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    chosen = "model.compute_weights=replicated, model.remat=none, rollout.micro_batch=4: "
    assert chosen in done.stderr
    assert "of 1.00 GiB on each device, by the compiler" in done.stderr
    used = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (used["rollout"]["micro_batch"], used["optimizer"]["micro_batch"]) == (4, 16)
    assert (used["model"]["compute_weights"], used["model"]["remat"]) == ("replicated", "none")
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["iterations"] == 1
