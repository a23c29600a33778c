"""Layouts of a folder of pictures, and errors that name everything that is wrong with one."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sample_pictures import numbered, write_flat, write_geneval

from udm_grpo.data.prompts import PromptSet
from udm_grpo.scoring.folder_scores import MAX_BATCH
from udm_grpo.scoring.layouts import cut_grid, grid_names, join_grid, place_of
from udm_grpo.scoring.sample_folder import SampleFolderError, load_picture, read_samples
from udm_grpo.scoring.sample_settings import Settings, open_output


@pytest.fixture
def geneval(tmp_path: Path) -> Path:
    write_geneval(tmp_path / "samples", *numbered(3, 2))
    return tmp_path / "samples"


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    write_flat(tmp_path / "samples", *numbered(3, 2))
    return tmp_path / "samples"


def refused(root: Path) -> str:
    with pytest.raises(SampleFolderError) as caught:
        read_samples(root)
    return str(caught.value)


@pytest.mark.parametrize("name", ["04d", "05d", "d"])
def test_both_layouts_hold_the_same(tmp_path: Path, name: str) -> None:
    prompts, pictures = numbered(3, 2)
    write_geneval(tmp_path / "geneval", prompts, pictures, name)
    write_flat(tmp_path / "flat", prompts, pictures)
    samples, other = read_samples(tmp_path / "geneval"), read_samples(tmp_path / "flat")
    assert samples.prompts == other.prompts == dict(enumerate(prompts))
    assert [(p.prompt, p.image, p.size, p.digest) for p in samples.pictures] == [
        (p.prompt, p.image, p.size, p.digest) for p in other.pictures
    ]
    assert [picture.path for picture in samples.pictures] == [
        f"{prompt:05d}/samples/{image:{name}}.png" for prompt in range(3) for image in range(2)
    ]
    assert samples.warnings == other.warnings == []
    assert len({picture.digest for picture in samples.pictures}) == 6
    for picture in samples.pictures:
        expected = pictures[picture.prompt][picture.image]
        np.testing.assert_array_equal(load_picture(samples.root / picture.path), expected)


def test_the_layouts_are_those_of_sample(tmp_path: Path) -> None:
    """Paths, prompts and settings.json as `udm_grpo.sample` itself names and writes them."""
    prompts, pictures = numbered(2, 2)
    texts = tuple(prompt["prompt"] for prompt in prompts)
    asked = PromptSet(texts, tuple(prompts), ("untagged",) * 2)
    for layout in ("geneval", "flat"):
        settings = Settings("w", "p", 2, 1, 1.0, 0.9, 0, 8, 8, 4, "float32", layout)
        root = tmp_path / layout
        open_output(settings, {}, asked, root)
        for prompt in range(2):
            for image in range(2):
                path = place_of(settings.layout, root, (), prompt, image)[0]
                path.parent.mkdir(exist_ok=True)
                Image.fromarray(pictures[prompt][image]).save(path)
        Image.fromarray(pictures[0][0]).save(root / "contact_sheet.png")
        samples = read_samples(root)
        assert samples.prompts == dict(enumerate(prompts))
        assert len(samples.pictures) == 4
        assert samples.warnings == []
        gone = place_of(settings.layout, root, (), 1, 1)[0]
        gone.unlink()
        said = refused(root)
        assert f"1 pictures are missing; draw them (the same udm_grpo.sample command continues):\n    {gone}\n" in said


def test_missing_pictures_are_listed_and_counted(geneval: Path) -> None:
    for name in ("00000/samples/0000.png", "00001/samples/0000.png", "00001/samples/0001.png"):
        (geneval / name).unlink()
    (geneval / "00002").rename(geneval / "00003")
    said = refused(geneval)
    assert "3 pictures are missing" in said  # no settings.json promises more than one per prompt
    for name in ("00000/samples/0000.png", "00001/samples/0000.png", "00002 (a prompt with all its pictures)"):
        assert f"\n    {geneval / name}" in said
    assert said.endswith("--allow-missing scores what is there and counts the rest.")
    samples = read_samples(geneval, allow_missing=True)
    assert [picture.path for picture in samples.pictures] == [
        "00000/samples/0001.png",
        *(f"00003/samples/000{image}.png" for image in range(2)),
    ]
    missing, counts = samples.warnings
    assert missing.startswith("3 pictures are missing and left out:")
    assert counts.startswith("3 different numbers of pictures per prompt")


def test_unreadable_pictures_are_listed(flat: Path) -> None:
    whole = (flat / "00000_0.png").read_bytes()
    (flat / "00000_0.png").write_bytes(whole[:-40])
    (flat / "00001_0.png").write_bytes(b"")
    (flat / "00001_1.png").write_bytes(b"GIF8 or something")
    Image.new("CMYK", (8, 8)).save(flat / "00002_1.png", format="JPEG")
    said = refused(flat)
    assert "4 pictures cannot be scored; convert them, or remove them and draw them again:" in said
    for text in (
        "00000_0.png: is damaged",
        "00001_0.png: is not a PNG, JPEG or WebP file: it is empty",
        "00001_1.png: is not a PNG, JPEG or WebP file: it is GIF",
        "00002_1.png: has the mode CMYK",
    ):
        assert f"\n    {flat / text}" in said
    assert len(read_samples(flat, allow_missing=True).pictures) == 2


@pytest.mark.parametrize(
    ("rename", "shown"),
    [
        (lambda folder, image: folder / "samples" / f"{image:05d}.jpg", "00001/samples/00001.jpg"),
        (lambda folder, image: folder / "samples" / f"{image:04d}.PNG", "00001/samples/0001.PNG"),
        (lambda folder, image: folder / "samples" / f"img_{image}.png", "00001/samples/img_1.png"),
        (lambda folder, image: folder / "samples" / f"{image}.webp", "00001/samples/1.webp"),
        (lambda folder, image: folder / f"{image:05d}.png", "00001/00001.png"),
        (lambda folder, image: folder / "images" / f"{image:05d}.png", "00001/images/00001.png"),
    ],
)
def test_pictures_of_other_names_are_not_called_missing_alone(geneval: Path, rename, shown: str) -> None:
    for folder in sorted(geneval.iterdir()):
        (folder / "images").mkdir()
        for image, file in enumerate(sorted((folder / "samples").iterdir())):
            file.rename(rename(folder, image))
    said = refused(geneval)
    assert "6 pictures have other names or suffixes than NUMBER/samples/NUMBER.png" in said
    assert f"\n    {geneval / shown}" in said
    assert "draw them" not in said
    with pytest.raises(SampleFolderError, match="other names or suffixes") as caught:
        read_samples(geneval, allow_missing=True)
    assert f"\n    {geneval / shown}" in str(caught.value)


def test_pictures_of_other_names_are_named_in_every_layout(flat: Path, tmp_path: Path) -> None:
    (flat / "00001_0.png").rename(flat / "00001_0.jpg")
    said = refused(flat)
    assert "than PROMPT_IMAGE.png, such as 00000_0.png for the first picture of prompt 0; rename or convert" in said
    assert f"convert them:\n    {flat / '00001_0.jpg'}\n" in said
    prompts, pictures = numbered(2, 4)
    write_grids(tmp_path / "grids", ["a", "b"], pictures)
    (tmp_path / "grids" / "b.png").rename(tmp_path / "grids" / "b.jpeg")
    with pytest.raises(SampleFolderError, match=r"than ID\.png, such as a\.png; rename or convert them:\n.*b\.jpeg"):
        read_samples(tmp_path / "grids", prompts=[{**row, "id": name} for row, name in zip(prompts, "ab", strict=True)])


def test_bad_metadata_are_listed_even_if_missing_is_allowed(geneval: Path) -> None:
    for number, text in enumerate(("{", '{"tag": "colors"}')):
        (geneval / f"{number:05d}" / "metadata.jsonl").write_text(text)
    (geneval / "00002" / "metadata.jsonl").unlink()
    with pytest.raises(SampleFolderError) as caught:
        read_samples(geneval, allow_missing=True)
    said = str(caught.value)
    assert "3 files are wrong:" in said
    assert f"{geneval / '00000' / 'metadata.jsonl'}: not JSON" in said
    assert f'{geneval / "00001" / "metadata.jsonl"}: "prompt" must be a text' in said
    assert f"{geneval / '00002' / 'metadata.jsonl'}: is missing" in said


def test_bad_lines_and_pictures_without_a_prompt_are_listed(flat: Path) -> None:
    prompts = (flat / "prompts.jsonl").read_text().splitlines()
    (flat / "prompts.jsonl").write_text("\n".join([prompts[0], '{"prompt": "x", "tag": 3}']))
    said = refused(flat)
    assert 'prompts.jsonl, prompt 1: "tag" must be a text that is not empty' in said
    assert f"{flat / '00002_0.png'}: is of prompt 2, but {flat / 'prompts.jsonl'} has 2 prompts" in said


def test_the_same_number_twice_is_refused(geneval: Path) -> None:
    picture = (geneval / "00000" / "samples" / "0000.png").read_bytes()
    (geneval / "00000" / "samples" / "00000.png").write_bytes(picture)
    (geneval / "1").mkdir()
    (geneval / "00001" / "samples" / "9999999.png").write_bytes(picture)
    (geneval / "20260101").mkdir()
    said = refused(geneval)
    assert "00000.png: 00000/samples/0000.png has the same number; keep one of them" in said
    assert "another folder has the number 1 too; keep one of them" in said
    assert "9999999.png: numbers of pictures must be below" in said
    assert "20260101: numbers of prompts must be below" in said


def test_what_is_no_picture_by_its_name_is_counted(geneval: Path) -> None:
    (geneval / "00000" / "samples" / "grid.png").write_bytes(b"x")
    (geneval / "00000" / "samples" / ".0000-123.png").write_bytes(b"half")  # a leftover of a killed process
    samples = read_samples(geneval)
    assert samples.warnings == [
        f"1 files are not named like pictures and are left out:\n    {geneval / '00000' / 'samples' / 'grid.png'}"
    ]
    assert len(samples.pictures) == 6


def test_transparent_parts_are_counted_and_white(flat: Path) -> None:
    Image.fromarray(np.full((8, 8, 4), (77, 77, 77, 0), np.uint8)).save(flat / "00000_0.png")
    Image.new("P", (8, 8)).save(flat / "00000_1.png", transparency=b"\x00\x80")
    Image.fromarray(np.full((8, 8, 4), 255, np.uint8)).save(flat / "00001_0.png")
    samples = read_samples(flat)
    assert samples.warnings == [
        "2 pictures are partly transparent and are scored on white:\n"
        f"    {flat / '00000_0.png'}\n    {flat / '00000_1.png'}"
    ]
    for name in ("00000_0.png", "00000_1.png"):
        assert load_picture(flat / name).tolist() == np.full((8, 8, 3), 255).tolist()


def test_long_lists_are_cut(tmp_path: Path) -> None:
    write_flat(tmp_path / "samples", numbered(60, 1)[0], [])
    said = refused(tmp_path / "samples")
    assert "60 pictures are missing" in said
    assert "00049_0.png\n    and 10 more\n" in said


def test_folders_of_neither_layout_are_refused(geneval: Path, tmp_path: Path) -> None:
    assert refused(tmp_path / "nowhere").startswith("there is no folder")
    (tmp_path / "empty").mkdir()
    assert "has neither of numbered folders" in refused(tmp_path / "empty")
    (geneval / "prompts.jsonl").write_text(json.dumps({"prompt": "x"}))
    assert "has both of numbered folders" in refused(geneval)
    (tmp_path / "empty" / "prompts.jsonl").touch()
    assert "holds no picture that can be read" in refused(tmp_path / "empty")
    assert MAX_BATCH >= 3 * 8192**2  # the largest picture that the bridge accepts


# ---------------------------------------------------------------- DPG-Bench's grids


def write_grids(root: Path, ids: list[str], pictures: np.ndarray) -> None:
    root.mkdir()
    for name, four in zip(ids, pictures, strict=True):
        Image.fromarray(join_grid(list(four))).save(root / f"{name}.png")


def test_grids_are_cut_row_by_row_and_score_as_single_pictures_do(tmp_path: Path) -> None:
    prompts, pictures = numbered(3, 4)
    ids = ["111", "COCOval_9", "partiprompts 2"]
    rows = [{**prompt, "id": name} for prompt, name in zip(prompts, ids, strict=True)]
    write_grids(tmp_path / "grids", ids, pictures)
    grid = np.asarray(Image.open(tmp_path / "grids" / "111.png"))
    np.testing.assert_array_equal(grid[:8, 8:], pictures[0][1])
    np.testing.assert_array_equal(grid[8:, :8], pictures[0][2])
    samples = read_samples(tmp_path / "grids", prompts=rows)
    assert samples.prompts == dict(enumerate(rows))
    assert [picture.path for picture in samples.pictures][:5] == [
        *(f"111.png#{image}" for image in range(4)),
        "COCOval_9.png#0",
    ]
    assert {picture.size for picture in samples.pictures} == {(8, 8)}
    assert len({picture.digest for picture in samples.pictures}) == 12
    for picture in samples.pictures:
        expected = pictures[picture.prompt][picture.image]
        np.testing.assert_array_equal(load_picture(samples.root / picture.path), expected)


def test_what_is_wrong_with_grids_is_named(tmp_path: Path) -> None:
    prompts, pictures = numbered(3, 4)
    root, ids = tmp_path / "grids", ["a", "b", "c"]
    rows = [{**prompt, "id": name} for prompt, name in zip(prompts, ids, strict=True)]
    write_grids(root, ids, pictures)
    assert "give --prompts FILE" in refused(root)
    Image.new("RGB", (15, 16)).save(root / "a.png")
    (root / "b.png").rename(root / "other.png")
    with pytest.raises(SampleFolderError) as caught:
        read_samples(root, prompts=rows)
    said = str(caught.value)
    assert f"{root}/a.png#0: is 15 x 16 pixels; a grid of 2 x 2 pictures has even sides" in said
    assert f"{root}/b.png (a prompt with its four pictures)" in said
    samples = read_samples(root, allow_missing=True, prompts=rows)
    assert [picture.path for picture in samples.pictures] == [f"c.png#{image}" for image in range(4)]
    assert any("other.png" in warning for warning in samples.warnings)


def test_grids_are_named_by_ids_that_are_file_names() -> None:
    assert grid_names([{"prompt": "x"}, {"prompt": "y"}]) == ("00000", "00001")
    assert grid_names([{"id": 7}, {"id": "x-1"}]) == ("7", "x-1")
    bad = [
        {"id": "../x"},
        {"id": ""},
        {},
        {"id": True},
        {"id": "A"},
        {"id": "a"},
        {"id": "contact_sheet"},
        {"id": ".b"},
    ]
    with pytest.raises(ValueError, match="named by the ids") as caught:
        grid_names(bad)
    for number in (0, 1, 2, 3, 6, 7):
        assert f"prompt {number} has the id {bad[number].get('id')!r}" in str(caught.value)
    assert "the id 'a' occurs more than once" in str(caught.value)
    with pytest.raises(ValueError, match="even sides"):
        cut_grid(np.zeros((4, 3, 3), np.uint8), 0)
