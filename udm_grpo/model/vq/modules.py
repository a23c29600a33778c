"""The layers of AutoencoderVQ, as Flax modules on [B, H, W, C]; vq.py turns them into pure functions.

Source: the diffusers VAE family as used by URSA (arXiv 2510.24717).
"""

import math
from functools import partial
from types import SimpleNamespace
from typing import cast

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from udm_grpo.model.vq.config import GROUPS, VQConfig

NORM_EPS = 1e-6
# vq.init draws the parameters. Here they only have shapes: zeros without keys, since to trace a draw for each of them
# takes a second at every start.
_NO_KEYS = cast(nnx.Rngs, SimpleNamespace(params=lambda: None))
_ZEROS = nnx.initializers.zeros
Conv = partial(nnx.Conv, kernel_init=_ZEROS, rngs=_NO_KEYS)
Linear = partial(nnx.Linear, kernel_init=_ZEROS, rngs=_NO_KEYS)
Embed = partial(nnx.Embed, embedding_init=_ZEROS, rngs=_NO_KEYS)


class GroupNorm(nnx.Module):
    """Group norm over GROUPS groups; statistics and affine map in float32, the result in the dtype of the input."""

    def __init__(self, channels: int):
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))

    def __call__(self, x: Array) -> Array:
        """Normalise over pixels and a group's channels."""
        x32 = x.astype(jnp.float32)
        centred = x32 - self._group_mean(x32)
        variance = self._group_mean(jnp.square(centred))
        scale, bias = (param[...].astype(jnp.float32)[None, None, None, :] for param in (self.scale, self.bias))
        return (centred * (jax.lax.rsqrt(variance + NORM_EPS) * scale) + bias).astype(x.dtype)

    @staticmethod
    def _group_mean(x: Array) -> Array:
        """Return the mean over pixels and a group's channels, (B, 1, 1, C); pixels first, which XLA does fastest."""
        rows = x.mean((1, 2))
        groups = rows.reshape(rows.shape[0], GROUPS, -1).mean(-1)
        return jnp.repeat(groups, rows.shape[1] // GROUPS, axis=-1)[:, None, None, :]


class ResBlock(nnx.Module):
    """Two convolutions, each after a group norm and SiLU, beside a shortcut."""

    def __init__(self, channels: int, out_channels: int):
        self.norm1 = GroupNorm(channels)
        self.conv1 = _conv3x3(channels, out_channels)
        self.norm2 = GroupNorm(out_channels)
        self.conv2 = _conv3x3(out_channels, out_channels)
        if channels != out_channels:
            self.conv_shortcut = Conv(channels, out_channels, (1, 1))
        self.has_shortcut = channels != out_channels

    def __call__(self, x: Array) -> Array:
        """Return [B, H, W, out_channels]."""
        y = self.conv1(nnx.silu(self.norm1(x)))
        y = self.conv2(nnx.silu(self.norm2(y)))
        shortcut = self.conv_shortcut(x) if self.has_shortcut else x
        return y + shortcut


class Attention(nnx.Module):
    """Single-head attention over all pixels, with its residual."""

    def __init__(self, channels: int):
        self.group_norm = GroupNorm(channels)
        self.to_q = Linear(channels, channels)
        self.to_k = Linear(channels, channels)
        self.to_v = Linear(channels, channels)
        self.to_out = nnx.List([Linear(channels, channels)])

    def __call__(self, x: Array) -> Array:
        """Return x plus what its pixels attend to."""
        b, h, w, channels = x.shape
        rows = self.group_norm(x).reshape(b, h * w, channels)
        q, k, v = self.to_q(rows), self.to_k(rows), self.to_v(rows)
        scores = jnp.einsum("bqc,bkc->bqk", q, k, preferred_element_type=jnp.float32) / math.sqrt(channels)
        mixed = jnp.einsum("bqk,bkc->bqc", jax.nn.softmax(scores, axis=-1).astype(v.dtype), v)
        return x + self.to_out[0](mixed).reshape(x.shape)


class Downsample(nnx.Module):
    """A convolution of stride 2, padded by one pixel on the right and at the bottom."""

    def __init__(self, channels: int):
        self.conv = Conv(channels, channels, (3, 3), strides=2, padding=((0, 1), (0, 1)))

    def __call__(self, x: Array) -> Array:
        """Return [B, H/2, W/2, C]."""
        return self.conv(x)


class Upsample(nnx.Module):
    """Nearest-neighbour doubling, then a convolution."""

    def __init__(self, channels: int):
        self.conv = _conv3x3(channels, channels)

    def __call__(self, x: Array) -> Array:
        """Return [B, 2H, 2W, C]."""
        b, h, w, channels = x.shape
        doubled = jnp.broadcast_to(x[:, :, None, :, None, :], (b, h, 2, w, 2, channels))
        return self.conv(doubled.reshape(b, 2 * h, 2 * w, channels))


class Block(nnx.Module):
    """Resnets, each perhaps followed by attention, then perhaps a change of resolution."""

    def __init__(self, channels: int, out_channels: int, depth: int, attention: bool, resize: str):
        widths = [channels] + [out_channels] * (depth - 1)
        self.resnets = nnx.List([ResBlock(width, out_channels) for width in widths])
        self.attentions = nnx.List([Attention(out_channels) for _ in widths] if attention else [])
        self.downsamplers = nnx.List([Downsample(out_channels)] if resize == "down" else [])
        self.upsamplers = nnx.List([Upsample(out_channels)] if resize == "up" else [])

    def __call__(self, x: Array) -> Array:
        """Apply all of it in turn."""
        for index, resnet in enumerate(self.resnets):
            x = resnet(x)
            if self.attentions:
                x = self.attentions[index](x)
        for resize in (*self.downsamplers, *self.upsamplers):
            x = resize(x)
        return x


class MidBlock(nnx.Module):
    """Resnet, attention, resnet."""

    def __init__(self, channels: int):
        self.resnets = nnx.List([ResBlock(channels, channels), ResBlock(channels, channels)])
        self.attentions = nnx.List([Attention(channels)])

    def __call__(self, x: Array) -> Array:
        """Apply them in turn."""
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Encoder(nnx.Module):
    """Pixels to latents, before quant_conv."""

    def __init__(self, config: VQConfig):
        widths, last = config.block_out_channels, len(config.block_out_channels) - 1
        self.conv_in = _conv3x3(config.in_channels, widths[0])
        blocks = []
        for index, width in enumerate(widths):
            attention = config.attn_down_block and index == last
            resize = "none" if index == last else "down"
            before = widths[max(index - 1, 0)]
            blocks.append(Block(before, width, config.layers_per_block, attention, resize))
        self.down_blocks = nnx.List(blocks)
        self.mid_block = MidBlock(widths[-1])
        self.conv_norm_out = GroupNorm(widths[-1])
        self.conv_out = _conv3x3(widths[-1], config.latent_channels)

    def __call__(self, x: Array) -> Array:
        """Return [B, h, w, latent_channels]."""
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(nnx.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nnx.Module):
    """Latents, after post_quant_conv, to pixels."""

    def __init__(self, config: VQConfig):
        widths, last = config.block_out_channels[::-1], len(config.block_out_channels) - 1
        self.conv_in = _conv3x3(config.latent_channels, widths[0])
        self.mid_block = MidBlock(widths[0])
        blocks = []
        for index, width in enumerate(widths):
            attention = config.attn_up_block and index == 0
            resize = "none" if index == last else "up"
            before = widths[max(index - 1, 0)]
            blocks.append(Block(before, width, config.layers_per_block + 1, attention, resize))
        self.up_blocks = nnx.List(blocks)
        self.conv_norm_out = GroupNorm(widths[-1])
        self.conv_out = _conv3x3(widths[-1], config.out_channels)

    def __call__(self, x: Array) -> Array:
        """Return [B, H, W, out_channels]."""
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(nnx.silu(self.conv_norm_out(x)))


class AutoencoderVQ(nnx.Module):
    """All parameters of the tokenizer; vq.py calls its parts."""

    def __init__(self, config: VQConfig):
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = Conv(config.latent_channels, config.vq_embed_dim, (1, 1))
        self.post_quant_conv = Conv(config.vq_embed_dim, config.latent_channels, (1, 1))
        if config.quantizer_name == "VQuantizer":
            self.codebook = Embed(config.num_vq_embeddings, config.vq_embed_dim)


def _conv3x3(channels: int, out_channels: int) -> nnx.Conv:
    return Conv(channels, out_channels, (3, 3), padding=1)
