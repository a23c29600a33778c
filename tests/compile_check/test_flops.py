"""The counted operations equal numbers worked out by hand, and the analytic ones of the published model."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from configs.geneval import get_config
from udm_grpo.compile_check.flops import matrix_flops
from udm_grpo.compile_check.programs import mesh_of, programs, read_sizes


def count(fn, *shapes, loops=True):
    arguments = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    return matrix_flops(jax.make_jaxpr(fn)(*arguments).jaxpr, loops)


def test_products_convolutions_loops_and_branches():
    assert count(lambda a, b: a @ b, (3, 5), (5, 7)) == 2 * 3 * 5 * 7
    assert count(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (2, 3, 5), (2, 5, 7)) == 2 * 2 * 3 * 5 * 7

    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    assert count(convolve, (1, 8, 8, 3), (3, 3, 3, 6)) == 2 * (4 * 4 * 6) * (3 * 3 * 3)

    def loop(a):
        return jax.lax.scan(lambda c, _: (c @ a, None), a, None, length=9)[0]

    assert count(loop, (4, 4)) == 9 * 2 * 4**3
    assert count(loop, (4, 4), loops=False) == 2 * 4**3
    assert count(jax.grad(lambda a: jnp.sum(loop(a))), (4, 4)) == 3 * 9 * 2 * 4**3

    mesh = jax.sharding.AbstractMesh((4,), ("x",))
    rows = jax.sharding.PartitionSpec("x")
    spread = jax.shard_map(lambda a: a @ a.T, mesh=mesh, in_specs=rows, out_specs=rows)
    assert count(spread, (8, 5)) == 4 * (2 * 2 * 2 * 5)

    def branch(a):
        return jax.lax.cond(a[0, 0] > 0, lambda: a @ a @ a, lambda: a @ a)

    assert count(branch, (4, 4)) == 2 * 2 * 4**3


@pytest.fixture(scope="module")
def published():
    """Return the TFLOP per image of each program at 1.7B and 512 x 512; the programs are traced, never compiled."""
    config = get_config()
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, remat="none"))
    sizes = read_sizes(config.model.path, config.model.text_length)
    stages = programs(config, sizes, mesh_of(config, sizes, jax.devices()[:1]))
    images = {"rollout": 32, "reference": 128, "update": 128}
    return {name: matrix_flops(stages[name].trace().jaxpr.jaxpr) / n / 1e12 for name, n in images.items()}


def test_the_published_model_costs_what_the_arithmetic_says(published):
    """28 layers, D 2048, mlp 6144, 16/8 heads of 128, L + 1 + N = 1345, V = 131072, 256-dim codes, T = 10, K = 3."""
    rows, tokens, codes = 1345, 1024, 131072
    weights = 28 * (2048 * (2048 + 2 * 1024) + 2048 * 2048 + 3 * 2048 * 6144)
    trunk = 2 * rows * weights + 28 * 2 * 2 * rows**2 * 2048
    head, distances = 2 * tokens * 2048 * codes, 2 * tokens * 256 * codes
    assert published["rollout"] == pytest.approx(9 * (trunk + head + distances) / 1e12, rel=1e-6)
    assert published["reference"] == pytest.approx(3 * (trunk + head + distances) / 1e12, rel=1e-6)
    # The head's logits are computed again in its backward pass.
    assert published["update"] == pytest.approx(3 * (3 * trunk + 4 * head) / 1e12, rel=1e-6)
    assert published["rollout"] / 9 == pytest.approx(4.82, rel=0.01)
    # 57.1 counts the reference too, and neither the distances nor the second computation of the logits.
    extra = 3 * (distances + head) / 1e12
    assert published["update"] + published["reference"] - extra == pytest.approx(57.1, rel=0.01)
