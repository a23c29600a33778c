"""The sizes of the transformer, as its config.json gives them, and how it is computed; both are static under jit."""

from dataclasses import dataclass, fields
from typing import Any

import jax
from jaxtyping import Array

from udm_grpo.batches import Params
from udm_grpo.model.sizes import check_sizes

ATTENTION_IMPLEMENTATIONS = ("xla", "cudnn", "splash")
"""Values of `Execution.attention`: plain XLA anywhere, cuDNN's flash attention on NVIDIA GPUs (bfloat16), JAX's splash
kernel on TPUs."""
REMAT_POLICIES = ("none", "dots", "full")


@dataclass(frozen=True)
class TransformerConfig:
    """The sizes in transformer/config.json."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    num_hidden_layers: int
    rope_theta: int | float
    vocab_size: int
    lm_vocab_size: int
    lm_head_size: int
    bov_token_id: int

    @classmethod
    def from_json(cls, config: dict[str, Any]) -> "TransformerConfig":
        """Read the sizes from the parsed config.json; raises ValueError naming fields that are missing or invalid."""
        missing = [field.name for field in fields(cls) if field.name not in config]
        if missing:
            raise ValueError(f"transformer config.json lacks {', '.join(missing)}; found {', '.join(sorted(config))}.")
        check_sizes(config)
        sizes = cls(**{field.name: config[field.name] for field in fields(cls)})
        if sizes.vocab_size != sizes.lm_vocab_size + sizes.lm_head_size:
            raise ValueError(
                f"transformer config.json: vocab_size is {sizes.vocab_size}, but lm_vocab_size + lm_head_size is "
                f"{sizes.lm_vocab_size} + {sizes.lm_head_size}."
            )
        if sizes.num_attention_heads % sizes.num_key_value_heads:
            raise ValueError(
                f"transformer config.json: num_attention_heads {sizes.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {sizes.num_key_value_heads}."
            )
        return sizes


@dataclass(frozen=True)
class Execution:
    """How the trunk is computed; affects speed and memory, never the result beyond rounding."""

    attention: str = "xla"
    """One of ATTENTION_IMPLEMENTATIONS."""
    remat: str = "none"
    """What the backward pass recomputes: nothing, all but matrix products ("dots"), or whole blocks ("full")."""
    batch: Any = None
    """Sharding of arrays whose first axis is the batch; None leaves it to the compiler."""
    head: Any = None
    """Sharding of the head's kernel while logits are computed; None leaves it unchanged."""
    layers: Any = None
    """Function that prepares the parameters of all blocks for the loop over them; None leaves them unchanged."""
    shards: int = 1
    """Number of devices that a batch is spread over."""
    added_up: Any = None
    """Decorator for a function of (weights, a batch) that every device computes on its own rows, with all parameters,
    before the results are added up; None if devices have only parts of the parameters, or there is only one device."""
    multiple: int = 1
    """The sequence is padded at the embedding to a multiple of this, with rows that no row attends to and that are
    dropped at the end. 1, or 2 for "cudnn", whose gradient JAX refuses for an odd number of rows."""

    def on_one_device(self) -> "Execution":
        """Return the execution of one device's share of a batch, by that device alone."""
        return Execution(self.attention, self.remat, multiple=self.multiple)

    def padded_rows(self, rows: int) -> int:
        """Return the rows of the sequence inside the trunk."""
        multiple = max(self.multiple, 2 if self.attention == "cudnn" else 1)
        return -(-rows // multiple) * multiple

    def spread(self, x: Array) -> Array:
        """Constrain a batch to stay spread over its devices: the compiler might shard the width like the weights'."""
        return x if self.batch is None else jax.lax.with_sharding_constraint(x, self.batch)

    def with_head(self, params: Params) -> Params:
        """Return the parameters with the head's kernel gathered once, instead of for every chunk of rows."""
        if self.head is None:
            return params
        return {**params, "lm_head": jax.lax.with_sharding_constraint(params["lm_head"], self.head)}


ONE_DEVICE = Execution()
