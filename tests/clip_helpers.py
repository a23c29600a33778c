"""Tiny random CLIP models on disk, for tests of the scorers that use one."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from rewards_bridge.scorers import Scorer, Scores, load_scorer

SIDE = 32
PROMPTS = ["a cat", "two dogs at the sea", "A CAT!", "a cat", "red and blue " * 40, "çà et là"]
CLASSES = {
    "pickscore": "rewards_bridge.scorers.pickscore:PickScoreScorer",
    "clipscore": "rewards_bridge.scorers.clipscore:ClipScoreScorer",
    "aesthetic": "rewards_bridge.scorers.aesthetic:AestheticScorer",
    "hpsv2": "rewards_bridge.scorers.hpsv2:HpsV2Scorer",
    "jpeg": "rewards_bridge.scorers.jpeg:JpegScorer",
    "imagereward": "rewards_bridge.scorers.imagereward:ImageRewardScorer",
}
WIDTHS = (1024, 128, 64, 16, 1)


def make_tokenizer() -> CLIPTokenizer:
    """Return CLIP's tokenizer with two merges: bytes, bytes at the end of a word, merges, start and end of a text."""
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "ca", "cat</w>", "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=[("c", "a"), ("ca", "t</w>")])


def make_config(act: str, eos: int = 2) -> CLIPConfig:
    """Return the config of a CLIP with two small towers; the default eos is the legacy id of a text's last token."""
    both = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_act": act, "projection_dim": 16}
    text = {"hidden_size": 32, "intermediate_size": 128, "vocab_size": len(make_tokenizer()), "eos_token_id": eos}
    vision = {"hidden_size": 48, "intermediate_size": 192, "image_size": SIDE, "patch_size": 8}
    return CLIPConfig(text_config={**both, **text}, vision_config={**both, **vision}, projection_dim=16)


def make_folder(folder: Path, config: CLIPConfig) -> Path:
    """Save a complete CLIP with transformers, with weights far enough from 0 for images and texts to differ."""
    torch.manual_seed(0)
    model = CLIPModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SIDE).save_pretrained(folder)
    return folder


OUTSIDE = {
    "logit_scale": "logit_scale",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm": "ln_final",
    "text_projection.weight": "text_projection",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.embeddings.patch_embedding": "visual.conv1",
    "vision_model.pre_layrnorm": "visual.ln_pre",
    "vision_model.post_layernorm": "visual.ln_post",
    "visual_projection.weight": "visual.proj",
    "vision_model.encoder.layers": "visual.transformer.resblocks",
    "text_model.encoder.layers": "transformer.resblocks",
}
"""Beginning of a name in transformers -> in open_clip."""
INSIDE = {"layer_norm": "ln_", "self_attn.out_proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}


def to_open_clip(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the same weights with open_clip's names: projections transposed; query, key and value concatenated."""
    result: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        start = next(start for start in OUTSIDE if name.startswith(start))
        target = OUTSIDE[start] + name.removeprefix(start)
        for old, new in INSIDE.items():
            target = target.replace(old, new)
        if ".self_attn." in target:
            block, _, rest = target.partition(".self_attn.")
            parts = [tensors[name.replace(rest[0] + "_proj", letter + "_proj")] for letter in "qkv"]
            target, tensor = f"{block}.attn.in_proj_{rest.partition('.')[2]}", torch.cat(parts)
        result[target] = tensor.T.contiguous() if target in ("text_projection", "visual.proj") else tensor
    return result


def open_clip_config(act: str) -> dict[str, Any]:
    """Return the content of open_clip_config.json for the model of make_config."""
    vision = {"image_size": SIDE, "layers": 2, "width": 48, "head_width": 12, "patch_size": 8}
    text = {"context_length": 77, "vocab_size": len(make_tokenizer()), "width": 32, "heads": 4, "layers": 2}
    mean, std = CLIPImageProcessorPil.image_mean, CLIPImageProcessorPil.image_std
    model = {"embed_dim": 16, "quick_gelu": act == "quick_gelu", "vision_cfg": vision, "text_cfg": text}
    return {"model_cfg": model, "preprocess_cfg": {"mean": mean, "std": std}}


def make_open_clip_folder(folder: Path, source: Path, act: str, weights: str = "open_clip_pytorch_model.bin") -> Path:
    """Convert a folder of transformers into a folder of open_clip, with its tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps(open_clip_config(act)))
    tensors = to_open_clip(load_file(source / "model.safetensors"))
    save_file(tensors, folder / weights) if weights.endswith(".safetensors") else torch.save(tensors, folder / weights)
    make_tokenizer().save_pretrained(folder)
    return folder


def make_images(seed: int = 0, shape: tuple[int, ...] = (6, 50, 70)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


def run(scorer: Scorer, images: np.ndarray, prompts: Sequence[str] = PROMPTS) -> Scores:
    scores = scorer.score(images, prompts, [{}] * len(prompts))
    assert scores.score.dtype == np.float32
    assert scores.score.shape == (len(images),)
    assert scores.reasons == [""] * len(images)
    return scores


def make(name: str, **options: object) -> Any:
    """Return the scorer of this name, with its options as text, as from a config."""
    return load_scorer(CLASSES[name], {key: str(value) for key, value in options.items()})


def make_head(width: int, seed: int = 1) -> torch.nn.Sequential:
    torch.manual_seed(seed)
    sizes = [width, *WIDTHS]
    linear = [torch.nn.Linear(*pair) for pair in itertools.pairwise(sizes)]
    drop = torch.nn.Dropout(0.2)
    return torch.nn.Sequential(linear[0], drop, linear[1], drop, linear[2], drop, linear[3], linear[4]).eval()


def save_head(path: Path, width: int = 16) -> Path:
    tensors = {f"layers.{name}": tensor for name, tensor in make_head(width).state_dict().items()}
    if path.suffix == ".pth":
        torch.save(tensors, path)
    else:
        save_file(tensors, path)
    return path
