"""Only reward models need torch: training and the commands after it run where importing torch fails."""

import os
import subprocess
import sys
from pathlib import Path

import checkpoint_copies as copies
import torch
from running import ROOT, environment

PROGRAM = """
import sys, udm_grpo.train
from udm_grpo.pipeline import load_pipeline
load_pipeline("udm_grpo/assets/ursa-shapes")
assert "torch" not in sys.modules

from pathlib import Path
from udm_grpo import convert, evaluate, sample
output = sys.argv[1]
trained = output + "/checkpoint-100"
places = ("model.transformer=" + trained, "output_dir=" + output + "/run")
words = (*places, "iterations=1", "rollout.steps=4", "evaluation.steps=(4,)", "seed=3")
short = ("evaluation.picture_every=0", "evaluation.every=0", "evaluation.final_prompts=4", "grpo.window_starts=1")
arguments = ["--config", "configs/shapes.py:smoke"] + ["--config." + word for word in words + short]
assert udm_grpo.train.main(arguments) == 0
base = ["--base", "udm_grpo/assets/ursa-shapes"]
file, export = output + "/new/transformer.bin", output + "/run/export"
assert convert.main(["to-pytorch", "--checkpoint", output + "/run", *base, "--transformer-only", file]) == 0
assert convert.main(["info", export]) == 0
arguments = ["--run", output + "/run", "--steps", "2", "--images-per-prompt", "1", "--output", output + "/pictures"]
assert sample.main([*arguments, "--prompt", "a photo of a red circle", "--batch", "1"]) == 0
assert evaluate.main(["--samples", output + "/pictures", "--output", output + "/scores", "--scorer", "jpeg"]) == 0
learned, start = (load_pipeline(folder).released.transformer["lm_head"]["kernel"] for folder in (export, base[1]))
assert abs(learned - 0.5 * start).max() < 0.05 < abs(start).max()  # one update from the trained weights
loaded = {name.partition(".")[0] for name in sys.modules}
assert not loaded & {"torch", "transformers"}, loaded & {"torch", "transformers"}
"""


def test_a_run_and_its_results_need_no_torch(tmp_path: Path):
    """A failing package named torch hides the real one, and leaves a mark if anything imports it.

    The run starts from trained weights in the form of the public release's checkpoints, a .bin.
    """
    state = copies.load_file(copies.file_of(ROOT / "udm_grpo" / "assets" / "ursa-shapes", "transformer"))
    folder = tmp_path / "checkpoint-100" / "transformer"
    folder.mkdir(parents=True)
    torch.save(state | {"lm_head.weight": state["lm_head.weight"] * 0.5}, folder / "diffusion_pytorch_model.bin")
    mark, poison = tmp_path / "torch was imported", tmp_path / "poison" / "torch"
    poison.mkdir(parents=True)
    lines = ("import pathlib, traceback", f"pathlib.Path({str(mark)!r}).write_text(''.join(traceback.format_stack()))")
    (poison / "__init__.py").write_text("\n".join([*lines, "raise ImportError('there is no torch here')"]))
    env = environment()
    env["PYTHONPATH"] = os.pathsep.join([str(poison.parent), env["PYTHONPATH"]])
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert not mark.exists(), mark.read_text()
