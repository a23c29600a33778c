"""The interface of the model: pure functions of its parameters, on a dataclass of everything that is static.

To use another model, write another class with these methods.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxtyping import Array, Float, Int

from udm_grpo.batches import Params
from udm_grpo.model.chunks import map_chunks
from udm_grpo.model.execution import ONE_DEVICE, Execution, TransformerConfig
from udm_grpo.model.head import head_logps
from udm_grpo.model.transformer import head, image_features


@dataclass(frozen=True)
class Network:
    """URSA's transformer over a grid of image tokens; static under jit."""

    config: TransformerConfig
    grid: tuple[int, int]
    """(h, w), the token grid of an image."""
    execution: Execution = ONE_DEVICE
    rows: int = 4
    """Number of images whose logits are in memory at a time."""

    @property
    def tokens(self) -> int:
        """N, the number of tokens of an image."""
        return self.grid[0] * self.grid[1]

    @property
    def codes(self) -> int:
        """V, the number of visual codes."""
        return self.config.lm_head_size

    def features(
        self, params: Params, prompt_ids: Int[Array, "b l"], image_ids: Int[Array, "b n"]
    ) -> Float[Array, "b n d"]:
        """Return the trunk's output at the rows that predict the N image tokens, in the dtype of `params`.

        Raises ValueError if the number of tokens per image does not match the grid.
        """
        return image_features(self.config, params, prompt_ids, image_ids, self.grid, self.execution)

    def logits(self, params: Params, features: Float[Array, "*b d"]) -> Float[Array, "*b v"]:
        """Return float32 logits over the V codes; pass features in chunks, since V is large."""
        return head(params, features)

    def log_probs(
        self,
        params: Params,
        prompt_ids: Int[Array, "b l"],
        noisy: Int[Array, "b n"],
        action: Int[Array, "b n"],
    ) -> tuple[Float[Array, "b n"], Float[Array, "b n"]]:
        """Return (log p(action | noisy), entropy) of every token in float32; the gradient stores no logits."""
        features = self.features(params, prompt_ids, noisy)
        kernel = self.execution.with_head(params)["lm_head"]["kernel"]
        return head_logps(features, kernel, action, self.rows, self.execution)

    def with_head(self, params: Params) -> Params:
        """Return the parameters with the head gathered once, for calling `logits` on many chunks."""
        return self.execution.with_head(params)

    def in_chunks(self, fn: Callable[[Any], Any], images: Any) -> Any:
        """Apply `fn`, which must treat images independently, to `rows` images at a time along the first axis."""
        return map_chunks(fn, images, self.rows)

    def spread(self, batch: Array) -> Array:
        """Constrain a batch to stay spread over its devices."""
        return self.execution.spread(batch)
