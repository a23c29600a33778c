"""The records that pass between the stages of one iteration, and their sizes.

P  prompts of an iteration          K  trained steps of a trajectory
G  images of a prompt (its group)   T  steps of a rollout
B  = P*G images, prompt-major:      V  visual codes
   image b = p*G + g                D  width of the transformer
L  text tokens of a prompt          h, w  token grid of an image
N  = h*w image tokens
"""

from dataclasses import dataclass
from typing import Any

import jax
import optax
from jaxtyping import Array, Float, Int32

Params = dict[str, Any]
"""A plain nested dict of arrays; no flax type leaves `udm_grpo.model`."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rollout:
    """What a rollout leaves behind; the trajectory only for the ablations that train on it."""

    clean: Int32[Array, "b n"]
    """The final tokens, the clean action of UDM-GRPO."""
    visited: Int32[Array, "t b n"] | None = None
    """x_k, the codes that step k started from."""
    predicted: Int32[Array, "t b n"] | None = None
    """The x_1 drawn at step k."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Trajectory:
    """The states of K steps that an update trains on."""

    noisy: Int32[Array, "k b n"]
    """x_k, what the model sees."""
    action: Int32[Array, "k b n"]
    """y, what its log-probability is taken of."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Samples:
    """Training states with everything their loss needs, the K steps and B images merged into one axis S = K*B.

    Where the devices do not divide S, states are added at the end whose weight is 0.
    """

    prompt_ids: Int32[Array, "s l"]
    noisy: Int32[Array, "s n"]
    action: Int32[Array, "s n"]
    advantage: Float[Array, " s"]
    """What the objective made of the scores; 0 until they are there."""
    frozen: dict[str, Float[Array, "s ..."]]
    """What else the objective's loss needs, by name, computed before the first update of this rollout."""
    weight: Float[Array, " s"] | None = None
    """1 for a state of the rollout, 0 for one that only fills up the devices; None: there are none of those."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything an update changes."""

    params: Params
    """float32 master weights of the transformer."""
    opt_state: optax.OptState
    ema: Params | None
    """Exponential moving average of `params`, if asked for."""
    step: Int32[Array, ""]
    """Optimizer updates made so far."""


def padded(size: int, multiple: int) -> int:
    """Return the smallest multiple of `multiple` that is at least `size`."""
    return -(-size // multiple) * multiple


@dataclass(frozen=True)
class BatchSizes:
    """The batches of an iteration and of an evaluation, over all devices together."""

    images: int
    """B, images of an iteration."""
    rollout: int
    """Images that are rolled out and decoded together."""
    states: int
    """S = K*B, training states of an iteration."""
    minibatches: int
    """Parts of the B images, each for an optimizer step of its own."""
    update: int
    """States whose gradients are taken together."""
    evaluation: int
    """Images of an evaluation that are drawn together."""

    @property
    def drawn(self) -> int:
        """Images that are drawn for an iteration: the B, then the padding of the last micro-batch."""
        return padded(self.images, self.rollout)

    @property
    def trained(self) -> int:
        """States of an iteration: the S, then padding of weight 0."""
        return padded(self.states, self.update)

    @property
    def stepped(self) -> int:
        """States of one optimizer step: those of its images, then padding of weight 0."""
        return padded(self.states // self.minibatches, self.update)
