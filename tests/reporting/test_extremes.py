"""The best and the worst images of an evaluation, and grids that say where their pictures are."""

from concurrent.futures import Future

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from rewards_bridge.scorers.base import Scores
from udm_grpo.reporting.extremes import Extremes
from udm_grpo.reporting.grid_file import read_grid
from udm_grpo.reporting.pictures import before_after, image_grid

COPIES = 3


def ticket(score: np.ndarray, first: int) -> Future[Scores]:
    future: Future[Scores] = Future()
    reasons = [f"reason {first + i}" for i in range(len(score))]
    future.set_result(Scores(score.astype(np.float32), {"twice": 2 * score.astype(np.float32)}, reasons))
    return future


def watched(score: np.ndarray, batch: int, most: int) -> Extremes:
    """Process images: image i is filled with i, its prompt is i // COPIES; the last is padded with a perfect score."""
    kept = Extremes(most, len(score))
    for at in range(0, len(score), batch):
        index = np.arange(at, at + batch)
        images = np.broadcast_to(index.astype(np.uint8)[:, None, None, None], (batch, 4, 4, 3))
        part = np.pad(score[at : at + batch], (0, max(0, at + batch - len(score))), constant_values=9.0)
        kept.watch(images, [f"prompt {i // COPIES}" for i in index], ticket(part, at))
    return kept


@pytest.mark.parametrize("batch", [1, 5, 24, 30])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_best_and_worst_of_every_prompt_whatever_the_batches(batch, seed):
    score = np.random.default_rng(seed).integers(0, 6, 24) / 8  # many are equal
    kept = watched(score, batch, 3)
    by_prompt = score.reshape(-1, COPIES)
    for sign, images in ((-1, kept.best()), (1, kept.worst())):
        first = (sign * by_prompt).argmin(1) + COPIES * np.arange(len(by_prompt))
        expected = sorted(first, key=lambda i: (sign * score[i], i))[:3]
        assert [judged.index for judged in images] == expected
        assert [judged.score for judged in images] == list(score[expected])
        assert [judged.reason for judged in images] == [f"reason {i}" for i in expected]
        assert [judged.prompt for judged in images] == [f"prompt {i // COPIES}" for i in expected]
        assert all((judged.image == judged.index).all() for judged in images)
        assert [judged.raw for judged in images] == [{"twice": 2 * score[i]} for i in expected]


def test_they_are_written_with_all_that_was_said(tmp_path):
    watched(np.array([0.5, 0.25, 1.0, 0.0, 0.0, 0.75]), 4, 1).write(tmp_path / "x.png")
    best, worst = read_grid(tmp_path / "x.png")
    assert best.caption == "best 1.000 prompt 0"
    assert best.details == {"kind": "best", "prompt": "prompt 0", "score": 1, "raw": {"twice": 2}, "reason": "reason 2"}
    assert (worst.details["kind"], worst.details["reason"]) == ("worst", "reason 3")
    assert (best.pictures[""] == 2).all()
    assert best.pictures[""].shape == (4, 4, 3)


def test_none_are_kept_when_none_are_wanted(tmp_path):
    kept = watched(np.array([0.5, 0.25]), 1, 0)
    kept.write(tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


def test_what_the_scorer_raised_is_raised():
    kept = Extremes(1, 2)
    waiting: Future[Scores] = Future()
    kept.watch(np.zeros((2, 4, 4, 3), np.uint8), ["a", "b"], waiting)
    waiting.set_exception(RuntimeError("the scorer failed"))
    with pytest.raises(RuntimeError, match="the scorer failed"):
        kept.best()


@pytest.mark.parametrize("side", [20, 32, 128])
def test_a_grid_comes_apart_again(tmp_path, side):
    rng = np.random.default_rng(side)
    images = rng.integers(0, 256, (5, side, side + 4, 3), dtype=np.uint8)
    captions = ["", "a", "long " * 60, "Ähre 日本語", '</script> "quotes" \n']
    image_grid(images, captions, 3, tmp_path / "grid.png", [{"number": i} for i in range(5)])
    cells = read_grid(tmp_path / "grid.png")
    assert [cell.caption for cell in cells] == captions
    assert [cell.details for cell in cells] == [{"number": i} for i in range(5)]
    np.testing.assert_array_equal([cell.pictures[""] for cell in cells], images)
    before_after(images, images[::-1], captions, tmp_path / "pair.png", columns=2)
    pairs = read_grid(tmp_path / "pair.png")
    np.testing.assert_array_equal([cell.pictures["before"] for cell in pairs], images)
    np.testing.assert_array_equal([cell.pictures["after"] for cell in pairs], images[::-1])


def test_details_are_of_every_picture_or_of_none(tmp_path):
    with pytest.raises(ValueError, match="found 1 for 2 pictures"):
        image_grid(np.zeros((2, 8, 8, 3), np.uint8), ["a", "b"], 2, tmp_path / "grid.png", [{}])


def test_a_picture_of_another_program_says_nothing_and_a_damaged_one_is_named(tmp_path):
    Image.new("RGB", (20, 20)).save(tmp_path / "other.png")
    assert read_grid(tmp_path / "other.png") is None
    (tmp_path / "broken.png").write_bytes((tmp_path / "other.png").read_bytes()[:40])
    with pytest.raises(ValueError, match=r"broken\.png is damaged"):
        read_grid(tmp_path / "broken.png")


def test_a_grid_that_says_where_there_is_nothing_is_damaged(tmp_path):
    image_grid(np.zeros((2, 100, 100, 3), np.uint8), ["a", "b"], 2, tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as file:
        smaller = file.crop((0, 0, 150, 150))
        info = PngInfo()
        info.add_itxt("udm_grpo", file.info["udm_grpo"])
        smaller.save(tmp_path / "grid.png", pnginfo=info)
    with pytest.raises(ValueError, match="where there is none"):
        read_grid(tmp_path / "grid.png")
