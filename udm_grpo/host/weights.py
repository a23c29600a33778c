"""The released URSA checkpoint folder, read and written; new_checkpoint.py makes one for a new model."""

import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

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
    KEEP,
    TRANSFORMER_TABLE,
    VQ_TABLE,
    Source,
    Table,
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
CONFIG_FILES = ("transformer/config.json", "vae/config.json", "scheduler/scheduler_config.json")


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
        raise WeightsError(
            f"{folder}: no such folder; give the folder that holds transformer/, vae/, scheduler/, tokenizer/"
        )
    found = Problems()
    transformer_json, vq_json, scheduler_json = (folder / name for name in CONFIG_FILES)
    config = found.collect(lambda: TransformerConfig.from_json(read_json(transformer_json)))
    vq_config = found.collect(lambda: VQConfig.from_json(read_json(vq_json)))
    scheduler = found.collect(lambda: Scheduler.from_json(read_json(scheduler_json)))
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
        found.lines += tokenizer_problems(tokenizer, config)
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
    path, found = Path(path), Problems()
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
    found = Problems()
    for part, (_, abstract, tree) in trees.items():
        found.lines += _tree_problems(part, abstract, tree)
    found.raise_any("the checkpoint to save")
    codebook = {CODEBOOK_NAME: Source(CODEBOOK_NAME, None, KEEP, checkpoint.path_codebook.shape)}
    try:
        with replacing_folder(Path(folder), CONFIG_FILES[0]) as fresh:
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


class Problems:
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


def tokenizer_problems(tokenizer: PromptTokenizer, config: TransformerConfig) -> list[str]:
    """Return what about a tokenizer does not fit a transformer."""
    lines = []
    if tokenizer.vocabulary != config.lm_vocab_size:
        found = f"the tokenizer has {tokenizer.vocabulary} ids, transformer/config.json says lm_vocab_size"
        lines.append(f"{found} {config.lm_vocab_size}; use the tokenizer that the transformer was trained with")
    if not 0 <= config.bov_token_id < config.lm_vocab_size:
        lines.append(f"bov_token_id {config.bov_token_id} is no text id, of which there are {config.lm_vocab_size}")
    return lines


def read_files(folder: Path) -> dict[str, bytes]:
    """Return the content of every file below a folder, by relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def _codebook_problems(codebook: TensorFiles, config: TransformerConfig) -> list[str]:
    found = codebook.infos.get(CODEBOOK_NAME)
    width = found.shape[1] if found and len(found.shape) == 2 else 0
    wanted = {CODEBOOK_NAME: Source(CODEBOOK_NAME, None, KEEP, (config.lm_head_size, width))}
    return [f"scheduler/{SCHEDULER_FILE}: {line}" for line in problems(wanted, codebook.infos)]


def _read_tree(files: TensorFiles, table: Table, abstract: Params, dtype: str) -> Params:
    return to_tree(sources(table, abstract), abstract, files.read, jnp.dtype(dtype))


def _saved_layout(layout: Layout, dtype: str) -> Layout:
    """Return the layout to save what was read as `dtype`: a dtype that `dtype` does not hold exactly becomes it."""
    names = {name: old if _holds(dtype, old) else dtype for name, old in layout.dtypes.items()}
    return dataclasses.replace(layout, dtypes=names)


def _holds(dtype: str, other: str) -> bool:
    """Return whether every number of dtype `other` is one of `dtype` too."""
    wide, narrow = jnp.finfo(dtype), jnp.finfo(other)
    return wide.nmant >= narrow.nmant and wide.nexp >= narrow.nexp


def _read_carried(folder: Path) -> dict[str, bytes]:
    names = ["model_index.json", *CONFIG_FILES]
    carried = {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}
    tokenizer = read_files(folder / "tokenizer")
    return carried | {f"tokenizer/{name}": content for name, content in tokenizer.items()}


def _tree_problems(part: str, abstract: Params, tree: Params) -> list[str]:
    wanted, found = leaves_by_path(abstract), leaves_by_path(tree)
    lines = [f"missing: {path}, shape {leaf.shape}" for path, leaf in wanted.items() if path not in found]
    lines += [f"not known: {path}, shape {leaf.shape}" for path, leaf in found.items() if path not in wanted]
    both = [(path, wanted[path].shape, found[path].shape) for path in wanted if path in found]
    lines += [f"wrong shape: {path} is {there}, wanted {shape}" for path, shape, there in both if shape != there]
    return [f"{part}: {line}" for line in lines]


def _write_part(folder: Path, layout: Layout, wanted: Mapping[str, Source], leaves: Mapping[str, Array]) -> None:
    host: dict[str, np.ndarray] = {path: np.asarray(leaf) for path, leaf in leaves.items()}
    infos = {name: TensorInfo(source.shape, layout.dtypes[name]) for name, source in wanted.items()}

    def read(name: str) -> np.ndarray:
        tensor = from_tree(wanted[name], host)
        with np.errstate(over="ignore"):  # found below, and said with the tensor's name
            cast = tensor.astype(infos[name].dtype)
        if np.isfinite(tensor).all() and not np.isfinite(cast).all():
            advice = 'save with dtype="float32"'
            raise WeightsError(f"{folder.name}: {name} has values too large for {infos[name].dtype}; {advice}")
        return cast

    write_tensors(folder, layout, infos, read)
