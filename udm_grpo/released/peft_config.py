"""PEFT's adapter_config.json: each field is understood here, makes no difference to the result, or is refused.

Checked against the fields of PEFT 0.3 to 0.21. An unknown field is refused unless its value is empty, because a newer
PEFT may compute something else with it.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

CONFIG_FILE = "adapter_config.json"
ADVICE = "merge that adapter with PEFT (merge_and_unload) and give the merged transformer instead"
UNDERSTOOD = (
    *("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules"),
    *("exclude_modules", "layers_to_transform", "init_lora_weights"),
)
NO_DIFFERENCE = (
    *("auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "inference_mode"),
    *("layers_pattern", "lora_dropout", "lora_ga_config", "loftq_config", "megatron_core", "merge_weights"),
    *("peft_version", "qalora_group_size", "revision", "runtime_config", "task_type", "velora_config"),
)
"""Fields on training, file locations and other fields, which do not change what a trained adapter computes."""
REFUSED = {
    "alora_invocation_tokens": "an activated LoRA acts only after certain tokens, so it has no merged weights",
    "arrow_config": "Arrow chooses among several adapters for each token",
    "bias": "the biases of the base were trained as well, but this model has none",
    "fan_in_fan_out": "the weights are transposed",
    "kasa_config": "KaSA changes the base weights at initialisation",
    "layer_replication": "layers of the base are repeated",
    "lora_bias": "the adapter has biases, but this model has none",
    "megatron_config": "the adapter belongs to Megatron's parallel layers",
    "modules_to_save": "whole modules were trained in addition to the adapter",
    "monteclora_config": "MonteCLoRA samples its weights",
    "target_parameters": "parameters outside of linear layers are adapted",
    "trainable_token_indices": "rows of the embedding were trained as well",
    "use_bdlora": "the matrices are block-diagonal",
    "use_dora": "DoRA also scales the columns of the base weights",
    "use_qalora": "QA-LoRA pools the inputs",
}
"""Unsupported fields that change the result -> what they do."""
SAME_BASE = ("gaussian", "eva", "orthogonal", "mica")
"""Initialisations, besides true and false, that leave the base weights unchanged."""


@dataclass(frozen=True)
class AdapterConfig:
    """The fields that determine what an adapter adds to a model. Modules are named as in the base model."""

    rank: int
    alpha: float
    rslora: bool
    ranks: Mapping[str, int]
    """Pattern of module names -> rank of these modules."""
    alphas: Mapping[str, float]
    """Pattern of module names -> alpha of these modules."""
    targets: str | tuple[str, ...] | None
    excluded: str | tuple[str, ...] | None
    layers: frozenset[int] | None
    """The layers that are adapted; None for all."""

    def rank_of(self, module: str) -> int:
        """Return the rank of a module."""
        return int(_by_pattern(self.ranks, module, self.rank))

    def scaling(self, module: str) -> float:
        """Return the factor of B A: alpha / r, or alpha / sqrt(r) with use_rslora."""
        rank = self.rank_of(module)
        return _by_pattern(self.alphas, module, self.alpha) / (math.sqrt(rank) if self.rslora else rank)

    def adapts(self, module: str, layer: int) -> bool:
        """Return whether a linear map is adapted, by the rules of PEFT."""
        if self.layers is not None and layer not in self.layers:
            return False
        if self.excluded and _matches(self.excluded, module):
            return False
        return self.targets in (None, "all-linear") or _matches(self.targets, module)


def read_config(raw: Mapping[str, Any], problems: list[str]) -> AdapterConfig | None:
    """Return the settings in an adapter_config.json; None, with each reason added to `problems`, if it is unusable."""
    lines = [*_number_problems(raw), *_pattern_problems(raw), *_other_problems(raw)]
    problems += [f"{CONFIG_FILE}: {line}" for line in lines]
    if lines:
        return None
    layers = raw.get("layers_to_transform")
    numbers = [layers] if isinstance(layers, int) else layers
    return AdapterConfig(
        rank=raw["r"],
        alpha=float(raw["lora_alpha"]),
        rslora=bool(raw.get("use_rslora")),
        ranks=raw.get("rank_pattern") or {},
        alphas=raw.get("alpha_pattern") or {},
        targets=_names(raw.get("target_modules")),
        excluded=_names(raw.get("exclude_modules")),
        layers=frozenset(numbers) if numbers else None,
    )


def _number_problems(raw: Mapping[str, Any]) -> list[str]:
    lines = []
    if raw.get("peft_type") != "LORA":
        lines.append(f"peft_type is {raw.get('peft_type')!r}; expected 'LORA', the only supported kind. {ADVICE}")
    if not _is_rank(raw.get("r")):
        lines.append(f"r is {raw.get('r')!r}; expected a whole number above 0")
    if not _is_alpha(raw.get("lora_alpha")):
        lines.append(f"lora_alpha is {raw.get('lora_alpha')!r}; expected a number above 0")
    return lines


def _pattern_problems(raw: Mapping[str, Any]) -> list[str]:
    lines = []
    for name, fits in (("rank_pattern", _is_rank), ("alpha_pattern", _is_alpha)):
        pattern = raw.get(name) or {}
        if not isinstance(pattern, dict) or not all(map(fits, pattern.values())):
            lines.append(f"{name} is {pattern!r}; expected an object of module name patterns and numbers above 0")
            continue
        lines += [f"{name}: {key!r} is not a regular expression" for key in pattern if not _compiles(key)]
    for name in ("target_modules", "exclude_modules"):
        value = raw.get(name)
        if isinstance(value, str) and not _compiles(value):
            lines.append(f"{name} is {value!r}, which is not a regular expression")
        elif isinstance(value, list) and not all(isinstance(word, str) for word in value):
            lines.append(f"{name} is {value!r}; expected names")
        elif value is not None and not isinstance(value, str | list):
            lines.append(f"{name} is {value!r}; expected names or a regular expression")
    layers = raw.get("layers_to_transform")
    numbers = layers if isinstance(layers, list) else [layers]
    if layers is not None and not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers):
        lines.append(f"layers_to_transform is {layers!r}; expected layer numbers")
    return lines


def _other_problems(raw: Mapping[str, Any]) -> list[str]:
    lines = []
    start = raw.get("init_lora_weights", True)
    if not isinstance(start, bool) and start is not None and str(start).lower() not in SAME_BASE:
        lines.append(
            f"init_lora_weights is {start!r}: that initialisation changes the base weights, so the adapter fits only "
            "the changed base. Save it with PEFT's path_initial_model_for_weight_conversion, which makes it a plain "
            f"LoRA, or {ADVICE}"
        )
    for name, reason in REFUSED.items():
        if not _is_empty(raw.get(name)):
            lines.append(f"{name} is {raw[name]!r}, which is not supported ({reason}); {ADVICE}")
    for name, value in raw.items():
        if name not in (*UNDERSTOOD, *NO_DIFFERENCE, *REFUSED) and not _is_empty(value):
            version = f", written by PEFT {raw['peft_version']}" if raw.get("peft_version") else ""
            lines.append(f"{name} is {value!r}, an unknown field{version}; {ADVICE}")
    return lines


def _by_pattern(patterns: Mapping[str, Any], module: str, usual: Any) -> Any:
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return usual


def _matches(names: str | tuple[str, ...] | None, module: str) -> bool:
    if names is None:
        return False
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _names(value: Any) -> str | tuple[str, ...] | None:
    return tuple(value) if isinstance(value, list) else value


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_alpha(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _is_empty(value: Any) -> bool:
    return value in (None, False, 0, "", "none") or (isinstance(value, list | dict) and not value)


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True
