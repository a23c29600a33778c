"""Tests of the shapes world: GenEval's grammar, the split, and scenes that satisfy their prompts."""

import itertools
import json
import re
from collections import Counter

import numpy as np
import pytest

from udm_grpo.data.geneval_prompts import TAGS
from udm_grpo.worlds import shapes, shapes_scenes


def _by_prompt() -> dict[str, dict]:
    return {metadata["prompt"]: metadata for metadata in shapes.all_prompts()}


# ---------------------------------------------------------------- grammar


def test_every_combination_once() -> None:
    prompts = shapes.all_prompts()
    assert len(_by_prompt()) == len(prompts) == 460
    assert Counter(metadata["tag"] for metadata in prompts) == {
        "single_object": 4,
        "two_object": 12,
        "counting": 12,
        "colors": 24,
        "position": 48,
        "color_attr": 360,
    }


@pytest.mark.parametrize(
    "metadata",
    [
        {
            "tag": "single_object",
            "include": [{"class": "circle", "count": 1}],
            "prompt": "a photo of a circle",
        },
        {
            "tag": "two_object",
            "include": [{"class": "circle", "count": 1}, {"class": "star", "count": 1}],
            "prompt": "a photo of a circle and a star",
        },
        {
            "tag": "counting",
            "include": [{"class": "star", "count": 3}],
            "exclude": [{"class": "star", "count": 4}],
            "prompt": "a photo of three stars",
        },
        {
            "tag": "colors",
            "include": [{"class": "circle", "count": 1, "color": "red"}],
            "prompt": "a photo of a red circle",
        },
        {
            "tag": "position",
            "include": [{"class": "square", "count": 1}, {"class": "circle", "count": 1, "position": ["left of", 0]}],
            "prompt": "a photo of a circle left of a square",
        },
        {
            "tag": "color_attr",
            "include": [
                {"class": "circle", "count": 1, "color": "red"},
                {"class": "square", "count": 1, "color": "blue"},
            ],
            "prompt": "a photo of a red circle and a blue square",
        },
    ],
    ids=lambda metadata: metadata["tag"],
)
def test_wording_and_metadata_are_genevals(metadata: dict) -> None:
    assert _by_prompt()[metadata["prompt"]] == metadata


def test_metadata_are_json() -> None:
    for metadata in shapes.all_prompts():
        assert json.loads(json.dumps(metadata)) == metadata


# ---------------------------------------------------------------- split


def _mirrored(prompt: str) -> str:
    """Return the equivalent prompt in the other wording, derived from the text alone."""
    pair = re.fullmatch(r"a photo of (.+?) (and|left of|right of|above|below) (.+)", prompt)
    if pair is None:
        return prompt
    first, word, second = pair.groups()
    mirror = {"left of": "right of", "right of": "left of", "above": "below", "below": "above", "and": "and"}
    return f"a photo of {second} {mirror[word]} {first}"


def test_split_parts_all_prompts_and_keeps_twins_together() -> None:
    train = {metadata["prompt"] for metadata in shapes.train_prompts()}
    held_out = {metadata["prompt"] for metadata in shapes.heldout_prompts()}
    assert not train & held_out
    assert train | held_out == set(_by_prompt())
    assert {_mirrored(prompt) for prompt in train} == train
    assert {_mirrored(prompt) for prompt in held_out} == held_out


def test_split_is_by_combination() -> None:
    train = {shapes.combination(metadata) for metadata in shapes.train_prompts()}
    assert train.isdisjoint(shapes.combination(metadata) for metadata in shapes.heldout_prompts())


def test_about_a_fifth_of_every_tag_is_held_out() -> None:
    every = Counter(metadata["tag"] for metadata in shapes.all_prompts())
    held_out = Counter(metadata["tag"] for metadata in shapes.heldout_prompts())
    for tag in TAGS:
        assert 0.15 <= held_out[tag] / every[tag] <= 0.25, tag


def test_every_word_and_every_value_is_trained_on() -> None:
    def words(prompts: list[dict]) -> set[str]:
        return {word for metadata in prompts for word in metadata["prompt"].split()}

    def values(prompts: list[dict]) -> set[tuple]:
        return {
            (metadata["tag"], key, str(value))
            for metadata in prompts
            for part in metadata["include"]
            for key, value in part.items()
        }

    assert words(shapes.train_prompts()) == words(shapes.all_prompts())
    unseen = values(shapes.heldout_prompts()) - values(shapes.train_prompts())
    assert unseen == {("single_object", "class", "square")}  # held out entirely, since a class is all that this tag has


def test_held_out_prompts_are_these() -> None:
    """Every reported number depends on the split, so it must not change unnoticed."""
    held_out = [metadata["prompt"] for metadata in shapes.heldout_prompts() if metadata["tag"] != "color_attr"]
    assert [prompt.removeprefix("a photo of ") for prompt in held_out] == [
        "a square",
        "a square and a triangle",
        "a triangle and a square",
        "two squares",
        "four triangles",
        "three stars",
        "a blue circle",
        "a red square",
        "a yellow triangle",
        "a purple triangle",
        "a green star",
        "a circle right of a square",
        "a circle below a triangle",
        "a circle above a star",
        "a square left of a circle",
        "a square below a star",
        "a triangle above a circle",
        "a triangle left of a star",
        "a star below a circle",
        "a star above a square",
        "a star right of a triangle",
    ]


# ---------------------------------------------------------------- drawing prompts


def test_sampling_follows_the_weights(rng: np.random.Generator) -> None:
    drawn = Counter(metadata["tag"] for metadata in shapes.sample_prompts(shapes.train_prompts(), 6800, rng))
    total = sum(shapes.RL_TAG_WEIGHTS.values())
    for tag, weight in shapes.RL_TAG_WEIGHTS.items():
        assert drawn[tag] == pytest.approx(6800 * weight / total, abs=200)
    assert drawn["single_object"] == 0


def test_sampling_is_decided_by_the_generator() -> None:
    first, second = (
        shapes.sample_prompts(shapes.train_prompts(), 50, np.random.default_rng(3), shapes.PRETRAIN_TAG_WEIGHTS)
        for _ in range(2)
    )
    assert first == second


def test_sampling_says_when_no_prompt_can_be_drawn(rng: np.random.Generator) -> None:
    single = [metadata for metadata in shapes.all_prompts() if metadata["tag"] == "single_object"]
    with pytest.raises(ValueError, match="single_object"):
        shapes.sample_prompts(single, 1, rng)


def test_corrupted_captions_are_wrong_in_one_element_and_never_held_out(rng: np.random.Generator) -> None:
    def elements(metadata: dict) -> list:
        return [(part["class"], part["count"], part.get("color"), part.get("position")) for part in metadata["include"]]

    for metadata, _ in itertools.product(shapes.all_prompts(), range(3)):
        wrong = shapes.corrupt_caption(metadata, rng)
        assert wrong["tag"] == metadata["tag"]
        assert not shapes.is_held_out(wrong)
        assert shapes.combination(wrong) != shapes.combination(metadata)
        pairs = zip(elements(metadata), elements(wrong), strict=True)
        assert sum(a != b for first, second in pairs for a, b in zip(first, second, strict=True)) == 1


# ---------------------------------------------------------------- scenes


def _holds(relation: str, shape: shapes_scenes.Shape, other: shapes_scenes.Shape) -> bool:
    """Return GenEval's position rule for the true positions, with a margin: 0.6 instead of 0.5."""
    offset = np.array([shape.x - other.x, shape.y - other.y])
    reduced = np.maximum(np.abs(offset) - 0.1 * (shape.size + other.size), 0) * np.sign(offset)
    dx, dy = reduced / np.linalg.norm(offset)
    return {"left of": dx < -0.6, "right of": dx > 0.6, "above": dy < -0.6, "below": dy > 0.6}[relation]


@pytest.mark.parametrize("tag", TAGS)
def test_scenes_satisfy_their_prompts_and_keep_clear(tag: str, rng: np.random.Generator) -> None:
    for metadata in shapes.sample_prompts(shapes.all_prompts(), 150, rng, {tag: 1}):
        scene = shapes_scenes.scene_for(metadata, rng)
        objects = [(part["class"], part.get("color")) for part in metadata["include"] for _ in range(part["count"])]
        assert len(scene.shapes) == len(objects)
        for shape, (name, color) in zip(scene.shapes, objects, strict=True):
            assert shape.name == name
            assert color in (None, shape.color)
            assert 10 <= shape.size <= 20
            for place in (shape.x, shape.y):
                assert place - shape.size / 2 >= 1
                assert place + shape.size / 2 <= 31
        for one, other in itertools.combinations(scene.shapes, 2):
            apart = max(abs(one.x - other.x), abs(one.y - other.y)) - (one.size + other.size) / 2
            assert apart > 2 - 1e-9
        if tag == "position":
            relation = metadata["include"][1]["position"][0]
            held = [word for word in shapes.RELATIONS if _holds(word, scene.shapes[1], scene.shapes[0])]
            assert held == [relation]


def test_open_colors_and_places_are_random(rng: np.random.Generator) -> None:
    scenes = [shapes_scenes.scene_for(_by_prompt()["a photo of a star"], rng) for _ in range(200)]
    assert {scene.shapes[0].color for scene in scenes} == set(shapes.COLORS)
    assert np.std([scene.shapes[0].x for scene in scenes]) > 2
    assert np.std([scene.ground for scene in scenes]) > 2


def test_scenes_and_pictures_are_decided_by_the_generator() -> None:
    def draw(seed: int) -> np.ndarray:
        generator = np.random.default_rng(seed)
        return shapes_scenes.render_batch(
            [shapes_scenes.scene_for(metadata, generator) for metadata in shapes.all_prompts()[::20]]
        )

    np.testing.assert_array_equal(draw(5), draw(5))
    assert (draw(5) != draw(6)).any()


def test_a_prompt_of_another_world_is_refused(rng: np.random.Generator) -> None:
    with pytest.raises(ValueError, match="giraffe"):
        shapes_scenes.scene_for({"tag": "x", "include": [{"class": "giraffe", "count": 1}], "prompt": "x"}, rng)
    with pytest.raises(ValueError, match="five stars"):
        shapes_scenes.scene_for({"tag": "x", "include": [{"class": "star", "count": 5}], "prompt": "five stars"}, rng)


def test_anchored_scenes_are_near_their_places() -> None:
    rng = np.random.default_rng(0)
    for metadata in shapes.all_prompts()[::7]:
        scene = shapes_scenes.scene_for(metadata, rng, "anchored")
        places = (16.0,) if len(scene.shapes) == 1 else (8.0, 16.0, 24.0)
        for shape in scene.shapes:
            for coordinate in (shape.x, shape.y):
                assert min(abs(coordinate - place) for place in places) <= 2.0
        if metadata["tag"] in ("two_object", "color_attr"):
            assert scene.shapes[0].x < scene.shapes[1].x  # side by side in the order of naming
    with pytest.raises(ValueError, match="free or anchored"):
        shapes_scenes.scene_for(shapes.all_prompts()[0], rng, "tidy")


# ---------------------------------------------------------------- pictures


def _disc(x: float, y: float, size: float) -> shapes_scenes.Scene:
    return shapes_scenes.Scene(
        ground=200.0, shapes=(shapes_scenes.Shape("circle", "black", x, y, size, (0.0, 0.0, 0.0)),)
    )


@pytest.mark.parametrize("size", [32, 48, 64, 100])
def test_pictures_have_the_size_asked_for(size: int) -> None:
    image = shapes_scenes.render(_disc(16, 16, 16), size)
    assert image.shape == (size, size, 3)
    assert image.dtype == np.uint8
    assert tuple(image[0, 0]) == (200, 200, 200)
    assert tuple(image[size // 2, size // 2]) == (0, 0, 0)


@pytest.mark.parametrize(
    ("name", "share"), [("circle", np.pi / 4), ("square", 1.0), ("triangle", 0.5), ("star", 1.1226 / 1.9021**2)]
)
def test_areas_are_those_of_the_geometry(name: str, share: float) -> None:
    """The mean of the image gives the area, to about a percent, since edges are anti-aliased."""
    shape = shapes_scenes.Shape(name, "black", 15.3, 16.4, 18.0, (0.0, 0.0, 0.0))
    image = shapes_scenes.render(shapes_scenes.Scene(ground=200.0, shapes=(shape,)))
    area = (1 - image.mean() / 200.0) * 32 * 32
    assert area == pytest.approx(share * 18.0**2, rel=0.02)


def test_shapes_point_up() -> None:
    for name in ("triangle", "star"):
        shape = shapes_scenes.Shape(name, "black", 16.0, 16.0, 20.0, (0.0, 0.0, 0.0))
        dark = 200.0 - shapes_scenes.render(shapes_scenes.Scene(ground=200.0, shapes=(shape,)))[..., 0]
        top = np.nonzero(dark[6:9].sum(0))[0]
        assert set(top) <= {14, 15, 16, 17}, name
        np.testing.assert_allclose(dark, dark[:, ::-1], atol=1)


def test_a_batch_is_its_pictures() -> None:
    scenes = [_disc(10, 12, 11), _disc(20, 16, 14)]
    np.testing.assert_array_equal(
        shapes_scenes.render_batch(scenes, 40), np.stack([shapes_scenes.render(scene, 40) for scene in scenes])
    )


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20)
