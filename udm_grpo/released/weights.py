"""Read and write released URSA model folders.

`new_checkpoint` builds a released model that was not loaded from a folder, for `save_folder` to write.
"""

import dataclasses
import functools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from udm_grpo.batches import Params
from udm_grpo.data.tokenizer import load_tokenizer
from udm_grpo.files.atomic import replacing_folder
from udm_grpo.files.folder_lock import FolderLockedError
from udm_grpo.files.places import PlaceError, with_home
from udm_grpo.model import transformer
from udm_grpo.model.execution import TransformerConfig
from udm_grpo.model.vq import codec as vq
from udm_grpo.model.vq.config import VQConfig
from udm_grpo.released.contents import (
    CODEBOOK_NAME,
    CONFIG_FILES,
    SCHEDULER_FILE,
    PathLike,
    Problems,
    ReleasedModel,
    Scheduler,
    is_number,
    read_files,
    tokenizer_problems,
)
from udm_grpo.released.new_checkpoint import WEIGHTS_FILE, new_checkpoint
from udm_grpo.released.part_files import size_differences, transformer_source
from udm_grpo.tensor_files.streaming import Fetch, fetch_here, read_tree, row_blocks
from udm_grpo.tensor_files.torch_files import (
    Layout,
    TensorFiles,
    WeightsError,
    open_tensors,
    read_json,
    write_file,
    write_tensors,
)
from udm_grpo.tensor_files.weight_table import (
    KEEP,
    TRANSFORMER_TABLE,
    VQ_TABLE,
    Source,
    Table,
    TensorInfo,
    leaves_by_path,
    problems,
    sources,
)

__all__ = [
    "ReleasedModel",
    "Scheduler",
    "WeightsError",
    "load_folder",
    "load_transformer",
    "new_checkpoint",
    "save_folder",
    "transformer_path",
]

DTYPES = ("float32", "bfloat16", "float16")


def load_folder(
    folder: PathLike,
    dtype: str = "float32",
    prompt_length: int | None = None,
    read_transformer: bool = True,
    transformer_weights: PathLike | None = None,
) -> ReleasedModel:
    """Read a released folder of a model of any size.

    dtype: dtype of the parameters in memory; 16-bit weights are widened to float32 without loss and saved in 16 bits
    again, while weights that `dtype` cannot hold exactly are rounded and saved as `dtype`. prompt_length: L; by default
    the tokenizer's model_max_length, at most 320. read_transformer: if False, the transformer is checked but returned
    as shapes only, for `load_transformer` to read to its devices. transformer_weights: a file or folder with weights to
    use instead of the folder's transformer, located as in `transformer_path`. Raises WeightsError listing every problem
    at once.
    """
    _check_dtype(dtype)
    folder, errors = Path(with_home("the folder", os.fspath(folder))), Problems()
    if not folder.is_dir():
        parts = "transformer/, vae/, scheduler/, tokenizer/"
        raise WeightsError(f"{folder}: no such folder; give the folder that holds {parts}")
    files = [folder / name for name in CONFIG_FILES]
    config = errors.collect(lambda: _transformer_config(read_json(files[0])))
    vq_config = errors.collect(lambda: _vq_config(read_json(files[1])))
    scheduler = errors.collect(lambda: Scheduler.from_json(read_json(files[2])))
    tokenizer = errors.collect(lambda: load_tokenizer(folder / "tokenizer", prompt_length))
    weights = _open_transformer(errors, folder, transformer_weights, config)
    codec = errors.part(folder / "vae", sources(VQ_TABLE, vq.abstract(vq_config)) if vq_config else None)
    codebook = errors.collect(lambda: open_tensors(folder / "scheduler" / SCHEDULER_FILE))
    if config and codebook:
        errors.lines += _codebook_problems(codebook, config)
    if config and vq_config:
        errors.lines += _code_problems(vq_config, config)
    if config and tokenizer:
        errors.lines += tokenizer_problems(tokenizer, config)
    errors.raise_any(folder)
    assert config is not None
    assert vq_config is not None
    assert scheduler is not None
    assert tokenizer is not None
    assert weights is not None
    assert codec is not None
    assert codebook is not None
    source = transformer_path(folder, transformer_weights)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype)), transformer.abstract(config))
    return ReleasedModel(
        transformer_config=config,
        transformer=_read_tree(source, weights, TRANSFORMER_TABLE, shapes, dtype) if read_transformer else shapes,
        vq_config=vq_config,
        vq=_read_tree(folder / "vae", codec, VQ_TABLE, vq.abstract(vq_config), dtype),
        path_codebook=jnp.asarray(_read_codebook(codebook)),
        scheduler=scheduler,
        tokenizer=tokenizer,
        files=_read_carried(folder),
        layouts={
            "transformer": _saved_layout(weights.layout if transformer_weights is None else _one_file(weights), dtype),
            "vae": _saved_layout(codec.layout, dtype),
            "scheduler": _saved_layout(codebook.layout, "float32"),
        },
    )


def transformer_path(folder: PathLike, transformer_weights: PathLike | None) -> Path:
    """Return where the transformer's tensors are: in the released folder, or in the trained weights of a user.

    Raises WeightsError for a file or folder that holds none.
    """
    if not transformer_weights:
        return Path(folder) / "transformer"
    return transformer_source(Path(with_home("the transformer", os.fspath(transformer_weights))))


def load_transformer(
    path: PathLike, config: TransformerConfig, dtype: str = "float32", shardings: Any = None
) -> Params:
    """Read a transformer's parameters from its folder or from one tensor file; raises WeightsError listing problems.

    shardings: a tree with the sharding of each leaf; by default all leaves are on the first device. Tensors are read
    block by block into the shards of this process, whose memory holds those and one block. Each of several processes
    reads its own shards, so each needs access to the file.
    """
    _check_dtype(dtype)
    path, errors = Path(path), Problems()
    expected = sources(TRANSFORMER_TABLE, transformer.abstract(config))
    weights = errors.part(path, expected)
    errors.raise_any(path)
    assert weights
    return _read_tree(path, weights, TRANSFORMER_TABLE, transformer.abstract(config), dtype, shardings)


def save_folder(
    released: ReleasedModel,
    folder: PathLike,
    dtype: str | None = None,
    fetch: Fetch = fetch_here,
    write: bool = True,
) -> None:
    """Write a released model; `folder` is replaced atomically once everything is written, or stays unchanged.

    fetch: function that brings a block of a parameter to this host. If it needs all processes, all of them call this
    function, all but one with write=False.

    Names, shapes, dtypes and the division into files are those of the folder that was loaded, so unchanged weights
    are written back bit for bit; `dtype` replaces that of the transformer's tensors. Raises WeightsError for weights
    that do not fit the configurations, are not finite or overflow their dtype, FileExistsError rather than overwrite
    anything but a released model, and OSError if the disk is full or not writable.
    """
    layouts = dict(released.layouts)
    if dtype is not None:
        _check_dtype(dtype)
        names = dict.fromkeys(layouts["transformer"].dtypes, dtype)
        layouts["transformer"] = dataclasses.replace(layouts["transformer"], dtypes=names)
    trees = {
        "transformer": (TRANSFORMER_TABLE, transformer.abstract(released.transformer_config), released.transformer),
        "vae": (VQ_TABLE, vq.abstract(released.vq_config), released.vq),
    }
    errors = Problems()
    for part, (_, abstract, tree) in trees.items():
        errors.lines += _tree_problems(part, abstract, tree)
    errors.raise_any("the model to save")
    codebook = {CODEBOOK_NAME: Source(CODEBOOK_NAME, None, KEEP, released.path_codebook.shape)}
    parts = {
        part: _Part(layouts[part], sources(table, abstract), leaves_by_path(tree), fetch)
        for part, (table, abstract, tree) in trees.items()
    }
    parts["scheduler"] = _Part(layouts["scheduler"], codebook, {CODEBOOK_NAME: released.path_codebook}, fetch_here)
    if not write:
        return _take_part(parts)
    try:
        with replacing_folder(Path(folder), CONFIG_FILES[0]) as fresh:
            for name, content in released.files.items():
                write_file(fresh / name, [content])
            for name, one in parts.items():
                write_tensors(fresh / name, one.layout, one.infos, functools.partial(one.blocks, name))
    except (FileExistsError, FolderLockedError, PlaceError):
        raise
    except OSError as error:
        advice = "its previous contents are untouched; free some space or choose another folder"
        raise OSError(error.errno, f"{folder} cannot be written ({error.strerror}); {advice}") from error


def _open_transformer(
    errors: Problems, folder: Path, transformer_weights: PathLike | None, config: TransformerConfig | None
) -> TensorFiles | None:
    path = errors.collect(lambda: transformer_path(folder, transformer_weights))
    if path is None:
        return None
    if config and transformer_weights:
        sizes = dataclasses.asdict(config)
        errors.lines += errors.collect(lambda: size_differences(path, sizes)) or []
    return errors.part(path, sources(TRANSFORMER_TABLE, transformer.abstract(config)) if config else None)


def _one_file(opened: TensorFiles) -> Layout:
    """Return the layout for weights from outside of the folder: one file, in their own dtypes."""
    return Layout({WEIGHTS_FILE: tuple(sorted(opened.infos))}, opened.layout.dtypes, {WEIGHTS_FILE: {"format": "pt"}})


def _check_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; choose one of {', '.join(DTYPES)}")


def _transformer_config(raw: Mapping[str, Any]) -> TransformerConfig:
    """Return the sizes in transformer/config.json. Raises ValueError if one of them is not a number above 0."""
    wrong = []
    sizes = {field.name: raw[field.name] for field in dataclasses.fields(TransformerConfig) if field.name in raw}
    for name, value in sizes.items():
        least = 0 if name == "bov_token_id" else 1
        if not is_number(value) or not least <= value < float("inf"):
            wrong.append(f"{name} is {value!r}")
        else:
            sizes[name] = float(value) if name == "rope_theta" else int(value)
    if wrong:
        raise ValueError(f"transformer/config.json: {', '.join(wrong)}; expected numbers above 0")
    return TransformerConfig.from_json(sizes)


def _vq_config(raw: Mapping[str, Any]) -> VQConfig:
    try:
        return VQConfig.from_json(raw)
    except ValueError as error:
        raise ValueError(f"vae/config.json: {error}") from None


def _code_problems(vq_config: VQConfig, config: TransformerConfig) -> list[str]:
    if vq_config.num_vq_embeddings == config.lm_head_size:
        return []
    counts = f"num_vq_embeddings {vq_config.num_vq_embeddings}, lm_head_size {config.lm_head_size}"
    return [f"the image tokenizer and the transformer differ in their number of codes: {counts}"]


def _codebook_problems(codebook: TensorFiles, config: TransformerConfig) -> list[str]:
    info = codebook.infos.get(CODEBOOK_NAME)
    width = info.shape[1] if info and len(info.shape) == 2 else 0
    expected = {CODEBOOK_NAME: Source(CODEBOOK_NAME, None, KEEP, (config.lm_head_size, width))}
    return [f"scheduler/{SCHEDULER_FILE}: {line}" for line in problems(expected, codebook.infos)]


def _read_tree(
    place: PathLike, files: TensorFiles, table: Table, abstract: Params, dtype: str, shardings: Any = None
) -> Params:
    return read_tree(place, sources(table, abstract), abstract, files.read_rows, jnp.dtype(dtype), shardings)


def _read_codebook(files: TensorFiles) -> np.ndarray:
    codebook = files.read(CODEBOOK_NAME).astype(np.float32)
    if not np.isfinite(codebook).all():
        raise WeightsError(f"scheduler/{SCHEDULER_FILE}: NaN or infinite numbers in {CODEBOOK_NAME}.")
    return codebook


def _saved_layout(layout: Layout, dtype: str) -> Layout:
    """Return the layout for saving what was read as `dtype`, which replaces dtypes that it does not hold exactly."""
    names = {name: old if _holds(dtype, old) else dtype for name, old in layout.dtypes.items()}
    return dataclasses.replace(layout, dtypes=names)


def _holds(dtype: str, other: str) -> bool:
    """Return whether `dtype` holds every number of dtype `other` exactly."""
    wide, narrow = jnp.finfo(dtype), jnp.finfo(other)
    return wide.nmant >= narrow.nmant and wide.nexp >= narrow.nexp


def _read_carried(folder: Path) -> dict[str, bytes]:
    names = ["model_index.json", *CONFIG_FILES]
    carried = {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}
    tokenizer = read_files(folder / "tokenizer")
    return carried | {f"tokenizer/{name}": content for name, content in tokenizer.items()}


def _tree_problems(part: str, abstract: Params, tree: Params) -> list[str]:
    expected, actual = leaves_by_path(abstract), leaves_by_path(tree)
    lines = [f"missing: {path}, shape {leaf.shape}" for path, leaf in expected.items() if path not in actual]
    lines += [f"not known: {path}, shape {leaf.shape}" for path, leaf in actual.items() if path not in expected]
    both = [(path, expected[path].shape, actual[path].shape) for path in expected if path in actual]
    lines += [f"wrong shape: {path} is {there}, expected {shape}" for path, shape, there in both if shape != there]
    return [f"{part}: {line}" for line in lines]


@dataclasses.dataclass(frozen=True)
class _Part:
    """One part of a model, ready to be written to files."""

    layout: Layout
    sources: Mapping[str, Source]
    leaves: Mapping[str, Any]
    fetch: Fetch

    @property
    def infos(self) -> dict[str, TensorInfo]:
        return {name: TensorInfo(source.shape, self.layout.dtypes[name]) for name, source in self.sources.items()}

    def blocks(self, part: str, name: str) -> Iterator[np.ndarray]:
        """Yield a tensor in the dtype of its file. Raises WeightsError if a value is not finite or too large for it."""
        source, dtype = self.sources[name], self.layout.dtypes[name]
        for block in row_blocks(source, self.leaves[source.path], self.fetch):
            with np.errstate(over="ignore"):  # reported below, with the tensor's name
                cast = block.astype(dtype)
            if not np.isfinite(block).all():
                raise WeightsError(f"{part}: {name} has NaN or infinite numbers; such weights are not written")
            if not np.isfinite(cast).all():
                advice = 'save with dtype="float32"'
                raise WeightsError(f"{part}: {name} has values too large for {dtype}; {advice}")
            yield cast


def _take_part(parts: Mapping[str, _Part]) -> None:
    """Fetch all blocks in the same order as the process that writes them."""
    for part, one in parts.items():
        for names in one.layout.files.values():
            for name in names:
                for _ in one.blocks(part, name):  # so that a tensor that cannot be written is an error in all processes
                    pass
