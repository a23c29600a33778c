"""CLIP in the format of open_clip: folders of timm and LAION, and single files such as those of HPS v2.

open-clip-torch builds the model, tokenizes and preprocesses images. Its own loader is not used, because it builds
whatever a configuration asks for, downloads parts of some models, and stops at the first tensor that does not fit.

Source: github.com/mlfoundations/open_clip.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from rewards_bridge.errors import UsageError
from rewards_bridge.scorers.clip_files import Source, load_tensors, refuse_differences
from rewards_bridge.scorers.clip_transformers import count_tokens, has_tokenizer, load_tokenizer
from rewards_bridge.scorers.torchvision_ops import declare_operators

if TYPE_CHECKING:
    import open_clip

CONFIG = "open_clip_config.json"
WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
    "model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.pth",
)
"""File names of a folder's CLIP; the first that exists is used, in open_clip's own order."""
TRANSFORMERS_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
PARTS = ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "init_logit_scale", "nonscalar_logit_scale")
"""Settings that the configuration of a plain CLIP may contain."""
ELSEWHERE = ("hf_model_name", "timm_model_name")
"""Settings of a tower that replace it with another library's model."""
NO_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "attn_mask")
"""Entries that some files contain besides the weights; all of them follow from the configuration."""
TIMM_TENSOR = "patch_embed.proj.weight"

Tokenize = Callable[[Sequence[str]], torch.Tensor]
"""Prompts -> token ids i64[b,context length], padded with zeros."""
Count = Callable[[str], int]
"""A prompt -> its number of tokens before truncation, including start and end tokens."""


class OpenClipTowers:
    """The encoders of an open_clip.CLIP with its tokenizer; see clip_model.Towers."""

    def __init__(
        self, model: open_clip.CLIP, tokenize: Tokenize, count: Count, fit: Mapping[str, tuple[object, object]]
    ) -> None:
        self.model, self.tokenize, self.count, self.fit = model.eval().requires_grad_(False), tokenize, count, fit
        self.side, self.text_tokens = _side(model), int(model.context_length)
        self.logit_scale = float(model.logit_scale.detach().exp())  # before any cast, since bfloat16 is too coarse

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self.model.logit_scale.device

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move the model to a device and a dtype."""
        self.model.to(device, dtype)

    def image_features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the projected features [b,E] of f32[b,3,S,S]."""
        return self.model.encode_image(pixels.to(self.device, self.model.logit_scale.dtype))

    def text_features(self, prompts: Sequence[str]) -> torch.Tensor:
        """Return the projected features [b,E] of prompts, truncated to the model's context length."""
        return self.model.encode_text(self.tokenize(prompts).to(self.device))

    def count_tokens(self, prompt: str) -> int:
        """Return the number of tokens of a whole prompt, including start and end tokens."""
        return self.count(prompt)

    def tokenizer_fit(self) -> Mapping[str, tuple[object, object]]:
        """Return the values on which tokenizer and model must agree, by name: (the tokenizer's, the model's)."""
        return self.fit


def is_open_clip(source: Source) -> bool:
    """Return whether the place is a folder in open_clip's format and not also in that of transformers."""
    if not source.has(CONFIG):
        return False
    try:
        kind = json.loads((source.path / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError):
        return True
    return kind != "clip" or not any(source.has(name) for name in TRANSFORMERS_WEIGHTS)


def load_folder(
    source: Source, tokenizer: Source | None = None
) -> tuple[OpenClipTowers, Callable[[np.ndarray], torch.Tensor]]:
    """Load the encoders of a folder and its image preprocessing (clip_model.Pixels).

    The tokenizer is that at `tokenizer`; if this is None, that of the folder; if it has none, open_clip's. Raises
    UsageError unless the folder contains a plain CLIP with all of its weights.
    """
    with source.reading(CONFIG):
        config = _read_config(source, source.path / CONFIG)
        files = [source.path / name for name in WEIGHTS if source.has(name)]
        if not files:
            raise FileNotFoundError(f"none of {', '.join(WEIGHTS)}")
    model_config = dict(config["model_cfg"])
    # timm names repositories after the origin of the weights, and all of OpenAI's need its quick GELU.
    model_config.setdefault("quick_gelu", source.path.name.endswith(".openai"))
    model = _fill(source, files[0], model_config)
    return _towers(model, source, tokenizer), _pixels(source, model, config.get("preprocess_cfg") or {})


def load_file(source: Source, path: Path, architecture: str, tokenizer: Source | None = None) -> OpenClipTowers:
    """Load the encoders of a single weights file with open_clip's tensor names.

    The architecture is that of an open_clip_config.json beside the file or at `tokenizer`, otherwise open_clip's own of
    this name. The tokenizer is that at `tokenizer`; if this is None, that of the file's folder; if it has none,
    open_clip's. Raises UsageError unless the file contains exactly the weights.
    """
    beside = replace(source, place=str(path.parent))
    config_path = next((place.path / CONFIG for place in (beside, tokenizer) if place and place.has(CONFIG)), None)
    if config_path:
        with source.reading(CONFIG):
            model_config = _read_config(source, config_path)["model_cfg"]
    else:
        model_config = _library(source).get_model_config(architecture)
    return _towers(_fill(source, path, model_config), beside, tokenizer)


def _library(source: Source) -> Any:
    """Import and return open_clip; UsageError if it cannot be imported."""
    declare_operators()
    try:
        import open_clip
    except ImportError as error:
        raise source.wrong(
            f"open-clip-torch is needed to read this ({error}); fix: pip install open-clip-torch==3.3.0"
        ) from error
    return open_clip


def _read_config(source: Source, path: Path) -> dict[str, Any]:
    config = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise source.wrong(f"{path.name} is not a JSON object")
    config = config if "model_cfg" in config else {"model_cfg": config}
    parts = config["model_cfg"]
    towers: list[Any] = [parts.get(name) if isinstance(parts, dict) else None for name in ("vision_cfg", "text_cfg")]
    if not all(isinstance(tower, dict) for tower in towers):
        raise source.wrong(f"{path.name} has no model_cfg with vision_cfg and text_cfg")
    foreign = [name for tower in towers for name in ELSEWHERE if tower.get(name)]
    foreign += sorted(name for name in parts if name not in PARTS and parts[name])
    if foreign:
        raise source.wrong(f"{path.name} does not describe a plain CLIP: it sets {', '.join(foreign)}")
    return config


def _fill(source: Source, path: Path, config: Mapping[str, Any]) -> open_clip.CLIP:
    """Return the model of a configuration with the weights of a file, in float32 on the CPU."""
    model = _build(source, config)
    tensors = load_tensors(source, path)
    if tensors and all(name.startswith("module.") for name in tensors):  # saved under data parallelism
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    if TIMM_TENSOR in tensors:
        raise source.missing("complete CLIP", f"{path.name} is only the image half, with timm's names")
    tensors = {name: tensor.float() for name, tensor in tensors.items() if name not in NO_WEIGHTS}
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if "logit_scale" in tensors and tensors["logit_scale"].numel() == 1:
        tensors["logit_scale"] = tensors["logit_scale"].reshape(own["logit_scale"])
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    misshapen = {name: (shapes[name], own[name]) for name in shapes.keys() & own.keys() if shapes[name] != own[name]}
    refuse_differences(source, own.keys() - shapes.keys(), shapes.keys() - own.keys(), misshapen)
    model.load_state_dict(tensors, assign=True)
    if model.attn_mask is not None:  # the only tensor that is in no file: a token sees itself and earlier ones
        model.attn_mask = torch.full(model.attn_mask.shape, -torch.inf).triu(1)
    return model


def _build(source: Source, config: Mapping[str, Any]) -> open_clip.CLIP:
    """Return the model without memory for its weights, since initialising a billion random ones takes a minute."""
    library = _library(source)
    try:
        with torch.device("meta"):
            return library.CLIP(**{name: value for name, value in config.items() if name in PARTS})
    except (TypeError, ValueError, AssertionError, ZeroDivisionError, RuntimeError) as error:
        raise source.wrong(f"{CONFIG} does not describe a valid CLIP ({error})") from error


def _towers(model: open_clip.CLIP, own: Source, named: Source | None) -> OpenClipTowers:
    """Return the encoders with the tokenizer at `named`, or at the model's own place, or else open_clip's."""
    length = model.context_length
    if named is None and not has_tokenizer(own):
        simple = _library(own).SimpleTokenizer(context_length=length)

        def count(prompt: str) -> int:
            return len(simple.encode(prompt)) + 2

        return OpenClipTowers(model, simple, count, _fit(model, simple.vocab_size, simple.eot_token_id))
    tokenizer = load_tokenizer(named or own)

    def tokenize(prompts: Sequence[str]) -> torch.Tensor:
        tokens = tokenizer(list(prompts), padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        return tokens["input_ids"] * tokens["attention_mask"]

    fit = _fit(model, len(tokenizer), tokenizer.eos_token_id)
    return OpenClipTowers(model, tokenize, partial(count_tokens, tokenizer), fit)


def _fit(model: open_clip.CLIP, size: int, last: int) -> dict[str, tuple[object, object]]:
    """Return the values on which both must agree; the model takes the highest token id of a text as its end."""
    ends = model.text_eos_id if model.text_pool_type == "eos" else size - 1
    return {
        "tokens in the vocabulary": (size, model.vocab_size),
        "the number of the last token of a text": (last, ends),
    }


def _pixels(source: Source, model: open_clip.CLIP, config: Mapping[str, Any]) -> Callable[[np.ndarray], torch.Tensor]:
    _library(source)
    from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict

    try:
        merged = {**merge_preprocess_dict(PreprocessCfg(), dict(config)), "size": _side(model)}
        transform = image_transform_v2(PreprocessCfg(**merged), is_train=False)
    except (TypeError, ValueError, AssertionError, KeyError) as error:
        raise source.wrong(f"preprocess_cfg in {CONFIG} cannot be used ({error})") from error

    def pixels(images: np.ndarray) -> torch.Tensor:
        return torch.stack([transform(Image.fromarray(image)) for image in images])

    return pixels


def _side(model: open_clip.CLIP) -> int:
    """Return the side in pixels of the model's input images; UsageError unless they are square."""
    height, width = model.visual.image_size
    if height != width:
        raise UsageError(f"the model takes images of {height} x {width} pixels; expected square ones")
    return int(height)
