"""The tokenizer's training step on CPU: its convolutions use all cores."""

import jax
import optax
import pytest

from udm_grpo import compiled
from udm_grpo.model.vq import codec as vq
from udm_grpo.model.vq.config import VQConfig

SMALL = VQConfig(3, 3, (32, 32), 1, 4, 16, 4)


@pytest.fixture(name="on_one_core")
def fixture_on_one_core():
    """Return a function that compiles the step and returns the convolutions that YNNPACK computes, on one core."""
    params, optimizer = vq.abstract(SMALL), optax.sgd(1.0)
    arguments = params, jax.eval_shape(optimizer.init, params), jax.ShapeDtypeStruct((4, 8, 8, 3), "float32")

    def lines():
        text = compiled.tokenizer_step(SMALL, optimizer, True).lower(*arguments).compile().as_text()
        assert " convolution(" in text
        return [line for line in text.splitlines() if "__ynn_fusion" in line and "conv_general_dilated" in line]

    return lines


def test_no_convolution_is_left_to_a_single_core(on_one_core):
    assert not on_one_core()


def test_without_the_options_some_are(on_one_core, monkeypatch):
    """If this fails with a later version of XLA, the options are no longer needed."""
    monkeypatch.setattr(compiled, "_is_known", lambda *_: False)
    assert on_one_core()


def test_options_that_xla_does_not_know_are_left_out():
    assert compiled._is_known(*compiled.MULTITHREADED.items())
    assert not compiled._is_known(("xla_cpu_no_such_option", "1"))
