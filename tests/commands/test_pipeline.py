"""The pipeline of a released model: compared with the release's numbers, and errors for wrong input."""

import contextlib
import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_data import GoldenCase, assert_close, first_case, golden_cases

from udm_grpo.pipeline import Pipeline, load_pipeline


@functools.cache
def pipeline_of(case_path: Path) -> Pipeline:
    return load_pipeline(case_path / "checkpoint")


@pytest.fixture
def pipeline() -> Pipeline:
    return pipeline_of(first_case().path)


def channels_last(array: np.ndarray) -> np.ndarray:
    return np.moveaxis(array, 1, -1)


@golden_cases()
def test_prompts_become_the_ids_of_the_release(case: GoldenCase):
    pipeline = pipeline_of(case.path)
    backend, length = pipeline.released.tokenizer.backend, case.setup["L"]
    longer = sum(len(backend.encode(prompt, add_special_tokens=False)) > length for prompt in case.prompts)
    message = f"{longer} of {len(case.prompts)} prompts have more than {length} tokens"
    with pytest.warns(UserWarning, match=message) if longer else contextlib.nullcontext():
        ids = pipeline.tokenize(case.prompts)
    assert ids.dtype == np.int32
    np.testing.assert_array_equal(ids, case.arrays["prompt_ids"])
    empty = pipeline.tokenize([""] * len(case.prompts))
    np.testing.assert_array_equal(empty, case.arrays["empty_prompt_ids"])
    np.testing.assert_array_equal(pipeline.released.tokenizer.empty(), empty[0])


@golden_cases()
def test_logits_match_the_release(case: GoldenCase):
    logits = pipeline_of(case.path).logits(case.arrays["prompt_ids"], case.arrays["image_ids"])
    assert logits.dtype == jnp.float32
    assert_close(logits, case.arrays["logits_image"])


@golden_cases()
def test_pictures_match_the_release(case: GoldenCase):
    pipeline = pipeline_of(case.path)
    expected = channels_last(case.arrays["vae_decode"])
    decoded = pipeline.decode(case.arrays["image_ids"])
    assert decoded.dtype == jnp.float32
    # Clipping comes after the comparison of test_vq.py, so the scale of the error is that of the unclipped picture.
    assert np.abs(decoded - np.clip(expected, -1, 1)).max() <= 1e-5 * np.abs(expected).max()
    ids = pipeline.encode(channels_last(case.arrays["vae_encode_pixels"]))
    np.testing.assert_array_equal(ids, case.arrays["vae_encode_ids"])


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_generate_depends_on_the_seed_alone(pipeline: Pipeline, guidance_scale: float):
    height, width = 2 * pipeline.stride, 3 * pipeline.stride
    draw = functools.partial(pipeline.generate, steps=3, guidance_scale=guidance_scale, height=height, width=width)
    prompts = ["a red circle", "a blue star"]
    pictures = draw(prompts, seed=5)
    assert pictures.dtype == np.uint8
    assert pictures.shape == (2, height, width, 3)
    np.testing.assert_array_equal(draw(prompts, seed=5), pictures)
    assert (draw(prompts, seed=6) != pictures).any()


def test_a_stage_is_compiled_once(pipeline: Pipeline):
    size = pipeline.stride
    for seed in (0, 1):
        pipeline.generate(["a red circle"], steps=2, seed=seed, height=size, width=size)
    rollouts = [stage for what, stage in pipeline.compiled.items() if what[0] == (1, 1)]
    assert len(rollouts) == 1
    assert rollouts[0].func._cache_size() == 1  # partial(compiled, path)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bits_are_near_float32(dtype: str, pipeline: Pipeline):
    case = first_case()
    half = load_pipeline(case.checkpoint, dtype=dtype)
    assert half.released.transformer["lm_head"]["kernel"].dtype == dtype
    assert half.released.path_codebook.dtype == jnp.float32
    prompt_ids, image_ids = case.arrays["prompt_ids"], case.arrays["image_ids"]
    # jax.nn.dot_product_attention promotes 16 bits to float32 implicitly.
    with jax.numpy_dtype_promotion("standard"):
        logits = half.logits(prompt_ids, image_ids)
    assert logits.dtype == jnp.float32
    expected = case.arrays["logits_image"]
    assert np.abs(logits - expected).max() < 0.05 * np.abs(expected).max()
    decoded = half.decode(image_ids)
    assert decoded.dtype == jnp.float32
    assert np.abs(decoded - pipeline.decode(image_ids)).max() < 0.2


def test_a_saved_pipeline_is_the_same_pipeline(pipeline: Pipeline, tmp_path: Path):
    case = first_case()
    pipeline.save(tmp_path / "copy")
    copy = load_pipeline(tmp_path / "copy")
    expected = pipeline.logits(case.arrays["prompt_ids"], case.arrays["image_ids"])
    np.testing.assert_array_equal(copy.logits(case.arrays["prompt_ids"], case.arrays["image_ids"]), expected)


def test_no_scheduler_alpha_means_the_mixture_path(tmp_path: Path):
    shutil.copytree(first_case().checkpoint, tmp_path / "mixture")
    file = tmp_path / "mixture" / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text())
    del config["alpha"]
    file.write_text(json.dumps(config))
    pipeline = load_pipeline(tmp_path / "mixture")
    assert pipeline.path.alpha is None
    size = pipeline.stride
    assert pipeline.generate(["a"], steps=2, height=size, width=size).shape == (1, size, size, 3)


def test_wrong_input_is_named(pipeline: Pipeline):
    config, size = pipeline.released.transformer_config, pipeline.stride
    prompt_ids, image_ids = np.zeros((1, 7), int), np.zeros((1, 2, 2), int)
    with pytest.raises(ValueError, match=rf"9 x 16.*multiples of {size}"):
        pipeline.generate(["a"], height=9, width=16)
    with pytest.raises(ValueError, match=r"steps is 0"):
        pipeline.generate(["a"], steps=0, height=size, width=size)
    with pytest.raises(ValueError, match="no prompts"):
        pipeline.generate([], height=size, width=size)
    with pytest.raises(TypeError, match="give a list"):
        pipeline.tokenize("a red circle")
    with pytest.raises(ValueError, match=rf"prompt_ids holds 0 to {config.lm_vocab_size}"):
        pipeline.logits(prompt_ids + np.eye(1, 7, dtype=int) * config.lm_vocab_size, image_ids)
    with pytest.raises(ValueError, match="image_ids holds -1 to -1"):
        pipeline.decode(image_ids - 1)
    with pytest.raises(ValueError, match="integers with 3 axes"):
        pipeline.decode(image_ids[0])
    with pytest.raises(ValueError, match="2 prompts, but 1 images"):
        pipeline.logits(np.zeros((2, 7), int), image_ids)
    with pytest.raises(ValueError, match=rf"multiples of {size}"):
        pipeline.encode(np.zeros((1, size + 1, size, 3), np.float32))
    with pytest.raises(ValueError, match=r"floats in \[-1, 1\]"):
        pipeline.encode(np.zeros((1, size, size, 3), np.uint8))
    assert pipeline.tokenize([]).shape == (0, pipeline.released.tokenizer.length)
