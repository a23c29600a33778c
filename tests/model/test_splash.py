"""Tests of JAX's splash kernel, interpreted, against plain attention, forward and backward, with padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from udm_grpo.model import splash
from udm_grpo.model.blocks import attend
from udm_grpo.model.execution import Execution


@pytest.mark.parametrize("rows", [130, 125])
def test_splash_is_attention(rows):
    """It equals attention over all keys, and over only the first of them."""
    length = 130
    keys = jax.random.split(jax.random.key(3), 4)
    q, weight = (jax.random.normal(key, (1, length, 2, 128)) for key in keys[:2])
    k, v = (jax.random.normal(key, (1, length, 1, 128)) for key in keys[2:])

    def value_and_gradients(fn):
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):  # inside the kernel
            return jax.jit(jax.value_and_grad(lambda *x: jnp.sum(weight * fn(*x)), (0, 1, 2)))(q, k, v)

    expected, expected_gradients = value_and_gradients(lambda *x: attend(*x, Execution("xla"), rows))
    value, gradients = value_and_gradients(lambda *x: splash.attend(*x, rows, interpret=True))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for one, other in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * float(jnp.max(jnp.abs(other))))


def test_an_unknown_kernel_is_named():
    x = jnp.zeros((1, 2, 1, 128))
    with pytest.raises(ValueError, match="attention is 'flash'; it must be one of xla, cudnn, splash"):
        attend(x, x, x, Execution("flash"))
