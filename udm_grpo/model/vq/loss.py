"""The training loss of the image tokenizer."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from udm_grpo.batches import Params
from udm_grpo.model.vq import codec as vq

COMMITMENT_WEIGHT = 0.25
"""How strongly a latent is drawn to its code."""


def unit(vectors: Float[Array, "*b e"]) -> Float[Array, "*b e"]:
    """Rows of length 1; among such codes the largest dot product is also the nearest code."""
    return vectors / jnp.sqrt(jnp.sum(vectors**2, axis=-1, keepdims=True) + 1e-8)


def tokenizer_loss(
    config: vq.VQConfig, params: Params, pixels: Float[Array, "b hh ww 3"], quantized: bool
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """(loss, metrics) of the VQ autoencoder on pixels in [-1, 1]: L1 + L2, on codes of length 1.

    With `quantized` the decoder sees the code and the encoder the gradient at the code (straight-through), and the
    codebook follows the latents; without it the decoder sees the latent itself, which is how training starts: a
    codebook that is set from learned latents keeps all its codes in use.

    Source: VQ-VAE, arXiv 1711.00937; normalised codes, ViT-VQGAN, arXiv 2110.04627.
    """
    z = unit(vq.encode_latent(config, params, pixels))
    ids = vq.quantize(config, params, z)
    code = vq.embed_codes(config, params, ids)
    seen = z + jax.lax.stop_gradient(code - z) if quantized else z
    output = vq.decode_latent(config, params, seen)
    reconstruction = jnp.mean(jnp.abs(output - pixels)) + jnp.mean((output - pixels) ** 2)
    commitment = jnp.mean(jnp.sum((z - jax.lax.stop_gradient(code)) ** 2, axis=-1))
    codebook = jnp.mean(jnp.sum((code - jax.lax.stop_gradient(z)) ** 2, axis=-1))
    loss = reconstruction + (COMMITMENT_WEIGHT * commitment + codebook if quantized else 0.0)
    usage = jnp.bincount(ids.reshape(-1), length=config.num_vq_embeddings) / ids.size
    metrics = {
        "loss": loss,
        "reconstruction": reconstruction,
        "commitment": commitment,
        "perplexity": jnp.exp(-jnp.sum(usage * jnp.log(usage + 1e-9))),
    }
    return loss, metrics
