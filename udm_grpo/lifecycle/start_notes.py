"""Notes printed at the start of a run: its fit to the devices (kernel, padding, unsharded parameters), odd prompts."""

from collections.abc import Sequence
from functools import partial

import jax.numpy as jnp
from jax.sharding import Mesh

from rewards_bridge.errors import BridgeError
from udm_grpo import mesh as meshes
from udm_grpo.batch_sizes import batch_sizes
from udm_grpo.batches import BatchSizes, Params
from udm_grpo.config import RunConfig
from udm_grpo.data.prompt_warnings import NAMES, cut_warnings, places, set_warnings, special_warnings, write_warnings
from udm_grpo.mesh import Undivided
from udm_grpo.model.attention import choose
from udm_grpo.model.execution import TransformerConfig
from udm_grpo.multihost import hosts
from udm_grpo.run import Run, trained
from udm_grpo.scoring.scorer_notes import note_warnings

MIN_BYTES = 2**20
"""Unsharded parameters smaller than this are not reported."""


def start_notes(config: RunConfig, sizes: TransformerConfig, whole: Params, mesh: Mesh) -> list[str]:
    """Return lines on what was chosen for these devices; `whole` is the model's parameters, possibly abstract.

    Raises ConfigError for an attention kernel that the devices cannot run.
    """
    attention = choose(config.model, mesh.devices.flat[0])
    notes = [f"attention: {attention.name} ({attention.reason})"]
    notes += _padding(config, batch_sizes(config, mesh), mesh)
    if not config.lora.rank:
        # Parameters, two moments and gradients, and the average if there is one.
        copies = 4 + (config.optimizer.ema_decay > 0)
        return notes + _left_whole(meshes.undivided(mesh, whole), 4, 4 * copies, "with moments and gradients")
    adapter = trained(config, whole, sizes)
    width = jnp.dtype(config.model.dtype).itemsize
    notes += _left_whole(meshes.undivided(mesh, whole), width, width, "of the frozen model")
    return notes + _left_whole(meshes.undivided(mesh, adapter), 4, 16, "with moments and gradients")


def prompt_notes(run: Run) -> list[str]:
    """Return one warning on everything that is doubtful about the run's prompts; an empty list if nothing is.

    Only process 0 checks. It also writes the warnings into the run's folder, for the report.
    """
    if not hosts.is_primary():
        return []
    lines = set_warnings(run.train, run.heldout, run.config.rollout.prompts)
    lines += cut_warnings(run.train, run.heldout, run.released.tokenizer)
    lines += special_warnings(run.train, run.heldout, run.released.tokenizer)
    lines += _scorer_notes(run)
    write_warnings(run.output, run.identity.id, lines)
    return ["\n  ".join(["warning: the prompts:", *lines])] if lines else []


def _scorer_notes(run: Run) -> list[str]:
    """Return the scorers' notes on the prompts: which they truncate, and which they may misunderstand."""
    lines = []
    try:
        for name, prompts in zip(NAMES, (run.train, run.heldout), strict=True):
            notes = run.client.notes(prompts.prompts, prompts.metadata)
            lines += note_warnings(name, len(prompts), notes, partial(places, prompts))
    except BridgeError as error:  # no reason to end the training, and the other processes do not ask
        lines.append(f"the scorers could not say which prompts they cut or find ambiguous: {error}")
    return lines


def _padding(config: RunConfig, sizes: BatchSizes, mesh: Mesh) -> list[str]:
    asked = (config.rollout.micro_batch, config.optimizer.micro_batch, config.evaluation.batch)
    if asked == (sizes.rollout, sizes.update, sizes.evaluation):
        return []
    return [
        f"batches for {meshes.batch_shards(mesh)} devices: {sizes.rollout} images of a rollout, {sizes.update} states "
        f"of an update and {sizes.evaluation} images of an evaluation at a time; an iteration draws {sizes.drawn} "
        f"images for {sizes.images} and trains on {sizes.trained} states for {sizes.states}; the rest is padding "
        "without any effect"
    ]


def _left_whole(leaves: Sequence[Undivided], width: int, total: int, what: str) -> list[str]:
    """Return a line per unsharded parameter; `width`: its bytes per number, `total`: with everything kept beside it."""
    large = [leaf for leaf in leaves if leaf.numbers * width > MIN_BYTES]
    return [
        f"{leaf.path} {list(leaf.shape)} stays whole on every device, {_bytes(leaf.numbers * total)} {what}: "
        f"mesh.{leaf.axis}={leaf.size} divides none of its dimensions. {_remedy(leaf)}"
        for leaf in large
    ]


def _remedy(leaf: Undivided) -> str:
    if not leaf.dividing:
        return f"No other size of mesh.{leaf.axis} up to the number of devices does."
    fitting = [size for size in leaf.dividing if leaf.devices % size == 0]
    sizes = ", ".join(map(str, leaf.dividing))
    fits = f"{', '.join(map(str, fitting))} with mesh.data=-1" if fitting else "none"
    return f"mesh.{leaf.axis}={sizes} would; of these, {fits} fits {leaf.devices} devices."


def _bytes(number: int) -> str:
    return f"{number / 2**30:.2f} GiB" if number >= 2**30 else f"{number / 2**20:.1f} MiB"
