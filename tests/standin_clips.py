"""Small random CLIPs in open_clip's format: the folder for GenEval's colours, and an HPS v2 file."""

import json
from pathlib import Path
from typing import Any

import torch

VOCABULARY, TEXT_TOKENS = 49408, 77
"""open_clip's tokenizer is part of its package, so even a tiny text tower needs all of its tokens."""
MODEL: dict[str, Any] = {
    "embed_dim": 16,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8},
    "text_cfg": {"context_length": TEXT_TOKENS, "vocab_size": VOCABULARY, "width": 32, "heads": 4, "layers": 2},
}
PREPROCESSING = {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711]}


def make_open_clip(folder: Path, weights: str = "pytorch_model.bin") -> Path:
    """Create a folder in open_clip's layout; `weights` is pytorch_model.bin or open_clip_pytorch_model.bin."""
    folder.mkdir(parents=True)
    config = {"model_cfg": MODEL, "preprocess_cfg": PREPROCESSING}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    torch.save(open_clip_tensors(seed=5), folder / weights)
    return folder


def make_hps(path: Path) -> Path:
    """Save an HPS v2 file, a training checkpoint of open_clip, with a config beside it, since it is not a ViT-H-14."""
    path.parent.mkdir(parents=True, exist_ok=True)
    (path.parent / "open_clip_config.json").write_text(json.dumps({"model_cfg": MODEL}, indent=2) + "\n")
    torch.save({"epoch": 1, "name": "hps", "state_dict": open_clip_tensors(seed=6)}, path)
    return path


def open_clip_tensors(seed: int, model: dict[str, Any] = MODEL) -> dict[str, torch.Tensor]:
    """Return random tensors with open_clip's names, for a model of these sizes."""
    vision, text, embedding = model["vision_cfg"], model["text_cfg"], model["embed_dim"]
    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    shapes: dict[str, tuple[int, ...]] = {
        "positional_embedding": (text["context_length"], text["width"]),
        "text_projection": (text["width"], embedding),
        "token_embedding.weight": (text["vocab_size"], text["width"]),
        "visual.class_embedding": (vision["width"],),
        "visual.positional_embedding": (patches + 1, vision["width"]),
        "visual.proj": (vision["width"], embedding),
        "visual.conv1.weight": (vision["width"], 3, vision["patch_size"], vision["patch_size"]),
    }
    norms = {"ln_final": text["width"], "visual.ln_pre": vision["width"], "visual.ln_post": vision["width"]}
    for tower, sizes in (("", text), ("visual.", vision)):
        width = sizes["width"]
        for layer in range(sizes["layers"]):
            block = f"{tower}transformer.resblocks.{layer}"
            norms |= {f"{block}.ln_1": width, f"{block}.ln_2": width}
            shapes |= {f"{block}.attn.in_proj_weight": (3 * width, width), f"{block}.attn.in_proj_bias": (3 * width,)}
            for name, shape in (
                ("attn.out_proj", (width, width)),
                ("mlp.c_fc", (4 * width, width)),
                ("mlp.c_proj", (width, 4 * width)),
            ):
                shapes |= {f"{block}.{name}.weight": shape, f"{block}.{name}.bias": shape[:1]}
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in sorted(shapes.items())}
    for name, width in norms.items():
        tensors |= {f"{name}.weight": torch.ones(width), f"{name}.bias": torch.zeros(width)}
    return tensors | {"logit_scale": torch.tensor(4.6052)}
