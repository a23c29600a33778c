"""A golden checkpoint as the middle of the house sees it: parameters, path, ids."""

import dataclasses
import functools

import jax.numpy as jnp
from golden_data import GoldenCase

from udm_grpo.batches import Params
from udm_grpo.diffusion.path import ProbabilityPath, make_path
from udm_grpo.model.transformer import TransformerConfig
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
        """An integer array of the case, image axes flattened."""
        array = self.case.arrays[name]
        return jnp.asarray(array.reshape(array.shape[0], -1), jnp.int32)


@functools.cache
def _load(folder: str) -> tuple:
    checkpoint = load_folder(folder)
    return checkpoint, make_path(
        checkpoint.path_codebook, checkpoint.scheduler.alpha, checkpoint.scheduler.c, checkpoint.scheduler.eps
    )


def load_model(case: GoldenCase) -> GoldenModel:
    checkpoint, path = _load(str(case.checkpoint))
    return GoldenModel(
        config=checkpoint.transformer_config,
        params=checkpoint.transformer,
        reference=load_transformer(case.reference, checkpoint.transformer_config),
        path=path,
        shift=checkpoint.scheduler.shift,
        grid=tuple(case.setup["hw"]),
        case=case,
    )
