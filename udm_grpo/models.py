"""Models that commands draw with: a released folder, with or without an adapter, or a training run."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rewards_bridge.errors import UserError
from udm_grpo.checkpoints.checkpoint import Checkpoints
from udm_grpo.checkpoints.trained import read_training
from udm_grpo.files.buckets import local
from udm_grpo.released.peft_files import with_adapter
from udm_grpo.released.weights import ReleasedModel, load_folder


class SamplingError(UserError, ValueError):
    """A request that cannot be drawn; the message says what to change."""


@dataclass(frozen=True)
class Model:
    """A released model in float32, its origin (for settings.json), and its default height, width and dtype."""

    released: ReleasedModel
    source: dict[str, Any]
    defaults: dict[str, Any]


def open_folder(folder: str, adapter: str | None = None, transformer: str | None = None) -> Model:
    """Open a folder in the released format; raises WeightsError.

    transformer: trained weights to use instead of those in the folder; adapter: a PEFT folder to merge into them.
    """
    released = load_folder(local(folder), transformer_weights=transformer)
    size = 32 * released.vq_config.stride
    source = {"checkpoint": folder} | ({"transformer": transformer} if transformer else {})
    if adapter is not None:
        merged = with_adapter(released.transformer, local(adapter), released.transformer_config)
        released, source = replace(released, transformer=merged), {**source, "adapter": adapter}
    return Model(released, source, {"height": size, "width": size, "dtype": "float32"})


def open_run(folder: str, step: str | None = None, weights: str | None = None) -> Model:
    """Open a training run: its start model with the weights of a checkpoint.

    step: a number, best or None (the latest). weights: params, ema or None: those that the run itself evaluates and
    exports, its moving average if it keeps one.
    Raises SamplingError, CheckpointError, WeightsError.
    """
    file = local(f"{folder}/config.json")
    if not file.is_file():
        raise SamplingError(f"{folder} is not a training run: there is no {file}. Give the output_dir of one as --run.")
    config = read_json(file)
    model, judged = config["model"], "ema" if config["optimizer"]["ema_decay"] > 0 else "params"
    chosen = weights or judged
    if chosen != judged and (step == "best" or judged == "params"):
        raise SamplingError(f"--weights is {chosen}, but {folder} has only {judged}; give --weights {judged}.")
    path, number = _checkpoint_of(f"{folder}/checkpoints", step or "latest")
    length, trained = model["text_length"] or None, model.get("transformer") or None
    released = load_folder(local(model["path"]), prompt_length=length, transformer_weights=trained)
    best, training = step == "best", read_training(path)
    if training.meta.get("run", config.get("run")) != config.get("run"):
        others = f"{path} belongs to the run {training.meta['run']}, but config.json to {config.get('run')}"
        raise SamplingError(f"{others}: the files of two runs are mixed in {folder}; give the folder of a single run.")
    # The best checkpoint stores the weights that the run evaluates under the name params.
    params = training.read_for(released, "params" if best else chosen, model["path"])
    source = {"run": folder, "step": number, "best": best, "weights": chosen}
    defaults = {name: model[name] for name in ("height", "width", "dtype")}
    return Model(replace(released, transformer=params), source, defaults)


def read_json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file; raises SamplingError if it is damaged."""
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise SamplingError(f"{file} is damaged ({error}); give another folder.") from error


def _checkpoint_of(folder: str, step: str) -> tuple[Any, int]:
    """Return (folder, step) of a run's checkpoint."""
    saved = Checkpoints(folder, keep=1)
    steps = saved.steps()
    there = f"there are {', '.join(map(str, steps))}" if steps else "there is none"
    if step == "best":
        best = saved.best()
        if best is None:
            raise SamplingError(f"{folder} has no best checkpoint (checkpoint.keep_best); by step {there}.")
        return best, int(best.name.rpartition("-")[2])
    if step != "latest" and not step.isdecimal():
        raise SamplingError(f"--step is {step!r}; give latest, best or a number.")
    number = int(step) if step != "latest" else max(steps, default=-1)
    if number not in steps:
        raise SamplingError(f"{folder} has no complete checkpoint for --step {step}; {there}.")
    return saved.path(number), number
