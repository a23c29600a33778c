"""The command that scores folders of pictures: known scores, continuing, comparing, wrong input."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from bridge_helpers import TESTS
from PIL import Image
from running import ROOT, environment
from sample_pictures import numbered, right_or_blank, two_of_each_tag, write_flat, write_geneval

from udm_grpo import evaluate
from udm_grpo.scoring.layouts import join_grid
from udm_grpo.worlds.shapes import TAGS
from udm_grpo.worlds.shapes_scenes import render, scene_for

ECHO = ("--scorer=echo=bridge_scorers:Echo", f"--environment=echo.PYTHONPATH={TESTS}")


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def run(samples: Path, output: Path, *words: str) -> int:
    return evaluate.main([f"--samples={samples}", f"--output={output}", "--resamples=500", *words])


# ---------------------------------------------------------------- known scores


@pytest.fixture(scope="module")
def right() -> tuple[np.ndarray, np.ndarray]:
    """Which pictures of twelve prompts are right, before and after: bool[12, 4] each."""
    after = np.random.default_rng(1).random((12, 4)) < 0.7
    before = after & (np.random.default_rng(2).random((12, 4)) < 0.5)
    before[3], after[3] = True, False  # one prompt gets much worse
    return before, after


@pytest.fixture(scope="module")
def judged(right: tuple[np.ndarray, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folders of shapes, the second scored and compared with the first by one command."""
    root = tmp_path_factory.mktemp("judged")
    prompts = two_of_each_tag()
    write_geneval(root / "before", prompts, right_or_blank(prompts, right[0], seed=0))
    pictures = right_or_blank(prompts, right[1], seed=1)
    assert [prompts[row]["prompt"] for row in (0, 2, 4)] == [
        f"a photo of {what}" for what in ("a circle", "a circle and a square", "two circles")
    ]
    for image, row in enumerate((2, 4)):  # what the first prompt asks for, plus something else
        pictures[0][image] = render(scene_for(prompts[row], np.random.default_rng(0)))
    write_geneval(root / "after", prompts, pictures, name="05d")
    command = [f"--compare={root / 'before'}", "--scorer=shapes", "--scorer=jpeg", "--changed=3", "--batch=5"]
    assert run(root / "after", root / "scores", *command) == 0
    return root


def official(root: Path) -> list[dict]:
    return lines(root / "scores" / "results.jsonl")


def test_the_means_are_those_of_the_truth(judged: Path, right: tuple[np.ndarray, np.ndarray]) -> None:
    summary = json.loads((judged / "scores" / "summary.json").read_text())
    assert (summary["images"], summary["prompts"], summary["images_per_prompt"]) == (48, 12, {"4": 12})
    values = summary["scorers"]["shapes"]["values"]
    truth = right[1].astype(float)
    truth[0, :2] = [1, 0]  # strict ignores an object that is not asked for, but not a second circle
    tags = [prompt["tag"] for prompt in two_of_each_tag()]
    by_tag = {tag: truth[[row for row, other in enumerate(tags) if other == tag]] for tag in TAGS}
    assert list(values["strict"]["tags"]) == list(TAGS)
    for tag, expected in by_tag.items():
        entry = values["strict"]["tags"][tag]
        assert entry["value"] == pytest.approx(expected.mean())
        assert (entry["prompts"], entry["images"]) == (2, 8)
        assert entry["low"] == pytest.approx(
            expected.mean(1).min()
        )  # a quarter of the resamples draw the worse of two prompts twice
    assert values["strict"]["mean"]["value"] == pytest.approx(truth.mean())
    assert values["strict"]["overall"]["value"] == pytest.approx(np.mean([part.mean() for part in by_tag.values()]))
    assert (
        values["strict"]["overall"]["low"] < values["strict"]["overall"]["value"] < values["strict"]["overall"]["high"]
    )
    assert values["official"]["tags"]["single_object"]["value"] == pytest.approx(
        (by_tag["single_object"].sum() + 1) / 8
    )
    assert summary["warnings"] == []


def test_the_results_file_is_what_the_benchmark_summarises(judged: Path) -> None:
    """The expected values are computed as GenEval's summary_scores.py describes."""
    results = official(judged)
    assert [list(line) for line in results] == 48 * [
        ["filename", "tag", "prompt", "correct", "reason", "metadata", "details"]
    ]
    of_task, of_prompt = defaultdict(list), defaultdict(list)
    for line in results:
        assert type(line["correct"]) is bool
        assert bool(line["reason"]) != line["correct"]
        of_task[line["tag"]].append(line["correct"])
        of_prompt[line["metadata"]].append(line["correct"])
    summary = json.loads((judged / "scores" / "summary.json").read_text())["scorers"]["shapes"]
    values = summary["values"]["official"]
    assert values["overall"]["value"] == pytest.approx(np.mean([np.mean(marks) for marks in of_task.values()]))
    assert values["mean"]["value"] == pytest.approx(np.mean([line["correct"] for line in results]))
    assert {tag: entry["value"] for tag, entry in values["tags"].items()} == pytest.approx(
        {tag: np.mean(marks) for tag, marks in of_task.items()}
    )
    assert summary["correct_prompts"] == pytest.approx(np.mean([any(marks) for marks in of_prompt.values()]))
    first = results[1]
    assert first["filename"] == str(judged / "after" / "00000" / "samples" / "00001.png")
    assert json.loads(first["metadata"]) == two_of_each_tag()[0]
    boxes = json.loads(first["details"])["circle"]
    assert len(boxes) == 2
    assert all(len(box) == 5 and 0 <= box[0] < box[2] <= 32 and 0.3 < box[4] <= 1 for box in boxes)
    empty = next(line for line in results if line["details"] == "{}")
    assert empty["reason"].startswith("expected ")
    assert empty["reason"].endswith(", found 0")


def test_the_tables_are_readable(judged: Path) -> None:
    text = (judged / "scores" / "summary.md").read_text()
    assert "48 pictures of 12 prompts" in text
    assert "| tag | official | strict | soft | prompts | pictures |" in text
    assert "| **overall** (mean of the tags) |" in text
    assert "| jpeg | jpeg_kilobytes |" in text
    assert [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| ") and "_object" in line] == [
        "| single_object",
        "| two_object",
    ] * 2  # of both scorers


def test_the_comparison(judged: Path, right: tuple[np.ndarray, np.ndarray]) -> None:
    comparison = json.loads((judged / "scores" / "comparison.json").read_text())
    assert (comparison["prompts"], comparison["warnings"]) == (12, [])
    shapes = comparison["scorers"]["shapes"]
    strict = shapes["values"]["strict"]["mean"]
    assert strict["before"] == pytest.approx(right[0].mean())
    assert strict["difference"]["value"] == pytest.approx(strict["after"] - strict["before"])
    assert strict["difference"]["low"] < strict["difference"]["value"] < strict["difference"]["high"]
    assert sum(shapes["prompts"].values()) == 12
    changes = [row["difference"] for row in shapes["changed"]]
    assert len(changes) == 3
    assert changes == sorted(changes, key=abs, reverse=True)
    worst = shapes["changed"][0]
    assert (worst["prompt"], worst["before"], worst["after"]) == (two_of_each_tag()[3]["prompt"], 1, 0)
    assert worst["pictures"]["after"]["score"] == 0
    assert "found 0" in worst["pictures"]["after"]["reasons"]
    with Image.open(judged / "scores" / "comparison.png") as sheet:
        assert sheet.width > 3 * 2 * 96
    assert (judged / "scores" / "comparison_jpeg.png").exists()
    text = (judged / "scores" / "comparison.md").read_text()
    assert "![shapes](comparison.png)" in text
    assert f"| {worst['prompt']} | 1.000 | 0.000 | -1.000 |" in text
    assert "| tag | official | strict | soft |\n" in text
    assert "| position | 0.125 -> 0.750 (+0.625) |" in text


def test_scores_are_compared_without_scoring_again(judged: Path, tmp_path: Path, capsys) -> None:
    """A comparison in the other direction has the same numbers, with before and after swapped."""
    shutil.copytree(judged / "scores" / "compared", tmp_path / "scores")
    words = ("--scorer=shapes", "--scorer=jpeg", f"--compare={judged / 'scores'}", "--changed=3")
    assert run(judged / "before", tmp_path / "scores", *words) == 0
    assert "scoring" not in capsys.readouterr().err
    there, back = (
        json.loads((folder / "comparison.json").read_text())["scorers"]["shapes"]["values"]["soft"]["overall"]
        for folder in (judged / "scores", tmp_path / "scores")
    )
    assert (there["before"], there["after"]) == (back["after"], back["before"])
    assert there["difference"]["low"] == pytest.approx(-back["difference"]["high"])
    settings = {"dtype": "float32", "steps": 25, "seed": 0}
    for folder, other in (("before", {}), ("after", {"dtype": "bfloat16", "steps": 10})):
        (judged / folder / "settings.json").write_text(json.dumps(settings | other))
    try:
        assert run(judged / "before", tmp_path / "scores", *words) == 0
    finally:
        for folder in ("before", "after"):
            (judged / folder / "settings.json").unlink()
    (warning,) = json.loads((tmp_path / "scores" / "comparison.json").read_text())["warnings"]
    assert "drawn with different settings" in warning
    assert "dtype bfloat16 before and float32 after, steps 10 before and 25 after." in warning
    assert warning in capsys.readouterr().err


# ---------------------------------------------------------------- continuing


def test_a_killed_command_goes_on(tmp_path: Path) -> None:
    write_flat(tmp_path / "pictures", *numbered(8, 3))
    slow = (*ECHO, "--option=echo.delay=0.25", "--batch=1")
    command = [sys.executable, "-m", "udm_grpo.evaluate", f"--samples={tmp_path / 'pictures'}", *slow]
    process = subprocess.Popen(
        [*command, f"--output={tmp_path / 'killed'}", "--resamples=500"],
        cwd=ROOT,
        env=environment(),
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    file = tmp_path / "killed" / "scores.jsonl"
    deadline = time.monotonic() + 300
    while not file.exists() or len(file.read_bytes().splitlines()) < 3:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = file.read_bytes()
    assert 3 <= len(before.splitlines()) < 24
    assert not (tmp_path / "killed" / "summary.json").exists()
    file.write_bytes(before + b'{"image": "00007_')
    assert run(tmp_path / "pictures", tmp_path / "killed", *slow, "--replicas=echo=2") == 0
    assert file.read_bytes().startswith(before)
    marks = lines(file)
    assert sorted(mark["image"] for mark in marks) == [f"{p:05d}_{i}.png" for p in range(8) for i in range(3)]
    for mark in marks:
        prompt, image = mark["image"].removesuffix(".png").split("_")
        assert (mark["prompt"], mark["score"]) == (int(prompt), int(prompt) + 256 * int(image))
        assert mark["raw"]["number"] == int(prompt)
        assert mark["reasons"] == f"seen: prompt {int(prompt)}"


@pytest.fixture(scope="module")
def echoed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small scored folder of pictures of two sizes, in which one prompt has fewer pictures."""
    root = tmp_path_factory.mktemp("echoed")
    prompts, pictures = numbered(4, 2)
    pictures[2] = [np.pad(picture, ((0, 4), (0, 0), (0, 0))) for picture in pictures[2]]
    pictures[3] = pictures[3][:1]
    write_flat(root / "pictures", prompts, pictures)
    assert run(root / "pictures", root / "scores", *ECHO) == 0
    return root


def test_mixed_sizes_and_counts_are_scored_and_counted(echoed: Path) -> None:
    marks = {mark["image"]: mark["score"] for mark in lines(echoed / "scores" / "scores.jsonl")}
    assert marks == {f"{p:05d}_{i}.png": p + 256 * i for p in range(4) for i in range(2) if (p, i) != (3, 1)}
    summary = json.loads((echoed / "scores" / "summary.json").read_text())
    sizes, counts = summary["warnings"]
    assert sizes.startswith("2 sizes of pictures")
    assert "8x8: 5 pictures, such as 00000_0.png" in sizes
    assert "8x12: 2 pictures, such as 00002_0.png" in sizes
    assert "2 pictures: 3 prompts, such as prompt 0\n    1 pictures: 1 prompts, such as prompt 3" in counts
    assert sizes.splitlines()[0] in (echoed / "scores" / "summary.md").read_text()
    assert not (echoed / "scores" / "results.jsonl").exists()  # no scorer judged by GenEval's rule
    assert "overall" not in summary["scorers"]["echo"]["values"]["score"]


def test_grids_are_scored_with_the_prompts_of_a_file(tmp_path: Path) -> None:
    prompts, pictures = numbered(2, 4)
    rows = [{"id": f"p{number}", "prompt": "x", "dense": prompt["prompt"]} for number, prompt in enumerate(prompts)]
    (tmp_path / "prompts.json").write_text(json.dumps(rows))
    (tmp_path / "grids").mkdir()
    for row, four in zip(rows, pictures, strict=True):
        Image.fromarray(join_grid(four)).save(tmp_path / "grids" / f"{row['id']}.png")
    words = (f"--prompts={tmp_path / 'prompts.json'}", "--prompt-key=dense")
    assert run(tmp_path / "grids", tmp_path / "scores", *ECHO, *words) == 0
    marks = {mark["image"]: mark["score"] for mark in lines(tmp_path / "scores" / "scores.jsonl")}
    assert marks == {f"p{prompt}.png#{image}": prompt + 256 * image for prompt in range(2) for image in range(4)}


def test_other_settings_and_other_pictures_are_refused(echoed: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(echoed, tmp_path / "copy")
    pictures, scores = tmp_path / "copy" / "pictures", tmp_path / "copy" / "scores"

    def said(*words: str, output: Path = scores) -> str:
        assert run(pictures, output, *words) == 2
        return capsys.readouterr().err

    kept = (scores / "scores.jsonl").read_bytes()
    assert "settings:\n  options of echo: there {}, now {'delay': '1'}" in said(*ECHO, "--option=echo.delay=1")
    assert "different settings:\n  scorers: there echo, now jpeg\n" in said("--scorer=jpeg")
    assert "is not empty and has no settings.json" in said(*ECHO, output=TESTS)
    assert "does not belong to scores" in said(*ECHO, output=Path(_drawn(tmp_path)))
    shutil.copy(pictures / "00000_1.png", pictures / "00001_0.png")
    changed = said(*ECHO)
    assert "scores of 1 pictures that were removed or changed" in changed
    assert changed.endswith(":\n  00001_0.png\n")
    (pictures / "00003_0.png").unlink()
    assert "2 pictures that were removed" in said(*ECHO, "--allow-missing")
    assert (scores / "scores.jsonl").read_bytes() == kept


def _drawn(tmp_path: Path) -> str:
    """A folder with the settings of udm_grpo.sample."""
    folder = tmp_path / "drawn"
    folder.mkdir()
    (folder / "settings.json").write_text('{"images_per_prompt": 4}')
    return str(folder)


def test_more_pictures_are_scored_beside_those_that_are(echoed: Path, tmp_path: Path) -> None:
    shutil.copytree(echoed, tmp_path / "copy")
    pictures, file = tmp_path / "copy" / "pictures", tmp_path / "copy" / "scores" / "scores.jsonl"
    shutil.copy(pictures / "00003_0.png", pictures / "00003_1.png")
    damaged = file.read_text().splitlines()
    damaged[2] = damaged[2][:-5]
    damaged[3] = re.sub(r'"score": [0-9.]+', '"score": NaN', damaged[3])
    file.write_text("\n".join(damaged) + "\n")
    assert run(pictures, tmp_path / "copy" / "scores", *ECHO) == 0
    assert sorted(mark["image"] for mark in lines(file)) == sorted(path.name for path in pictures.glob("*.png"))
    warnings = json.loads((tmp_path / "copy" / "scores" / "summary.json").read_text())["warnings"]
    assert any(warning.startswith("2 lines of") for warning in warnings)


def test_a_scorer_that_fails_keeps_what_was_scored(tmp_path: Path, capsys) -> None:
    prompts, pictures = numbered(3, 1)
    write_flat(tmp_path / "pictures", [*prompts[:2], prompts[2] | {"wish": "inf"}], pictures)
    words = ("--scorer=wrong=bridge_scorers:Wrong", f"--environment=wrong.PYTHONPATH={TESTS}", "--batch=1")
    assert run(tmp_path / "pictures", tmp_path / "scores", *words) == 2
    error = capsys.readouterr().err
    assert "score = -inf" in error
    assert "the same command resumes from there" in error
    assert len(lines(tmp_path / "scores" / "scores.jsonl")) == 2
    assert len(list((tmp_path / "scores" / "kept_images" / "wrong").glob("*.png"))) == 1
    assert not (tmp_path / "scores" / "summary.json").exists()
    assert run(tmp_path / "pictures", tmp_path / "new", *words, f"--compare={tmp_path / 'scores'}") == 2
    assert "has no summary.json, so its scores are incomplete" in capsys.readouterr().err


# ---------------------------------------------------------------- wrong input


def test_prompts_that_cannot_be_scored_are_all_named_before(tmp_path: Path, capsys) -> None:
    write_flat(tmp_path / "pictures", *numbered(6, 1))
    words = ("--scorer=even=bridge_scorers:Picky", f"--environment=even.PYTHONPATH={TESTS}")
    assert run(tmp_path / "pictures", tmp_path / "scores", *words) == 2
    error = capsys.readouterr().err
    assert "3 prompts cannot be scored" in error
    assert [f"prompt {odd} ('prompt {odd}'): even: {odd} is odd" in error for odd in (1, 3, 5)] == 3 * [True]
    assert not (tmp_path / "scores" / "scores.jsonl").exists()


def test_what_a_scorer_says_of_prompts_is_told_at_the_start_and_kept(tmp_path: Path, capsys) -> None:
    prompts, pictures = numbered(9, 1)
    write_flat(tmp_path / "pictures", prompts[::2], pictures[::2])
    words = ("--scorer=even=bridge_scorers:Picky", f"--environment=even.PYTHONPATH={TESTS}")
    note = "prompts, scorer even: 3 of 5 prompts (prompts 0, 2, 4): divisible by four"
    for _ in range(2):  # the second time, no scorer is asked
        assert run(tmp_path / "pictures", tmp_path / "scores", *words) == 0
        assert capsys.readouterr().err.count(f"warning: {note}\n") == 1
        assert note in json.loads((tmp_path / "scores" / "summary.json").read_text())["warnings"]
    (tmp_path / "scores" / "prompt_notes.json").write_text("[]")
    assert run(tmp_path / "pictures", tmp_path / "scores", *words) == 2
    assert "prompt_notes.json is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "there is no scorer; give --scorer"),
        (("--scorer=a=",), "--scorer a=: expected SCORER or NAME=SCORER"),
        (("--scorer=jpeg", "--scorer=jpeg"), "there is a scorer jpeg already; give this one as OTHER=jpeg"),
        (
            ("--scorer=jpeg", "--option=jpg.quality=3"),
            "--option jpg.quality=3: expected NAME.KEY=VALUE, with NAME one of jpeg",
        ),
        (("--scorer=jpeg", "--option=quality=3"), "--option quality=3: expected NAME.KEY=VALUE"),
        (("--scorer=jpeg", "--replicas=jpeg=two"), "--replicas: 'two' is not valid; expected: number of processes"),
        (("--scorer=jpeg", "--replicas=jpeg=0"), "jpeg has 0 replicas; give at least 1"),
        (("--scorer=jpeg", "--deadline-s=jpeg=0"), "deadline_s must be in"),
        (("--scorer=jpeg", "--address=jpeg=far:1"), "far:1 is another machine: set tls_ca and token_file"),
        (("--config=nowhere.py",), "there is no nowhere.py"),
        (("--scorer=jpeg", "--config.seed=1"), "--config.seed=1 needs --config FILE"),
        (("--scorer=jpeg", "--batch=0", "--resamples=5"), "--batch is 0; choose at least 1.\n  --resamples is 5"),
        (("--scorer=jpeg", "--prompts=x.json"), "these pictures have prompts of their own"),
        (("--scorer=jpeg", "--prompt-key=x"), "--prompt-key chooses a text of --prompts FILE"),
        (("--scorer=jpeg", "--compare=nowhere"), "there is no folder nowhere"),
        (("--scorer=jpeg", "--compare={scores}"), "no scorer in common: echo scored"),
        ((*ECHO, "--option=echo.delay=1", "--compare={scores}"), "echo: before {'scorer': 'bridge_scorers:Echo', 'opt"),
    ],
)
def test_wrong_words_are_named(echoed: Path, tmp_path: Path, capsys, words: tuple[str, ...], said: str) -> None:
    arguments = [word.replace("{scores}", str(echoed / "scores")) for word in words]
    assert run(echoed / "pictures", tmp_path / "scores", *arguments) == 2
    assert said in capsys.readouterr().err


def test_the_scorers_of_a_config_and_flags_together() -> None:
    words = ["--samples=x", "--output=y", "--config=configs/shapes.py", "--scorer=jpeg", "--option=jpeg.quality=90"]
    words += ["--address=jpeg=unix:/a", "--address=jpeg=unix:/b", "--interpreter=shapes=python9", "--replicas=shapes=3"]
    args = evaluate._parser().parse_args(words)
    scorers = evaluate.read_scorers(args, ["--config.rewards.scorers.shapes.deadline_s=5"])
    assert list(scorers) == ["shapes", "jpeg"]
    shapes, jpeg = scorers.values()
    assert (shapes.deadline_s, shapes.interpreter, shapes.replicas) == (5.0, "python9", 3)
    assert (jpeg.scorer, jpeg.options, jpeg.addresses) == ("jpeg", {"quality": "90"}, ("unix:/a", "unix:/b"))


def test_the_commands_of_the_docstring_are_understood() -> None:
    """They are only parsed, as their scorers need weights; the README's command is run as it is."""
    text = evaluate.__doc__.replace("\\\n", " ")
    commands = [line.split()[3:] for line in text.splitlines() if line.startswith("    python -m udm_grpo.evaluate ")]
    parsed = [evaluate.read_scorers(evaluate._parser().parse_args(words), []) for words in commands]
    assert [list(scorers) for scorers in parsed] == [["geneval"], ["pickscore", "clipscore", "hpsv2"]]
    assert parsed[0]["geneval"].options == {"detector": "detector.pth", "clip": "clip-vit-large-patch14"}


def test_help_names_every_option(capsys) -> None:
    for words, status, said in ((["--help"], 0, "--allow-missing"), (["--samples=x", "--output=y", "--z"], 2, "--z")):
        with pytest.raises(SystemExit) as ended:
            evaluate.main(words)
        assert ended.value.code == status
        captured = capsys.readouterr()
        assert said in captured.out + captured.err


def test_nothing_in_common_is_no_comparison(echoed: Path, tmp_path: Path, capsys) -> None:
    prompts, pictures = numbered(4, 1)
    write_flat(tmp_path / "others", [prompt | {"prompt": "other"} for prompt in prompts], pictures)
    assert run(tmp_path / "others", tmp_path / "scores", *ECHO, f"--compare={echoed / 'scores'}") == 2
    assert "have no prompt in common; compare other folders" in capsys.readouterr().err
