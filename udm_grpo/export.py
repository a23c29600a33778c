"""Export the weights of a run: folders in the released format, and adapters in PEFT's format."""

from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from udm_grpo.batches import Params, TrainState
from udm_grpo.files.buckets import local
from udm_grpo.files.digests import digest_folder
from udm_grpo.files.set_aside import RESULTS
from udm_grpo.model import lora
from udm_grpo.model.execution import TransformerConfig
from udm_grpo.multihost import hosts
from udm_grpo.released.peft_files import merge_on_host, write_adapter
from udm_grpo.released.weights import PathLike, WeightsError, load_transformer, save_folder, transformer_path
from udm_grpo.run import Run, exported


def export(run: Run, state: TrainState, judged: Params, reference: Params) -> None:
    """Write `export` (the weights that the run evaluates) and, if it keeps an average, `export_raw` (the last weights).

    Both are whole models in the released format. If the run trains an adapter, process 0 merges it into the start model
    in its own memory, and also writes the adapter itself in PEFT's format: `export_lora` and `export_lora_raw`. All
    processes take part; process 0 writes. Raises as `save_folder` does.
    """
    kinds = {"": judged} if state.ema is None else {"": judged, "_raw": state.params}
    if not run.config.lora.rank:
        for ending, params in kinds.items():
            whole = exported(run.released, params)
            save_folder(whole, run.output / f"export{ending}", fetch=hosts.block, write=hosts.is_primary())
        return
    frozen = jax.tree.map(hosts.whole, reference)
    adapters = {ending: jax.tree.map(hosts.whole, params) for ending, params in kinds.items()}
    if hosts.is_primary():
        _export_adapters(run, adapters, frozen)


def digest_exports(output: Path) -> dict[str, str]:
    """Return the SHA-256 of every folder that `export` may have written: folder -> digest of its files and their names.

    The exports do not name the run: equal weights give equal files, whichever run trained them.
    """
    folders = [output / name for name in RESULTS if (output / name).is_dir()]
    return {folder.name: digest_folder(folder) for folder in folders}


def _export_adapters(run: Run, adapters: Mapping[str, Params], frozen: Params) -> None:
    settings = run.config.lora
    model = run.config.model
    base = start_weights(local(model.path), run.released.transformer_config, frozen, model.transformer)
    for ending, adapter in adapters.items():
        write_adapter(run.output / f"export_lora{ending}", adapter, settings.alpha)
        merged = merge_on_host(base, adapter, lora.factor(settings))
        save_folder(exported(run.released, merged), run.output / f"export{ending}")


def start_weights(
    folder: PathLike, config: TransformerConfig, frozen: Params, transformer_weights: PathLike | None = None
) -> Params:
    """Return the base weights of an adapter in float32 on the host, as exactly as they are known.

    `frozen` (on the host) is what training used, perhaps rounded to bfloat16. If the folder still holds the values that
    it was rounded from, they are taken. transformer_weights: what the run read instead of the folder's, if anything.
    """
    if all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(frozen)):
        return frozen
    here = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    try:
        path = transformer_path(folder, transformer_weights)
        whole = load_transformer(path, config, shardings=jax.tree.map(lambda leaf: here, frozen))
    except WeightsError:  # it may have been removed or changed since the run began
        return frozen
    return jax.tree.map(unrounded, whole, frozen)


def unrounded(whole: np.ndarray, frozen: np.ndarray) -> np.ndarray:
    """Return `whole` if it rounds to `frozen`, else `frozen`, in float32."""
    same = np.array_equal(np.asarray(whole).astype(frozen.dtype), frozen)
    return np.asarray(whole if same else frozen, np.float32)
