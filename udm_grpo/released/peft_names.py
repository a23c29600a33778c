"""How versions of PEFT, and wrappers around its models, name the tensors of an adapter.

base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight            what PEFT saves
base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight    a state dict, with the adapter's name
module.base_model.model._orig_mod.model.layers.0...                       inside DDP, DeepSpeed, torch.compile or FSDP
transformer.model.layers.0.self_attn.q_proj.lora_A.weight                 as diffusers saves it, under a part's name
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from udm_grpo.tensor_files.tensor_names import drop_wrappers

WEIGHT = re.compile(
    r"(?P<start>(?:.+\.)?)(?P<module>layers\.(?P<layer>\d+)\.(?:self_attn|mlp)\.(?P<map>(?:q|k|v|o|gate|up|down)_proj))"
    r"\.lora_(?P<side>[AB])(?:\.(?P<adapter>\w+))?\.weight"
)
OTHERS = {
    r"\.lora_magnitude_vector": "DoRA's magnitudes",
    r"\.lora_embedding_[AB]": "an adapted embedding",
    r"\.modules_to_save\.|\.original_module\.": "whole modules that were trained in addition to the adapter",
    r"\.token_adapter\.|\.trainable_tokens": "trained rows of the embedding",
    r"\.base_layer\.": "the weights of the base model; this is the state dict of the whole adapted model",
    r"\.lora_[AB](\.\w+)?\.bias": "biases of the adapter",
    r"\.lora_(E|ranknum)": "AdaLoRA, another kind of adapter",
    r"\.(ia3_|hada_|lokr_|oft_|boft_|vera_|fourierft_|randlora_|vblora_|road_|miss_|shira_)": "another kind of adapter",
    r"^prompt_|\.prompt_encoder|prompt_embeddings": "prompt tuning, another kind of adapter",
    r"\.lora(_linear_layer)?\.(up|down)\.": "the old names of diffusers, which do not include alpha",
    r"^lora_\w+\.(lora_(up|down)\.weight|alpha)$|\.lora_(up|down)\.|\.alpha$": "kohya's names, not PEFT's",
}
"""Pattern of the names of tensors that are not read -> what they are."""


@dataclass(frozen=True, order=True)
class Factor:
    """Identifies one matrix of an adapter."""

    layer: int
    map: str
    """Name of the linear map in lora.MAPS."""
    side: str
    """A or B."""


@dataclass(frozen=True)
class AdapterNames:
    """The tensors of an adapter's file."""

    tensors: dict[Factor, str]
    """Matrix -> the tensor's name in the file."""
    start: str
    """Prefix before "layers." in the names of the base model's modules."""
    unknown: tuple[str, ...]
    """One sentence for each kind of tensor that is not read."""

    def module(self, layer: int, name: str) -> str:
        """Return the name of a linear map in the base model, as the patterns of adapter_config.json see it."""
        part = "self_attn" if name[0] in "qkvo" else "mlp"
        return f"{self.start}layers.{layer}.{part}.{name}"

    def saved(self, factor: Factor) -> str:
        """Return the name that a matrix has, or would have, in the file."""
        usual = f"base_model.model.{self.module(factor.layer, factor.map)}.lora_{factor.side}.weight"
        return self.tensors.get(factor, usual)


def read_names(names: Iterable[str]) -> AdapterNames:
    """Return which tensor is which matrix, and a description of those that are not read."""
    tensors: dict[Factor, str] = {}
    starts: dict[str, str] = {}
    adapters: dict[str, str] = {}
    others: dict[str, list[str]] = {}
    for name in sorted(names):
        match = WEIGHT.fullmatch(drop_wrappers(name))
        if not match:
            kind = next((text for pattern, text in OTHERS.items() if re.search(pattern, name)), "not known")
            others.setdefault(kind, []).append(name)
            continue
        start = match["start"].removeprefix("base_model.").removeprefix("model.") if _is_peft(match) else match["start"]
        starts.setdefault(start, name)
        adapters.setdefault(match["adapter"] or "", name)
        tensors[Factor(int(match["layer"]), match["map"], match["side"])] = name
    unknown = [
        f"{len(members)} tensor(s) that are not read: {kind} ({', '.join(members[:3])})"
        for kind, members in others.items()
    ]
    for what, several in (("prefixes", starts), ("adapters", adapters)):
        if len(several) > 1:
            unknown.append(f"tensors of several {what}: {', '.join(several.values())}; save one adapter alone")
    return AdapterNames(tensors, next(iter(starts), "model."), tuple(unknown))


def _is_peft(match: re.Match[str]) -> bool:
    return match["start"].startswith("base_model.model.")
