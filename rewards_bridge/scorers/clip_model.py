"""CLIP as the scorers use it: a folder or hub name in, image and text embeddings of length 1 out.

Images are read by the PIL processor of transformers whatever else is installed, because that of torchvision gives
other pixels. Nothing that is loaded can run code: weights are safetensors, or PyTorch files read with weights_only.

Source: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision".
"""

from __future__ import annotations

import logging
import re
import shlex
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer
from transformers.utils import cached_file

from rewards_bridge.errors import UsageError

TEXT_TOKENS = 77
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
PROCESSOR_FILES = ("--include", "*.json", "--include", "merges.txt")
"""What of a hub repository is its processor, without weights, as arguments of `hf download`."""
LEGACY_EOS = 2
"""The eos_token_id in configurations older than transformers 4.31; it stands for "the highest token of the text"."""

Pixels = Callable[[np.ndarray], torch.Tensor]
"""Images u8[b,H,W,3] -> normalised f32[b,3,S,S], S the side that the model wants."""

_LOG = logging.getLogger("rewards_bridge")


@dataclass(frozen=True)
class Source:
    """Where a scorer's files are to be found, and what an error about them says."""

    scorer: str
    option: str
    """The scorer's option that named the place."""
    place: str
    """A local folder or file, or a hub name owner/name."""
    published: str
    """The hub name of what is published, to download if the place is a local one."""
    download: tuple[str, ...] = ()
    """Further arguments of `hf download`: file names or patterns."""

    @property
    def path(self) -> Path:
        """The place as a local path, which need not exist."""
        return Path(self.place).expanduser()

    @property
    def is_local(self) -> bool:
        """Whether the place is a local path and not a hub name; what exists is local."""
        return self.path.exists() or self.place[:1] in ("", ".", "/", "~") or self.place.count("/") != 1

    @property
    def where(self) -> str:
        """The place as transformers takes it."""
        return str(self.path) if self.is_local else self.place

    def has(self, *names: str) -> bool:
        """Whether the place is a local folder with all these files."""
        return all((self.path / name).is_file() for name in names)

    def missing(self, what: str, reason: object) -> UsageError:
        """The error for something that is not there: says how to download it and which option to give."""
        name, folder = (self.published, self.place) if self.is_local else (self.place, self.place.split("/")[-1])
        folder = folder or self.published.split("/")[-1]
        command = shlex.join(["hf", "download", name, *self.download, "--local-dir", folder])
        return UsageError(
            f"scorer {self.scorer!r}: no {what} at {self.option}={self.place!r} ({_first_line(reason)}). "
            f"Download it with: {command}; and give the option {self.option}={folder}"
        )

    def wrong(self, problem: str) -> UsageError:
        """The error for something that is there and cannot be used."""
        return UsageError(f"scorer {self.scorer!r}: {self.option}={self.place!r}: {problem}")

    @contextmanager
    def reading(self, what: str) -> Iterator[None]:
        """Turn what goes wrong inside into a UsageError: not there, unreadable, or more than tensors."""
        try:
            if self.is_local and not self.path.exists():
                raise FileNotFoundError("no such file or folder")
            yield
        except UsageError:
            raise
        except OSError as error:
            raise self.missing(what, error) from error
        except Exception as error:  # of many types, for a file may be damaged in many ways
            if re.search(r"Unsupported (global|class|operand)", str(error)):
                reason = f"the {what} holds more than tensors, and loading that could run code; wanted .safetensors"
                raise self.wrong(reason) from None
            raise self.wrong(f"cannot read the {what} ({_first_line(error)}); download it again") from error


class Clip:
    """A CLIP model with its tokenizer and its way of reading images, on one device and in one dtype.

    Embeddings are f32 and of length 1; they are made in micro-batches of batch_size, fewer once memory has run out.
    Raises UsageError if device, dtype or batch_size cannot be, or if the tokenizer or the pixels are not the model's.
    """

    def __init__(
        self,
        scorer: str,
        model: CLIPModel,
        tokenizer: CLIPTokenizer,
        pixels: Pixels,
        device: str,
        dtype: str,
        batch_size: int,
    ) -> None:
        if dtype not in DTYPES:
            raise UsageError(f"scorer {scorer!r}: dtype={dtype!r}: wanted one of {', '.join(DTYPES)}")
        if batch_size < 1:
            raise UsageError(f"scorer {scorer!r}: batch_size={batch_size}: wanted at least 1 image at a time")
        self._device = _open_device(scorer, device)
        _check_fit(scorer, model, tokenizer, pixels)
        self._scorer, self._tokenizer, self._pixels, self._batch_size = scorer, tokenizer, pixels, batch_size
        # Read before the cast: in bfloat16 ln(100) is off by so much that every score would be 1 % too high or low.
        self.logit_scale = float(model.logit_scale.detach().exp())
        try:
            self._model = model.eval().requires_grad_(False).to(self._device, DTYPES[dtype])
        except torch.OutOfMemoryError as error:
            raise self._out_of_memory("the model alone") from error

    def embed_images(self, images: np.ndarray) -> np.ndarray:
        """Embeddings f32[B,E] of images u8[B,H,W,3]; UsageError if memory runs out for a single one."""

        def features(part: np.ndarray) -> torch.Tensor:
            pixels = self._pixels(part).to(self._device)
            return self._model.get_image_features(pixel_values=pixels).pooler_output

        return self._in_parts(features, images)

    def embed_texts(self, prompts: Sequence[str]) -> np.ndarray:
        """Embeddings f32[B,E] of B prompts, each padded and cut to 77 tokens; equal prompts are embedded once."""

        def features(part: Sequence[str]) -> torch.Tensor:
            tokens = self._tokenizer(
                list(part), padding="max_length", truncation=True, max_length=TEXT_TOKENS, return_tensors="pt"
            ).to(self._device)
            return self._model.get_text_features(**tokens).pooler_output

        rows = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
        return self._in_parts(features, list(rows))[[rows[prompt] for prompt in prompts]]

    def logits(self, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        """exp(logit_scale) * cos(image, its prompt), f32[B]: between -exp(logit_scale) and exp(logit_scale)."""
        cosines = np.einsum("be,be->b", self.embed_images(images), self.embed_texts(prompts))
        return cosines * np.float32(self.logit_scale)

    @torch.inference_mode()
    def _in_parts(self, features: Callable[..., torch.Tensor], items: np.ndarray | Sequence[str]) -> np.ndarray:
        """The features of all items as rows of length 1, f32[len(items),E]."""
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
            # Only here, outside the except clause, have the tensors of the failed attempt been let go.
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
        return torch.cat(parts).numpy()

    def _out_of_memory(self, what: str) -> UsageError:
        return UsageError(
            f"scorer {self._scorer!r}: {self._device} has no memory for {what}; "
            "give it another device, dtype=float16 or bfloat16, or leave more of the device's memory to it"
        )


def load_clip(model: Source, processor: Source, device: str, dtype: str, batch_size: int) -> Clip:
    """A Clip of transformers files; UsageError says what is missing or does not fit, and what to do."""
    loaded = load_model(model)
    pixels = load_processor(processor)
    return Clip(model.scorer, loaded, load_tokenizer(processor), pixels, device, dtype, batch_size)


def load_config(source: Source) -> CLIPConfig:
    """The configuration of a folder or hub repository; UsageError if it is not that of a CLIP."""
    with source.reading("config.json"):
        found = CLIPConfig.get_config_dict(source.where)[0]
        if not found:  # transformers finds nothing in a folder without the file, and makes a default model of it
            raise FileNotFoundError("no such file")
        if found.get("model_type") != "clip":
            raise source.wrong(f"model_type in config.json is {found.get('model_type')!r}, wanted 'clip'")
        return CLIPConfig.from_pretrained(source.where)


def load_model(source: Source) -> CLIPModel:
    """The model of a folder or hub repository in float32; UsageError unless every weight is there and fits."""
    config = load_config(source)
    with source.reading("weights"):
        return _load(source, source.where, config, None)


def model_from_tensors(source: Source, config: CLIPConfig, tensors: Mapping[str, torch.Tensor]) -> CLIPModel:
    """The model of these tensors, by transformers' names, in float32; UsageError unless they are all of its own."""
    return _load(source, None, config, dict(tensors))


def _load(source: Source, place: str | None, config: CLIPConfig, tensors: dict[str, torch.Tensor] | None) -> CLIPModel:
    loaded: Any = CLIPModel.from_pretrained(  # typed as a model, but with the loading info it is a pair
        place,
        config=config,
        state_dict=tensors,
        dtype=torch.float32,
        weights_only=True,
        ignore_mismatched_sizes=True,  # collected and refused below, together with everything else
        output_loading_info=True,
    )
    model, info = loaded
    misshapen = {name: (tuple(found), tuple(wanted)) for name, found, wanted in info["mismatched_keys"]}
    refuse_differences(source, info["missing_keys"], info["unexpected_keys"], misshapen)
    return model


def refuse_differences(
    source: Source,
    missing: Collection[str],
    unexpected: Collection[str],
    misshapen: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]],
) -> None:
    """Raise UsageError that names the tensors, unless there are none; misshapen is name -> (found, wanted) shape."""
    shapes = [f"{name} is {list(found)}, wanted {list(wanted)}" for name, (found, wanted) in misshapen.items()]
    kinds = {"missing": missing, "not of this model": unexpected, "of another shape": shapes}
    problems = [f"{len(names)} {kind}: {_some(sorted(names))}" for kind, names in kinds.items() if names]
    if problems:
        raise source.wrong(f"the weights are not those of the architecture wanted; {'; '.join(problems)}")


def load_processor(source: Source) -> Pixels:
    """What a preprocessor_config.json says is done to images; UsageError if there is none."""
    with source.reading("preprocessor_config.json"):
        processor = CLIPImageProcessorPil.from_pretrained(source.where)

    def pixels(images: np.ndarray) -> torch.Tensor:
        return processor(list(images), return_tensors="pt", input_data_format="channels_last")["pixel_values"]

    return pixels


def has_tokenizer(source: Source) -> bool:
    """Whether the place is a local folder with the files of a tokenizer."""
    return source.has("tokenizer.json") or source.has("vocab.json", "merges.txt")


def load_tokenizer(source: Source) -> CLIPTokenizer:
    """The tokenizer of a folder or hub repository; UsageError if there is none."""
    with source.reading("tokenizer"):
        # Asked beforehand, because transformers makes an empty tokenizer of nothing.
        if not source.is_local:
            cached_file(source.place, "tokenizer_config.json")
        elif not has_tokenizer(source):
            raise FileNotFoundError("neither tokenizer.json nor vocab.json with merges.txt")
        return CLIPTokenizer.from_pretrained(source.where)


def load_tensors(source: Source, path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors or PyTorch file by name, on the CPU, those under "state_dict" if there is one.

    A PyTorch file is read with weights_only. Raises UsageError if it is damaged or holds something else.
    """
    with source.reading(f"weights {path.name}"):
        loaded = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
        if isinstance(loaded, dict) and "state_dict" in loaded:
            loaded = loaded["state_dict"]
        if not isinstance(loaded, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in loaded.values()):
            raise source.wrong(f"{path.name} is no dict of tensors by name, as a state dict is")
        return loaded


def _open_device(scorer: str, device: str) -> torch.device:
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"scorer {scorer!r}: device={device!r}: wanted cpu or cuda:0, say ({error})") from None
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"scorer {scorer!r}: device={device!r}: torch {torch.__version__} sees {torch.cuda.device_count()} CUDA "
            "devices; give another device, look at CUDA_VISIBLE_DEVICES, or install a CUDA build of torch"
        )
    return found


def image_side(model: CLIPModel) -> int:
    """Pixels along an edge of the square images that the model takes."""
    return cast(int, model.vision_model.config.image_size)


def _check_fit(scorer: str, model: CLIPModel, tokenizer: CLIPTokenizer, pixels: Pixels) -> None:
    """Raise UsageError if tokenizer or pixels are another model's: it would answer all the same, with nonsense."""
    text, wanted = model.text_model.config, (1, 3, image_side(model), image_side(model))
    last = len(tokenizer) - 1 if text.eos_token_id == LEGACY_EOS else text.eos_token_id
    problems = {
        "tokens in the vocabulary": (len(tokenizer), text.vocab_size),
        "the number of the last token of a text": (tokenizer.eos_token_id, last),
        "tokens of the longest text": (TEXT_TOKENS, text.max_position_embeddings),
        "the shape of an image": (tuple(pixels(np.zeros((1, 8, 8, 3), np.uint8)).shape), wanted),
    }
    wrong = [f"{what}: {ours}, the model's {theirs}" for what, (ours, theirs) in problems.items() if ours != theirs]
    if wrong:
        raise UsageError(
            f"scorer {scorer!r}: the processor (tokenizer and image processor) is another model's; {'; '.join(wrong)}"
        )


def _some(names: Sequence[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _first_line(reason: object) -> str:
    # torch's first lines advise to load the file without weights_only; what is wrong with it comes after.
    lines = str(reason).split("WeightsUnpickler error: ")[-1].strip().splitlines()
    return lines[0][:200] if lines else type(reason).__name__
