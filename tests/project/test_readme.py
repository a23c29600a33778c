"""The README's statements and examples beyond the commands that test_rehearsal_readme.py runs."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pages import manual, readme_commands
from running import ROOT, environment

from rewards_bridge.scorers import SCORERS
from scripts import prepare_prompts
from udm_grpo import config as config_module
from udm_grpo.config import RunConfig
from udm_grpo.configuration.config_checks import validate

README = manual()
LAUNCH = ("scripts/launch_", "sbatch ", "IMAGE=", "TPU_NAME=")
PRETRAIN = "python -m scripts.pretrain_shapes --output outputs/pretrain_shapes"
DOCTOR = "python -m rewards_bridge doctor"
PREPARE = "python -m scripts.prepare_prompts"


def run(command: str) -> subprocess.CompletedProcess[str]:
    words = command.replace("python ", f"{sys.executable} ", 1)
    newcomers = {name: value for name, value in environment().items() if name != "PYTHONPATH"}
    done = subprocess.run(["bash", "-c", words], cwd=ROOT, env=newcomers, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return done


def test_the_launches_of_the_readme_print_what_they_would_do() -> None:
    """Each runs with --dry-run; tests/scripts/test_launch.py checks the output."""
    shown = [command for command in readme_commands() if command.startswith(LAUNCH)]
    assert len(shown) >= 4
    for command in shown:
        if command.startswith("sbatch "):
            command = f"bash scripts/{command.partition('scripts/')[2]}"
        dry = command.replace(" -- ", " --dry-run -- ") if " -- " in command else f"{command} --dry-run"
        assert run(f"export CUDA_VISIBLE_DEVICES=0,1; {dry}").stdout.strip(), command


def test_the_prompt_sets_of_the_readme_are_examples_of_the_command() -> None:
    """tests/scripts/test_prepare_prompts.py runs all examples of the command."""
    shown = {command for command in readme_commands() if command.startswith(PREPARE)}
    assert len(shown) == 2
    for command in shown:
        assert f"    {command}\n" in (prepare_prompts.__doc__ or "")


def test_the_doctor_says_what_every_scorer_lacks(tmp_path: Path) -> None:
    """Without a network most scorers lack their weights; the doctor prints a command that fixes each of them."""
    words = DOCTOR.replace("python", sys.executable, 1).split()
    offline = {**environment(), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(words, cwd=ROOT, env=offline, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr
    said = dict(re.findall(r"^(\w+): (ready|not ready)$", done.stdout, re.MULTILINE))
    assert set(said) == set(SCORERS)
    assert {name for name, state in said.items() if state == "ready"} == {"jpeg", "shapes"}
    for command in ("hf download yuvalkirstain/PickScore_v1", "curl -fL", "ocr_models --output", "pip install"):
        assert command in done.stdout, command


def python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_scorers_of_the_readme_can_be_configured() -> None:
    config = RunConfig()
    exec(next(block for block in python_blocks() if "rewards.scorers" in block), vars(config_module) | locals())
    config.model.path = config.prompts.train = config.prompts.heldout = "x"
    validate(config)
    assert list(config.rewards.scorers) == ["pickscore", "geneval", "ocr", "mine"]


def test_the_scorer_of_the_readme_scores() -> None:
    names: dict = {}
    exec(next(block for block in python_blocks() if "class Brightness" in block), names)
    scores = names["Brightness"]().score(np.full((2, 4, 4, 3), 51, np.uint8), ["a", "b"], [{}, {}])
    np.testing.assert_allclose(scores.score, 0.2, rtol=1e-6)


@pytest.fixture(scope="module")
def script() -> object:
    spec = importlib.util.spec_from_file_location("pretrain_shapes", ROOT / "scripts" / "pretrain_shapes.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["pretrain_shapes"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.usefixtures("compiled_quickly")
def test_the_base_is_made_in_small_and_goes_on(script, tmp_path: Path) -> None:
    """scripts/pretrain_shapes.py runs with every stage cut down; a second call resumes after the last stage."""
    from udm_grpo.pipeline import load_pipeline

    plan = script.Plan(
        pool=600, continuous_updates=2, quantized_updates=2, tokenizer_batch=4, pictures=500, updates=3, batch=8
    )
    run(f"{PRETRAIN.split(' --output')[0]} --help")  # the command itself finds the package
    script.main(["--output", str(tmp_path)], plan)
    pipeline = load_pipeline(tmp_path / "base" / "checkpoint")
    images = pipeline.generate(["a photo of a red circle"], steps=3, height=32, width=32)
    assert images.shape == (1, 32, 32, 3)
    before = (tmp_path / "base" / "pretrain.jsonl").read_text()
    script.main(["--output", str(tmp_path)], plan)
    assert json.loads(before.splitlines()[-1])["update"] == 3


def test_the_notebook_example_runs() -> None:
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nprint(images.shape, images.dtype)"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "(2, 32, 32, 3) uint8" in done.stdout


def folders_with_sources() -> list[Path]:
    """Return the packages and their subfolders, without generated ones."""
    tops = [ROOT / name for name in ("udm_grpo", "rewards_bridge", "scripts")]
    below = [folder for top in tops for folder in top.rglob("*") if folder.is_dir() and list(folder.glob("*.py"))]
    return [folder for folder in (*tops, *below) if folder.name not in ("protocol", "__pycache__")]


def test_the_layout_and_the_folders_readmes_name_exactly_the_files_there_are() -> None:
    lines = README.split("## Repository layout")[1].split("```")[1].splitlines()
    said = {line.split()[0] for line in lines[lines.index("udm_grpo/") + 1 :] if line.startswith("  ")}
    present = [path for path in (ROOT / "udm_grpo").iterdir() if path.is_file() or list(path.glob("[!_]*"))]
    there = {path.name + "/" * path.is_dir() for path in present}  # without compiled leftovers of an older checkout
    assert said == there - {"__init__.py", "__pycache__/", "README.md"}
    for folder in folders_with_sources():
        if folder.name == "udm_grpo":
            continue
        named = set(re.findall(r"^- \[([^]]+)\]\(\1\)", (folder / "README.md").read_text(), re.M))
        named = {name for name in named if not name.endswith("/")}
        files = {path.name for path in folder.iterdir() if path.suffix in (".py", ".sh", ".sbatch")} - {"__init__.py"}
        assert named == files, f"{folder.name}/README.md and the folder differ in {named ^ files}"


def test_no_folder_is_crowded() -> None:
    crowded = {folder.name: len(list(folder.glob("*.py"))) for folder in folders_with_sources()}
    crowded = {name: count for name, count in crowded.items() if name not in ("rewards_bridge", "scorers", "scripts")}
    assert crowded.pop("udm_grpo") <= 22
    assert all(count <= 14 for count in crowded.values()), crowded


def test_the_tests_lie_in_the_folders_of_what_they_test() -> None:
    tests = ROOT / "tests"
    assert not list(tests.glob("test_*.py"))
    folders = {path.parent.relative_to(tests).as_posix() for path in tests.rglob("test_*.py")}
    packages = {path.name for path in (ROOT / "udm_grpo").iterdir() if list(path.glob("*.py"))}
    assert folders - packages == {"bridge", "scorers", "scripts", "commands", "project"}
    assert packages - folders == set(), "a package without tests"
    crowded = {folder: len(list((tests / folder).glob("test_*.py"))) for folder in folders}
    assert max(crowded.values()) <= 14, crowded
