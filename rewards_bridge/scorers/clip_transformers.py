"""CLIP in the format of transformers: load the two encoders, the tokenizer and the image preprocessing.

Images are always preprocessed by the PIL processor of transformers, because the one based on torchvision gives
different pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch

from rewards_bridge.scorers.clip_files import Source, refuse_differences
from rewards_bridge.scorers.torch_models import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
    cached_file,
)

TEXT_TOKENS = 77
LEGACY_EOS = 2
"""The eos_token_id in configurations older than transformers 4.31; it stands for "the highest token of the text"."""


class TransformersTowers:
    """The encoders of a CLIPModel with its tokenizer; see clip_model.Towers."""

    def __init__(self, model: CLIPModel, tokenizer: CLIPTokenizer) -> None:
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer
        self.side = cast(int, model.vision_model.config.image_size)
        self.text_tokens = TEXT_TOKENS
        # Read before any cast: in bfloat16 the error of ln(100) would change every score by 1 %.
        self.logit_scale = float(model.logit_scale.detach().exp())

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return cast(torch.device, self.model.device)

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move the model to a device and a dtype."""
        self.model.to(device, dtype)

    def image_features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the projected features [b,E] of f32[b,3,S,S]."""
        return cast(torch.Tensor, self.model.get_image_features(pixel_values=pixels.to(self.device)).pooler_output)

    def text_features(self, prompts: Sequence[str]) -> torch.Tensor:
        """Return the projected features [b,E] of prompts, truncated to 77 tokens; padding has no effect."""
        tokens = self.tokenizer(
            list(prompts), padding=True, truncation=True, max_length=TEXT_TOKENS, return_tensors="pt"
        ).to(self.device)
        return cast(torch.Tensor, self.model.get_text_features(**tokens).pooler_output)

    def count_tokens(self, prompt: str) -> int:
        """Return the number of tokens of a whole prompt, including start and end tokens."""
        return count_tokens(self.tokenizer, prompt)

    def tokenizer_fit(self) -> Mapping[str, tuple[object, object]]:
        """Return the values on which tokenizer and model must agree, by name: (the tokenizer's, the model's)."""
        text = self.model.text_model.config
        last = len(self.tokenizer) - 1 if text.eos_token_id == LEGACY_EOS else text.eos_token_id
        return {
            "tokens in the vocabulary": (len(self.tokenizer), text.vocab_size),
            "the number of the last token of a text": (self.tokenizer.eos_token_id, last),
            "tokens of the longest text": (TEXT_TOKENS, text.max_position_embeddings),
        }


def count_tokens(tokenizer: Any, prompt: str) -> int:
    """Return the number of tokens of a whole prompt, including start and end tokens, by a transformers tokenizer."""
    return len(tokenizer(prompt, truncation=False, verbose=False)["input_ids"])


def load_model(source: Source) -> CLIPModel:
    """Return the model of a folder or hub repository in float32; UsageError unless all weights exist and fit."""
    config = _load_config(source)
    with source.reading("weights"):
        loaded: Any = CLIPModel.from_pretrained(  # typed as a model, but a pair with output_loading_info
            source.where,
            config=config,
            dtype=torch.float32,
            weights_only=True,
            ignore_mismatched_sizes=True,  # reported below, together with all other differences
            output_loading_info=True,
        )
    model, info = loaded
    misshapen = {name: (tuple(actual), tuple(expected)) for name, actual, expected in info["mismatched_keys"]}
    refuse_differences(source, info["missing_keys"], info["unexpected_keys"], misshapen)
    return cast(CLIPModel, model)


def _load_config(source: Source) -> CLIPConfig:
    """Return the configuration of a folder or hub repository; UsageError if it is not that of a CLIP."""
    with source.reading("config.json"):
        settings = CLIPConfig.get_config_dict(source.where)[0]
        if not settings:  # without the file, transformers returns nothing and would build a default model
            raise FileNotFoundError("no such file")
        if settings.get("model_type") != "clip":
            advice = "; download a repository of open_clip or timm and set its folder"
            raise source.wrong(
                f"model_type in config.json is {settings.get('model_type')!r}, expected 'clip'"
                f"{'' if source.is_local else advice}"
            )
        return CLIPConfig.from_pretrained(source.where)


def load_pixels(source: Source) -> Any:
    """Return the image preprocessing (clip_model.Pixels) of a preprocessor_config.json; UsageError without one."""
    with source.reading("preprocessor_config.json"):
        processor = CLIPImageProcessorPil.from_pretrained(source.where)

    def pixels(images: np.ndarray) -> torch.Tensor:
        return processor(list(images), return_tensors="pt", input_data_format="channels_last")["pixel_values"]

    return pixels


def has_tokenizer(source: Source) -> bool:
    """Return whether the place is a local folder with the files of a tokenizer."""
    return source.has("tokenizer.json") or source.has("vocab.json", "merges.txt")


def load_tokenizer(source: Source) -> CLIPTokenizer:
    """Return the tokenizer of a folder or hub repository; UsageError if there is none."""
    with source.reading("tokenizer"):
        # Checked beforehand, because transformers creates an empty tokenizer if the files are missing.
        if not source.is_local:
            cached_file(source.place, "tokenizer_config.json")
        elif not has_tokenizer(source):
            raise FileNotFoundError("neither tokenizer.json nor vocab.json with merges.txt")
        return CLIPTokenizer.from_pretrained(source.where)
