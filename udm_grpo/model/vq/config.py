"""The sizes of an AutoencoderVQ, as vae/config.json gives them."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from udm_grpo.model.sizes import check_vq_sizes
from udm_grpo.model.vq.quantizers import FSQ_LEVELS

GROUPS = 32
"""Of every group norm; the release computes with it whatever the file says."""
QUANTIZERS = ("VQuantizer", "LFQuantizer", "FSQuantizer")


@dataclasses.dataclass(frozen=True)
class VQConfig:
    """Sizes of an AutoencoderVQ; the field names are those of vae/config.json, its quantizer key without underscore.

    block_out_channels: channels per resolution, encoder order; layers_per_block: resnets per encoder block (a decoder
    block has one more); latent_channels: channels between encoder and quant_conv; num_vq_embeddings: V codes;
    vq_embed_dim: e channels of a code; attn_down_block / attn_up_block: attention after each resnet of the last
    encoder block / first decoder block; quantizer_name: one of QUANTIZERS.
    Raises ValueError where the sizes do not fit together.
    """

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 16
    num_vq_embeddings: int = 16384
    vq_embed_dim: int = 8
    attn_down_block: bool = False
    attn_up_block: bool = False
    quantizer_name: str = "VQuantizer"

    def __post_init__(self) -> None:
        if self.quantizer_name not in QUANTIZERS:
            raise ValueError(f"_quantizer_name is {self.quantizer_name!r}; known are {', '.join(QUANTIZERS)}")
        if not self.block_out_channels:
            raise ValueError("block_out_channels is empty; give one channel count per resolution")
        check_vq_sizes(vars(self))
        uneven = [channels for channels in self.block_out_channels if channels % GROUPS]
        if uneven:
            raise ValueError(f"block_out_channels {uneven} are no multiples of the {GROUPS} groups of the group norm")
        codes, dim = self.num_vq_embeddings, self.vq_embed_dim
        if self.quantizer_name == "LFQuantizer" and codes != 2**dim:
            raise ValueError(f"LFQuantizer has 2**vq_embed_dim = {2**dim} codes, num_vq_embeddings is {codes}")
        fsq_dim, fsq_codes = len(FSQ_LEVELS), math.prod(FSQ_LEVELS)
        if self.quantizer_name == "FSQuantizer" and (dim, codes) != (fsq_dim, fsq_codes):
            expected = f"vq_embed_dim {fsq_dim} and num_vq_embeddings {fsq_codes}"
            raise ValueError(f"FSQuantizer with levels {FSQ_LEVELS} needs {expected}, found {dim} and {codes}")

    @property
    def stride(self) -> int:
        """Pixels per token along each image axis."""
        return 2 ** (len(self.block_out_channels) - 1)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> "VQConfig":
        """Read vae/config.json; keys that are left out have the release's defaults, others are ignored.

        Raises ValueError for a model that this module does not compute, such as the 3D tokenizer of the video models.
        """
        blocks = [*(raw.get("down_block_types") or ()), *(raw.get("up_block_types") or ())]
        name, frames = str(raw.get("_class_name", "")), raw.get("temporal_stride", 1)
        if "3D" in name or "patch_size" in raw or frames != 1 or any(str(block).endswith("3D") for block in blocks):
            raise ValueError(
                f"{name or 'this'} is the tokenizer of a video model; only image models are supported, such as "
                "URSA-1.7B-IBQ512 and URSA-0.6B-IBQ512"
            )
        fixed = {"_class_name": "AutoencoderVQ", "act_fn": "silu", "norm_num_groups": GROUPS}
        for key, expected in fixed.items():
            if key in raw and raw[key] != expected:
                raise ValueError(f"{key} is {raw[key]!r}; only {expected!r} is supported")
        names = {field.name: field.name for field in dataclasses.fields(cls)} | {"quantizer_name": "_quantizer_name"}
        values = {name: raw[key] for name, key in names.items() if key in raw}
        if isinstance(values.get("block_out_channels"), list):
            values["block_out_channels"] = tuple(values["block_out_channels"])
        for name, value in values.items():
            kind = type(getattr(cls, name))
            numbers = value if isinstance(value, tuple) else (value,) if kind is int else ()
            if type(value) is not kind or any(type(number) is not int or number < 1 for number in numbers):
                expected = f"{kind.__name__} of integers above 0" if kind is tuple else f"{kind.__name__} above 0"
                raise ValueError(f"{names[name]} is {value!r:.60}; expected {expected}")
        return cls(**values)
