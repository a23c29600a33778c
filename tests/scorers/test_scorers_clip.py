"""Tests of the CLIP scorers on tiny random models: their scores equal those of plain transformers and open_clip."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from clip_helpers import (
    PROMPTS,
    make,
    make_config,
    make_folder,
    make_head,
    make_images,
    make_tokenizer,
    open_clip_config,
    run,
    save_head,
)
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer

from rewards_bridge.errors import UsageError
from rewards_bridge.scorers.hpsv2 import letterbox


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread: models this small are slower on several, especially if other programs need the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("clip"), make_config("quick_gelu"))


def plain(folder: Path, images: np.ndarray, prompts: Sequence[str] = PROMPTS) -> np.ndarray:
    """Return the logits of plain transformers, computed one pair at a time and without padding."""
    model = CLIPModel.from_pretrained(folder)
    processor = CLIPProcessor(
        image_processor=CLIPImageProcessorPil.from_pretrained(folder), tokenizer=CLIPTokenizer.from_pretrained(folder)
    )
    logits = []
    for image, prompt in zip(images, prompts, strict=True):
        inputs = processor(
            images=[Image.fromarray(image)], text=[prompt], truncation=True, max_length=77, return_tensors="pt"
        )
        with torch.no_grad():
            logits.append(model(**inputs).logits_per_image.item())
    return np.array(logits, np.float32)


# ---------------------------------------------------------------- against plain transformers


@pytest.mark.parametrize(("name", "scale"), [("pickscore", 26), ("clipscore", 100)])
def test_scores_are_those_of_plain_transformers(clip: Path, name: str, scale: float) -> None:
    images = make_images()
    scores = run(make(name, model=clip, batch_size=4), images)
    expected = plain(clip, images)
    assert expected.std() > 0.5  # images and prompts are distinguished
    np.testing.assert_allclose(scores.raw[name], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(scores.score, expected / scale, rtol=1e-5, atol=1e-5)


def test_either_configuration_determines_the_end_of_a_text(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, make_config("gelu", eos=len(make_tokenizer()) - 1))
    raw = run(make("clipscore", model=folder), make_images()).raw["clipscore"]
    np.testing.assert_allclose(raw, plain(folder, make_images()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("file", ["head.pth", "head.safetensors"])
def test_aesthetic_marks_are_those_of_the_published_head(clip: Path, tmp_path: Path, file: str) -> None:
    images = make_images()
    model = CLIPModel.from_pretrained(clip)
    pixels = CLIPImageProcessorPil.from_pretrained(clip)(
        [Image.fromarray(image) for image in images], return_tensors="pt"
    )
    with torch.no_grad():
        features = model.get_image_features(**pixels).pooler_output
        expected = make_head(16)(features / features.norm(dim=-1, keepdim=True))[:, 0].numpy()
    assert expected.std() > 1e-4
    scores = run(make("aesthetic", model=clip, head=save_head(tmp_path / file)), images)
    np.testing.assert_allclose(scores.raw["aesthetic"], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(scores.score, expected / 10, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["pickscore", "clipscore", "hpsv2"])
def test_prompts_that_the_model_cuts_are_noted(clip: Path, name: str) -> None:
    scorer = make(name, model=clip)
    assert [scorer.note("a " * words, {}) for words in (1, 75)] == ["", ""]  # start and end are also tokens
    cut = scorer.note("a " * 76, {})
    assert cut == "more than the 77 tokens that it reads; the rest has no effect"
    texts = scorer.clip.embed_texts(["a " * 75, "a " * 75 + "b", "a " * 75 + "cat", "a " * 74 + "b"])
    np.testing.assert_allclose(texts[1:3], texts[[0, 0]], atol=1e-5)  # the note is true
    assert np.abs(texts[3] - texts[0]).max() > 1e-3


def test_neither_batch_size_nor_order_nor_neighbours_change_a_score(clip: Path) -> None:
    images = np.concatenate([make_images(), make_images()[:1]])
    prompts = [*PROMPTS, PROMPTS[0]]
    expected = run(make("pickscore", model=clip), images, prompts).score
    assert expected[0] == pytest.approx(expected[-1], rel=1e-6)
    for batch_size in (1, 3):
        scores = run(make("pickscore", model=clip, batch_size=batch_size), images, prompts)
        np.testing.assert_allclose(scores.score, expected, rtol=1e-5, atol=1e-6)
    order = np.random.default_rng(0).permutation(len(images))
    scores = run(make("pickscore", model=clip), images[order], [prompts[index] for index in order])
    np.testing.assert_allclose(scores.score, expected[order], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 0.002), ("bfloat16", 0.02)])
def test_half_precision_moves_cosines_little_and_the_scale_not_at_all(clip: Path, dtype: str, tolerance: float) -> None:
    images = make_images()
    half, full = (make("clipscore", model=clip, dtype=kind).clip for kind in (dtype, "float32"))
    assert half.logit_scale == full.logit_scale
    difference = np.abs(half.logits(images, PROMPTS) - full.logits(images, PROMPTS)) / full.logit_scale
    assert 0 < difference.max() < tolerance


# ---------------------------------------------------------------- memory


def test_a_batch_that_does_not_fit_is_halved(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = make("clipscore", model=clip)
    expected = run(scorer, make_images()).score
    sizes: list[int] = []
    honest = CLIPModel.get_image_features

    def scarce(self: CLIPModel, pixel_values: torch.Tensor) -> object:
        sizes.append(len(pixel_values))
        if len(pixel_values) > 2:
            raise torch.OutOfMemoryError("no memory")
        return honest(self, pixel_values=pixel_values)

    monkeypatch.setattr(CLIPModel, "get_image_features", scarce)
    np.testing.assert_allclose(run(scorer, make_images()).score, expected, rtol=1e-5)
    assert sizes == [6, 3, 1, 1, 1, 1, 1, 1]
    run(scorer, make_images())
    assert sizes[8:] == [1] * 6  # the reduced batch size is kept


def test_no_memory_for_a_single_image_names_the_scorer(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(self: CLIPModel, pixel_values: torch.Tensor) -> object:
        raise torch.OutOfMemoryError("no memory")

    scorer = make("pickscore", model=clip)
    monkeypatch.setattr(CLIPModel, "get_image_features", none)
    with pytest.raises(UsageError, match=r"'pickscore': cpu has not enough memory for a single image.*dtype=float16"):
        run(scorer, make_images())


# ---------------------------------------------------------------- HPS v2

WIDTHS = {"visual.": 48, "": 32}  # of the towers, by their prefix in open_clip's names


def open_clip_tensors() -> dict[str, torch.Tensor]:
    """Return random tensors with the names and shapes of open_clip's CLIP."""
    torch.manual_seed(3)
    shapes: dict[str, tuple[int, ...]] = {
        "positional_embedding": (77, 32),
        "text_projection": (32, 16),
        "logit_scale": (),
        "token_embedding.weight": (len(make_tokenizer()), 32),
        "visual.class_embedding": (48,),
        "visual.positional_embedding": (17, 48),
        "visual.proj": (48, 16),
        "visual.conv1.weight": (48, 3, 8, 8),
    }
    for name, width in (("visual.ln_pre", 48), ("visual.ln_post", 48), ("ln_final", 32)):
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    for tower, width in WIDTHS.items():
        for block in (f"{tower}transformer.resblocks.{number}." for number in range(2)):
            shapes |= {f"{block}attn.in_proj_weight": (3 * width, width), f"{block}attn.in_proj_bias": (3 * width,)}
            for norm in ("ln_1", "ln_2"):
                shapes |= {f"{block}{norm}.weight": (width,), f"{block}{norm}.bias": (width,)}
            for name, size in (("attn.out_proj", (width, width)), ("mlp.c_fc", (4 * width, width))):
                shapes |= {f"{block}{name}.weight": size, f"{block}{name}.bias": size[:1]}
            shapes |= {f"{block}mlp.c_proj.weight": (width, 4 * width), f"{block}mlp.c_proj.bias": (width,)}
    return {name: 0.3 * torch.randn(shape) for name, shape in shapes.items()} | {"logit_scale": torch.tensor(3.0)}


def open_clip_norm(t: dict[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt() * t[
        f"{name}.weight"
    ] + t[f"{name}.bias"]


def open_clip_blocks(t: dict[str, torch.Tensor], tower: str, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Apply pre-norm transformer blocks of 4 heads with packed query, key and value, and the exact GELU."""
    for block in (f"{tower}transformer.resblocks.{number}." for number in range(2)):
        packed = (
            open_clip_norm(t, f"{block}ln_1", x) @ t[f"{block}attn.in_proj_weight"].T + t[f"{block}attn.in_proj_bias"]
        )
        q, k, v = packed.unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT / q.shape[-1] ** 0.5 + mask).softmax(-1)
        attended = (weights @ v).transpose(1, 2).flatten(2)
        x = x + attended @ t[f"{block}attn.out_proj.weight"].T + t[f"{block}attn.out_proj.bias"]
        hidden = open_clip_norm(t, f"{block}ln_2", x) @ t[f"{block}mlp.c_fc.weight"].T + t[f"{block}mlp.c_fc.bias"]
        hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
        x = x + hidden @ t[f"{block}mlp.c_proj.weight"].T + t[f"{block}mlp.c_proj.bias"]
    return x


def open_clip_logits(t: dict[str, torch.Tensor], pixels: torch.Tensor, ids: torch.Tensor) -> np.ndarray:
    """Return exp(logit_scale) * cos of pixels f32[B,3,32,32] and their ids i64[B,77], computed as in open_clip."""
    x = torch.nn.functional.conv2d(pixels, t["visual.conv1.weight"], stride=8).flatten(2).mT
    x = torch.cat([t["visual.class_embedding"].expand(len(x), 1, -1), x], 1) + t["visual.positional_embedding"]
    x = open_clip_blocks(t, "visual.", open_clip_norm(t, "visual.ln_pre", x), torch.zeros(()))
    image = open_clip_norm(t, "visual.ln_post", x[:, 0]) @ t["visual.proj"]
    x = t["token_embedding.weight"][ids] + t["positional_embedding"]
    x = open_clip_blocks(t, "", x, torch.full((77, 77), -torch.inf).triu(1))
    text = open_clip_norm(t, "ln_final", x)[torch.arange(len(ids)), ids.argmax(-1)] @ t["text_projection"]
    cosine = (image * text).sum(-1) / image.norm(dim=-1) / text.norm(dim=-1)
    return (cosine * t["logit_scale"].exp()).numpy()


@pytest.fixture(scope="module")
def gelu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with configuration and tokenizer for open_clip's tensors; its own weights are different ones."""
    folder = make_folder(tmp_path_factory.mktemp("gelu"), make_config("gelu"))
    (folder / "open_clip_config.json").write_text(json.dumps(open_clip_config("gelu")))
    return folder


def test_hpsv2_scores_are_those_of_open_clip(gelu: Path, tmp_path: Path) -> None:
    tensors = open_clip_tensors()
    torch.save({"epoch": 1, "name": "hps", "state_dict": tensors}, tmp_path / "HPS_v2_compressed.pt")
    ids = torch.zeros(len(PROMPTS), 77, dtype=torch.int64)  # open_clip pads with 0
    for row, prompt in enumerate(PROMPTS):
        tokens = make_tokenizer()(prompt, truncation=True, max_length=77)["input_ids"]
        ids[row, : len(tokens)] = torch.tensor(tokens)
    expected = open_clip_logits(tensors, letterbox(32, True)(make_images()), ids)
    assert expected.std() > 0.1
    for model in (tmp_path, tmp_path / "HPS_v2_compressed.pt"):
        scores = run(make("hpsv2", model=model, processor=gelu), make_images())
        np.testing.assert_allclose(scores.raw["hpsv2"], expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(scores.score, expected / 100, rtol=1e-5, atol=1e-5)


def test_hpsv2_takes_a_folder_of_transformers(gelu: Path) -> None:
    model, tokenizer = CLIPModel.from_pretrained(gelu), CLIPTokenizer.from_pretrained(gelu)
    with torch.no_grad():
        inputs = tokenizer(PROMPTS, padding=True, truncation=True, max_length=77, return_tensors="pt")
        expected = model(pixel_values=letterbox(32, True)(make_images()), **inputs).logits_per_image.diagonal().numpy()
    scores = run(make("hpsv2", model=gelu), make_images())
    np.testing.assert_allclose(scores.raw["hpsv2"], expected, rtol=1e-5, atol=1e-5)


def test_every_tensor_of_open_clip_must_have_its_place(gelu: Path, tmp_path: Path) -> None:
    tensors = open_clip_tensors()
    tensors["visual.transformer.resblocks.0.ls_1.gamma"] = torch.ones(48)
    tensors["transformer.resblocks.2.ln_1.weight"] = torch.ones(32)
    tensors["text_projection"] = torch.ones(32, 20)
    del tensors["visual.ln_post.bias"]
    torch.save(tensors, tmp_path / "HPS_v2.1_compressed.pt")
    with pytest.raises(UsageError) as caught:
        make("hpsv2", model=tmp_path, file="HPS_v2.1_compressed.pt", processor=gelu)
    assert str(caught.value).endswith(
        "1 missing: visual.ln_post.bias; "
        "2 not of this model: transformer.resblocks.2.ln_1.weight, visual.transformer.resblocks.0.ls_1.gamma; "
        "1 of another shape: text_projection is [32, 20], expected [32, 16]"
    )
    with pytest.raises(UsageError, match=r"hf download xswu/HPSv2 HPS_v2_compressed.pt --local-dir .*model="):
        make("hpsv2", model=tmp_path, processor=gelu)


@pytest.mark.parametrize("size", [(60, 20), (32, 32), (20, 20), (31, 64), (32, 10)])
def test_hpsv2_letterboxes_on_black(size: tuple[int, int]) -> None:
    image = make_images(4, size)
    height, width = (round(edge * 32 / max(size)) for edge in size)
    planes = [Image.fromarray(np.float32(image[..., channel] / 255)) for channel in range(3)]
    small = np.stack([np.asarray(plane.resize((width, height), Image.Resampling.BICUBIC)) for plane in planes], -1)
    expected = np.zeros((32, 32, 3), np.float32)
    top, left = (32 - height) // 2, (32 - width) // 2
    expected[top : top + height, left : left + width] = small
    mean, std = CLIPImageProcessorPil.image_mean, CLIPImageProcessorPil.image_std
    smooth = letterbox(32, True)(image[None])[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(smooth, (expected - mean) / std, atol=1e-5)
    rough = letterbox(32, False)(image[None])[0].permute(1, 2, 0).numpy()
    assert (np.abs(rough - smooth).max() > 0.1) == (max(size) != 32)
