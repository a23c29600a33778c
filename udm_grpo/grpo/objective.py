"""What an update optimises: the seam at which another objective takes the place of UDM-GRPO's.

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
    """Pure functions over arrays; a frozen dataclass of plain values, since it is static under jit."""

    @classmethod
    def from_config(cls, config: RunConfig, shift: float, rows: int) -> "Objective":
        """Return the objective of a run: `shift` is that of its schedule, `rows` the images to work on at a time."""
        ...

    @property
    def needs_rollout(self) -> bool:
        """Whether rollouts have to keep what they met at every step."""
        ...

    def states(
        self, path: ProbabilityPath, rollout: Rollout, image_index: Int32[Array, " b"], key: Key[Array, ""]
    ) -> Trajectory:
        """Return the K training states of each of B images; no score is needed for them."""
        ...

    def freeze(
        self, network: Network, policy: Params, reference: Params, samples: Samples
    ) -> dict[str, Float[Array, "m ..."]]:
        """Return what the loss needs of the policy that drew the images and of the start model, for M states."""
        ...

    def weights(self, score: Float[Array, "p g"]) -> Float[Array, "p g"]:
        """Return what each image counts: its advantage. Where all are 0 no update is made."""
        ...

    def loss(self, network: Network, params: Params, samples: Samples) -> tuple[Float[Array, ""], Metrics]:
        """Return the loss of some of the states and metrics by name, which are logged; all are means by `loss.mean`."""
        ...


OBJECTIVES: dict[str, type[Objective]] = {"udm_grpo": UDMGRPO}
"""The objectives by the name that `grpo.objective` gives them."""


def objective_class(name: str) -> type[Any]:
    """Return the class of OBJECTIVES or module:Class that a config names; raise ConfigError where there is none."""
    if name in OBJECTIVES:
        return OBJECTIVES[name]
    module, _, attribute = name.partition(":")
    if not attribute:
        raise ConfigError(f"grpo.objective is {name!r}; choose {', '.join(OBJECTIVES)} or module:Class.")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"grpo.objective is {name!r}, which cannot be imported: {error}.") from error
    lacking = [part for part in METHODS if not hasattr(found, part)]
    if lacking:
        raise ConfigError(f"grpo.objective is {name!r}, which lacks {', '.join(lacking)}; see udm_grpo/grpo/README.md.")
    return found


METHODS = ("from_config", "needs_rollout", "states", "freeze", "weights", "loss")
"""Of an objective."""
