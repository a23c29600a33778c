"""Training checkpoints as commands read them: find, describe, and convert to complete weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import jax
import numpy as np
from etils import epath
from orbax.checkpoint import v1 as ocp

from udm_grpo.batches import Params
from udm_grpo.checkpoints.checkpoint import CheckpointError, Checkpoints, read_meta, resolve_resume, restore
from udm_grpo.checkpoints.checkpoint_storage import plain
from udm_grpo.config import LoraConfig
from udm_grpo.export import unrounded
from udm_grpo.model import lora, transformer
from udm_grpo.model.transformer import ADAPTER
from udm_grpo.released.peft_files import PEFT_TABLE, merge_on_host
from udm_grpo.released.weights import ReleasedModel, WeightsError
from udm_grpo.tensor_files.weight_table import TRANSFORMER_TABLE, Table, TensorInfo, problems, sources

PREFIXES = {"params": ("state/params/", "params/"), "ema": ("state/ema/",)}
"""Value of --weights -> possible prefixes of their names in a checkpoint; the best one contains only params."""
BASE = "reference/"
"""Prefix of the names of an adapter's frozen base; the best checkpoint contains none."""


@dataclass(frozen=True)
class Training:
    """A training checkpoint whose arrays have not been read yet."""

    path: epath.Path
    step: int
    meta: Mapping[str, Any]
    infos: Mapping[str, TensorInfo]
    """Name such as state/params/norm/scale -> shape and dtype."""

    def prefix(self, weights: str) -> str:
        """Return the prefix of the names of params or ema; raises WeightsError if the checkpoint contains none."""
        for prefix in PREFIXES[weights]:
            if any(name.startswith(prefix) for name in self.infos):
                return prefix
        parts = ", ".join(sorted({part_of(name) for name in self.infos}))
        advice = "use --weights params, or for ema a run with optimizer.ema_decay"
        raise WeightsError(
            f"{self.path} contains no {weights}: found {parts}, expected {PREFIXES[weights][0]}; {advice}"
        )

    @property
    def lora(self) -> LoraConfig | None:
        """The settings of its adapter; None if all weights were trained."""
        if not any(name.endswith(f"/{ADAPTER[0]}") for name in self.infos):
            return None
        settings = self.meta.get("fingerprint", {}).get("lora")
        if settings is None:
            raise WeightsError(
                f"{self.path} contains an adapter, but its meta lacks the adapter's alpha; save it again"
            )
        return LoraConfig(settings["rank"], settings["alpha"], tuple(settings["targets"]))

    def empty(self, prefix: str) -> Params:
        """Return uninitialized arrays for all names with this prefix, as a tree; it is empty if there are none."""
        tree: Params = {}
        for name, info in self.infos.items():
            if name.startswith(prefix):
                *parts, last = name.removeprefix(prefix).split("/")
                node = tree
                for part in parts:
                    node = node.setdefault(part, {})
                node[last] = np.empty(info.shape, info.dtype)
        return tree

    def read_part(self, prefix: str) -> Params:
        """Return the arrays whose names have this prefix, as a tree, in the dtypes that were saved."""
        abstract = self.empty(prefix)
        for part in reversed(prefix.strip("/").split("/")):
            abstract = {part: abstract}
        tree = restore(self.path, abstract, True)[0]
        for part in prefix.strip("/").split("/"):
            tree = tree[part]
        return tree

    def read(self, weights: str, start: Params | None = None) -> Params:
        """Return the transformer's complete parameters on the host, with an adapter merged into its base.

        start: the model that the training started from, if available: where training saw its values rounded, these
        unrounded ones are used for the base. Raises WeightsError for an adapter without its base if start is None.
        """
        prefix, adapter = self.prefix(weights), self.lora
        params = self.read_part(prefix)
        if adapter is None:
            return params
        frozen = self.read_part(BASE) if self.empty(BASE) else start
        if frozen is None:
            raise WeightsError(f"{self.path} contains an adapter without its base; use to-pytorch with --base first")
        base = frozen if start is None else jax.tree.map(lambda *pair: unrounded(*map(np.asarray, pair)), start, frozen)
        return merge_on_host(base, params, lora.factor(adapter))

    def read_for(self, released: ReleasedModel, weights: str, name: str) -> Params:
        """Return `read` with the start model of a released folder; raises like `check`."""
        self.check(released, weights, name)
        return self.read(weights, released.transformer)

    def check(self, released: ReleasedModel, weights: str, name: str) -> None:
        """Raise WeightsError if a released folder, called `name`, is of another model than the trained one."""
        config, adapter = released.transformer_config, self.lora
        whole = transformer.abstract(config)
        lines = []
        if adapter is None:
            lines += _differences(TRANSFORMER_TABLE, whole, self.empty(self.prefix(weights)))
        else:
            expected = lora.abstract(config, adapter.rank, lora.targets(adapter.targets))
            lines += _differences(PEFT_TABLE, expected, self.empty(self.prefix(weights)))
            if base := self.empty(BASE):
                lines += _differences(TRANSFORMER_TABLE, whole, base)
        if lines:
            advice = "use the released folder that the training started from"
            raise WeightsError(f"{self.path} is of another model than {name}: {'; '.join(lines)}; {advice}")


def is_released(path: epath.Path) -> bool:
    """Return whether a folder looks like a released model."""
    return (path / "transformer").is_dir() or (path / "model_index.json").is_file()


def open_training(path: epath.Path) -> Training:
    """Find a training checkpoint and read its metadata; raises WeightsError or CheckpointError."""
    checkpoint = Checkpoints(path.parent, keep=1).best() if path.name == "best" else None
    if checkpoint is None:
        try:
            checkpoint = resolve_resume(f"{path}/", path)
        except CheckpointError:
            kinds = "a run's folder, its checkpoints, one of them, or checkpoints/best"
            what = "is a released folder" if is_released(path) else "contains no complete checkpoint"
            raise WeightsError(f"{path} {what if path.exists() else 'does not exist'}; expected {kinds}") from None
    assert checkpoint is not None
    return read_training(checkpoint)


def read_training(path: epath.Path) -> Training:
    """Read the metadata of the checkpoint in this folder; raises CheckpointError if there is none."""
    meta, header = read_meta(path), cast(Any, ocp.metadata(plain(path)))
    infos = {name: TensorInfo(tuple(leaf.shape), str(leaf.dtype)) for name, leaf in header.metadata.items()}
    return Training(path, header.custom_metadata["step"], meta, infos)


def part_of(name: str) -> str:
    """Return the part of a checkpoint that an array belongs to: state/params, reference."""
    return "/".join(name.split("/")[: 2 if name.startswith("state/") else 1])


def _differences(table: Table, expected: Params, saved: Params) -> list[str]:
    """Return how saved shapes differ from expected ones, by the names that the tensors have in files."""
    there = {name: TensorInfo(source.shape, "float32") for name, source in sources(table, saved).items()}
    return problems(sources(table, expected), there)
