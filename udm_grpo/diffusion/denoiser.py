"""The interface through which the diffusion code uses a model."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Float, Int

from udm_grpo.batches import Params


@runtime_checkable
class Denoiser(Protocol):
    """A model that predicts clean codes from noisy ones; `model.network.Network` is one."""

    @property
    def tokens(self) -> int:
        """N, the number of tokens of an image."""
        ...

    def features(
        self, params: Params, prompt_ids: Int[Array, "b l"], image_ids: Int[Array, "b n"]
    ) -> Float[Array, "b n d"]:
        """Return the input of `logits` for every image token."""
        ...

    def logits(self, params: Params, features: Float[Array, "*b d"]) -> Float[Array, "*b v"]:
        """Return float32 logits of the clean code."""
        ...

    def with_head(self, params: Params) -> Params:
        """Return the parameters, prepared for calling `logits` on many chunks."""
        ...

    def in_chunks(self, fn: Callable[[Any], Any], images: Any) -> Any:
        """Apply `fn` to a few images at a time, along the first axis of every array."""
        ...
