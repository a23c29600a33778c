"""The command that draws pictures: where it writes them, what determines them, and errors for wrong input."""

import functools
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from running import ONE_AVERAGED, ROOT, environment, together, train

from udm_grpo import compiled, sample
from udm_grpo.checkpoints.checkpoint import Checkpoints
from udm_grpo.files.atomic import UNFINISHED
from udm_grpo.pipeline import load_pipeline
from udm_grpo.scoring.sample_folder import read_samples
from udm_grpo.scoring.sample_settings import digest_of

SHAPES = str(ROOT / "udm_grpo" / "assets" / "ursa-shapes")
FEW = ("--height=32", "--width=32", "--steps=3")
LINES = [
    {
        "tag": "colors",
        "include": [{"class": "circle", "count": 1, "color": "red"}],
        "prompt": "a photo of a red circle",
    },
    {"tag": "counting", "include": [{"class": "star", "count": 2}], "prompt": "a photo of two stars"},
    {"tag": "single_object", "include": [{"class": "square", "count": 1}], "prompt": "a photo of a square"},
]


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory: pytest.TempPathFactory):
    """The command compiles anew each time; the calls of these tests share the compiled programs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "tokenizer_codec", functools.cache(compiled.tokenizer_codec))
        original, programs = compiled.free_rollout, {}

        def free_rollout(network, path, plan):
            if (network, plan) not in programs:
                programs[network, plan] = original(network, path, plan)
            return programs[network, plan]

        patch.setattr(compiled, "free_rollout", free_rollout)
        yield


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "three.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return file


def draw(output: Path, *words: str) -> dict[str, np.ndarray]:
    """Run the command with the shipped model and return its pictures."""
    model = () if any(word.startswith("--run") for word in words) else ("--checkpoint", SHAPES)
    assert sample.main([*model, *FEW, f"--output={output}", *words]) == 0
    return pictures(output)


def pictures(output: Path) -> dict[str, np.ndarray]:
    """Return every picture in a folder by its relative path, without the contact sheet."""
    files = [file for file in output.rglob("*.png") if file.name != "contact_sheet.png"]
    return {file.relative_to(output).as_posix(): np.asarray(Image.open(file)) for file in sorted(files)}


def assert_same(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert actual.keys() == expected.keys()
    for name, picture in expected.items():
        np.testing.assert_array_equal(actual[name], picture, err_msg=name)


@pytest.fixture(scope="module")
def whole(prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three prompts with four pictures each, drawn by one command."""
    output = tmp_path_factory.mktemp("whole") / "pictures"
    draw(output, f"--prompts={prompts}", "--batch=8")
    return output


def test_the_geneval_layout(whole: Path) -> None:
    names = {f"{prompt:05d}/samples/{image:04d}.png" for prompt in range(3) for image in range(4)}
    drawn = pictures(whole)
    assert drawn.keys() == names
    assert {(picture.shape, picture.dtype) for picture in drawn.values()} == {((32, 32, 3), np.dtype(np.uint8))}
    for prompt, line in enumerate(LINES):
        assert json.loads((whole / f"{prompt:05d}" / "metadata.jsonl").read_text()) == line
    assert sorted(entry.name for entry in whole.iterdir() if entry.is_file()) == ["contact_sheet.png", "settings.json"]
    settings = json.loads((whole / "settings.json").read_text())
    assert (settings["seed"], settings["steps"], settings["source"]) == (0, 3, {"checkpoint": SHAPES})
    with Image.open(whole / "contact_sheet.png") as sheet:
        assert sheet.width > 3 * 96


def test_the_first_picture_is_that_of_the_notebook(whole: Path) -> None:
    texts = [line["prompt"] for line in LINES] + ["a photo of a star"] * 5  # eight, as many as are compiled for
    drawn = load_pipeline(SHAPES).generate(texts, steps=3, height=32, width=32)
    for prompt, picture in enumerate(drawn[:3]):
        np.testing.assert_array_equal(pictures(whole)[f"{prompt:05d}/samples/0000.png"], picture)


def test_the_flat_layout_and_plain_prompts(whole: Path, tmp_path: Path) -> None:
    texts = [line["prompt"] for line in LINES[:2]]
    drawn = draw(tmp_path / "words", "--layout=flat", "--images-per-prompt=2", "--prompt", *texts, "--batch=8")
    assert list(drawn) == ["00000_0.png", "00000_1.png", "00001_0.png", "00001_1.png"]
    lines = [json.loads(line) for line in (tmp_path / "words" / "prompts.jsonl").read_text().splitlines()]
    assert lines == [{"tag": "untagged", "prompt": text} for text in texts]
    # Drawing fewer pictures of a prompt, or fewer prompts, changes none of the others.
    for name, picture in drawn.items():
        prompt, image = name.removesuffix(".png").split("_")
        np.testing.assert_array_equal(picture, pictures(whole)[f"{prompt}/samples/{int(image):04d}.png"])
    file = tmp_path / "two.txt"
    file.write_text("\n".join(texts))
    words = ("--layout=flat", "--images-per-prompt=2", f"--prompts={file}", "--batch=8", "--sheet-prompts=0")
    assert_same(draw(tmp_path / "file", *words), drawn)
    assert not (tmp_path / "file" / "contact_sheet.png").exists()


def test_the_layout_of_dpg_bench(whole: Path, tmp_path: Path) -> None:
    rows = [{"id": name, **line} for name, line in zip(("111", "x y", "COCO_9"), LINES, strict=True)]
    file = tmp_path / "prompts.json"
    file.write_text(json.dumps(rows))
    words = ("--layout=dpgbench", f"--prompts={file}", "--batch=8")
    drawn = draw(tmp_path / "dpg", *words)
    assert list(drawn) == ["111.png", "COCO_9.png", "x y.png"]
    for prompt, row in enumerate(rows):
        grid = drawn[f"{row['id']}.png"]
        for image, (top, left) in enumerate(((0, 0), (0, 32), (32, 0), (32, 32))):
            single = pictures(whole)[f"{prompt:05d}/samples/{image:04d}.png"]
            np.testing.assert_array_equal(grid[top : top + 32, left : left + 32], single)
    read = read_samples(tmp_path / "dpg")
    assert list(read.prompts.values()) == rows
    assert len(read.pictures) == 12
    assert read.warnings == []
    (tmp_path / "dpg" / "x y.png").unlink()
    assert_same(draw(tmp_path / "dpg", *words), drawn)  # only the missing grid is drawn


def test_a_negative_prompt_takes_the_place_of_the_empty_one(tmp_path: Path) -> None:
    star = "a photo of a star"
    words = ("--layout=flat", "--images-per-prompt=2", "--batch=8", "--prompt", star)
    guided = (*words, "--guidance-scale=3", "--guidance-trunc=0.9")
    plain = draw(tmp_path / "plain", *guided)
    assert_same(draw(tmp_path / "empty", *guided, "--negative-prompt", ""), plain)
    other = draw(tmp_path / "other", *guided, "--negative-prompt", star)
    assert any((other[name] != picture).any() for name, picture in plain.items())
    settings = tmp_path / "other" / "settings.json"
    assert json.loads(settings.read_text())["negative_prompt"] == star
    drawn = load_pipeline(SHAPES).generate([star] * 8, 3, 3.0, negative_prompt=star, height=32, width=32)
    np.testing.assert_array_equal(other["00000_0.png"], drawn[0])
    # A folder of an earlier version lacks the setting, and continues only with the empty prompt.
    old = json.loads(settings.read_text())
    del old["negative_prompt"]
    settings.write_text(json.dumps(old))
    again = ["--checkpoint", SHAPES, *FEW, f"--output={tmp_path / 'other'}", *guided]
    assert sample.main([*again, "--negative-prompt=a"]) == 2
    assert sample.main(again) == 0


def test_another_seed_draws_other_pictures(whole: Path, prompts: Path, tmp_path: Path) -> None:
    other = draw(tmp_path / "other", f"--prompts={prompts}", "--batch=8", "--seed=1")
    assert all((other[name] != picture).any() for name, picture in pictures(whole).items())
    assert len({picture.tobytes() for picture in other.values()}) == len(other)


def test_guidance_and_bfloat16_are_used(whole: Path, prompts: Path, tmp_path: Path) -> None:
    words = ("--guidance-scale=3", "--guidance-trunc=1", "--dtype=bfloat16")
    # jax.nn.dot_product_attention promotes bfloat16 to float32 implicitly.
    with jax.numpy_dtype_promotion("standard"):
        drawn = draw(tmp_path / "guided", f"--prompts={prompts}", "--batch=8", *words)
    assert any((drawn[name] != picture).any() for name, picture in pictures(whole).items())
    settings = json.loads((tmp_path / "guided" / "settings.json").read_text())
    assert (settings["guidance_scale"], settings["guidance_trunc"], settings["dtype"]) == (3, 1, "bfloat16")


def test_what_is_there_is_not_drawn_again(
    whole: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, expected = tmp_path / "copy", pictures(whole)
    shutil.copytree(whole, output)
    kept = output / "00000" / "samples" / "0000.png"
    before = kept.stat().st_mtime_ns
    lost = ["00000/samples/0001.png", "00001/samples/0003.png", "00002/samples/0000.png"]
    for name in lost:
        (output / name).unlink()
    (output / "contact_sheet.png").unlink()
    assert_same(draw(output, f"--prompts={prompts}", "--batch=8"), expected)
    assert f"4 pictures of each prompt are in {output}; 3 are new" in capsys.readouterr().err
    assert kept.stat().st_mtime_ns == before
    assert (output / "contact_sheet.png").exists()


def command(output: Path, prompts: Path, *words: str) -> list[str]:
    options = [f"--checkpoint={SHAPES}", f"--prompts={prompts}", f"--output={output}", *FEW, *words]
    return [sys.executable, "-m", "udm_grpo.sample", *options]


def test_seven_devices_after_a_kill_draw_what_one_does_at_once(whole: Path, prompts: Path, tmp_path: Path) -> None:
    output = tmp_path / "killed"
    with (tmp_path / "killed.log").open("w") as log:
        process = subprocess.Popen(
            command(output, prompts, "--batch=1"), cwd=ROOT, env=environment(), stdout=log, stderr=log
        )
    deadline = time.monotonic() + 300
    while len(list(output.rglob("0*.png"))) < 2:
        assert process.poll() is None, f"it ended before it was killed:\n{(tmp_path / 'killed.log').read_text()}"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    partial = pictures(output)
    assert 2 <= len(partial) < 12
    assert_same(partial, {name: picture for name, picture in pictures(whole).items() if name in partial})
    left = output / "00002" / "samples" / f".0003.png.1{UNFINISHED}"
    left.parent.mkdir(exist_ok=True)
    left.touch()
    done = subprocess.run(
        command(output, prompts, "--batch=8"), cwd=ROOT, env=environment(7), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert f"{12 - len(partial)} are new" in done.stderr
    assert not left.exists()
    assert_same(pictures(output), pictures(whole))


def test_two_processes_share_the_work(whole: Path, prompts: Path, tmp_path: Path) -> None:
    output = tmp_path / "shared"
    processes = together(command(output, prompts, "--batch=4"), output, 2, 1)
    codes = [process.wait(300) for process in processes]
    said = [(tmp_path / f"shared-{process}.log").read_text() for process in range(2)]
    assert codes == [0, 0], said
    assert "12 are new" in said[0]
    assert "are new" not in said[1]
    assert (output / "contact_sheet.png").exists()
    assert_same(pictures(output), pictures(whole))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training run of one iteration that keeps a moving average."""
    output = tmp_path_factory.mktemp("train") / "run"
    done = train(output, *ONE_AVERAGED)
    assert done.returncode == 0, done.stderr
    return output


def test_a_run_and_its_export_draw_the_same(run: Path, prompts: Path, tmp_path: Path, capsys) -> None:
    words = (f"--prompts={prompts}", "--batch=8", "--images-per-prompt=1", "--steps=3")
    assert sample.main([f"--run={run}", f"--output={tmp_path / 'run'}", *words]) == 0  # the run's height and width
    exported = [f"--checkpoint={run / 'export'}", "--height=32", "--width=32", f"--output={tmp_path / 'export'}"]
    assert sample.main([*exported, *words]) == 0
    assert_same(pictures(tmp_path / "run"), pictures(tmp_path / "export"))
    settings = [json.loads((tmp_path / name / "settings.json").read_text()) for name in ("run", "export")]
    assert settings[0].pop("source") == {"run": str(run), "step": 1, "best": False, "weights": "ema"}
    assert settings[1].pop("source") == {"checkpoint": str(run / "export")}
    assert settings[0] == settings[1]
    # The trained weights differ from their average.
    assert sample.main([f"--run={run}", "--step=1", "--weights=params", f"--output={tmp_path / 'run'}", *words]) == 2
    assert f"weights: there '{settings[0]['weights']}', now '" in capsys.readouterr().err


def test_the_best_weights_of_a_run(run: Path, tmp_path: Path) -> None:
    with pytest.raises(sample.SamplingError, match=r"no best checkpoint .*there are 1\."):
        sample.open_run(str(run), "best")
    shutil.copytree(run, tmp_path / "best")
    average = sample.open_run(str(run)).released
    saved = Checkpoints(tmp_path / "best" / "checkpoints", keep=1)
    saved.save_best(7, {"params": average.transformer}, {})
    model = sample.open_run(str(tmp_path / "best"), "best")
    assert model.source == {"run": str(tmp_path / "best"), "step": 7, "best": True, "weights": "ema"}
    assert digest_of(model.released) == digest_of(average)
    with pytest.raises(sample.SamplingError, match=r"--weights is params, but .* has only ema;"):
        sample.open_run(str(tmp_path / "best"), "best", "params")
    with pytest.raises(sample.SamplingError, match=r"--step 3; there are 1\."):
        sample.open_run(str(run), "3")
    with pytest.raises(sample.SamplingError, match="give latest, best or a number"):
        sample.open_run(str(run), "-1")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--steps=0", "--guidance-scale=nan", "--seed=-1"], "--steps is 0; choose 1 to 10000.\n  --guidance-scale"),
        (["--images-per-prompt=2049"], "choose 1 to 2048"),
        (["--devices=1000"], "--devices is 1000; choose 1 to"),
        (["--height=33"], "--height 33 and --width 32 must be multiples of 8"),
        (["--weights=ema"], "--step and --weights choose from a training run"),
        (["--negative-prompt=a"], "--negative-prompt changes nothing without guidance"),
        (["--negative-prompt=a", "--guidance-scale=2", "--guidance-trunc=0"], "changes nothing without guidance"),
        (["--layout=dpgbench", "--images-per-prompt=2"], "takes exactly 4 --images-per-prompt"),
        (["--prompt-key=dense_prompt"], "--prompt-key chooses a text of --prompts FILE"),
    ],
)
def test_wrong_options_are_named(words: list[str], said: str, tmp_path: Path, capsys) -> None:
    assert sample.main([f"--checkpoint={SHAPES}", f"--output={tmp_path}", "--prompt=a", *FEW, *words]) == 2
    assert said in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_wrong_folders_are_named(whole: Path, prompts: Path, tmp_path: Path, capsys) -> None:
    def said(*words: str, output: Path = tmp_path / "new") -> str:
        assert sample.main([f"--output={output}", *FEW, *words]) == 2
        return capsys.readouterr().err

    model, prompts_option = f"--checkpoint={SHAPES}", f"--prompts={prompts}"
    changed = said(model, prompts_option, "--seed=1", "--steps=4", output=whole)
    assert "different settings:\n  steps: there 3, now 4\n  seed: there 0, now 1\n  Restore" in changed
    assert "prompts: there" in said(model, "--prompt=a photo of a star", output=whole)
    assert "no settings.json; give an empty or new folder" in said(model, prompts_option, output=prompts.parent)
    assert "Not a directory" in said(model, prompts_option, output=prompts)
    assert "no such folder" in said("--checkpoint=nowhere", prompts_option)
    assert "not a training run: there is no" in said(f"--run={tmp_path}", prompts_option)
    assert "no such prompt file" in said(model, "--prompts=nowhere.txt")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "settings.json").write_text("{")
    assert "settings.json is damaged" in said(model, prompts_option, output=tmp_path / "damaged")
    assert not (tmp_path / "new").exists()


def test_help_names_every_option(capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        sample.main(["--help"])
    assert ended.value.code == 0
    assert "--guidance-trunc" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        sample.main(["--output=x", "--prompt=a"])
    assert ended.value.code == 2
    assert "one of the arguments --checkpoint --run is required" in capsys.readouterr().err
