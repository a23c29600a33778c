"""Tiny random stand-ins for the files that users of the published recipes download, with the same names and layouts.

`make(folder)` fills a folder in the layout of README.md and the recipe pages. The files are written with torch and
safetensors alone, not by this project's own code, so that the readers are tested against the format.
"""

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from clip_helpers import make_config, make_folder
from safetensors.torch import load_file, save_file
from standin_clips import make_hps, make_open_clip
from standin_prompts import make_prompts
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

TINY_DETECTOR = Path(__file__).parent / "golden" / "mask2former" / "tiny_mmdet.safetensors"
DETECTOR = "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco.pth"
DOWNLOADED_DETECTOR = "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco_20220504_001756-743b7d99.pth"
URSA = "URSA-1.7B-IBQ512"
CODES, CHANNELS, WIDTH, LAYERS, HEAD = 64, 8, 128, 2, 128
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>")
WEIGHTS = "diffusion_pytorch_model"


def make(folder: Path) -> Path:
    """Create models/ and data/ of every recipe in `folder`, with seeded random weights; return the folder."""
    make_models(folder / "models")
    make_prompts(folder / "data")
    return folder


def make_models(models: Path) -> None:
    """Create everything that is downloaded to models/, and a training checkpoint of the public release beside it."""
    make_ursa(models / URSA)
    make_training_checkpoint(models.parent / "checkpoint-100", models / URSA)
    clip = make_folder(models / "clip-vit-large-patch14", make_config("quick_gelu"))
    torch.save(load_file(clip / "model.safetensors"), clip / "pytorch_model.bin")  # the Hub has both
    make_folder(models / "PickScore_v1", make_config("gelu"))
    make_open_clip(models / "vit_large_patch14_clip_224.openai")
    make_hps(models / "HPSv2" / "HPS_v2_compressed.pt")
    make_detector(models / DOWNLOADED_DETECTOR)
    shutil.copy(models / DOWNLOADED_DETECTOR, models / DETECTOR)


def make_detector(path: Path) -> None:
    """Write GenEval's detector as mmdetection 2.x saves it."""
    tensors = load_file(TINY_DETECTOR)
    tensors["panoptic_head.cls_embed.weight"] *= 40  # random scores so confident that objects are detected
    notes = {"mmdet_version": "2.24.0", "epoch": 50, "iter": 368750, "CLASSES": ("person", "bicycle")}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"meta": notes, "state_dict": tensors, "optimizer": {}}, path)


# ---------------------------------------------------------------- URSA


def make_ursa(folder: Path) -> Path:
    """Write a released folder with 16-pixel tokens and prompts of 320 tokens."""
    texts = make_tokenizer(folder / "tokenizer")
    _write_json(folder / "model_index.json", _named("URSAPipeline") | PARTS)
    sizes = {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_hidden_layers": LAYERS,
        "rope_theta": 1000000,
        "vocab_size": texts + CODES,
        "lm_vocab_size": texts,
        "lm_head_size": CODES,
        "bov_token_id": SPECIAL.index("<|vision_start|>"),
    }
    _write_json(folder / "transformer" / "config.json", _named("URSATransformer3DModel") | sizes)
    save_file(transformer(sizes), folder / "transformer" / f"{WEIGHTS}.safetensors", {"format": "pt"})
    _write_json(folder / "vae" / "config.json", _named("AutoencoderVQ") | TOKENIZER_OF_IMAGES)
    save_file(image_tokenizer(), folder / "vae" / f"{WEIGHTS}.safetensors", {"format": "pt"})
    path = {"alpha": 0.5, "c": 6, "shift": 1.0, "eps": 1e-05}
    _write_json(folder / "scheduler" / "scheduler_config.json", _named("KineticOptimalScheduler") | path)
    torch.save({"path.emb": _random(CODES, CHANNELS, seed=3)}, folder / "scheduler" / "scheduler_model.pth")
    return folder


def make_training_checkpoint(folder: Path, base: Path) -> Path:
    """Write a training checkpoint of the public release: only a transformer, a .bin file beside its config.json."""
    config = json.loads((base / "transformer" / "config.json").read_text())
    _write_json(folder / "transformer" / "config.json", config)
    tensors = transformer(config)
    trained = {
        name: tensor + 0.01 * torch.randn(tensor.shape, generator=_generator(4)) for name, tensor in tensors.items()
    }
    torch.save(trained, folder / "transformer" / f"{WEIGHTS}.bin")
    return folder


def make_tokenizer(folder: Path) -> int:
    """Write a byte-level BPE in Qwen2's file layout; return its number of tokens."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=320,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["a photo of a red circle and a green bench", "a photo of two clocks"], trainer)
    folder.mkdir(parents=True)
    tokenizer.model.save(str(folder))  # vocab.json and merges.txt
    tokenizer.save(str(folder / "tokenizer.json"))
    added = {str(tokenizer.token_to_id(token)): {"content": token, "special": True} for token in SPECIAL}
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "added_tokens_decoder": added,
        "model_max_length": 320,
        "pad_token": "<|endoftext|>",
        "eos_token": "<|im_end|>",
        "padding_side": "left",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
    }
    _write_json(folder / "tokenizer_config.json", settings)
    return tokenizer.get_vocab_size()


def transformer(sizes: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return random tensors under the names of a released transformer."""
    width, middle = sizes["hidden_size"], sizes["intermediate_size"]
    queries, values = (HEAD * sizes[f"num_{kind}_heads"] for kind in ("attention", "key_value"))
    shapes = {"embed_tokens.weight": (sizes["vocab_size"], width), "norm.weight": (width,)}
    for layer in range(sizes["num_hidden_layers"]):
        block = {"q_proj": (queries, width), "k_proj": (values, width), "v_proj": (values, width)}
        block |= {"o_proj": (width, queries), "q_norm": (HEAD,), "k_norm": (HEAD,)}
        block = {f"self_attn.{name}": shape for name, shape in block.items()}
        block |= {"mlp.gate_proj": (middle, width), "mlp.up_proj": (middle, width), "mlp.down_proj": (width, middle)}
        block |= {"input_layernorm": (width,), "post_attention_layernorm": (width,)}
        shapes |= {f"layers.{layer}.{name}.weight": shape for name, shape in block.items()}
    named = {f"model.{name}": shape for name, shape in shapes.items()}
    return _fill(named | {"lm_head.weight": (sizes["lm_head_size"], width)}, seed=1)


LEVELS = [32, 32, 32, 32, 32]
"""Channels of the image tokenizer's blocks: five blocks halve the sides four times, so a token has 16 x 16 pixels."""
TOKENIZER_OF_IMAGES = {
    "_quantizer_name": "VQuantizer",
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": LEVELS,
    "layers_per_block": 1,
    "latent_channels": CHANNELS,
    "num_vq_embeddings": CODES,
    "vq_embed_dim": CHANNELS,
    "attn_down_block": True,
    "attn_up_block": True,
}
PARTS = {
    "scheduler": ["diffnext.schedulers.scheduling_dfm", "KineticOptimalScheduler"],
    "tokenizer": ["transformers", "Qwen2TokenizerFast"],
    "transformer": ["diffnext.models.transformers.transformer_ursa", "URSATransformer3DModel"],
    "vae": ["diffnext.models.autoencoders.autoencoder_vq", "AutoencoderVQ"],
}


def image_tokenizer() -> dict[str, torch.Tensor]:
    """Return random tensors under the names of a released image tokenizer.

    It has the channels of LEVELS, one layer per block, and attention at the lowest resolution.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    last, width = len(LEVELS) - 1, LEVELS[0]
    for level in range(len(LEVELS)):
        shapes |= _below(f"encoder.down_blocks.{level}.resnets.0", RESNET)
        for resnet in range(2):
            shapes |= _below(f"decoder.up_blocks.{level}.resnets.{resnet}", RESNET)
        if level < last:
            shapes |= _convolution(f"encoder.down_blocks.{level}.downsamplers.0.conv", width, width)
            shapes |= _convolution(f"decoder.up_blocks.{level}.upsamplers.0.conv", width, width)
    shapes |= _below(f"encoder.down_blocks.{last}.attentions.0", ATTENTION)
    for layer in range(2):
        shapes |= _below(f"decoder.up_blocks.0.attentions.{layer}", ATTENTION)
    for side, first, end in (("encoder", 3, CHANNELS), ("decoder", CHANNELS, 3)):
        shapes |= _convolution(f"{side}.conv_in", first, width) | _convolution(f"{side}.conv_out", width, end)
        shapes |= _below(f"{side}.mid_block.attentions.0", ATTENTION)
        for resnet in range(2):
            shapes |= _below(f"{side}.mid_block.resnets.{resnet}", RESNET)
        shapes |= {f"{side}.conv_norm_out.{kind}": (width,) for kind in ("weight", "bias")}
    shapes |= _convolution("quant_conv", CHANNELS, CHANNELS, 1) | _convolution("post_quant_conv", CHANNELS, CHANNELS, 1)
    return _fill(shapes | {"quantizer.embedding.weight": (CODES, CHANNELS)}, seed=2)


def _convolution(name: str, start: int, end: int, side: int = 3) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (end, start, side, side), f"{name}.bias": (end,)}


def _below(prefix: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {f"{prefix}.{name}": shape for name, shape in shapes.items()}


def _block() -> Iterator[tuple[str, tuple[int, ...]]]:
    for number in (1, 2):
        yield from _convolution(f"conv{number}", LEVELS[0], LEVELS[0]).items()
        yield from ((f"norm{number}.{kind}", (LEVELS[0],)) for kind in ("weight", "bias"))


RESNET = dict(_block())
ATTENTION: dict[str, tuple[int, ...]] = {
    **{f"{name}.weight": (LEVELS[0], LEVELS[0]) for name in ("to_q", "to_k", "to_v", "to_out.0")},
    **{f"{name}.bias": (LEVELS[0],) for name in ("to_q", "to_k", "to_v", "to_out.0", "group_norm")},
    "group_norm.weight": (LEVELS[0],),
}


# ---------------------------------------------------------------- shared helpers


def _fill(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, torch.Tensor]:
    """Return norms of ones, biases of zeros, and random matrices that preserve the scale of their input."""
    generator = _generator(seed)
    tensors = {}
    for name, shape in sorted(shapes.items()):
        if name.endswith(".bias"):
            tensors[name] = torch.zeros(shape)
        elif len(shape) == 1:
            tensors[name] = torch.ones(shape)
        else:
            tensors[name] = torch.randn(shape, generator=generator) / math.prod(shape[1:]) ** 0.5
    return tensors


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=_generator(seed))


def _named(class_name: str) -> dict[str, Any]:
    return {"_class_name": class_name, "_diffusers_version": "0.35.1"}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")
