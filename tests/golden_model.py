"""A golden model in the form that the model and training code takes: parameters, path, ids."""

import dataclasses
import functools

import jax.numpy as jnp
from golden_data import GoldenCase

from udm_grpo.batches import Params
from udm_grpo.diffusion.path import ProbabilityPath, make_path
from udm_grpo.model.execution import TransformerConfig
from udm_grpo.released.weights import load_folder, load_transformer


@dataclasses.dataclass(frozen=True)
class GoldenModel:
    config: TransformerConfig
    params: Params
    reference: Params
    path: ProbabilityPath
    shift: float
    grid: tuple[int, int]
    case: GoldenCase

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    def ids(self, name: str) -> jnp.ndarray:
        """Return an integer array of the case with its image axes flattened."""
        array = self.case.arrays[name]
        return jnp.asarray(array.reshape(array.shape[0], -1), jnp.int32)


@functools.cache
def _load(folder: str) -> tuple:
    released = load_folder(folder)
    return released, make_path(
        released.path_codebook, released.scheduler.alpha, released.scheduler.c, released.scheduler.eps
    )


def load_model(case: GoldenCase) -> GoldenModel:
    released, path = _load(str(case.checkpoint))
    return GoldenModel(
        config=released.transformer_config,
        params=released.transformer,
        reference=load_transformer(case.reference, released.transformer_config),
        path=path,
        shift=released.scheduler.shift,
        grid=tuple(case.setup["hw"]),
        case=case,
    )
