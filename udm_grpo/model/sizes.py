"""Limits for the sizes in config.json, so that a malicious or damaged file is an error before memory is allocated."""

from collections.abc import Mapping
from typing import Any

MAX_SIZES = {
    "hidden_size": 2**16,
    "intermediate_size": 2**19,
    "num_attention_heads": 1024,
    "num_key_value_heads": 1024,
    "num_hidden_layers": 1024,
    "vocab_size": 2**24,
    "lm_vocab_size": 2**24,
    "lm_head_size": 2**24,
}
"""Largest value of each field; the released model has 28 layers of width 2048."""

MAX_VQ_SIZES = {
    "in_channels": 64,
    "out_channels": 64,
    "block_out_channels": 2**14,
    "layers_per_block": 64,
    "latent_channels": 2**14,
    "num_vq_embeddings": 2**24,
    "vq_embed_dim": 2**12,
}
"""Largest value of each field of an image tokenizer, in lists of each element; released: at most 131,072 codes."""
MAX_RESOLUTIONS = 10
"""Largest number of resolutions of an image tokenizer: 512 pixels per token along each axis. Released ones have 5."""


def check_vq_sizes(config: Mapping[str, Any]) -> None:
    """Raise ValueError naming the fields of a vae/config.json that are too large for any image tokenizer."""
    wrong = []
    for name, most in MAX_VQ_SIZES.items():
        values = config[name] if isinstance(config[name], tuple) else (config[name],)
        if len(values) > MAX_RESOLUTIONS:
            wrong.append(f"{name} has {len(values)} values, expected at most {MAX_RESOLUTIONS}")
        elif large := [value for value in values if value > most]:
            wrong.append(f"{name} is {_shown(large[0])}, expected at most {most}")
    if wrong:
        raise ValueError(f"vae config.json: {'; '.join(wrong)}. The file is damaged or not of this model.")


def _shown(number: int) -> str:
    """Return a number for an error message; a huge one, which Python refuses to print, by its length."""
    return f"{number}" if number.bit_length() < 128 else f"a number of {number.bit_length()} bits"


def check_sizes(config: Mapping[str, Any]) -> None:
    """Raise ValueError naming the fields with impossible values, which would exhaust memory or take forever."""
    wrong = []
    for name, most in MAX_SIZES.items():
        size = config[name]
        if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= most:
            wrong.append(f"{name} is {size!r:.40}, expected a whole number from 1 to {most}")
    theta = config["rope_theta"]
    if isinstance(theta, bool) or not isinstance(theta, int | float) or not 0 < theta < float("inf"):
        wrong.append(f"rope_theta is {theta!r:.40}, expected a number above 0")
    if wrong:
        raise ValueError(f"transformer config.json: {'; '.join(wrong)}. The file is damaged or not of this model.")
