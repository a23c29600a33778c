"""CLIP for the scorers: a folder or hub name in, image and text embeddings of length 1 out.

Weights are read in the format of transformers (clip_transformers.py) or of open_clip (clip_open.py), with the same
embeddings for either. Loading never runs code (clip_files.py).

Source: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision".
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
import torch

from rewards_bridge.errors import UsageError
from rewards_bridge.scorers import clip_open
from rewards_bridge.scorers.base import cut_text
from rewards_bridge.scorers.clip_files import Source
from rewards_bridge.scorers.clip_transformers import TransformersTowers, load_model, load_pixels, load_tokenizer

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

Pixels = Callable[[np.ndarray], torch.Tensor]
"""Images u8[b,H,W,3] -> normalised f32[b,3,S,S], where S is the model's input size."""

_LOG = logging.getLogger("rewards_bridge")


class Towers(Protocol):
    """The two encoders of a CLIP with its tokenizer."""

    side: int
    """Side in pixels of the model's square input images."""
    logit_scale: float
    """The factor by which cosines are multiplied."""
    text_tokens: int
    """Maximum number of tokens, including start and end tokens; longer texts are truncated."""

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        ...

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move the model to a device and a dtype."""
        ...

    def image_features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the projected features [b,E], not normalised, of f32[b,3,S,S]."""
        ...

    def text_features(self, prompts: Sequence[str]) -> torch.Tensor:
        """Return the projected features [b,E], not normalised, of b prompts."""
        ...

    def count_tokens(self, prompt: str) -> int:
        """Return the number of tokens of a whole prompt, including start and end tokens."""
        ...

    def tokenizer_fit(self) -> Mapping[str, tuple[object, object]]:
        """Return the values on which tokenizer and model must agree, by name: (the tokenizer's, the model's)."""
        ...


class Clip:
    """A CLIP model with its tokenizer and image preprocessing, on one device and in one dtype.

    Embeddings are f32 of length 1, computed in micro-batches of batch_size, which is reduced when memory runs out.
    Raises UsageError for an invalid device, dtype or batch_size, or if tokenizer or preprocessing are not the model's.
    """

    def __init__(
        self,
        scorer: str,
        towers: Towers,
        pixels: Pixels,
        device: str,
        dtype: str,
        batch_size: int,
    ) -> None:
        if dtype not in DTYPES:
            raise UsageError(f"scorer {scorer!r}: dtype={dtype!r}: expected one of {', '.join(DTYPES)}")
        if batch_size < 1:
            raise UsageError(f"scorer {scorer!r}: batch_size={batch_size}: expected at least 1")
        self._device = _open_device(scorer, device)
        check_fit(scorer, towers, pixels)
        self._scorer, self._towers, self._pixels, self._batch_size = scorer, towers, pixels, batch_size
        self.logit_scale = towers.logit_scale
        try:
            towers.to(self._device, DTYPES[dtype])
        except torch.OutOfMemoryError as error:
            raise self._out_of_memory("the model alone") from error

    def embed_images(self, images: np.ndarray) -> np.ndarray:
        """Return embeddings f32[B,E] of images u8[B,H,W,3]; UsageError if memory does not suffice for a single one."""

        def features(part: np.ndarray) -> torch.Tensor:
            return self._towers.image_features(self._pixels(part))

        return self._in_parts(features, images)

    def embed_texts(self, prompts: Sequence[str]) -> np.ndarray:
        """Return embeddings f32[B,E] of B prompts, truncated to the model's limit; equal prompts are embedded once."""
        rows = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
        return self._in_parts(self._towers.text_features, list(rows))[[rows[prompt] for prompt in prompts]]

    def logits(self, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        """Return exp(logit_scale) * cos(image, its prompt), f32[B], between -exp(logit_scale) and exp(logit_scale)."""
        cosines = np.einsum("be,be->b", self.embed_images(images), self.embed_texts(prompts))
        return cosines * np.float32(self.logit_scale)

    def cut(self, prompt: str) -> str:
        """Return a note if the end of a prompt is cut off; otherwise ""."""
        most = self._towers.text_tokens
        return cut_text(most) if self._towers.count_tokens(prompt) > most else ""

    @torch.inference_mode()
    def _in_parts(self, features: Callable[..., torch.Tensor], items: np.ndarray | Sequence[str]) -> np.ndarray:
        """Return the normalised features of all items, f32[len(items),E]."""
        parts: list[torch.Tensor] = []
        start = 0
        while start < len(items):
            part = items[start : start + self._batch_size]
            try:
                parts.append(torch.nn.functional.normalize(features(part).float(), dim=-1).cpu())
            except torch.OutOfMemoryError as error:
                if len(part) == 1:
                    raise self._out_of_memory("a single image or prompt") from error
                self._batch_size = len(part) // 2
                _LOG.warning("scorer %r: out of memory; its micro-batch is now %d", self._scorer, self._batch_size)
            else:
                start += len(part)
                continue
            # Only outside the except clause are the tensors of the failed attempt released.
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
        return torch.cat(parts).numpy()

    def _out_of_memory(self, what: str) -> UsageError:
        return UsageError(
            f"scorer {self._scorer!r}: {self._device} has not enough memory for {what}; "
            "use another device, dtype=float16 or bfloat16, or leave it more of the device's memory"
        )


def load_clip(model: Source, processor: Source, device: str, dtype: str, batch_size: int) -> Clip:
    """Load a Clip from files in either format; UsageError says what is missing or does not fit, and how to fix it.

    model: a folder or hub name of transformers, or a folder of open_clip. processor: the place of the tokenizer and,
    for the format of transformers, of preprocessor_config.json; pass the model's place to use its own.
    """
    if clip_open.is_open_clip(model):
        towers, reader = clip_open.load_folder(model, None if processor.place == model.place else processor)
        return Clip(model.scorer, towers, reader, device, dtype, batch_size)
    loaded = load_model(model)
    pixels = load_pixels(processor)
    return Clip(model.scorer, TransformersTowers(loaded, load_tokenizer(processor)), pixels, device, dtype, batch_size)


def load_towers(source: Source) -> Towers:
    """Load the encoders of a folder in either format or of a hub name, in float32 on the CPU, without preprocessing."""
    if clip_open.is_open_clip(source):
        towers: Towers = clip_open.load_folder(source)[0]
    else:
        towers = TransformersTowers(load_model(source), load_tokenizer(source))
    check_fit(source.scorer, towers)
    return towers


def _open_device(scorer: str, device: str) -> torch.device:
    try:
        torch_device = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"scorer {scorer!r}: device={device!r}: expected e.g. cpu or cuda:0 ({error})") from None
    if torch_device.type == "cuda" and (torch_device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"scorer {scorer!r}: device={device!r}: torch {torch.__version__} sees {torch.cuda.device_count()} CUDA "
            "devices; use another device, check CUDA_VISIBLE_DEVICES, or install a CUDA build of torch"
        )
    return torch_device


def check_fit(scorer: str, towers: Towers, pixels: Pixels | None = None) -> None:
    """Raise UsageError if tokenizer or preprocessing belong to another model, since scores would be silently wrong."""
    problems = dict(towers.tokenizer_fit())
    if pixels is not None:
        shape = tuple(pixels(np.zeros((1, 8, 8, 3), np.uint8)).shape)
        problems["the shape of an image"] = (shape, (1, 3, towers.side, towers.side))
    wrong = [f"{what}: {ours}, the model's {theirs}" for what, (ours, theirs) in problems.items() if ours != theirs]
    if wrong:
        raise UsageError(
            f"scorer {scorer!r}: the processor (tokenizer and image processor) is another model's: {'; '.join(wrong)}"
        )
