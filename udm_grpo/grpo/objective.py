"""What an update optimises: the interface through which another objective can replace UDM-GRPO's.

README.md in this folder shows one in forty lines. `grpo.objective` of a config names one of OBJECTIVES, or
module:Class.
"""

import importlib
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Float, Int32, Key

from udm_grpo.batches import Params, Rollout, Samples, Trajectory
from udm_grpo.config import ConfigError, RunConfig
from udm_grpo.diffusion.path import ProbabilityPath
from udm_grpo.grpo.loss import UDMGRPO
from udm_grpo.model.network import Network

Metrics = dict[str, Float[Array, ""]]


@runtime_checkable
class Objective(Protocol):
    """Pure functions over arrays. Implement it as a frozen dataclass of plain values, since it is static under jit."""

    @classmethod
    def from_config(cls, config: RunConfig, shift: float, rows: int) -> "Objective":
        """Return the objective of a run: `shift` is that of its schedule, `rows` the images to process at a time."""
        ...

    @property
    def needs_rollout(self) -> bool:
        """Whether rollouts must keep x_k and x_1 of every step."""
        ...

    def states(
        self, path: ProbabilityPath, rollout: Rollout, image_index: Int32[Array, " b"], key: Key[Array, ""]
    ) -> Trajectory:
        """Return the K training states of each of B images; they do not depend on scores."""
        ...

    def freeze(
        self, network: Network, policy: Params, reference: Params, samples: Samples
    ) -> dict[str, Float[Array, "m ..."]]:
        """Return what the loss needs from the policy that drew the images and from the start model, for M states."""
        ...

    def weights(self, score: Float[Array, "p g"]) -> Float[Array, "p g"]:
        """Return the weight of each image, its advantage. If all are 0, no update is made."""
        ...

    def loss(self, network: Network, params: Params, samples: Samples) -> tuple[Float[Array, ""], Metrics]:
        """Return the loss of some states, and metrics by name, which are logged; all are means by `loss.mean`."""
        ...


OBJECTIVES: dict[str, type[Objective]] = {"udm_grpo": UDMGRPO}
"""The objectives by their names in `grpo.objective`."""


def objective_class(name: str) -> type[Any]:
    """Return the class in OBJECTIVES or module:Class that a config names; raise ConfigError if there is none."""
    if name in OBJECTIVES:
        return OBJECTIVES[name]
    module, _, attribute = name.partition(":")
    if not attribute:
        raise ConfigError(f"grpo.objective is {name!r}; choose {', '.join(OBJECTIVES)} or module:Class.")
    try:
        objective = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"grpo.objective is {name!r}, which cannot be imported: {error}.") from error
    lacking = [part for part in METHODS if not hasattr(objective, part)]
    if lacking:
        raise ConfigError(f"grpo.objective is {name!r}, which lacks {', '.join(lacking)}; see udm_grpo/grpo/README.md.")
    return objective


METHODS = ("from_config", "needs_rollout", "states", "freeze", "weights", "loss")
"""The methods of an objective."""
