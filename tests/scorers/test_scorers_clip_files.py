"""Tests of the CLIP scorers with unusable files, options and batches; and of the scorers without a CLIP."""

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from clip_helpers import PROMPTS, SIDE, make, make_config, make_folder, make_images, run, save_head
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessorPil, CLIPTokenizer

from rewards_bridge.errors import UsageError
from rewards_bridge.scorers.clip_files import Source


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("clip"), make_config("quick_gelu"))


@pytest.fixture
def copy(clip: Path, tmp_path: Path) -> Path:
    """Return a copy of the folder that a test may damage."""
    return Path(shutil.copytree(clip, tmp_path / "copy"))


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


# ---------------------------------------------------------------- files


def test_pickscore_takes_the_processor_named_or_its_own_or_the_published(clip: Path, copy: Path, offline: None) -> None:
    expected = run(make("pickscore", model=clip), make_images()).score
    (copy / "preprocessor_config.json").unlink()
    with pytest.raises(UsageError, match=r"processor='laion/CLIP-ViT-H-14.* hf download laion/CLIP.*merges.txt"):
        make("pickscore", model=copy)
    np.testing.assert_array_equal(run(make("pickscore", model=copy, processor=clip), make_images()).score, expected)


def test_a_torch_file_is_read_and_old_extra_buffers_do_not_matter(clip: Path, copy: Path) -> None:
    expected = run(make("clipscore", model=clip), make_images()).score
    tensors = load_file(copy / "model.safetensors")
    tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    torch.save(tensors, copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    old = {"feature_extractor_type": "CLIPFeatureExtractor", "size": SIDE, "crop_size": SIDE, "resample": 3}
    (copy / "preprocessor_config.json").write_text(json.dumps(old))
    np.testing.assert_array_equal(run(make("clipscore", model=copy), make_images()).score, expected)


class _Harmful:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable, tuple]:
        return Path.touch, (self.path,)


def test_no_weights_file_is_executed(clip: Path, copy: Path) -> None:
    trace = copy / "trace"
    (copy / "model.safetensors").unlink()
    for file in ("pytorch_model.bin", "head.pth"):
        torch.save({"a": _Harmful(trace)}, copy / file)
    with pytest.raises(UsageError, match=r"could run code; expected \.safetensors"):
        make("clipscore", model=copy)
    with pytest.raises(UsageError, match=r"could run code; expected \.safetensors"):
        make("aesthetic", model=clip, head=copy / "head.pth")
    assert not trace.exists()


def _edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


DAMAGES = {
    "architecture": (lambda f: _edit_config(f, model_type="siglip"), r"model_type .* is 'siglip', expected 'clip'"),
    "missing": (lambda f: _edit_weights(f, lambda t: t.pop("logit_scale")), r"1 missing: logit_scale"),
    "extra": (lambda f: _edit_weights(f, lambda t: t.update(a=torch.ones(1))), r"1 not of this model: a$"),
    "shape": (
        lambda f: _edit_weights(f, lambda t: t.update({"visual_projection.weight": torch.ones(16, 4)})),
        r"1 of another shape: visual_projection.weight is \[16, 4\], expected \[16, 48\]",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), r"no config.json .* hf download openai/clip-vit-large"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"no weights .* hf download openai/clip-vit-large"),
    "half": (lambda f: (f / "model.safetensors").write_bytes(b"12345678901"), r"cannot read the weights"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), r"no tokenizer .*neither tokenizer.json nor"),
    "other tokenizer": (
        lambda f: CLIPTokenizer().save_pretrained(f),
        r"another model's: tokens in the vocabulary: 2, the model's 516",
    ),
    "other pixels": (
        lambda f: CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size=8).save_pretrained(f),
        r"shape of an image: \(1, 3, 8, 8\), the model's \(1, 3, 32, 32\)",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_does_not_fit_is_refused_by_name(copy: Path, damage: str) -> None:
    act, message = DAMAGES[damage]
    act(copy)
    with pytest.raises(UsageError, match=message) as caught:
        make("clipscore", model=copy)
    assert str(caught.value).startswith("scorer 'clipscore': ")


def test_what_is_nowhere_comes_with_the_command_that_downloads_it(tmp_path: Path, offline: None) -> None:
    gone = tmp_path / "gone"
    command = f"hf download yuvalkirstain/PickScore_v1 --local-dir {gone}; and set the option model={gone}"
    with pytest.raises(UsageError, match=rf"no such file or folder\)\. Download it with: {command}"):
        make("pickscore", model=gone)
    with pytest.raises(UsageError, match=r"hf download some/clip --local-dir clip; and set the option model=clip$"):
        make("clipscore", model="some/clip")
    hf = Path(sys.executable).with_name("hf")
    if hf.exists():  # the installed hub client knows this command
        help_text = subprocess.run([hf, "download", "--help"], capture_output=True, text=True, check=True).stdout
        assert all(option in help_text for option in ("--local-dir", "--include", "[FILENAMES]"))


def test_a_head_of_another_layout_is_refused(clip: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"curl -L -o sac\+logos\+ava1-l14-linearMSE.pth https.*%2Bava1"):
        make("aesthetic", model=clip)
    head = save_head(tmp_path / "head.pth", width=20)
    with pytest.raises(
        UsageError, match=r"head=.* of another shape: layers.0.weight is \[1024, 20\], expected \[1024, 16"
    ):
        make("aesthetic", model=clip, head=head)
    torch.save({"state_dict": {"mlp.weight": torch.ones(1, 16)}}, head)
    with pytest.raises(UsageError, match=r"10 missing: layers.0.bias.* and 4 more; 1 not of this model: mlp.weight"):
        make("aesthetic", model=clip, head=head)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu:x"}, "expected e.g. cpu or cuda:0"),
        ({"device": "cuda:99"}, "CUDA devices; use another device"),
        ({"dtype": "int8"}, "expected one of float32, float16, bfloat16"),
        ({"batch_size": 0}, "batch_size=0: expected at least 1"),
        ({"batch_size": "many"}, "batch_size='many' is not a valid int"),
        ({"colour": "red"}, "its options"),
    ],
)
def test_options_that_cannot_be_are_refused(clip: Path, options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make("clipscore", model=clip, **options)


# ---------------------------------------------------------------- without CLIP


def test_jpeg_is_the_size_in_kilobytes_of_1000() -> None:
    images = np.stack([make_images(0, (64, 64)), np.full((64, 64, 3), 90, np.uint8)])
    sizes = []
    for image in images:
        Image.fromarray(image).save(buffer := io.BytesIO(), "JPEG", quality=95)
        sizes.append(len(buffer.getvalue()) / 1000)
    scores = run(make("jpeg"), images, PROMPTS[:2])
    np.testing.assert_allclose(scores.raw["jpeg_kilobytes"], sizes, rtol=1e-6)
    np.testing.assert_allclose(scores.score, -np.array(sizes), rtol=1e-6)
    assert scores.score[1] > scores.score[0]
    other = run(make("jpeg", incompressible="true", scale="500"), images, PROMPTS[:2])
    np.testing.assert_allclose(other.score, np.array(sizes) / 500, rtol=1e-6)
    with pytest.raises(UsageError, match="scale=0"):
        make("jpeg", scale="0")


def _fake_imagereward(marks: list[tuple[str, tuple[int, int]]]) -> SimpleNamespace:
    def tokenizer(prompt: str, truncation: bool, verbose: bool) -> dict[str, list[int]]:
        assert not truncation
        return {"input_ids": [101, *range(len(prompt.split())), 102]}

    class Model:
        blip = SimpleNamespace(tokenizer=tokenizer)

        def score(self, prompt: str, image: Image.Image) -> float:
            assert isinstance(image, Image.Image)
            marks.append((prompt, image.size))
            return float(np.asarray(image).mean())

    def load(name: str, device: str, med_config: str | None) -> Model:
        if name != "ImageReward-v1.0":
            raise RuntimeError(f"Model {name} not found")
        assert (device, med_config) == ("cpu", None)
        return Model()

    return SimpleNamespace(load=load)


def test_imagereward_asks_its_package_image_by_image(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, tuple[int, int]]] = []
    monkeypatch.setitem(sys.modules, "ImageReward", _fake_imagereward(seen))
    images = make_images()
    scorer = make("imagereward")
    scores = run(scorer, images)
    assert scorer.note("a " * 33, {}) == ""
    assert scorer.note("a " * 34, {}).startswith("more than the 35 tokens")
    np.testing.assert_allclose(scores.score, images.mean((1, 2, 3)), rtol=1e-6)
    np.testing.assert_array_equal(scores.raw["imagereward"], scores.score)
    assert seen == [(prompt, (70, 50)) for prompt in PROMPTS]
    with pytest.raises(UsageError, match=r"Model gone not found.*hf download THUDM/ImageReward ImageReward.pt"):
        make("imagereward", model="gone")
    monkeypatch.setattr("torch.__version__", "2.5.1+cpu")
    with pytest.raises(UsageError, match=r"torch 2.5.1\+cpu may run code"):
        make("imagereward")


def test_imagereward_without_its_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ImageReward", None)
    with pytest.raises(UsageError, match=rf'{sys.executable} -m pip install "image-reward==1.5".*rewards.interpreter'):
        make("imagereward")


@pytest.mark.parametrize("name", ["clipscore", "jpeg"])
def test_batches_of_another_form_are_refused(clip: Path, name: str) -> None:
    scorer = make(name, **({"model": clip} if name == "clipscore" else {}))
    for images in (make_images().astype(np.float32), make_images()[0], make_images()[:0], make_images()[..., :1]):
        with pytest.raises(ValueError, match=f"'{name}' expects images uint8"):
            run(scorer, images)
    with pytest.raises(ValueError, match="found 6 images, 5 prompts, 5 metadata"):
        run(scorer, make_images(), PROMPTS[:5])


@pytest.mark.parametrize("place", ["models/PickScore_v1", "Weights/clip", "mine/PickScore_v1", "kept/other"])
def test_a_missing_folder_is_not_taken_for_a_hub_name(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The advice is to download the published model into that folder."""
    monkeypatch.chdir(tmp_path)
    Path("kept").mkdir()
    source = Source("pickscore", "model", place, "yuvalkirstain/PickScore_v1")
    assert source.is_local
    with pytest.raises(UsageError) as caught, source.reading("weights"):
        pass
    assert f"hf download yuvalkirstain/PickScore_v1 --local-dir {place};" in str(caught.value)
    for name in ("yuvalkirstain/PickScore_v1", "openai/clip-vit-large-patch14"):
        assert not Source("pickscore", "model", name, "yuvalkirstain/PickScore_v1").is_local
    Path("yuvalkirstain").mkdir()
    assert not Source("pickscore", "model", source.published, source.published).is_local
