"""Labelled PNGs: places, sizes and pixels of the pictures in them, captions, and bad input."""

import time

import numpy as np
import pytest
from PIL import Image, ImageFont

from udm_grpo.reporting import pictures
from udm_grpo.reporting.grid_file import read_grid
from udm_grpo.reporting.pictures import MIN_CELL, before_after, image_grid


def noise(count: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def find(sheet: np.ndarray, picture: np.ndarray) -> tuple[int, int]:
    """Return (top, left) of a picture on the sheet."""
    height, width = picture.shape[:2]
    for top, left in np.argwhere((sheet == picture[0, 0]).all(axis=-1)):
        if np.array_equal(sheet[top : top + height, left : left + width], picture):
            return int(top), int(left)
    raise AssertionError("the picture is not on the sheet")


def enlarged(picture: np.ndarray, factor: int) -> np.ndarray:
    return np.kron(picture, np.ones((factor, factor, 1), np.uint8))


def load(path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.mode == "RGB"
        return np.asarray(image)


def test_a_grid_has_all_pictures_row_by_row_enlarged_by_whole_pixels(tmp_path):
    images = noise(5, 20, 33)
    image_grid(images, [f"prompt {i}" for i in range(5)], 3, tmp_path / "new" / "grid.png")
    sheet = load(tmp_path / "new" / "grid.png")
    assert MIN_CELL <= 20 * 5
    places = [find(sheet, enlarged(image, 5)) for image in images]
    assert [top for top, _ in places] == [places[0][0]] * 3 + [places[3][0]] * 2
    assert places[3][0] > places[0][0] + 100
    assert [left for _, left in places[3:]] == [left for _, left in places[:2]]
    assert sorted({left for _, left in places}) == [left for _, left in places[:3]]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["grid.png"]


def test_large_pictures_keep_their_size_and_one_picture_needs_one_column(tmp_path):
    images = noise(1, 128, 100)
    image_grid(images, ["a"], 8, tmp_path / "grid.png")
    sheet = load(tmp_path / "grid.png")
    find(sheet, images[0])
    assert sheet.shape[1] < 2 * 100


def test_captions_are_drawn_below_wrapped_and_cut(tmp_path):
    images = np.full((2, 96, 96, 3), 200, np.uint8)
    long = "a photo of a red circle left of a blue square and a green star above three yellow triangles " * 3
    image_grid(images, ["", "a dog"], 2, tmp_path / "short.png")
    image_grid(images, ["", long], 2, tmp_path / "long.png")
    image_grid(images, ["", "w" * 500], 2, tmp_path / "word.png")
    short, wrapped, word = (load(tmp_path / f"{name}.png") for name in ("short", "long", "word"))
    for sheet in (short, wrapped, word):
        below = sheet[102:] < 128
        assert not below[:, :102].any()
        assert below[:, 108:204].any()
        assert not below[:, 204:].any()
    assert wrapped.shape[0] == short.shape[0] + 2 * 14
    assert word.shape == wrapped.shape  # broken over three lines


def test_captions_of_any_length_and_script_are_quick_and_readable(tmp_path):
    images = np.full((1, 96, 96, 3), 200, np.uint8)
    began = time.process_time()
    image_grid(images, ["x" * 1_000_000], 1, tmp_path / "long.png")
    assert time.process_time() - began < 2
    (cell,) = read_grid(tmp_path / "long.png")
    assert cell.caption == "x" * pictures.MAX_CAPTION + "..."
    image_grid(images, ["日本 a\u200b\tb"], 1, tmp_path / "script.png")
    image_grid(images, ["?? a? b"], 1, tmp_path / "replaced.png")
    np.testing.assert_array_equal(load(tmp_path / "script.png"), load(tmp_path / "replaced.png"))
    font = ImageFont.load_default(size=11)
    lines = pictures._wrap("an " + "extraordinarily" * 20, font, 96)
    assert lines[0].startswith("an")
    assert len(lines) == 3
    assert lines[-1].endswith("...")
    assert all(font.getlength(line) <= 96 for line in lines)
    assert pictures._wrap("caf\u00e9 \u2013 Gr\u00f6\u00dfe", font, 96) == ["cafe - Gro?e"]


def test_before_and_after_stand_side_by_side(tmp_path):
    before, after = noise(3, 32, 32), noise(3, 32, 32, seed=1)
    before_after(before, after, ["a", "b", "c"], tmp_path / "pair.png", columns=2)
    sheet = load(tmp_path / "pair.png")
    for left, right in zip(before, after, strict=True):
        top, start = find(sheet, enlarged(left, 3))
        assert find(sheet, enlarged(right, 3)) == (top, start + 96 + 2)
        assert (sheet[top - 14 : top, start : start + 60] < 200).any()
        assert (sheet[top - 14 : top, start + 98 : start + 158] < 200).any()


@pytest.mark.parametrize(
    ("images", "captions", "columns", "says"),
    [
        (np.zeros((2, 8, 8, 3), np.float32), ["a", "b"], 2, "found float32"),
        (np.zeros((2, 8, 8), np.uint8), ["a", "b"], 2, "must be uint8"),
        (np.zeros((0, 8, 8, 3), np.uint8), [], 2, "not empty"),
        (np.zeros((2, 8, 8, 3), np.uint8), ["a"], 2, "2 pictures, 1 captions, 2 columns"),
        (np.zeros((1, 8, 8, 3), np.uint8), ["a"], 0, "1 pictures, 1 captions, 0 columns"),
    ],
)
def test_bad_input_is_refused(tmp_path, images, captions, columns, says):
    with pytest.raises(ValueError, match=says):
        image_grid(images, captions, columns, tmp_path / "grid.png")
    assert not (tmp_path / "grid.png").exists()


def test_before_and_after_must_be_alike(tmp_path):
    with pytest.raises(ValueError, match="before has the shape"):
        before_after(noise(1, 8, 8), noise(1, 8, 9), ["a"], tmp_path / "pair.png")
