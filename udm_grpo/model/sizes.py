"""The sizes that a transformer's config.json may ask for; a hostile or damaged one ends here, not in memory."""

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
"""Largest value of each field; the released model has 28 layers of 2048."""


def check_sizes(config: Mapping[str, Any]) -> None:
    """Raise ValueError naming the fields that no model has: they would take all memory, or forever."""
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
