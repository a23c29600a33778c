"""Tests of CLIPs in the format of open_clip and timm: the same scores as with transformers, and invalid files."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from clip_helpers import (
    PROMPTS,
    SIDE,
    make,
    make_config,
    make_folder,
    make_images,
    make_open_clip_folder,
    make_tokenizer,
    open_clip_config,
    run,
    save_head,
    to_open_clip,
)
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPImageProcessorPil

from rewards_bridge.errors import UsageError
from rewards_bridge.scorers.clip_colors import COLORS, load_colors, to_pixels
from rewards_bridge.scorers.clip_files import Source
from rewards_bridge.scorers.clip_open import load_folder

TIMM = "vit_large_patch14_clip_224.openai"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread: models this small are slower on several, especially if other programs need the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=["quick_gelu", "gelu"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """Return (folder of transformers, folder of open_clip with the same weights, activation)."""
    act, root = request.param, tmp_path_factory.mktemp("pair")
    source = make_folder(root / "transformers", make_config(act))
    return source, make_open_clip_folder(root / "open_clip", source, act), act


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("quick"), make_config("quick_gelu"))


# ---------------------------------------------------------------- the same scores


def test_scores_are_those_of_the_same_weights_in_transformers(pair: tuple[Path, Path, str], tmp_path: Path) -> None:
    source, folder, _ = pair
    head = save_head(tmp_path / "head.safetensors")
    for name, options in {"clipscore": {}, "pickscore": {}, "hpsv2": {}, "aesthetic": {"head": head}}.items():
        expected = run(make(name, model=source, **options), make_images()).score
        result = run(make(name, model=folder, batch_size=4, **options), make_images()).score
        assert expected.std() > 1e-4
        np.testing.assert_allclose(result, expected, rtol=2e-5, atol=1e-6)


def test_scores_are_those_of_open_clip_itself(pair: tuple[Path, Path, str]) -> None:
    _, folder, _ = pair
    model = open_clip.create_model(f"local-dir:{folder}").eval()
    transform = image_transform_v2(open_clip.transform.PreprocessCfg(size=SIDE), is_train=False)
    pixels = torch.stack([transform(Image.fromarray(image)) for image in make_images()])
    ids = torch.zeros(len(PROMPTS), 77, dtype=torch.int64)
    for row, prompt in enumerate(PROMPTS):
        tokens = make_tokenizer()(prompt, truncation=True, max_length=77)["input_ids"]
        ids[row, : len(tokens)] = torch.tensor(tokens)
    with torch.no_grad():
        expected = model.get_logits(pixels, ids)[0].diagonal().numpy()
    raw = run(make("clipscore", model=folder), make_images()).raw["clipscore"]
    np.testing.assert_allclose(raw, expected, rtol=1e-5, atol=1e-5)


def test_prompts_that_the_model_cuts_are_noted_alike(pair: tuple[Path, Path, str]) -> None:
    for folder in pair[:2]:
        scorer = make("clipscore", model=folder)
        assert [bool(scorer.note("a " * words, {})) for words in (75, 76)] == [False, True]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 0.002), ("bfloat16", 0.02)])
def test_half_precision_moves_cosines_little(quick: Path, tmp_path: Path, dtype: str, tolerance: float) -> None:
    folder = make_open_clip_folder(tmp_path, quick, "quick_gelu")
    half, full = (make("clipscore", model=folder, dtype=kind).clip for kind in (dtype, "float32"))
    assert half.logit_scale == full.logit_scale
    difference = np.abs(half.logits(make_images(), PROMPTS) - full.logits(make_images(), PROMPTS)) / full.logit_scale
    assert 0 < difference.max() < tolerance


@pytest.mark.parametrize("weights", ["pytorch_model.bin", "open_clip_model.safetensors"])
def test_a_folder_of_timm_has_openais_activation_and_may_hold_the_image_half_as_well(
    quick: Path, tmp_path: Path, weights: str
) -> None:
    folder = make_open_clip_folder(tmp_path / TIMM, quick, "quick_gelu", weights)
    config = open_clip_config("quick_gelu")
    del config["model_cfg"]["quick_gelu"]  # then the folder's name decides
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"architecture": "vit_large_patch14_clip_224"}))
    if weights != "pytorch_model.bin":
        torch.save({"patch_embed.proj.weight": torch.ones(1)}, folder / "pytorch_model.bin")
    expected = run(make("clipscore", model=quick), make_images()).score
    result = run(make("clipscore", model=folder), make_images()).score
    np.testing.assert_allclose(result, expected, rtol=2e-5, atol=1e-6)
    other = make_open_clip_folder(tmp_path / "other", quick, "gelu")
    assert np.abs(run(make("clipscore", model=other), make_images()).score - expected).max() > 1e-4


def test_a_folder_of_both_libraries_is_read_as_one_of_transformers(quick: Path, tmp_path: Path) -> None:
    folder = make_folder(tmp_path, make_config("quick_gelu"))
    (folder / "open_clip_config.json").write_text(json.dumps(open_clip_config("gelu")))
    expected = run(make("clipscore", model=quick), make_images()).score
    np.testing.assert_array_equal(run(make("clipscore", model=folder), make_images()).score, expected)


def test_colors_are_the_same(pair: tuple[Path, Path, str]) -> None:
    tellers = [load_colors(str(folder), torch.device("cpu")) for folder in pair[:2]]
    torch.testing.assert_close(*(teller.classifier("dog") for teller in tellers), rtol=0, atol=2e-6)
    image, mask = make_images(1, (40, 48)), np.ones((40, 48), bool)
    first, second = (teller.tell(image, (4.0, 4.0, 40.0, 36.0), mask, "dog") for teller in tellers)
    assert first == second
    assert first in COLORS


def test_a_file_of_hps_is_the_folder_with_its_weights(pair: tuple[Path, Path, str], tmp_path: Path) -> None:
    source, folder, act = pair
    expected = run(make("hpsv2", model=source), make_images()).score
    file = tmp_path / "HPS_v2.1_compressed.pt"
    half = {name: tensor.half() for name, tensor in to_open_clip(load_file(source / "model.safetensors")).items()}
    torch.save({"epoch": 1, "state_dict": half}, file)
    result = run(make("hpsv2", model=file, processor=folder), make_images()).score
    np.testing.assert_allclose(result, expected, rtol=0, atol=0.02)
    torch.save({f"module.{name}": tensor.float() for name, tensor in half.items()}, file)
    (tmp_path / "open_clip_config.json").write_text(json.dumps(open_clip_config(act)))
    make_tokenizer().save_pretrained(tmp_path)
    again = run(make("hpsv2", model=tmp_path, file=file.name), make_images()).score
    np.testing.assert_allclose(again, result, rtol=2e-5, atol=1e-6)


def test_without_a_tokenizer_the_one_of_open_clip_is_used(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = open_clip_config("gelu")
    config["model_cfg"]["text_cfg"]["vocab_size"] = 49408
    torch.save(open_clip.CLIP(**config["model_cfg"]).state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    towers, _ = load_folder(Source("clipscore", "model", str(tmp_path), "x/y"))
    assert (towers.text_tokens, towers.count_tokens("a photo of a cat")) == (77, 7)
    assert towers.count_tokens("“curly” quotes " + "long " * 90) == 96
    ids = towers.tokenize(["a photo of a cat", "“curly” quotes " + "long " * 90])
    assert ids[0, :7].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert ids[1, -1] == 49407
    torch.testing.assert_close(ids[1], towers.tokenize(['"curly" quotes ' + "long " * 90])[0])


@pytest.mark.parametrize("size", [(224, 300), (300, 224), (512, 512), (41, 17), (64, 30)])
def test_images_are_prepared_to_the_bit_as_by_open_clip(size: tuple[int, int]) -> None:
    picture = Image.fromarray(make_images(1, size))
    expected = image_transform_v2(PreprocessCfg(size=SIDE), is_train=False)(picture)
    assert torch.equal(to_pixels(picture, SIDE), expected)
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SIDE)
    pixels = processor(picture, return_tensors="pt")["pixel_values"][0]
    if size[0] == size[1]:  # otherwise transformers may crop the centre one pixel off
        assert torch.equal(pixels, expected)


# ---------------------------------------------------------------- bad files


class _Harmful:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable, tuple]:
        return Path.touch, (self.path,)


WEIGHTS = "open_clip_pytorch_model.bin"


def edit(folder: Path, *keys: str, value: Any) -> None:
    path = folder / "open_clip_config.json"
    config = part = json.loads(path.read_text())
    for key in keys[:-1]:
        part = part[key]
    part[keys[-1]] = value
    path.write_text(json.dumps(config))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "harmful": (lambda f: torch.save({"a": _Harmful(f / "trace")}, f / WEIGHTS), r"could run code; expected \.safet"),
    "script": (
        lambda f: torch.jit.save(torch.jit.trace(torch.nn.Linear(1, 1), torch.ones(1)), f / WEIGHTS),
        r"TorchScript program",
    ),
    "cut": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:900]), r"cannot read the weights"),
    "image half": (
        lambda f: torch.save({"patch_embed.proj.weight": torch.ones(1)}, f / WEIGHTS),
        rf"only the image half.* hf download timm/{TIMM} open_clip_config.json open_clip_pytorch_model.bin --local-dir",
    ),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), rf"none of open_clip_model.* hf download timm/{TIMM} "),
    "no model": (lambda f: edit(f, "model_cfg", value={}), r"no model_cfg with vision_cfg and text_cfg"),
    "no json": (lambda f: (f / "open_clip_config.json").write_text("{"), r"cannot read the open_clip_config.json"),
    "other text model": (
        lambda f: edit(f, "model_cfg", "text_cfg", "hf_model_name", value="some/model"),
        r"not describe a plain CLIP: it sets hf_model_name",
    ),
    "other kind": (lambda f: edit(f, "model_cfg", "multimodal_cfg", value={"a": 1}), r"it sets multimodal_cfg"),
    "unknown field": (lambda f: edit(f, "model_cfg", "vision_cfg", "colour", value=1), r"not describe a valid CLIP"),
    "other size": (
        lambda f: edit(f, "model_cfg", "embed_dim", value=24),
        r"2 of another shape: text_projection is \[32, 16\], expected \[32, 24\]",
    ),
    "other tokenizer": (
        lambda f: [path.unlink() for path in f.glob("token*.json")],
        r"another model's: tokens in the vocabulary: 49408, the model's 516",
    ),
    "pictures": (lambda f: edit(f, "preprocess_cfg", "resize_mode", value="fold"), r"preprocess_cfg"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_what_does_not_fit_is_refused_by_name(quick: Path, tmp_path: Path, damage: str) -> None:
    folder = make_open_clip_folder(tmp_path / TIMM, quick, "quick_gelu")
    act, message = DAMAGES[damage]
    act(folder)
    with pytest.raises(UsageError, match=message) as caught:
        make("clipscore", model=folder)
    assert str(caught.value).startswith("scorer 'clipscore': ")
    assert not (folder / "trace").exists()


def test_a_folder_that_is_not_there_comes_with_its_download(tmp_path: Path) -> None:
    command = f"hf download timm/{TIMM} open_clip_config.json open_clip_pytorch_model.bin --local-dir {tmp_path / TIMM}"
    with pytest.raises(UsageError, match=command):
        make("clipscore", model=tmp_path / TIMM)
    with pytest.raises(UsageError, match=f"scorer 'geneval': .*{command}; and set the option clip="):
        load_colors(str(tmp_path / TIMM), torch.device("cpu"))


def test_the_models_can_be_imported_beside_any_build_of_torch() -> None:
    """The test uses a new process, because in this one the operators are already declared."""
    code = "from rewards_bridge.scorers.torch_models import CLIPModel; import torchvision, open_clip; print(CLIPModel)"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
