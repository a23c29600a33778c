"""Three-axis rotary position embedding of URSA's sequences [text, BOV, image tokens]."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

HEAD_DIM = 128
"""Size of an attention head, fixed by the checkpoint format."""


def positions(text_length: int, height: int, width: int, frames: int = 1) -> np.ndarray:
    """Return the positions (t, h, w) of every token: i32[L + 1 + frames*height*width, 3].

    Text token i has (i, i, i), BOV (L, L, L), and the image token at row y, column x of frame f (L + 1 + f, y, x).

    Source: URSA, arXiv 2510.24717.
    """
    text = np.repeat(np.arange(text_length + 1)[:, None], 3, axis=1)
    f, y, x = np.meshgrid(np.arange(frames), np.arange(height), np.arange(width), indexing="ij")
    image = np.stack([text_length + 1 + f, y, x], axis=-1).reshape(-1, 3)
    return np.concatenate([text, image]).astype(np.int32)


def axis_of_frequency(head_dim: int = HEAD_DIM) -> np.ndarray:
    """Return the axis t, h or w (0, 1, 2) of each of the head_dim/2 frequencies: i32[head_dim/2].

    t, h, w alternate over the first three quarters, h, w over the last.
    """
    return np.concatenate([np.tile([0, 1, 2], head_dim // 8), np.tile([1, 2], head_dim // 16)]).astype(np.int32)


def rotary_table(pos: np.ndarray, theta: float, head_dim: int = HEAD_DIM) -> tuple[np.ndarray, np.ndarray]:
    """Return cosines and sines f32[S, head_dim/2] for positions i32[S, 3] and base `theta` (rope_theta).

    The angles are computed in float32, with which the released models were trained.
    """
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequency = (np.float32(1.0) / np.power(np.float32(theta), exponent)).astype(np.float32)
    angle = pos[:, axis_of_frequency(head_dim)].astype(np.float32) * frequency
    return np.cos(angle), np.sin(angle)


def rotate(x: Float[Array, "b s a c"], table: tuple[np.ndarray, np.ndarray]) -> Float[Array, "b s a c"]:
    """Rotate elements j and j + c/2 of each head by the angle of frequency j, in float32; the result has x's dtype."""
    cos, sin = (jnp.asarray(part, jnp.float32)[None, :, None, :] for part in table)
    low, high = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)
    return turned.astype(x.dtype)
