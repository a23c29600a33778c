"""The records that pass between the stages of one iteration, and the letters for their sizes.

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
    t: Float[Array, " k"]
    """The time of each step, in [0, 1)."""
    step: Int32[Array, " k"]
    """The index of each step in the rollout's schedule."""


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
    ref_logp: Float[Array, " s"]
    """Token-mean log-probability under the frozen start model."""
    old_logp: Float[Array, " s"] | None
    """Token-mean log-probability before the first update of this rollout; None when there is only one update."""
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
