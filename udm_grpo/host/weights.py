"""The released URSA checkpoint folder, both directions: load_folder, save_folder, and new_checkpoint for a new model."""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from udm_grpo.batches import Params
from udm_grpo.host.atomic import replacing_folder
from udm_grpo.host.tokenizer import PromptTokenizer, load_tokenizer
from udm_grpo.host.torch_files import (
    Layout,
    TensorFiles,
    WeightsError,
    find,
    open_tensors,
    read_json,
    write_file,
    write_tensors,
)
from udm_grpo.host.weight_table import (
    TRANSFORMER_TABLE,
    VQ_TABLE,
    Source,
    TensorInfo,
    from_tree,
    leaves_by_path,
    problems,
    sources,
    to_tree,
)
from udm_grpo.model import transformer, vq
from udm_grpo.model.transformer import TransformerConfig
from udm_grpo.model.vq import VQConfig

PathLike = str | os.PathLike[str]
T = TypeVar("T")

SCHEDULER_FILE = "scheduler_model.pth"
CODEBOOK_NAME = "path.emb"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
DIFFUSERS_VERSION = "0.35.1"
"""The version that the released folders name; what reads them wants one to be named."""


@dataclass(frozen=True)
class Scheduler:
    """scheduler_config.json: the probability path and the schedule."""

    alpha: float | None
    """Exponent of beta_t; None: the mixture path."""
    c: float
    """Factor of beta_t."""
    eps: float
    """Least norm of a codebook row when it is normalised."""
    shift: float
    """s of the schedule."""

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> "Scheduler":
        """Read scheduler_config.json, with the release's defaults; raises ValueError for values that cannot be."""
        given = {name: value for name, value in raw.items() if value is not None}
        values = {"c": 3.0, "eps": 1e-5, "shift": 1.0} | given
        made = cls(given.get("alpha"), values["c"], values["eps"], values["shift"])
        for name, value in dataclasses.asdict(made).items():
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if value is not None and not (number and 0 < value < float("inf")):
                raise ValueError(f"scheduler_config.json: {name} is {value!r}; wanted a number above 0")
        return made


@dataclass(frozen=True)
class Checkpoint:
    """Everything that a checkpoint folder holds, and how it was stored.

    To export trained weights: `save_folder(dataclasses.replace(checkpoint, transformer=params), folder)`.
    """

    transformer_config: TransformerConfig
    transformer: Params
    vq_config: VQConfig
    vq: Params
    path_codebook: Float[Array, "v e"]
    """The codes as the path sees them, float32; the image tokenizer has its own."""
    scheduler: Scheduler
    tokenizer: PromptTokenizer
    files: Mapping[str, bytes]
    """Relative path -> content of every configuration and tokenizer file; saved verbatim."""
    layouts: Mapping[str, Layout]
    """Part (transformer, vae, scheduler) -> how its tensors lie in files, with their dtypes."""


def load_folder(folder: PathLike, dtype: str = "float32", prompt_length: int | None = None) -> Checkpoint:
    """Read a checkpoint folder of any size in the released format.

    dtype: of the parameters in memory; 16-bit weights widen to float32 without loss and are saved in 16 bits again,
    while weights that `dtype` cannot hold exactly are rounded and will be saved as `dtype`. prompt_length: L; by
    default the tokenizer's model_max_length, at most 320. Raises WeightsError that lists every problem at once.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise WeightsError(f"{folder}: no such folder; give the folder that holds transformer/, vae/, scheduler/, tokenizer/")
    found = _Problems()
    config = found.collect(lambda: TransformerConfig.from_json(read_json(folder / "transformer/config.json")))
    vq_config = found.collect(lambda: VQConfig.from_json(read_json(folder / "vae/config.json")))
    scheduler = found.collect(lambda: Scheduler.from_json(read_json(folder / "scheduler/scheduler_config.json")))
    tokenizer = found.collect(lambda: load_tokenizer(folder / "tokenizer", prompt_length))
    weights = found.part(folder / "transformer", config and sources(TRANSFORMER_TABLE, transformer.abstract(config)))
    codec = found.part(folder / "vae", vq_config and sources(VQ_TABLE, vq.abstract(vq_config)))
    codebook = found.collect(lambda: open_tensors(folder / "scheduler" / SCHEDULER_FILE))
    if config and codebook:
        found.lines += _codebook_problems(codebook, config)
    if config and vq_config and vq_config.num_vq_embeddings != config.lm_head_size:
        counts = f"num_vq_embeddings {vq_config.num_vq_embeddings}, lm_head_size {config.lm_head_size}"
        found.lines.append(f"the image tokenizer and the transformer differ in their number of codes: {counts}")
    if config and tokenizer:
        found.lines += _tokenizer_problems(tokenizer, config)
    found.raise_any(folder)
    assert config and vq_config and scheduler and tokenizer and weights and codec and codebook
    return Checkpoint(
        transformer_config=config,
        transformer=_read_tree(weights, TRANSFORMER_TABLE, transformer.abstract(config), dtype),
        vq_config=vq_config,
        vq=_read_tree(codec, VQ_TABLE, vq.abstract(vq_config), dtype),
        path_codebook=jnp.asarray(codebook.read(CODEBOOK_NAME).astype(np.float32)),
        scheduler=scheduler,
        tokenizer=tokenizer,
        files=_read_carried(folder),
        layouts={
            "transformer": _saved_layout(weights.layout, dtype),
            "vae": _saved_layout(codec.layout, dtype),
            "scheduler": _saved_layout(codebook.layout, "float32"),
        },
    )


def load_transformer(path: PathLike, config: TransformerConfig, dtype: str = "float32") -> Params:
    """Read a transformer's parameters from its folder or from one tensor file; raises WeightsError listing problems."""
    path, found = Path(path), _Problems()
    wanted = sources(TRANSFORMER_TABLE, transformer.abstract(config))
    weights = found.part(path, wanted)
    found.raise_any(path)
    assert weights
    return _read_tree(weights, TRANSFORMER_TABLE, transformer.abstract(config), dtype)


def save_folder(checkpoint: Checkpoint, folder: PathLike, dtype: str | None = None) -> None:
    """Write a checkpoint in the released format; `folder` changes at once, when everything is written, or not at all.

    Names, shapes, dtypes and the division into files are those of the folder that was loaded, so unchanged weights
    come back bit for bit; `dtype`, if given, is that of the transformer's tensors instead. Raises WeightsError for
    weights that do not fit the configurations or overflow their dtype, FileExistsError rather than overwrite anything
    but a checkpoint, and OSError if the disk is full or forbids it.
    """
    layouts = dict(checkpoint.layouts)
    if dtype is not None:
        names = dict.fromkeys(layouts["transformer"].dtypes, dtype)
        layouts["transformer"] = dataclasses.replace(layouts["transformer"], dtypes=names)
    trees = {
        "transformer": (TRANSFORMER_TABLE, transformer.abstract(checkpoint.transformer_config), checkpoint.transformer),
        "vae": (VQ_TABLE, vq.abstract(checkpoint.vq_config), checkpoint.vq),
    }
    found = _Problems()
    for part, (_, abstract, tree) in trees.items():
        found.lines += _tree_problems(part, abstract, tree)
    found.raise_any("the checkpoint to save")
    codebook = {CODEBOOK_NAME: Source(CODEBOOK_NAME, None, "keep", checkpoint.path_codebook.shape)}
    try:
        with replacing_folder(Path(folder), "transformer/config.json") as fresh:
            for name, content in checkpoint.files.items():
                write_file(fresh / name, [content])
            for part, (table, abstract, tree) in trees.items():
                _write_part(fresh / part, layouts[part], sources(table, abstract), leaves_by_path(tree))
            leaves = {CODEBOOK_NAME: checkpoint.path_codebook}
            _write_part(fresh / "scheduler", layouts["scheduler"], codebook, leaves)
    except FileExistsError:
        raise
    except OSError as error:
        advice = "what was there before is untouched; free some space or choose another folder"
        raise OSError(error.errno, f"{folder} cannot be written ({error.strerror}); {advice}") from error


def new_checkpoint(
    transformer_config: TransformerConfig,
    transformer: Params,
    vq_config: VQConfig,
    vq: Params,
    path_codebook: Float[Array, "v e"],
    scheduler: Scheduler,
    tokenizer_folder: PathLike,
    prompt_length: int | None = None,
    dtype: str = "float32",
) -> Checkpoint:
    """Return a checkpoint that no folder held before, for `save_folder`; `dtype` is what it will be stored in.

    tokenizer_folder: any folder that transformers' AutoTokenizer reads. Raises WeightsError listing what does not fit.
    """
    found = _Problems()
    tokenizer = found.collect(lambda: load_tokenizer(Path(tokenizer_folder), prompt_length))
    if tokenizer:
        found.lines += _tokenizer_problems(tokenizer, transformer_config)
    counts = {vq_config.num_vq_embeddings, transformer_config.lm_head_size, path_codebook.shape[0]}
    if len(counts) > 1:
        found.lines.append(f"num_vq_embeddings, lm_head_size and the rows of path_codebook differ: {sorted(counts)}")
    found.raise_any("the new checkpoint")
    assert tokenizer
    files = {f"tokenizer/{name}": content for name, content in _read_all(Path(tokenizer_folder)).items()}
    files |= _new_configs(transformer_config, vq_config, scheduler, type(tokenizer.backend).__name__)
    layouts = {
        part: _new_layout(sources(table, tree), dtype)
        for part, table, tree in (("transformer", TRANSFORMER_TABLE, transformer), ("vae", VQ_TABLE, vq))
    }
    layouts["scheduler"] = Layout({SCHEDULER_FILE: (CODEBOOK_NAME,)}, {CODEBOOK_NAME: "float32"}, {})
    return Checkpoint(
        transformer_config, transformer, vq_config, vq, path_codebook, scheduler, tokenizer, files, layouts
    )


class _Problems:
    """Collects what is wrong, to say it all at once."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def collect(self, read: Callable[[], T]) -> T | None:
        """Return what `read` returns, or None if it raises ValueError, which is then kept."""
        try:
            return read()
        except ValueError as error:
            self.lines.append(str(error))
            return None

    def part(self, path: Path, wanted: Mapping[str, Source] | None) -> TensorFiles | None:
        """Open a part's tensors and compare them with what is wanted; None if they cannot be opened."""
        opened = self.collect(lambda: open_tensors(find(path) if path.is_dir() else path))
        if opened and wanted is not None:
            self.lines += [f"{path}: {line}" for line in problems(wanted, opened.infos)]
        return opened

    def raise_any(self, what: PathLike) -> None:
        """Raise WeightsError if there is any problem."""
        if self.lines:
            raise WeightsError("\n  ".join([f"{what}: {len(self.lines)} problem(s):", *self.lines]))
