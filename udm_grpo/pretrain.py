"""Pre-train a transformer on (prompt, image tokens) pairs.

    python -m udm_grpo.pretrain --checkpoint START --data tokens.npz --output FOLDER --updates 20000

`START` is a folder in the released format, whose weights are the starting point; `tokens.npz` contains prompts (text)
and images i32[M,h,w]. A killed run resumes from its last saved state and gives the same final result.
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
    """The settings of a pre-training."""

    updates: int
    batch: int = 128
    """Images per update."""
    learning_rate: float = 1e-3
    """Peak of a cosine schedule that ends at 2 % of it."""
    warmup: int = 200
    """Updates of the linear warm-up."""
    weight_decay: float = 0.01
    shift: float = 0.0
    """s of the warp of random times; 0: the model's own."""
    seed: int = 0
    save_every: int = 1000
    """Updates between saved states."""


@dataclass(frozen=True)
class TokenData:
    """M pairs; an image may occur again with another prompt."""

    prompt_ids: np.ndarray
    """i32[M, L]."""
    image_ids: np.ndarray
    """i32[M, h, w]."""
    empty_ids: np.ndarray
    """i32[L], the empty prompt."""


def batch_indices(count: int, plan: PretrainPlan, update: int) -> np.ndarray:
    """Return the indices of the pairs in an update, which depend only on the seed and the update."""
    generator = np.random.Generator(np.random.Philox(key=plan.seed, counter=[0, 0, 0, update]))
    return generator.integers(0, count, plan.batch)


def pretrain(
    released: ReleasedModel,
    path: ProbabilityPath,
    data: TokenData,
    plan: PretrainPlan,
    states: Checkpoints | None,
    log: Callable[[dict[str, Any]], None],
) -> Params:
    """Train and return the transformer's parameters; with `states`, resume from the newest of them and save there.

    `log` is called with {"update", "loss"} (mean cross-entropy in nats) every 100 updates. Raises DivergedError, before
    anything is saved, naming the first update whose loss or gradient norm is not finite.

    Source: URSA, arXiv 2510.24717.
    """
    rate = learning_rate(plan.learning_rate, "cosine", plan.updates, plan.warmup, final_fraction=0.02)
    optimizer = adamw(rate, 0.9, 0.98, plan.weight_decay, 1.0)
    grid = (data.image_ids.shape[1], data.image_ids.shape[2])
    network = Network(released.transformer_config, grid)
    step = compiled.pretrain_step(network, path, plan.shift or released.scheduler.shift, optimizer)
    params = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32), released.transformer)
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
            check_finite("update", number, row, "Lower --learning-rate and start over in another folder.")
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


def read_tokens(file: Path, released: ReleasedModel) -> TokenData:
    """Read tokens.npz and tokenize its prompts.

    Raises UserError if the file is not a NumPy archive, lacks an array, or contains codes that the model does not have.
    """
    try:
        with np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{file} is not an archive of NumPy arrays ({error}); expected a tokens.npz.") from error
    missing = {"prompts", "images"} - arrays.keys()
    if missing:
        raise UserError(f"{file} lacks {', '.join(sorted(missing))}; found {', '.join(arrays)}.")
    prompts, images = arrays["prompts"], arrays["images"].astype(np.int32)
    codes = released.transformer_config.lm_head_size
    if images.ndim != 3 or len(images) != len(prompts) or images.min() < 0 or images.max() >= codes:
        raise UserError(
            f"{file}: images must be i32[{len(prompts)}, h, w] with codes in [0, {codes}); found shape {images.shape}, "
            f"codes {images.min()} to {images.max()}."
        )
    ids = released.tokenizer([str(prompt) for prompt in prompts])
    return TokenData(prompt_ids=ids, image_ids=images, empty_ids=released.tokenizer.empty())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = Parser(description="Pre-train a transformer on (prompt, image tokens) pairs.")
    parser.add_argument("--checkpoint", required=True, help="folder in the released format to start from")
    parser.add_argument("--data", required=True, help="tokens.npz with prompts and images i32[M,h,w]")
    parser.add_argument("--output", required=True, help="folder for the trained model, its log and its saved states")
    parser.add_argument("--updates", type=int, required=True)
    parser.add_argument("--batch", type=int, default=PretrainPlan.batch)
    parser.add_argument("--learning-rate", type=finite_number, default=PretrainPlan.learning_rate)
    parser.add_argument("--shift", type=finite_number, default=PretrainPlan.shift, help="0: the model's own")
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
    """Pre-train the released folder `start`, with log, states and result in `output`, which is locked meanwhile.

    Raises what `load_folder`, `read_tokens`, `pretrain` and the lock raise.
    """
    released = load_folder(start)
    with lock_inside(output), open(output / "pretrain.jsonl", "a", encoding="utf-8") as file:

        def log(row: dict[str, Any]) -> None:
            print(row, flush=True)
            print(json.dumps(row), file=file, flush=True)

        data, states = read_tokens(tokens, released), Checkpoints(output / "states", keep=2)
        params = pretrain(released, path_of(released), data, plan, states, log)
    save_folder(replace(released, transformer=params), output / "checkpoint")


if __name__ == "__main__":
    sys.exit(guarded(main))
