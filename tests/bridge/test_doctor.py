"""Tests of the doctor's reports on scorers that are ready and on scorers that lack something."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest

from rewards_bridge import doctor, examples
from rewards_bridge.__main__ import main
from rewards_bridge.examples import example
from rewards_bridge.scorers import SCORERS
from rewards_bridge.scorers.base import Scores
from rewards_bridge.scorers.geneval import check_metadata
from rewards_bridge.server import ServeConfig, _ready_scorer

ROOT = Path(__file__).resolve().parents[2]


def test_every_scorer_has_one_record_with_all_that_is_known_of_it():
    for name, record in SCORERS.items():
        module, _, attribute = record.target.partition(":")
        assert f"class {attribute}:" in (ROOT / f"{module.replace('.', '/')}.py").read_text(), name
        assert record.memory_gib > 0
        assert all(line.startswith("  fix: ") for line in record.hint({}))
        test_images = example(name)
        assert test_images is not None
        assert test_images.images.dtype == np.uint8
        assert test_images.images.shape[0] == len(test_images.prompts)
        assert test_images.images.shape[3] == 3
        assert len(test_images.metadata) in (0, len(test_images.prompts))
    assert example("mine:Own") is None


def marked(**raw: list[float]) -> Scores:
    """Return Scores with these raw values, the first of which is also the score."""
    columns = {name: np.array(values, np.float32) for name, values in raw.items()}
    score = next(iter(columns.values()))
    return Scores(score, columns, [""] * len(score))


@pytest.mark.parametrize("name", ["pickscore", "clipscore", "hpsv2", "imagereward"])
def test_judges_of_image_and_prompt_have_to_put_photographs_in_order(name):
    test_images = example(name)
    assert len({image.tobytes() for image in test_images.images}) == 3
    assert len(set(test_images.prompts)) == 3
    table = np.array([[0.3, 0.1, 0.2], [0.2, 0.3, 0.1], [-3.0, -2.0, -1.0]])
    assert test_images.is_right(marked(raw=table.ravel().tolist()))
    assert not test_images.is_right(marked(raw=table[:, ::-1].ravel().tolist()))
    assert not test_images.is_right(marked(raw=[0.0] * 9))
    assert not test_images.is_right(marked(raw=[float("nan")] * 9))


def test_genevals_judge_has_to_find_what_is_there_and_nothing_else():
    test_images = example("geneval")
    assert [entry["include"][0]["class"] for entry in test_images.metadata] == ["cat", "person", "cup", "bench"]
    assert check_metadata(test_images.prompts, test_images.metadata) == []
    assert test_images.is_right(marked(official=[1, 1, 1, 0]))
    assert not test_images.is_right(marked(official=[0, 0, 0, 0])), "a detector that sees nothing"
    assert not test_images.is_right(marked(official=[1, 1, 1, 1])), "a detector that sees everything"
    assert (test_images.images[0] == test_images.images[3]).all()


def test_photographs_are_whole_and_those_of_their_names():
    cat, person, cup = examples.photographs()
    assert all(image.std() > 30 for image in (cat, person, cup))
    assert (cat[:40] == 128).all(), "not cropped, but padded with grey"
    red, green, blue = person[170, 120]
    assert red > green > blue, "the suit is orange: the colours are in order"


def test_photographs_that_are_not_installed_are_named_with_the_fix(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage", None)
    right, text = doctor.check_example("clipscore", object())
    assert not right
    assert "-m pip install scikit-image==" in text


@pytest.mark.parametrize("name", ["shapes", "jpeg"])
def test_a_scorer_that_needs_no_weights_is_ready(name, capsys):
    assert main(["doctor", "--scorer", name]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{name}: ready\n")
    assert "test images: as expected" in said


def test_missing_packages_are_named_with_the_command_that_installs_them(monkeypatch, capsys):
    record = dataclasses.replace(SCORERS["jpeg"], packages=("PIL", "no_such_module"))
    monkeypatch.setitem(SCORERS, "jpeg", record)
    monkeypatch.setitem(sys.modules, "PIL", None)  # import then raises ImportError
    assert main(["doctor", "--scorer", "jpeg"]) == 1
    said = capsys.readouterr().out
    assert "jpeg: not ready" in said
    assert "PIL, no_such_module cannot be imported" in said
    assert f"{sys.executable} -m pip install pillow==" in said
    assert said.rstrip().endswith("no_such_module")


def test_missing_weights_are_named_with_their_download(tmp_path: Path, capsys):
    folder = tmp_path / "PickScore_v1"
    assert main(["doctor", "--scorer", "pickscore", "--option", f"model={folder}"]) == 1
    said = capsys.readouterr().out
    assert "packages: all installed" in said
    assert f"hf download yuvalkirstain/PickScore_v1 --local-dir {folder}" in said


def test_what_an_option_has_to_name_is_said_with_a_hint(capsys):
    assert main(["doctor", "--scorer", "geneval"]) == 1
    said = capsys.readouterr().out
    assert "'detector'" in said
    assert "fix: curl -fL --create-dirs -o mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco.pth https://" in said


def test_an_unexpected_verdict_shows_the_scores(monkeypatch, capsys):
    def blind(self: object, images: np.ndarray, prompts: list[str], metadata: list[dict]) -> Scores:
        return Scores(np.zeros(1, np.float32), {"strict": np.zeros(1, np.float32)}, [""])

    monkeypatch.setattr("rewards_bridge.scorers.shapes.ShapesScorer.score", blind)
    assert main(["doctor", "--scorer", "shapes", "--scorer", "jpeg"]) == 1
    said = capsys.readouterr().out
    assert "expected that a red circle is seen; the scores are 0, raw {'strict': [0.0]}" in said
    assert "jpeg: ready" in said


def test_a_scorer_that_raises_is_not_ready(capsys):
    assert main(["doctor", "--scorer", "bridge_scorers:FailsToLoad"]) == 1
    assert "RuntimeError: no weights in /nowhere" in capsys.readouterr().out


def test_a_scorer_of_your_own_is_loaded(capsys):
    assert main(["doctor", "--scorer", "bridge_scorers:Echo"]) == 0
    assert "none for a scorer of your own" in capsys.readouterr().out


def test_options_are_for_one_scorer(capsys):
    assert main(["doctor", "--option", "device=cpu"]) == 2
    assert "name it with --scorer" in capsys.readouterr().err


def test_a_server_scores_its_test_images_before_it_serves(monkeypatch, capsys):
    def blind(self: object, images: np.ndarray, prompts: list[str], metadata: list[dict]) -> Scores:
        return Scores(np.zeros(1, np.float32), {"strict": np.zeros(1, np.float32)}, [""])

    config = ServeConfig(scorer="shapes", listen="unix:/nowhere")
    assert _ready_scorer(config)[1] == ""
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("rewards_bridge.scorers.shapes.ShapesScorer.score", blind)
    _, problem = _ready_scorer(config)  # the server starts all the same, and tells its clients
    assert problem.startswith("expected that a red circle is seen; the scores are 0")
    assert "shapes gets its test images wrong: expected that a red circle" in capsys.readouterr().err

    def broken(self: object, images: np.ndarray, prompts: list[str], metadata: list[dict]) -> Scores:
        raise OSError("no such file")

    monkeypatch.setattr("rewards_bridge.scorers.shapes.ShapesScorer.score", broken)
    with pytest.raises(OSError, match="no such file"):
        _ready_scorer(config)
