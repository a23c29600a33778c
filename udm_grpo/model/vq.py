"""The image tokenizer: AutoencoderVQ, a convolutional encoder and decoder around a quantizer.

Flax NNX in tree style: the modules below only describe the computation. `abstract` and `init` give the parameters as a
plain nested dict of arrays (convolution kernels HWIO, linear kernels (in, out)), and every other function is pure.
Letters: B images, H x W pixels, h x w = H/stride x W/stride tokens, e code channels, V codes.

Source: the diffusers VAE family as used by URSA (arXiv 2510.24717); quantizers: VQ with the dot product as similarity
(IBQ, arXiv 2412.02692), LFQ (arXiv 2310.05737), FSQ (arXiv 2309.15505), in quantizers.py.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from udm_grpo.model import quantizers

Params = dict[str, Any]

GROUPS = 32
NORM_EPS = 1e-6
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
        uneven = [channels for channels in self.block_out_channels if channels % GROUPS]
        if uneven:
            raise ValueError(f"block_out_channels {uneven} are no multiples of the {GROUPS} groups of the group norm")
        codes, dim = self.num_vq_embeddings, self.vq_embed_dim
        if self.quantizer_name == "LFQuantizer" and codes != 2**dim:
            raise ValueError(f"LFQuantizer has 2**vq_embed_dim = {2**dim} codes, num_vq_embeddings is {codes}")
        levels = quantizers.FSQ_LEVELS
        if self.quantizer_name == "FSQuantizer" and (dim, codes) != (len(levels), math.prod(levels)):
            wanted = f"vq_embed_dim {len(levels)} and num_vq_embeddings {math.prod(levels)}"
            raise ValueError(f"FSQuantizer with levels {levels} needs {wanted}, found {dim} and {codes}")

    @property
    def stride(self) -> int:
        """Pixels per token along each image axis."""
        return 2 ** (len(self.block_out_channels) - 1)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> "VQConfig":
        """Read vae/config.json; keys that are left out have the release's defaults, others are ignored.

        Raises ValueError for a model that this module does not compute, such as the 3D tokenizer of the video models.
        """
        fixed = {"_class_name": "AutoencoderVQ", "act_fn": "silu", "norm_num_groups": GROUPS, "temporal_stride": 1}
        for key, wanted in fixed.items():
            if key in raw and raw[key] != wanted:
                raise ValueError(f"vae config: {key} is {raw[key]!r}; only {wanted!r} is supported")
        names = {field.name: field.name for field in dataclasses.fields(cls)} | {"quantizer_name": "_quantizer_name"}
        values = {name: raw[key] for name, key in names.items() if key in raw}
        if "block_out_channels" in values:
            values["block_out_channels"] = tuple(values["block_out_channels"])
        return cls(**values)


class _GroupNorm(nnx.Module):
    """Group norm over GROUPS groups; statistics and affine map in float32, the result in the dtype of the input."""

    def __init__(self, channels: int):
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))

    def __call__(self, x: Array) -> Array:
        b, h, w, channels = x.shape
        grouped = x.astype(jnp.float32).reshape(b, h * w, GROUPS, channels // GROUPS)
        centred = grouped - grouped.mean((1, 3), keepdims=True)
        variance = jnp.square(centred).mean((1, 3), keepdims=True)
        normed = (centred * jax.lax.rsqrt(variance + NORM_EPS)).reshape(x.shape)
        scale, bias = (param[...].astype(jnp.float32)[None, None, None, :] for param in (self.scale, self.bias))
        return (normed * scale + bias).astype(x.dtype)


class _ResBlock(nnx.Module):
    def __init__(self, channels: int, out_channels: int, rngs: nnx.Rngs):
        self.norm1 = _GroupNorm(channels)
        self.conv1 = _conv3x3(channels, out_channels, rngs)
        self.norm2 = _GroupNorm(out_channels)
        self.conv2 = _conv3x3(out_channels, out_channels, rngs)
        if channels != out_channels:
            self.conv_shortcut = nnx.Conv(channels, out_channels, (1, 1), rngs=rngs)
        self.has_shortcut = channels != out_channels

    def __call__(self, x: Array) -> Array:
        y = self.conv1(nnx.silu(self.norm1(x)))
        y = self.conv2(nnx.silu(self.norm2(y)))
        shortcut = self.conv_shortcut(x) if self.has_shortcut else x
        return y + shortcut


class _Attention(nnx.Module):
    """Single-head attention over all pixels, with its residual."""

    def __init__(self, channels: int, rngs: nnx.Rngs):
        self.group_norm = _GroupNorm(channels)
        self.to_q = nnx.Linear(channels, channels, rngs=rngs)
        self.to_k = nnx.Linear(channels, channels, rngs=rngs)
        self.to_v = nnx.Linear(channels, channels, rngs=rngs)
        self.to_out = nnx.List([nnx.Linear(channels, channels, rngs=rngs)])

    def __call__(self, x: Array) -> Array:
        b, h, w, channels = x.shape
        rows = self.group_norm(x).reshape(b, h * w, 1, channels)
        mixed = jax.nn.dot_product_attention(self.to_q(rows), self.to_k(rows), self.to_v(rows))
        return x + self.to_out[0](mixed).reshape(x.shape)


class _Downsample(nnx.Module):
    def __init__(self, channels: int, rngs: nnx.Rngs):
        self.conv = nnx.Conv(channels, channels, (3, 3), strides=2, padding=((0, 1), (0, 1)), rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.conv(x)


class _Upsample(nnx.Module):
    """Nearest-neighbour doubling, then a convolution."""

    def __init__(self, channels: int, rngs: nnx.Rngs):
        self.conv = _conv3x3(channels, channels, rngs)

    def __call__(self, x: Array) -> Array:
        b, h, w, channels = x.shape
        doubled = jnp.broadcast_to(x[:, :, None, :, None, :], (b, h, 2, w, 2, channels))
        return self.conv(doubled.reshape(b, 2 * h, 2 * w, channels))


class _Block(nnx.Module):
    """Resnets, each perhaps followed by attention, then perhaps a change of resolution."""

    def __init__(self, channels: int, out_channels: int, depth: int, attention: bool, resize: str, rngs: nnx.Rngs):
        widths = [channels] + [out_channels] * (depth - 1)
        self.resnets = nnx.List([_ResBlock(width, out_channels, rngs) for width in widths])
        self.attentions = nnx.List([_Attention(out_channels, rngs) for _ in widths] if attention else [])
        self.downsamplers = nnx.List([_Downsample(out_channels, rngs)] if resize == "down" else [])
        self.upsamplers = nnx.List([_Upsample(out_channels, rngs)] if resize == "up" else [])

    def __call__(self, x: Array) -> Array:
        for index, resnet in enumerate(self.resnets):
            x = resnet(x)
            if self.attentions:
                x = self.attentions[index](x)
        for resize in (*self.downsamplers, *self.upsamplers):
            x = resize(x)
        return x


class _MidBlock(nnx.Module):
    def __init__(self, channels: int, rngs: nnx.Rngs):
        self.resnets = nnx.List([_ResBlock(channels, channels, rngs), _ResBlock(channels, channels, rngs)])
        self.attentions = nnx.List([_Attention(channels, rngs)])

    def __call__(self, x: Array) -> Array:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class _Encoder(nnx.Module):
    def __init__(self, config: VQConfig, rngs: nnx.Rngs):
        widths, last = config.block_out_channels, len(config.block_out_channels) - 1
        self.conv_in = _conv3x3(config.in_channels, widths[0], rngs)
        blocks = []
        for index, width in enumerate(widths):
            attention = config.attn_down_block and index == last
            resize = "none" if index == last else "down"
            before = widths[max(index - 1, 0)]
            blocks.append(_Block(before, width, config.layers_per_block, attention, resize, rngs))
        self.down_blocks = nnx.List(blocks)
        self.mid_block = _MidBlock(widths[-1], rngs)
        self.conv_norm_out = _GroupNorm(widths[-1])
        self.conv_out = _conv3x3(widths[-1], config.latent_channels, rngs)

    def __call__(self, x: Array) -> Array:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(nnx.silu(self.conv_norm_out(self.mid_block(x))))


class _Decoder(nnx.Module):
    def __init__(self, config: VQConfig, rngs: nnx.Rngs):
        widths, last = config.block_out_channels[::-1], len(config.block_out_channels) - 1
        self.conv_in = _conv3x3(config.latent_channels, widths[0], rngs)
        self.mid_block = _MidBlock(widths[0], rngs)
        blocks = []
        for index, width in enumerate(widths):
            attention = config.attn_up_block and index == 0
            resize = "none" if index == last else "up"
            before = widths[max(index - 1, 0)]
            blocks.append(_Block(before, width, config.layers_per_block + 1, attention, resize, rngs))
        self.up_blocks = nnx.List(blocks)
        self.conv_norm_out = _GroupNorm(widths[-1])
        self.conv_out = _conv3x3(widths[-1], config.out_channels, rngs)

    def __call__(self, x: Array) -> Array:
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(nnx.silu(self.conv_norm_out(x)))


class _AutoencoderVQ(nnx.Module):
    def __init__(self, config: VQConfig, rngs: nnx.Rngs):
        self.encoder = _Encoder(config, rngs)
        self.decoder = _Decoder(config, rngs)
        self.quant_conv = nnx.Conv(config.latent_channels, config.vq_embed_dim, (1, 1), rngs=rngs)
        self.post_quant_conv = nnx.Conv(config.vq_embed_dim, config.latent_channels, (1, 1), rngs=rngs)
        if config.quantizer_name == "VQuantizer":
            self.codebook = nnx.Embed(config.num_vq_embeddings, config.vq_embed_dim, rngs=rngs)


def _conv3x3(channels: int, out_channels: int, rngs: nnx.Rngs) -> nnx.Conv:
    return nnx.Conv(channels, out_channels, (3, 3), padding=1, rngs=rngs)


@functools.lru_cache(maxsize=16)
def _structure(config: VQConfig) -> tuple[nnx.GraphDef, Params]:
    """Return the graph of the modules and their parameters' shapes."""
    graph, state = nnx.split(nnx.eval_shape(lambda: _AutoencoderVQ(config, nnx.Rngs(0))))
    return graph, _string_keys(nnx.to_pure_dict(state))


def _string_keys(tree: Mapping[Any, Any]) -> Params:
    return {str(key): _string_keys(value) if isinstance(value, Mapping) else value for key, value in tree.items()}


def _state_keys(tree: Mapping[str, Any]) -> dict[Any, Any]:
    """Undo `_string_keys`: the modules' lists have integer keys."""
    return {
        int(key) if key.isdigit() else key: _state_keys(value) if isinstance(value, Mapping) else value
        for key, value in tree.items()
    }


def _module(config: VQConfig, params: Params) -> _AutoencoderVQ:
    graph, _ = _structure(config)
    return nnx.merge(graph, nnx.State(_state_keys(params)))


def abstract(config: VQConfig) -> Params:
    """Return the parameter tree with a float32 jax.ShapeDtypeStruct for every array.

    Top keys: encoder, decoder, quant_conv, post_quant_conv, and for VQ codebook: {embedding: (V, e)}. Below, names are
    those of the release's state dict, with "0", "1", ... for the members of a list.
    """
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32), _structure(config)[1])


def init(config: VQConfig, key: Key[Array, ""]) -> Params:
    """Return random float32 parameters: kernels normal / sqrt(fan in), biases 0, scales 1, codes normal / sqrt(e)."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(abstract(config))
    sizes = [0 if path[-1].key in ("bias", "scale") else math.prod(leaf.shape) for path, leaf in leaves]
    draws = jax.random.normal(key, (sum(sizes),))
    filled, start = [], 0
    for (path, leaf), size in zip(leaves, sizes, strict=True):
        if size == 0:
            filled.append(jnp.full(leaf.shape, 1.0 if path[-1].key == "scale" else 0.0, leaf.dtype))
            continue
        # A kernel sums over all axes but its last; a code is scaled by its own e channels.
        fan_in = leaf.shape[-1] if path[-1].key == "embedding" else math.prod(leaf.shape[:-1])
        filled.append(draws[start : start + size].reshape(leaf.shape) / math.sqrt(fan_in))
        start += size
    return jax.tree.unflatten(structure, filled)


def encode_latent(config: VQConfig, params: Params, pixels: Float[Array, "b H W c"]) -> Float[Array, "b h w e"]:
    """Return what the quantizer sees (after quant_conv) of pixels in [-1, 1].

    Raises ValueError if H or W is no multiple of the stride.
    """
    height, width = pixels.shape[1:3]
    if height % config.stride or width % config.stride:
        wanted = f"multiples of {config.stride}, the pixels of a token"
        raise ValueError(f"image size {height}x{width}: height and width must be {wanted}; resize or crop the images")
    module = _module(config, params)
    pixels = pixels.astype(params["quant_conv"]["kernel"].dtype)
    return module.quant_conv(module.encoder(pixels))


def quantize(config: VQConfig, params: Params, z: Float[Array, "b h w e"]) -> Int[Array, "b h w"]:
    """Return the int32 code of every latent; no gradient passes."""
    if config.quantizer_name == "LFQuantizer":
        return quantizers.lfq_ids(z)
    if config.quantizer_name == "FSQuantizer":
        return quantizers.fsq_ids(z)
    return quantizers.vq_ids(z, params["codebook"]["embedding"])


def embed_codes(config: VQConfig, params: Params, ids: Int[Array, "b h w"]) -> Float[Array, "b h w e"]:
    """Return the vectors of codes in [0, V); for VQ differentiable in the codebook."""
    if config.quantizer_name == "LFQuantizer":
        return quantizers.lfq_vectors(ids, config.vq_embed_dim)
    if config.quantizer_name == "FSQuantizer":
        return quantizers.fsq_vectors(ids)
    return params["codebook"]["embedding"][ids]


def decode_latent(config: VQConfig, params: Params, zq: Float[Array, "b h w e"]) -> Float[Array, "b H W c"]:
    """Return float32 pixels, nominally in [-1, 1] and not clipped, of code vectors."""
    module = _module(config, params)
    zq = zq.astype(params["post_quant_conv"]["kernel"].dtype)
    return module.decoder(module.post_quant_conv(zq)).astype(jnp.float32)


def encode(config: VQConfig, params: Params, pixels: Float[Array, "b H W c"]) -> Int[Array, "b h w"]:
    """Return the int32 codes of pixels in [-1, 1]; raises ValueError for sizes that the stride does not divide."""
    return quantize(config, params, encode_latent(config, params, pixels))


def decode(config: VQConfig, params: Params, ids: Int[Array, "b h w"]) -> Float[Array, "b H W c"]:
    """Return float32 pixels, nominally in [-1, 1] and not clipped, of codes in [0, V)."""
    return decode_latent(config, params, embed_codes(config, params, ids))
