"""The records passed between the stages of one iteration, and their sizes.

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
    """The result of a rollout; the trajectory is kept only for the ablations that train on it."""

    clean: Int32[Array, "b n"]
    """The final tokens, the clean action of UDM-GRPO."""
    visited: Int32[Array, "t b n"] | None = None
    """x_k, the codes at the beginning of step k."""
    predicted: Int32[Array, "t b n"] | None = None
    """The x_1 drawn at step k."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Trajectory:
    """The states of K steps that an update trains on."""

    noisy: Int32[Array, "k b n"]
    """x_k, the input of the model."""
    action: Int32[Array, "k b n"]
    """y, the tokens whose log-probability is used."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Samples:
    """Training states with everything that their loss needs; the K steps and B images form one axis S = K*B.

    If the number of devices does not divide S, padding states with weight 0 are appended.
    """

    prompt_ids: Int32[Array, "s l"]
    noisy: Int32[Array, "s n"]
    action: Int32[Array, "s n"]
    advantage: Float[Array, " s"]
    """The objective's weights of the images; 0 until the scores have arrived."""
    frozen: dict[str, Float[Array, "s ..."]]
    """Further inputs of the objective's loss, by name, computed before the first update of this rollout."""
    weight: Float[Array, " s"] | None = None
    """1 for a state of the rollout, 0 for padding; None if there is no padding."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything an update changes."""

    params: Params
    """float32 master weights of the transformer."""
    opt_state: optax.OptState
    ema: Params | None
    """Exponential moving average of `params`, if enabled."""
    step: Int32[Array, ""]
    """Number of optimizer updates so far."""


def padded(size: int, multiple: int) -> int:
    """Return the smallest multiple of `multiple` that is at least `size`."""
    return -(-size // multiple) * multiple


@dataclass(frozen=True)
class BatchSizes:
    """The batch sizes of an iteration and of an evaluation, over all devices together."""

    images: int
    """B, the images of an iteration."""
    rollout: int
    """Images that are rolled out and decoded at a time."""
    states: int
    """S = K*B, the training states of an iteration."""
    minibatches: int
    """M, the parts of the B images, each with its own optimizer step."""
    update: int
    """States whose gradients are computed at a time."""
    evaluation: int
    """Images of an evaluation that are drawn at a time."""

    @property
    def drawn(self) -> int:
        """Images drawn for an iteration: B, plus the padding of the last micro-batch."""
        return padded(self.images, self.rollout)

    @property
    def trained(self) -> int:
        """States of an iteration: S, plus padding of weight 0."""
        return padded(self.states, self.update)

    @property
    def stepped(self) -> int:
        """States of one optimizer step: those of its images, plus padding of weight 0."""
        return padded(self.states // self.minibatches, self.update)
