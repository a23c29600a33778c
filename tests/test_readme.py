"""Every command of the README runs: as it stands where that takes seconds, cut down where it would take minutes."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from report_runs import write_run
from running import ROOT, TOGETHER, environment

from rewards_bridge.client import BridgeConfig, RewardsClient
from rewards_bridge.scorers import KNOWN
from scripts import prepare_prompts
from udm_grpo import config as config_module
from udm_grpo.config import RunConfig
from udm_grpo.config_checks import validate
from udm_grpo.host.shapes import all_prompts
from udm_grpo.host.shapes_scenes import render, scene_for

README = (ROOT / "README.md").read_text()
INSTALL = "pip install -r requirements.txt"
TRAIN = "python -m udm_grpo.train --config configs/shapes.py"
SMOKE = f"{TRAIN}:smoke"
RESUME = f"{TRAIN} --config.checkpoint.resume=latest"
READER = "python -m rewards_bridge.scorers.ocr_models --output outputs/ocr-models"
TRAIN_OCR = "python -m udm_grpo.train --config configs/shapes_ocr.py"
PRETRAIN_SIGNS = "python -m scripts.pretrain_signs --output outputs/pretrain_signs"
LAUNCH = ("scripts/launch_", "sbatch ", "IMAGE=", "TPU_NAME=")
PYTEST = "python -m pytest"
PRETRAIN = "python -m scripts.pretrain_shapes --output outputs/pretrain_shapes"
SERVE = "python -m rewards_bridge serve --scorer shapes --listen unix:/tmp/shapes.sock"
DOCTOR = "python -m rewards_bridge doctor"
SAMPLE = "python -m udm_grpo.sample --checkpoint udm_grpo/assets/ursa-shapes --output outputs/pictures"
EVALUATE = "python -m udm_grpo.evaluate --samples outputs/pictures --output outputs/scores"
INFO = "python -m udm_grpo.convert info udm_grpo/assets/ursa-shapes"
VERIFY = "python -m udm_grpo.convert verify udm_grpo/assets/ursa-shapes udm_grpo/assets/ursa-shapes --forward"
REPORT = "python -m udm_grpo.report outputs/shapes"
COMPARE = f"{REPORT} outputs/other --output comparison.html"
LORA = f"{SMOKE} --config.output_dir=outputs/lora --config.lora.rank=8 --config.optimizer.learning_rate=2e-3"
ADAPTED = "python -m udm_grpo.sample --checkpoint udm_grpo/assets/ursa-shapes --adapter outputs/lora/export_lora"
SCORE = "python -m rewards_bridge score --scorer shapes"
PREPARE = "python -m scripts.prepare_prompts"
COMPILE = "python -m udm_grpo.train --config configs/geneval.py --compile_only --topology v5p:2x2x4"
DEMO = "python -m scripts.demo --base udm_grpo/assets/ursa-shapes --run outputs/shapes"  # run by test_demo.py


def commands() -> list[str]:
    """The command lines of the README's bash blocks, continuation lines joined, comments dropped."""
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [re.sub(r"\s+", " ", line.split("  #")[0]).strip() for line in lines if line.strip()]


def run(command: str) -> subprocess.CompletedProcess[str]:
    words = command.replace("python ", f"{sys.executable} ", 1)
    newcomers = {name: value for name, value in environment().items() if name != "PYTHONPATH"}
    done = subprocess.run(["bash", "-c", words], cwd=ROOT, env=newcomers, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return done


def test_the_readme_has_no_command_that_no_test_runs() -> None:
    """Those of an adapter are run in tests/test_lora.py."""
    known = (f"{INSTALL} && {TRAIN}", f"{INSTALL} && {PYTEST}", SMOKE, RESUME, PRETRAIN, SERVE, DOCTOR, INFO, VERIFY)
    known += (REPORT, COMPARE, READER, TRAIN_OCR, PRETRAIN_SIGNS, LORA, COMPILE, DEMO)
    for command in commands():
        if command == TOGETHER:
            continue  # tests/test_train.py runs several of it
        assert command in known or command.startswith((SCORE, SAMPLE, PREPARE, EVALUATE, ADAPTED, *LAUNCH)), command
    for command in known:
        assert command in commands(), command


def test_the_first_command_in_small_and_going_on(tmp_path: Path) -> None:
    """The default config itself, with fewer and smaller iterations; then the README's way to go on."""
    small = (
        f" --config.output_dir={tmp_path / 'run'} --config.iterations=ITERATIONS --config.optimizer.schedule=constant"
        " --config.rollout.prompts=4 --config.rollout.micro_batch=32 --config.optimizer.micro_batch=32"
        " --config.evaluation.final_prompts=6 --config.evaluation.images_per_prompt=1 --config.evaluation.batch=6"
        " --config.evaluation.picture_prompts=4"
    )
    run(TRAIN + small.replace("ITERATIONS", "1"))
    run(RESUME + small.replace("ITERATIONS", "2"))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["iterations"] == 2
    assert set(summary["by_steps"]) == {"10", "25"}


def test_an_ocr_reward_in_small(tmp_path: Path) -> None:
    """The reader's models by their command, then configs/shapes_ocr.py with fewer and smaller iterations."""
    run(READER.replace("outputs/ocr-models", str(tmp_path / "models")))
    models = "".join(
        f" --config.rewards.scorers.ocr.options.{option}={tmp_path}/models/PP-OCRv5_mobile_{short}"
        for option, short in (("detection", "det"), ("recognition", "rec"))
    )
    run(f"{TRAIN_OCR}:smoke --config.output_dir={tmp_path / 'run'}{models}")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["base"]["ocr"] >= summary["base"]["exact"] > 0.1
    assert set(summary["final"]["tags"]) == {"one", "two", "three"}


def test_the_launches_of_the_readme_print_what_they_would_do() -> None:
    """Each with --dry-run put in; tests/test_launch.py looks at what they print."""
    shown = [command for command in commands() if command.startswith(LAUNCH)]
    assert len(shown) >= 4
    for command in shown:
        if command.startswith("sbatch "):
            command = f"bash scripts/{command.partition('scripts/')[2]}"
        dry = command.replace(" -- ", " --dry-run -- ") if " -- " in command else f"{command} --dry-run"
        assert run(f"export CUDA_VISIBLE_DEVICES=0,1; {dry}").stdout.strip(), command


def test_reports_of_one_run_and_of_two(tmp_path: Path) -> None:
    folders = [str(write_run(tmp_path / name)) for name in ("shapes", "other")]
    at = {"outputs/shapes": folders[0], "outputs/other": folders[1], "comparison.html": f"{tmp_path}/comparison.html"}
    for command in (REPORT, COMPARE):
        run(re.sub("|".join(at), lambda found: at[found.group()], command))
    assert "<title>shapes</title>" in (tmp_path / "shapes" / "report.html").read_text()
    assert "<title>2 runs: shapes, other</title>" in (tmp_path / "comparison.html").read_text()


def test_pictures_of_prompts_and_their_scores(tmp_path: Path) -> None:
    command = next(command for command in commands() if command.startswith(f"{SAMPLE} "))
    run(command.replace("outputs/pictures", str(tmp_path / "pictures")))
    assert len(list((tmp_path / "pictures").glob("*/samples/*.png"))) == 8
    assert (tmp_path / "pictures" / "contact_sheet.png").exists()
    scoring = next(command for command in commands() if command.startswith(EVALUATE))
    run(scoring.replace("outputs/", f"{tmp_path}/"))
    summary = json.loads((tmp_path / "scores" / "summary.json").read_text())
    assert (summary["images"], summary["prompts"]) == (8, 2)
    assert 0.5 < summary["scorers"]["jpeg"]["values"]["jpeg_kilobytes"]["mean"]["value"] < 3


def test_the_prompt_sets_of_the_readme_are_examples_of_the_command() -> None:
    """tests/test_prepare_prompts.py runs all of those."""
    shown = {command for command in commands() if command.startswith(PREPARE)}
    assert len(shown) == 2
    for command in shown:
        assert f"    {command}\n" in (prepare_prompts.__doc__ or "")


def test_a_checkpoint_is_described_and_compared(tmp_path: Path) -> None:
    described = run(INFO).stdout
    assert "alpha: 0.9\n" in described
    assert "parameters: 857728\n" in described
    assert run(VERIFY).stdout.endswith("\nequal\n")


def test_the_scorer_by_itself(tmp_path: Path) -> None:
    wanted = "a photo of a red circle"
    metadata = next(prompt for prompt in all_prompts() if prompt["prompt"] == wanted)
    picture = tmp_path / "picture.png"
    Image.fromarray(render(scene_for(metadata, np.random.default_rng(0)))).save(picture)
    command = next(command for command in commands() if command.startswith(SCORE))
    assert wanted in command
    done = run(command.replace("picture.png", str(picture)))
    answer = json.loads(done.stdout)
    assert answer["scorer"] == "shapes"
    assert answer["raw"]["strict"] == 1.0


def test_the_server_by_itself(tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/s.sock"
    words = SERVE.replace("unix:/tmp/shapes.sock", address).split()
    process = subprocess.Popen([sys.executable, *words[1:]], cwd=ROOT, env=environment())
    metadata = all_prompts()[0]
    picture = render(scene_for(metadata, np.random.default_rng(0)))
    try:
        with RewardsClient(BridgeConfig(address=address, start_timeout_s=60)) as client:
            scores = client.submit(picture[None], [metadata["prompt"]], [metadata]).result()
    finally:
        process.terminate()
        status = process.wait(30)
    assert scores.raw["strict"][0] == 1.0
    assert status == 0


def test_the_doctor_says_what_every_scorer_lacks(tmp_path: Path) -> None:
    """Without a network, most scorers lack their weights: each of them gets a command that mends it."""
    words = DOCTOR.replace("python", sys.executable, 1).split()
    offline = {**environment(), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(words, cwd=ROOT, env=offline, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr
    said = dict(re.findall(r"^(\w+): (ready|not ready)$", done.stdout, re.MULTILINE))
    assert set(said) == set(KNOWN)
    assert {name for name, state in said.items() if state == "ready"} == {"jpeg", "shapes"}
    for command in ("hf download yuvalkirstain/PickScore_v1", "wget https://", "ocr_models --output", "pip install"):
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
    """scripts/pretrain_shapes.py with every stage cut down; a second call finds everything done."""
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


def test_the_tree_names_every_file() -> None:
    tree = README.split("## The tree")[1].split("```")[1]
    for folder in ("udm_grpo", "rewards_bridge", "configs", "scripts"):
        for path in (ROOT / folder).rglob("*.py"):
            if path.name != "__init__.py" and "assets" not in path.parts:
                assert path.name in tree, f"README's tree lacks {path.relative_to(ROOT)}"
