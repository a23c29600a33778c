"""Checkpoints of training as commands read them: found, described, and turned into whole weights."""

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
"""--weights -> how their names begin in a checkpoint of training; the best one holds params alone."""
BASE = "reference/"
"""How the names of an adapter's frozen base begin; the best one holds none."""


@dataclass(frozen=True)
class Training:
    """A checkpoint of training whose arrays are still unread."""

    path: epath.Path
    step: int
    meta: Mapping[str, Any]
    infos: Mapping[str, TensorInfo]
    """Name such as state/params/norm/scale -> shape and dtype."""

    def prefix(self, weights: str) -> str:
        """Return how the names of params or ema begin; raises WeightsError if it holds none."""
        for prefix in PREFIXES[weights]:
            if any(name.startswith(prefix) for name in self.infos):
                return prefix
        found = f"found {', '.join(sorted({part_of(name) for name in self.infos}))}, wanted {PREFIXES[weights][0]}"
        advice = "use --weights params, or for ema a run with optimizer.ema_decay"
        raise WeightsError(f"{self.path} holds no {weights}: {found}; {advice}")

    @property
    def lora(self) -> LoraConfig | None:
        """How its adapter was trained; None where all weights were."""
        if not any(name.endswith(f"/{ADAPTER[0]}") for name in self.infos):
            return None
        given = self.meta.get("fingerprint", {}).get("lora")
        if given is None:
            raise WeightsError(f"{self.path} holds an adapter, but its meta does not say of which alpha; save it again")
        return LoraConfig(given["rank"], given["alpha"], tuple(given["targets"]))

    def empty(self, prefix: str) -> Params:
        """Return arrays to fill for all whose names begin like this, as a tree; it is empty if there are none."""
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
        """Return the arrays whose names begin like this, as a tree, in the dtypes that were saved."""
        wanted = self.empty(prefix)
        for part in reversed(prefix.strip("/").split("/")):
            wanted = {part: wanted}
        tree = restore(self.path, wanted, True)[0]
        for part in prefix.strip("/").split("/"):
            tree = tree[part]
        return tree

    def read(self, weights: str, start: Params | None = None) -> Params:
        """Return the transformer's whole parameters on the host, an adapter merged into its base.

        start: the model that the training started from, where it is at hand: its values are taken for the base where
        training saw them rounded. Raises WeightsError for an adapter that was saved without its base if there is none.
        """
        prefix, given = self.prefix(weights), self.lora
        params = self.read_part(prefix)
        if given is None:
            return params
        frozen = self.read_part(BASE) if self.empty(BASE) else start
        if frozen is None:
            raise WeightsError(f"{self.path} holds an adapter without its base; use to-pytorch with --base first")
        base = frozen if start is None else jax.tree.map(lambda *pair: unrounded(*map(np.asarray, pair)), start, frozen)
        return merge_on_host(base, params, lora.factor(given))

    def read_for(self, checkpoint: ReleasedModel, weights: str, name: str) -> Params:
        """Return `read` with the start model of a released folder; raises as `check`."""
        self.check(checkpoint, weights, name)
        return self.read(weights, checkpoint.transformer)

    def check(self, checkpoint: ReleasedModel, weights: str, name: str) -> None:
        """Raise WeightsError if a released folder, called `name`, is of another model than what was trained."""
        config, given = checkpoint.transformer_config, self.lora
        whole = transformer.abstract(config)
        lines = []
        if given is None:
            lines += _differences(TRANSFORMER_TABLE, whole, self.empty(self.prefix(weights)))
        else:
            wanted = lora.abstract(config, given.rank, lora.targets(given.targets))
            lines += _differences(PEFT_TABLE, wanted, self.empty(self.prefix(weights)))
            if base := self.empty(BASE):
                lines += _differences(TRANSFORMER_TABLE, whole, base)
        if lines:
            advice = "give the released folder that the training started from"
            raise WeightsError(f"{self.path} is of another model than {name}: {'; '.join(lines)}; {advice}")


def is_released(path: epath.Path) -> bool:
    """Return whether a folder has the form of the released ones."""
    return (path / "transformer").is_dir() or (path / "model_index.json").is_file()


def open_training(path: epath.Path) -> Training:
    """Find a checkpoint of training and read what it says of itself; raises WeightsError or CheckpointError."""
    found = Checkpoints(path.parent, keep=1).best() if path.name == "best" else None
    if found is None:
        try:
            found = resolve_resume(f"{path}/", path)
        except CheckpointError:
            kinds = "a run's folder, its checkpoints, one of them, or checkpoints/best"
            what = "is a released folder" if is_released(path) else "holds no complete checkpoint"
            raise WeightsError(f"{path} {what if path.exists() else 'does not exist'}; wanted {kinds}") from None
    assert found is not None
    return read_training(found)


def read_training(path: epath.Path) -> Training:
    """Read what a checkpoint's own folder says of itself; raises CheckpointError if there is none."""
    meta, header = read_meta(path), cast(Any, ocp.metadata(plain(path)))
    infos = {name: TensorInfo(tuple(leaf.shape), str(leaf.dtype)) for name, leaf in header.metadata.items()}
    return Training(path, header.custom_metadata["step"], meta, infos)


def part_of(name: str) -> str:
    """Return the part of a checkpoint that an array belongs to: state/params, reference."""
    return "/".join(name.split("/")[: 2 if name.startswith("state/") else 1])


def _differences(table: Table, wanted: Params, found: Params) -> list[str]:
    """Return how found shapes differ from wanted ones, by the names that the tensors have in files."""
    there = {name: TensorInfo(source.shape, "float32") for name, source in sources(table, found).items()}
    return problems(sources(table, wanted), there)
