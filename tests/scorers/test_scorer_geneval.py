"""Tests of the geneval scorer: verdicts on artificial detections, colours of crops, and the whole on tiny models."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer, Mask2FormerConfig

from rewards_bridge.errors import UsageError
from rewards_bridge.scorers import clip_colors, load_scorer, mask2former
from rewards_bridge.scorers.clip_colors import COLORS, ClipColors, cut_out, load_colors, to_pixels
from rewards_bridge.scorers.geneval import GenevalScorer, check_metadata, score_images
from rewards_bridge.scorers.mask2former import CLASSES

GOLDEN = Path(__file__).parents[1] / "golden" / "mask2former"
SCORER = "rewards_bridge.scorers.geneval:GenevalScorer"


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Use one thread: on models this small, several threads only wait for each other, for minutes on busy cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---------------------------------------------------------------- verdicts on artificial detections

SIDE = 40
LEFT, RIGHT, TOP, BOTTOM = (0, 15, 10, 25), (30, 15, 40, 25), (15, 0, 25, 10), (15, 30, 25, 40)


class Seer:
    """A detector that returns preset objects: for every image, a list of (class, box, score)."""

    def __init__(self, *images: list[tuple]) -> None:
        self.images = images

    def detect(self, images: np.ndarray) -> Iterator[dict]:
        for _, things in zip(images, self.images, strict=True):
            detections: dict[str, list[dict]] = {}
            for name, box, score in things:
                mask = np.zeros((SIDE, SIDE), bool)
                mask[box[1] : box[3], box[0] : box[2]] = True
                detections.setdefault(name, []).append({"box": list(box), "score": score, "mask": mask})
            yield detections


class Teller:
    """Returns the colour whose index is the red level of an object's first pixel, and records its calls."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def tell(self, image: np.ndarray, box: list, mask: np.ndarray, name: str) -> str:
        self.asked.append(name)
        assert mask[box[1], box[0]]
        return COLORS[image[box[1], box[0], 0]]


def things(*seen: tuple, score: float = 0.95) -> list[tuple]:
    return [(name, box, score) for name, box in seen]


def clause(name: str, count: int = 1, **more: object) -> dict:
    return {"class": name, "count": count, **more}


def entry(tag: str, *include: dict, exclude: tuple = ()) -> dict:
    return {"tag": tag, "include": list(include), "exclude": list(exclude), "prompt": "x"}


ONE = entry("single_object", clause("tv remote"))
TWO = entry("two_object", clause("dog"), clause("cat"))
THREE = entry("counting", clause("dog", 3), exclude=(clause("dog", 4),))
RED = entry("colors", clause("bus", color="red"))
PLACED = entry("position", clause("dog"), clause("cat", position=["left of", 0]))
BOTH = entry("color_attr", clause("bus", color="red"), clause("cup", color="blue"))
CASES = [
    (ONE, things(("tv remote", LEFT)), (1, 1, 1), ""),
    (ONE, [], (0, 0, 0), "expected 1 tv remote, found 0"),
    (ONE, things(("tv remote", LEFT), score=0.3), (0, 0, 0), "expected 1 tv remote, found 0"),
    (ONE, things(("tv remote", LEFT), ("tv remote", TOP), ("tv", TOP)), (0, 0, 1), "expected 1 tv remote, found 2"),
    (ONE, things(*[("tv remote", LEFT)] * 20), (0, -14, 1), "expected 1 tv remote, found 16"),
    (TWO, things(("dog", LEFT), ("cat", TOP)), (1, 1, 1), ""),
    (TWO, things(("dog", LEFT)), (0, 0.5, 0), "expected 1 cat, found 0"),
    (THREE, things(("dog", LEFT), ("dog", TOP), ("dog", RIGHT)), (1, 1, 1), ""),
    (THREE, things(("dog", LEFT), ("dog", TOP), ("dog", RIGHT), ("dog", BOTTOM)), (0, 2 / 3, 0), "found 4"),
    (THREE, things(("dog", LEFT), ("dog", TOP)) + things(("dog", RIGHT), score=0.9), (0, 2 / 3, 0), "found 2"),
    (RED, things(("bus", LEFT)), (1, 1, 1), ""),
    (RED, things(("bus", RIGHT)), (0, 0.5, 0), "expected 1 red bus, found blue"),
    (PLACED, things(("dog", RIGHT), ("cat", LEFT)), (1, 1, 1), ""),
    (PLACED, things(("dog", LEFT), ("cat", RIGHT)), (0, 2 / 3, 0), "expected cat left of target, found right of"),
    (PLACED, things(("cat", LEFT)), (0, 1 / 3, 0), "expected 1 dog, found 0; no target for cat to be left of"),
    (BOTH, things(("bus", LEFT), ("cup", RIGHT)), (1, 1, 1), ""),
    (BOTH, things(("bus", RIGHT), ("cup", LEFT)), (0, 0.5, 0), "expected 1 red bus, found blue; expected 1 blue cup"),
]
"""Metadata, detections (red on the left, blue on the right), (strict, soft, official), part of the reason."""


@pytest.fixture
def picture() -> np.ndarray:
    image = np.full((SIDE, SIDE, 3), COLORS.index("white"), np.uint8)
    image[:, :15], image[:, 25:] = COLORS.index("red"), COLORS.index("blue")
    return image


@pytest.mark.parametrize(("metadata", "seen", "verdict", "reason"), CASES)
def test_verdicts(metadata, seen, verdict, reason, picture) -> None:
    scores = score_images(Seer(seen), Teller(), picture[None], ["x"], [metadata])
    raw = tuple(float(scores.raw[name][0]) for name in ("strict", "soft", "official"))
    assert raw == pytest.approx(verdict)
    assert scores.score.tolist() == scores.raw["soft"].tolist()
    assert reason in scores.reasons[0]
    assert bool(scores.reasons[0]) == (verdict[0] == 0)
    said = json.loads(scores.details[0])
    assert (said["reason"] == "") == bool(verdict[2])
    there = [(name, [*box, score]) for name, box, score in seen]
    assert all((name, box) in there for name, boxes in said["objects"].items() for box in boxes)
    assert bool(said["objects"]) == any(score > 0.3 for *_, score in seen)


def test_a_batch_keeps_its_order(picture) -> None:
    metadata, seen = [case[0] for case in CASES], [case[1] for case in CASES]
    for order in (np.arange(len(CASES)), np.random.default_rng(0).permutation(len(CASES))):
        scores = score_images(
            Seer(*[seen[i] for i in order]),
            Teller(),
            np.stack([picture] * len(order)),
            ["x"] * len(order),
            [metadata[i] for i in order],
        )
        for name, values in (("soft", scores.score), *scores.raw.items()):
            column = ("strict", "soft", "official").index(name)
            assert values.dtype == np.float32
            np.testing.assert_allclose(values, [CASES[i][2][column] for i in order], rtol=1e-6)
        assert all(CASES[i][3] in reason for i, reason in zip(order, scores.reasons, strict=True))


def test_colors_are_asked_only_where_a_verdict_depends_on_them(picture) -> None:
    teller = Teller()
    seen = [things(("bus", LEFT), ("dog", TOP)), things(), things(("bus", LEFT), ("bus", RIGHT))]
    score_images(Seer(*seen), teller, np.stack([picture] * 3), ["x"] * 3, [ONE, RED, RED])
    assert teller.asked == ["bus"]  # in the last image: the official rule uses the best of its two


def test_no_images_are_no_scores() -> None:
    scores = score_images(Seer(), Teller(), np.zeros((0, SIDE, SIDE, 3), np.uint8), [], [])
    assert scores.score.shape == (0,)
    assert scores.reasons == []


# ---------------------------------------------------------------- what cannot be judged


def test_all_unusable_metadata_are_reported_at_once(picture) -> None:
    bad: list = [
        ONE,
        {"include": [clause("dog")]},
        entry("colors", clause("mouse", color="mauve")),
        entry("counting", {"class": "dog"}, exclude=(clause("wolf"),)),
        {"tag": "counting"},
        entry("position", clause("dog"), clause("cat", position=["near", 0])),
        entry("counting", clause("dog", 0)),
        {"tag": "counting", "include": "dog"},
        entry("position", clause("dog"), clause("cat", position=3)),
        "a photo of a dog",
        entry("count", clause("dog", 2)),
    ]
    problems = check_metadata([f"p{index}" for index in range(len(bad))], bad)
    parts = [
        ("prompt 1 ('p1')", '"tag" must be a text that is not empty; found None'),
        ("prompt 2", "no class 'mouse', only person, bicycle"),
        ("prompt 2", "no color 'mauve', only red, orange"),
        ("prompt 3", '"include"[0] needs "count", a whole number of at least 1; found None'),
        ("prompt 3", "\"exclude\"[0]: GenEval's judge knows no class 'wolf'"),
        ("prompt 4", '"include" must be a list of at least one object'),
        ("prompt 5", "one of left of, right of"),
        ("prompt 6", "of at least 1; found 0"),
        ("prompt 7", "found 'dog'"),
        ("prompt 8", "found 3"),
        ("prompt 9", "must be an object like"),
        ("prompt 10", "\"tag\" is 'count'; GenEval's judge knows single_object, two_object, counting"),
    ]
    assert "GenEval calls it 'computer mouse'" in problems[1]
    assert len(problems) == len(parts)
    for line, (start, part) in zip(problems, parts, strict=True):
        assert line.startswith(start)
        assert part in line
    with pytest.raises(UsageError, match="metadata that GenEval's judge cannot use") as caught:
        score_images(Seer(), Teller(), np.stack([picture] * len(bad)), [f"p{i}" for i in range(len(bad))], bad)
    assert str(caught.value).splitlines()[1:] == [line for text in problems for line in f"  {text}".splitlines()]


def test_good_metadata_have_no_problems() -> None:
    metadata = [case[0] for case in CASES] + [{"tag": "colors", "include": ({"class": "bus", "count": 1},)}]
    assert check_metadata(["x"] * len(metadata), metadata) == []
    cases = (GOLDEN.parent / "geneval_rubric.jsonl").read_text().splitlines()
    assert all(each["class"] in CLASSES for case in cases for each in json.loads(case)["metadata"]["include"])
    with pytest.raises(ValueError, match="1 prompts, 0 entries"):
        check_metadata(["x"], [])


@pytest.mark.parametrize(
    ("images", "count", "message"),
    [
        (np.zeros((1, 8, 8, 3), np.float32), 1, "uint8"),
        (np.zeros((1, 8, 8, 4), np.uint8), 1, r"\[1, 8, 8, 4\]"),
        (np.zeros((8, 8, 3), np.uint8), 8, r"\[8, 8, 3\]"),
        (np.zeros((1, 0, 8, 3), np.uint8), 1, r"\[1, 0, 8, 3\]"),
        (np.zeros((2, 8, 8, 3), np.uint8), 1, "2 images, 1 prompts, 1 metadata"),
    ],
)
def test_bad_images_are_refused(images, count, message) -> None:
    with pytest.raises(ValueError, match=message):
        score_images(Seer(), Teller(), images, ["x"] * count, [ONE] * count)


# ---------------------------------------------------------------- colours


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> Path:
    """Return the folder of a tiny random CLIP with a tokenizer that knows only letters."""
    letters = [chr(code) for code in range(33, 127)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={token: index for index, token in enumerate(tokens)}, merges=[])
    layers = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": len(tokens) - 2, "eos_token_id": len(tokens) - 1, "pad_token_id": len(tokens) - 1}
    torch.manual_seed(5)
    config = CLIPConfig(
        text_config={**layers, **ends, "vocab_size": len(tokens), "max_position_embeddings": 77},
        vision_config={**layers, "image_size": 16, "patch_size": 4},
        projection_dim=24,
    )
    model = CLIPModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))  # so that different inputs give different answers
    folder = tmp_path_factory.mktemp("clip")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def colors(clip_folder) -> ClipColors:
    return load_colors(str(clip_folder), torch.device("cpu"))


@torch.no_grad()
def text_directions(folder: Path, name: str) -> torch.Tensor:
    """Return the text directions of a class in the ten colours, computed one text at a time."""
    model, tokenizer = CLIPModel.from_pretrained(folder).eval(), CLIPTokenizer.from_pretrained(folder)
    directions = []
    for color in COLORS:
        total = torch.zeros(24)
        for text in (
            f"a photo of a {color} {name}",
            f"a photo of a {color}-colored {name}",
            f"a photo of a {color} object",
        ):
            ids = tokenizer(text)["input_ids"]
            hidden = model.text_model(torch.tensor([ids])).last_hidden_state[0, -1]
            feature = hidden @ model.text_projection.weight.T
            total += feature / feature.square().sum().sqrt() / 3
        directions.append(total / total.square().sum().sqrt())
    return torch.stack(directions)


@torch.no_grad()
def image_direction(folder: Path, image: np.ndarray, box: tuple, mask: np.ndarray) -> torch.Tensor:
    """Return the direction of an object whose picture is prepared with Pillow, as in GenEval."""
    model = CLIPModel.from_pretrained(folder).eval()
    canvas = Image.new("RGB", (image.shape[1], image.shape[0]), "#999999")
    canvas.paste(Image.fromarray(image), mask=Image.fromarray(mask))
    processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    pixels = processor(canvas.crop(box), return_tensors="pt")["pixel_values"]
    feature = model.visual_projection(model.vision_model(pixels).pooler_output)[0]
    return feature / feature.square().sum().sqrt()


def test_colors_are_those_of_a_direct_computation(clip_folder, colors) -> None:
    rng = np.random.default_rng(2)
    names = ("dog", "tv remote")
    directions = {name: text_directions(clip_folder, name) for name in names}
    answers = set()
    for index in range(8):
        image = (rng.integers(0, 256, (1, 1, 3)) * rng.random((40, 48, 3)) ** 0.3).astype(np.uint8)
        x, y = rng.integers(0, 16, 2)
        box = (int(x), int(y), int(x) + 24, int(y) + 16 + 8 * (index % 2))
        mask = rng.random((40, 48)) < 0.8
        name = names[index % 2]
        cosines = directions[name] @ image_direction(clip_folder, image, box, mask)
        pixels = to_pixels(cut_out(image, box, mask), 16)
        with torch.inference_mode():
            feature = colors.towers.image_features(pixels[None])[0]
            mine = colors.classifier(name) @ (feature / feature.norm())
        torch.testing.assert_close(mine, cosines, rtol=0, atol=2e-6)
        answer = colors.tell(image, box, mask, name)
        assert answer == COLORS[int(cosines.argmax())]
        answers.add(answer)
    assert len(answers) > 1
    assert colors.classifiers.keys() == set(names)


RGB = {
    "red": (200, 20, 20),
    "orange": (255, 140, 0),
    "yellow": (250, 240, 40),
    "green": (20, 160, 40),
    "blue": (20, 40, 220),
    "purple": (120, 20, 140),
    "pink": (255, 170, 200),
    "brown": (110, 60, 20),
    "black": (5, 5, 5),
    "white": (250, 250, 250),
}


class SeesColors:
    """A stand-in for CLIP: image features are the mean colour of non-grey pixels, text features the named colour."""

    side = 32

    def text_features(self, prompts: Sequence[str]) -> torch.Tensor:
        words = [prompt.removeprefix("a photo of a ").replace("-", " ").split()[0] for prompt in prompts]
        return torch.stack([self.feature(torch.tensor(RGB[word])) for word in words])

    def image_features(self, pixels: torch.Tensor) -> torch.Tensor:
        levels = pixels[0].flatten(1).T * torch.tensor(clip_colors.STD) + torch.tensor(clip_colors.MEAN)
        colored = (levels * 255 - 0x99).abs().max(1).values > 2
        return self.feature((levels[colored] * 255).mean(0))[None]

    def feature(self, rgb: torch.Tensor) -> torch.Tensor:
        return torch.cat([rgb.float() / 255 - 0.5, torch.ones(1) * 0.3])


@pytest.mark.parametrize("name", ["dog", "orange"])
def test_objects_of_known_colors(name) -> None:
    """A disc of each colour is on a background of another one: pixels outside mask and box must not be seen."""
    teller = ClipColors(SeesColors())  # type: ignore[arg-type]
    ys, xs = np.mgrid[:64, :96]
    for index, color in enumerate(COLORS):
        image = np.full((64, 96, 3), RGB[COLORS[index - 3]], np.uint8)
        mask = (ys - 30) ** 2 + (xs - 50) ** 2 < 14**2
        image[mask] = RGB[color]
        assert teller.tell(image, (37.0, 17.0, 64.0, 44.0), mask, name) == color


def test_what_is_outside_the_mask_is_painted() -> None:
    image = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    mask = np.zeros((4, 6), bool)
    mask[1, 2] = mask[2, 4] = True
    crop = np.asarray(cut_out(image, [2.0, 1.0, 5.0, 3.0], mask))
    assert crop.shape == (2, 3, 3)
    np.testing.assert_array_equal(crop[0, 0], image[1, 2])
    np.testing.assert_array_equal(crop[1, 2], image[2, 4])
    assert (crop[mask[1:3, 2:5] == 0] == 0x99).all()


@pytest.mark.parametrize("size", [(30, 30), (64, 30), (17, 41), (1, 9), (3, 3), (40, 3), (224, 300)])
def test_pictures_are_prepared_as_by_transformers_and_open_clip(size) -> None:
    levels = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    expected = processor(Image.fromarray(levels), return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(to_pixels(Image.fromarray(levels), 16), expected, rtol=0, atol=1e-6)


def test_the_middle_is_where_torchvision_has_it() -> None:
    """With three pixels too many, torchvision rounds the offset 1.5 to 2, while transformers crops at 1."""
    levels = np.arange(7, dtype=np.uint8)[None, :, None] * np.ones((4, 1, 3), np.uint8)
    red = to_pixels(Image.fromarray(levels), 4)[0, 0] * clip_colors.STD[0] + clip_colors.MEAN[0]
    assert (red * 255).tolist() == pytest.approx([2, 3, 4, 5], abs=1e-3)


# ---------------------------------------------------------------- the whole scorer


@pytest.fixture(scope="module")
def scorer(clip_folder) -> GenevalScorer:
    """Return the whole scorer with the tiny random detector, which mostly detects laptops and apples."""
    config = Mask2FormerConfig(**json.loads((GOLDEN / "config.json").read_text())["transformers"])
    options = {"detector": str(GOLDEN / "tiny_mmdet.safetensors"), "clip": str(clip_folder)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mask2former, "swin_small_coco", lambda: config)
        geneval = load_scorer(SCORER, {**options, "device": "cpu", "batch_size": "2"})
    assert isinstance(geneval, GenevalScorer)
    assert geneval.detector.batch_size == 2
    geneval.detector.sides = (133, 80)
    geneval.detector.max_per_image = 10
    return geneval


def test_the_whole_scorer_is_repeatable(scorer) -> None:
    with np.load(GOLDEN / "expected.npz") as archive:
        image = archive["image_bgr_u8"][..., ::-1]
    rng = np.random.default_rng(3)
    images = np.stack([image, *rng.integers(0, 256, (2, *image.shape)).astype(np.uint8), image])
    metadata = [entry("colors", clause("laptop", color="red")) for _ in images]
    metadata[1] = entry("two_object", clause("laptop"), clause("apple"))
    prompts = [f"prompt {index}" for index in range(len(images))]
    assert [scorer.problem(prompt, each) for prompt, each in zip(prompts, metadata, strict=True)] == [""] * 4
    assert scorer.problem("x", entry("count", clause("wolf"))).startswith("\"tag\" is 'count'")
    scores = scorer.score(images, prompts, metadata)
    assert scores.raw["soft"][0] >= 0.5  # mmdetection also sees one laptop above 0.3
    assert scores.raw["soft"][0] == scores.raw["soft"][3]
    assert scores.reasons[0] == scores.reasons[3]
    for batch_size, order in [(1, [0, 1, 2, 3]), (4, [3, 1, 0, 2])]:
        scorer.detector.batch_size = batch_size
        again = scorer.score(images[order], prompts, [metadata[index] for index in order])
        np.testing.assert_array_equal(again.score, scores.score[order])
        assert again.reasons == [scores.reasons[index] for index in order]


def test_options_are_checked(clip_folder, tmp_path) -> None:
    with pytest.raises(UsageError, match="missing a required argument: 'detector'; its options: detector: 'str'"):
        load_scorer(SCORER, {})
    with pytest.raises(UsageError, match="no such file"):
        load_scorer(SCORER, {"detector": "gone.pth", "clip": str(clip_folder)})
    with pytest.raises(UsageError, match=r"'geneval': no config.json at clip=.* hf download openai/clip-vit-large"):
        load_colors(str(tmp_path), torch.device("cpu"))
