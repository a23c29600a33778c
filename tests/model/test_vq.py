"""AutoencoderVQ against the release's numbers, its quantizers against hand-computed codes, and its gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_data import GoldenCase, assert_close, golden_cases

from udm_grpo import compiled
from udm_grpo.batches import Params
from udm_grpo.model.vq import codec as vq
from udm_grpo.model.vq import quantizers
from udm_grpo.released.weights import load_folder

LFQ = vq.VQConfig(num_vq_embeddings=64, vq_embed_dim=6, quantizer_name="LFQuantizer")
FSQ = vq.VQConfig(num_vq_embeddings=64000, vq_embed_dim=6, quantizer_name="FSQuantizer")
TINY = vq.VQConfig(
    block_out_channels=(32, 64), layers_per_block=1, latent_channels=4, num_vq_embeddings=12, vq_embed_dim=5
)
NO_PARAMS: Params = {}


def channels_last(array: np.ndarray) -> jax.Array:
    return jnp.asarray(np.moveaxis(array, 1, -1))


@golden_cases()
def test_encoder_decoder_and_codes_match_the_release(case: GoldenCase):
    released = load_folder(case.checkpoint)
    config, params = released.vq_config, released.vq
    ids = jnp.asarray(case.arrays["image_ids"], jnp.int32)
    assert_close(vq.decode(config, params, ids), np.moveaxis(case.arrays["vae_decode"], 1, -1))
    latent = vq.encode_latent(config, params, channels_last(case.arrays["vae_encode_pixels"]))
    assert_close(latent, np.moveaxis(case.arrays["vae_encode_latent"], 1, -1))
    np.testing.assert_array_equal(vq.quantize(config, params, latent), case.arrays["vae_encode_ids"])


@golden_cases()
@pytest.mark.parametrize(("name", "config"), [("lfq", LFQ), ("fsq", FSQ)])
def test_scalar_quantizers_match_the_release(case: GoldenCase, name: str, config: vq.VQConfig):
    ids = vq.quantize(config, NO_PARAMS, channels_last(case.arrays["quantizer_z"]))
    assert ids.dtype == jnp.int32
    np.testing.assert_array_equal(ids, case.arrays[f"{name}_ids"])
    vectors = vq.embed_codes(config, NO_PARAMS, ids)
    np.testing.assert_allclose(vectors, channels_last(case.arrays[f"{name}_decoded"]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("config", [LFQ, FSQ], ids=["lfq", "fsq"])
def test_every_scalar_code_survives_a_round_trip(config: vq.VQConfig):
    ids = jnp.arange(config.num_vq_embeddings, dtype=jnp.int32).reshape(1, -1, 8)
    vectors = vq.embed_codes(config, NO_PARAMS, ids)
    # FSQ's levels are read back from the middle of the bounded range: undo its tanh first.
    if config is FSQ:
        levels = np.array(quantizers.FSQ_LEVELS)
        half, offset = (levels - 1) * (1 + quantizers.FSQ_EPS) / 2, np.where(levels % 2 == 0, 0.5, 0.0)
        scaled = np.asarray(vectors, np.float64) * (levels // 2)
        vectors = jnp.asarray(np.arctanh((scaled + offset) / half) - np.arctanh(offset / half), jnp.float32)
    np.testing.assert_array_equal(vq.quantize(config, NO_PARAMS, vectors), ids)


def test_vq_takes_the_largest_dot_product_not_the_nearest():
    codebook = jnp.array([[1.0, 0.0], [3.0, 0.0], [0.0, -2.0], [3.0, 0.0]])
    z = jnp.array([[1.0, 0.0], [0.1, -1.0]])[None, None]
    np.testing.assert_array_equal(quantizers.vq_ids(z, codebook), [[[1, 2]]])


def test_vq_in_chunks_equals_vq_at_once(monkeypatch: pytest.MonkeyPatch):
    key_z, key_codes = jax.random.split(jax.random.key(0))
    z, codebook = jax.random.normal(key_z, (2, 3, 5, 4)), jax.random.normal(key_codes, (40, 4))
    at_once = quantizers.vq_ids(z, codebook)
    monkeypatch.setattr(quantizers, "MAX_SIMILARITIES", 280)
    np.testing.assert_array_equal(quantizers.vq_ids(z, codebook), at_once)


def test_everything_the_tokenizer_trains_has_a_gradient():
    """With a straight-through estimator the whole tree, codebook included, gets finite non-zero gradients."""
    params = vq.init(TINY, jax.random.key(1))
    pixels = jax.random.uniform(jax.random.key(2), (2, 4, 6, 3), minval=-1.0)

    def loss(params: Params) -> jax.Array:
        z = vq.encode_latent(TINY, params, pixels)
        codes = vq.embed_codes(TINY, params, vq.quantize(TINY, params, z))
        straight_through = codes + z - jax.lax.stop_gradient(z)
        return jnp.mean((vq.decode_latent(TINY, params, straight_through) - pixels) ** 2)

    gradients = jax.jit(jax.grad(loss))(params)
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        name = jax.tree_util.keystr(path)
        assert jnp.isfinite(gradient).all(), name
        # A softmax does not change when a constant is added to all its inputs, so the bias of k has no gradient.
        assert "to_k" in name or jnp.any(gradient != 0), name


def test_abstract_describes_init_and_init_depends_on_the_key():
    params = vq.init(TINY, jax.random.key(1))
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    assert shapes == vq.abstract(TINY)
    other = vq.init(TINY, jax.random.key(2))
    assert not np.array_equal(params["codebook"]["embedding"], other["codebook"]["embedding"])
    assert not np.array_equal(params["encoder"]["conv_in"]["kernel"], other["encoder"]["conv_in"]["kernel"])


def test_bfloat16_parameters_give_float32_pixels_near_the_float32_ones():
    params = vq.init(TINY, jax.random.key(3))
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    ids = jnp.arange(12, dtype=jnp.int32).reshape(1, 3, 4)
    expected, result = vq.decode(TINY, params, ids), vq.decode(TINY, half, ids)
    assert result.dtype == jnp.float32
    assert jnp.abs(result - expected).max() < 0.1 * jnp.abs(expected).max()
    assert vq.encode(TINY, half, expected).shape == ids.shape


def test_sizes_that_no_image_tokenizer_has_are_named():
    bad = {"num_vq_embeddings": 2**40, "layers_per_block": 300_000, "block_out_channels": [32 * 10**9]}
    with pytest.raises(ValueError, match="damaged or not of this model") as caught:
        vq.VQConfig.from_json(bad | {"vq_embed_dim": 10**4000})
    for name, value in bad.items():
        assert f"{name} is {value[0] if isinstance(value, list) else value}, expected at most" in str(caught.value)
    assert "vq_embed_dim is a number of 13288 bits" in str(caught.value)
    with pytest.raises(ValueError, match="block_out_channels has 1000 values, expected at most 10"):
        vq.VQConfig.from_json({"block_out_channels": [32] * 1000})


def test_sizes_that_the_stride_does_not_divide_are_refused():
    params = vq.init(TINY, jax.random.key(4))
    with pytest.raises(ValueError, match=r"5x8.*multiples of 2"):
        vq.encode(TINY, params, jnp.zeros((1, 5, 8, 3)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_quantizer_name": "Magic"}, "Magic.*VQuantizer"),
        ({"block_out_channels": [32, 40]}, r"\[40\].*32 groups"),
        ({"block_out_channels": []}, "empty"),
        ({"_quantizer_name": "LFQuantizer"}, "2\\*\\*vq_embed_dim"),
        ({"_quantizer_name": "FSQuantizer"}, "64000"),
        ({"_class_name": "AutoencoderVQCosmos3D"}, "AutoencoderVQCosmos3D is the tokenizer of a video model"),
        ({"temporal_stride": 4}, "the tokenizer of a video model"),
        ({"norm_num_groups": 16}, "norm_num_groups"),
        ({"layers_per_block": "2"}, "layers_per_block is '2'"),
        ({"block_out_channels": [32, 0]}, r"block_out_channels is \(32, 0\)"),
        ({"attn_up_block": 1}, "attn_up_block is 1"),
    ],
)
def test_configs_that_cannot_be_computed_are_refused(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        vq.VQConfig.from_json({"block_out_channels": [32], "num_vq_embeddings": 10, "vq_embed_dim": 8} | changes)


def test_config_reads_the_json_names():
    config = vq.VQConfig.from_json({"block_out_channels": [32, 32, 64], "_quantizer_name": "VQuantizer", "x": 1})
    assert config.block_out_channels == (32, 32, 64)
    assert config.stride == 4
    assert config.vq_embed_dim == 8


def test_a_picture_is_the_same_in_any_batch():
    """To the last bit, on CPU: a program's sums depend on its shapes."""
    params = vq.init(TINY, jax.random.key(0))
    images = compiled.CPU_TOKENS // 16
    ids = jax.random.randint(jax.random.key(1), (6 * images - 1, 4, 4), 0, TINY.num_vq_embeddings)
    decode = compiled.tokenizer_codec(TINY)[1]
    together = decode(params, ids)
    for count in (1, images + 1, compiled.CPU_CHAINS * images):
        np.testing.assert_array_equal(decode(params, ids[-count:]), together[-count:])
