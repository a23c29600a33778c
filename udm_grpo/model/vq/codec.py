"""The image tokenizer: AutoencoderVQ, a convolutional encoder and decoder around a quantizer.

Flax NNX in tree style: the modules of modules.py only describe the computation. `abstract` and `init` give the
parameters as a plain nested dict of arrays (convolution kernels HWIO, linear kernels (in, out)), and every other
function is pure. Letters: B images, H x W pixels, h x w = H/stride x W/stride tokens, e code channels, V codes.

Source: the diffusers VAE family as used by URSA (arXiv 2510.24717); the quantizers name their own.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from udm_grpo.batches import Params
from udm_grpo.model.vq import quantizers
from udm_grpo.model.vq.config import VQConfig
from udm_grpo.model.vq.modules import AutoencoderVQ


@functools.lru_cache(maxsize=16)
def _structure(config: VQConfig) -> tuple[nnx.GraphDef, Params]:
    """Return the graph of the modules and their parameters' shapes."""
    graph, state = nnx.split(nnx.eval_shape(lambda: AutoencoderVQ(config)))
    return graph, _string_keys(nnx.to_pure_dict(state))


def _string_keys(tree: Mapping[Any, Any]) -> Params:
    return {str(key): _string_keys(value) if isinstance(value, Mapping) else value for key, value in tree.items()}


def _state_keys(tree: Mapping[str, Any]) -> dict[Any, Any]:
    """Undo `_string_keys`: the modules' lists have integer keys."""
    return {
        int(key) if key.isdigit() else key: _state_keys(value) if isinstance(value, Mapping) else value
        for key, value in tree.items()
    }


def _module(config: VQConfig, params: Params) -> AutoencoderVQ:
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
        expected = f"multiples of {config.stride}, the pixels of a token"
        raise ValueError(f"image size {height}x{width}: height and width must be {expected}; resize or crop the images")
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
