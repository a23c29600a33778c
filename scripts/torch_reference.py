"""Compute the logits of a released folder with a torch model that shares no code with udm_grpo: transformers' Qwen3.

    python scripts/torch_reference.py FOLDER inputs.npz logits.npz

inputs.npz holds prompt_ids int[B, L] and image_ids int[B, h, w]; logits.npz receives logits float32[B, h*w, V], those
of the clean code at each image token. `python -m udm_grpo.convert verify --forward` runs this script and compares.

The model differs from Qwen3 as a language model in two ways: attention has no mask (every token sees every other), and
each of the 64 rotary frequencies uses one of three positions. Everything is computed in float32 on the CPU.

Source: URSA, arXiv 2510.24717; Qwen3.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

if __name__ == "__main__":
    # No image is read here: keep transformers from importing torchvision, which fails beside a CPU build of torch.
    sys.modules["torchvision"] = None  # type: ignore[assignment]

from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3Model

HEAD_DIM = 128
"""Fixed by the format rather than by transformer/config.json, like the 1e-6 of the norms below."""
SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "num_hidden_layers",
    "vocab_size",
)


class Reference(torch.nn.Module):
    """Qwen3's layers between URSA's embedding and its untied head; parameters are named as in a released file."""

    def __init__(self, sizes: dict[str, Any]):
        super().__init__()
        # Other attention implementations treat a missing mask as a causal one.
        options: dict[str, Any] = {name: sizes[name] for name in SIZES} | {"attn_implementation": "eager"}
        config = Qwen3Config(
            **options,
            head_dim=HEAD_DIM,
            rms_norm_eps=1e-6,
            attention_bias=False,
            tie_word_embeddings=False,
        )
        self.sizes = sizes
        self.model = Qwen3Model(config)
        self.lm_head = torch.nn.Linear(sizes["hidden_size"], sizes["lm_head_size"], bias=False)

    def forward(self, prompt_ids: torch.Tensor, image_ids: torch.Tensor) -> torch.Tensor:
        """Return float32 logits [B, h*w, V] for prompts int64[B, L] and codes int64[B, h, w]."""
        (batch, length), (_, height, width) = prompt_ids.shape, image_ids.shape
        bov = torch.full((batch, 1), self.sizes["bov_token_id"])
        codes = image_ids.reshape(batch, -1) + self.sizes["lm_vocab_size"]
        rotary = rotary_embeddings(length, height, width, self.sizes["rope_theta"])
        hidden = self.model.embed_tokens(torch.cat([prompt_ids, bov, codes], dim=1))
        for layer in self.model.layers:
            hidden = layer(hidden, attention_mask=None, position_embeddings=rotary)
        hidden = self.model.norm(hidden)
        return self.lm_head(hidden[:, length : length + height * width])  # the row before a token predicts it


def rotary_embeddings(length: int, height: int, width: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosines and sines float32[1, L + 1 + h*w, 128] of the positions (t, h, w) of [text, BOV, image tokens]."""
    text = [(i, i, i) for i in range(length + 1)]
    image = [(length + 1, y, x) for y in range(height) for x in range(width)]
    positions = torch.tensor(text + image, dtype=torch.float32)
    axes = [j % 3 for j in range(48)] + [1 + j % 2 for j in range(16)]
    frequencies = 1.0 / theta ** (torch.arange(0, HEAD_DIM, 2, dtype=torch.float32) / HEAD_DIM)
    angles = positions[:, axes] * frequencies
    both_halves = torch.cat([angles, angles], dim=-1)[None]
    return both_halves.cos(), both_halves.sin()


def read_state(folder: Path) -> dict[str, torch.Tensor]:
    """Return the tensors in a transformer's folder, widened to float32; raises FileNotFoundError if it has none."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    if not tensors:
        for path in sorted(file for file in folder.iterdir() if file.suffix in (".bin", ".pth", ".pt")):
            tensors |= torch.load(path, map_location="cpu", weights_only=True)
    if not tensors:
        raise FileNotFoundError(f"{folder} contains no .safetensors, .bin or .pth file")
    return {name: tensor.float() for name, tensor in tensors.items()}


def load_reference(folder: Path) -> Reference:
    """Return the model of a released folder; raises RuntimeError for tensors that do not fit its config.json."""
    sizes = json.loads((folder / "transformer" / "config.json").read_text())
    with torch.device("meta"):  # allocates no memory for values that are replaced at once
        model = Reference(sizes)
    model.load_state_dict(read_state(folder / "transformer"), strict=True, assign=True)
    return model.eval()


def main() -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="released model folder")
    parser.add_argument("inputs", type=Path, help=".npz with prompt_ids [B, L] and image_ids [B, h, w]")
    parser.add_argument("output", type=Path, help=".npz to write: logits [B, h*w, V]")
    args = parser.parse_args()
    with np.load(args.inputs) as inputs:
        prompt_ids, image_ids = (
            torch.from_numpy(inputs[name].astype(np.int64)) for name in ("prompt_ids", "image_ids")
        )
    with torch.inference_mode():
        logits = load_reference(args.folder)(prompt_ids, image_ids)
    np.savez(args.output, logits=logits.numpy())
    return 0


if __name__ == "__main__":
    sys.exit(main())
