"""Pre-train a transformer on (prompt, image tokens) pairs.

    python -m udm_grpo.pretrain --checkpoint START --data tokens.npz --output FOLDER --updates 20000

`START` is a folder in the released format (its weights are where training starts), `tokens.npz` holds prompts (text)
and images i32[M,h,w]. A killed run continues where it stopped, from its last saved state, to the same end.
"""

import json
import sys
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rewards_bridge.errors import USER_ERROR_STATUS, UserError
from rewards_bridge.flags import Parser
from rewards_bridge.redaction import guarded
from udm_grpo import compiled
from udm_grpo.batches import Params
from udm_grpo.checkpoints.checkpoint import Checkpoints
from udm_grpo.checkpoints.checkpoint_fallback import restore_newest
from udm_grpo.devices import on_devices, prepare
from udm_grpo.diffusion.path import ProbabilityPath
from udm_grpo.files.finite import finite_number
from udm_grpo.files.folder_lock import lock_inside
from udm_grpo.files.places import local_args
from udm_grpo.grpo.optimizer import adamw, learning_rate
from udm_grpo.lifecycle.iteration_checks import check_finite
from udm_grpo.model.network import Network
from udm_grpo.released.weights import ReleasedModel, load_folder, save_folder
from udm_grpo.run import path_of


@dataclass(frozen=True)
class PretrainPlan:
    """How long and how fast."""

    updates: int
    batch: int = 128
    """Images an update."""
    learning_rate: float = 1e-3
    """Peak of a cosine schedule that ends at 2 % of it."""
    warmup: int = 200
    """Updates."""
    weight_decay: float = 0.01
    shift: float = 0.0
    """s of the warp that times are drawn through; 0: the checkpoint's own."""
    seed: int = 0
    save_every: int = 1000
    """Updates between saved states."""


@dataclass(frozen=True)
class TokenData:
    """M pairs; an image may come again under another prompt."""

    prompt_ids: np.ndarray
    """i32[M, L]."""
    image_ids: np.ndarray
    """i32[M, h, w]."""
    empty_ids: np.ndarray
    """i32[L], the empty prompt."""


def batch_indices(count: int, plan: PretrainPlan, update: int) -> np.ndarray:
    """Which pairs update `update` sees: a function of the seed and the update alone."""
    generator = np.random.Generator(np.random.Philox(key=plan.seed, counter=[0, 0, 0, update]))
    return generator.integers(0, count, plan.batch)


def pretrain(
    checkpoint: ReleasedModel,
    path: ProbabilityPath,
    data: TokenData,
    plan: PretrainPlan,
    states: Checkpoints | None,
    log: Callable[[dict[str, Any]], None],
) -> Params:
    """Train and return the transformer's parameters; with `states`, resume from its newest and save there.

    `log` gets {"update", "loss"} (mean cross-entropy in nats) every 100 updates. Raises DivergedError, before
    anything is saved, naming the first update whose loss or gradient norm is not finite.

    Source: URSA, arXiv 2510.24717.
    """
    rate = learning_rate(plan.learning_rate, "cosine", plan.updates, plan.warmup, final_fraction=0.02)
    optimizer = adamw(rate, 0.9, 0.98, plan.weight_decay, 1.0)
    grid = (data.image_ids.shape[1], data.image_ids.shape[2])
    network = Network(checkpoint.transformer_config, grid)
    step = compiled.pretrain_step(network, path, plan.shift or checkpoint.scheduler.shift, optimizer)
    params = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32), checkpoint.transformer)
    opt_state = optimizer.init(params)
    start = 0
    saved = None if states is None else restore_newest(states.folder, (params, opt_state))
    if states is not None and saved is not None:
        (params, opt_state), meta = saved
        start = meta["updates"]
        states.set_aside_after(start)
    clean = data.image_ids.reshape(len(data.image_ids), -1)
    root = jax.random.key(plan.seed)
    recent: list[dict[str, jax.Array]] = []

    def take(done: int) -> float:
        """Check the updates since the last call; return their mean loss (0 if there are none)."""
        rows = jax.device_get(recent)
        for number, row in enumerate(rows, start=done - len(rows) + 1):
            check_finite("update", number, row, "Lower --learning-rate and begin anew in another folder.")
        recent.clear()
        return sum(float(row["loss"]) for row in rows) / max(len(rows), 1)

    for update in range(start, plan.updates):
        chosen = batch_indices(len(clean), plan, update)
        key = jax.random.fold_in(root, update)
        of_batch = (data.prompt_ids[chosen], data.empty_ids, clean[chosen])
        params, opt_state, metrics = step(params, opt_state, *of_batch, key)
        recent.append(metrics)
        done = update + 1
        if done % 100 == 0 or done == plan.updates:
            log({"update": done, "loss": round(take(done), 5)})
        if states is not None and done % plan.save_every == 0:
            take(done)
            states.save(done, (params, opt_state), {"updates": done})
    return params


def read_tokens(file: Path, checkpoint: ReleasedModel) -> TokenData:
    """Read tokens.npz and tokenize its prompts; raises UserError for a file that is no such archive, lacks an
    array, or holds codes that the checkpoint does not have.
    """
    try:
        with np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{file} is no archive of NumPy arrays ({error}); give a tokens.npz.") from error
    missing = {"prompts", "images"} - arrays.keys()
    if missing:
        raise UserError(f"{file} lacks {', '.join(sorted(missing))}; found {', '.join(arrays)}.")
    prompts, images = arrays["prompts"], arrays["images"].astype(np.int32)
    codes = checkpoint.transformer_config.lm_head_size
    if images.ndim != 3 or len(images) != len(prompts) or images.min() < 0 or images.max() >= codes:
        raise UserError(
            f"{file}: images must be i32[{len(prompts)}, h, w] with codes in [0, {codes}); found shape {images.shape}, "
            f"codes {images.min()} to {images.max()}."
        )
    ids = checkpoint.tokenizer([str(prompt) for prompt in prompts])
    return TokenData(prompt_ids=ids, image_ids=images, empty_ids=checkpoint.tokenizer.empty())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = Parser(description="Pre-train a transformer on (prompt, image tokens) pairs.")
    parser.add_argument("--checkpoint", required=True, help="folder in the released format to start from")
    parser.add_argument("--data", required=True, help="tokens.npz with prompts and images i32[M,h,w]")
    parser.add_argument("--output", required=True, help="folder for the trained checkpoint, its log and its states")
    parser.add_argument("--updates", type=int, required=True)
    parser.add_argument("--batch", type=int, default=PretrainPlan.batch)
    parser.add_argument("--learning-rate", type=finite_number, default=PretrainPlan.learning_rate)
    parser.add_argument("--shift", type=finite_number, default=PretrainPlan.shift, help="0: the checkpoint's own")
    parser.add_argument("--seed", type=int, default=0)
    prepare()
    arguments = local_args(parser, argv)
    plan = PretrainPlan(
        arguments.updates, arguments.batch, arguments.learning_rate, shift=arguments.shift, seed=arguments.seed
    )
    output = Path(arguments.output)
    try:
        with on_devices():
            pretrain_folder(arguments.checkpoint, Path(arguments.data), output, plan)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR_STATUS
    return 0


def pretrain_folder(start: str | Path, tokens: Path, output: Path, plan: PretrainPlan) -> None:
    """Pre-train the checkpoint folder `start` with log, states and result in `output`, which is locked meanwhile.

    Raises what `load_folder`, `read_tokens`, `pretrain` and the lock raise.
    """
    checkpoint = load_folder(start)
    with lock_inside(output), open(output / "pretrain.jsonl", "a", encoding="utf-8") as file:

        def log(row: dict[str, Any]) -> None:
            print(row, flush=True)
            print(json.dumps(row), file=file, flush=True)

        data, states = read_tokens(tokens, checkpoint), Checkpoints(output / "states", keep=2)
        params = pretrain(checkpoint, path_of(checkpoint), data, plan, states, log)
    save_folder(replace(checkpoint, transformer=params), output / "checkpoint")


if __name__ == "__main__":
    sys.exit(guarded(main))
