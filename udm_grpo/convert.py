"""Between the checkpoints of training (Orbax) and the released folders of PyTorch: convert, look into, compare.

    python -m udm_grpo.convert to-pytorch --checkpoint outputs/shapes --base udm_grpo/assets/ursa-shapes --output out
    python -m udm_grpo.convert to-pytorch --checkpoint outputs/lora --base FOLDER --adapter out
    python -m udm_grpo.convert rewrite --base FOLDER --transformer checkpoint-100 --output out
    python -m udm_grpo.convert info udm_grpo/assets/ursa-shapes
    python -m udm_grpo.convert verify out udm_grpo/assets/ursa-shapes --tolerance 0.1

A training checkpoint is named by a run's folder or a folder of checkpoints (whose newest is taken), by its own folder,
or as checkpoints/best. Exit status: 0; 1 if `verify` finds a difference; 2 for an error, told in one line.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from etils import epath

from rewards_bridge.errors import USER_ERROR_STATUS, UserError
from rewards_bridge.flags import Parser
from rewards_bridge.redaction import guarded
from udm_grpo.checkpoints.trained import PREFIXES, Training, is_released, open_training, part_of
from udm_grpo.data.tokenizer import load_tokenizer
from udm_grpo.devices import device_errors, prepare
from udm_grpo.files.finite import finite_number
from udm_grpo.files.folder_lock import lock_beside
from udm_grpo.files.places import check_flags
from udm_grpo.machine.progress import progress_bar
from udm_grpo.model.transformer import TransformerConfig
from udm_grpo.model.vq.config import VQConfig
from udm_grpo.pipeline import Pipeline
from udm_grpo.released.contents import CONFIG_FILES, SCHEDULER_FILE, Scheduler
from udm_grpo.released.part_files import open_part
from udm_grpo.released.peft_files import write_adapter
from udm_grpo.released.weights import DTYPES, ReleasedModel, WeightsError, load_folder, save_folder
from udm_grpo.run import exported
from udm_grpo.tensor_files.torch_files import Layout, TensorFiles, open_tensors, read_json
from udm_grpo.tensor_files.weight_table import TRANSFORMER_TABLE, TensorInfo, from_tree, leaves_by_path, sources

REFERENCE = Path(__file__).resolve().parent.parent / "scripts" / "torch_reference.py"
FORWARD_TOLERANCE = 1e-4
"""Of the largest logit."""
BLOCK = 1 << 22
"""Numbers that are compared at a time."""
TARGETS = ("output", "transformer_only", "adapter")
"""Flags of what is written."""
Tensors = tuple[Mapping[str, TensorInfo], Callable[[str], np.ndarray]]  # what is known by name, and what reads one


def to_pytorch(given: argparse.Namespace) -> int:
    """Run the command to-pytorch: a released folder, or the transformer alone as one file, whole or not at all."""
    if given.transformer_only and given.transformer_only.suffix not in (".safetensors", ".bin"):
        raise WeightsError(
            f"found {given.transformer_only}, wanted a .safetensors or .bin; give it one of these endings"
        )
    if given.adapter and given.dtype:
        raise WeightsError("--dtype is for whole weights; an adapter is written in float32. Leave --dtype out")
    base = load_folder(given.base, transformer_weights=given.transformer)
    training = open_training(given.checkpoint)
    if given.adapter:
        return to_peft(given, base, training)
    layout = base.layouts["transformer"]
    made = exported(base, training.read_for(base, given.weights, str(given.base)))
    target = given.output or given.transformer_only
    if given.output:
        save_folder(made, target, given.dtype)
    else:
        alone = Layout({target.name: tuple(sorted(layout.dtypes))}, layout.dtypes, {target.name: {"format": "pt"}})
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as scratch:
            save_folder(dataclasses.replace(made, layouts={**made.layouts, "transformer": alone}), scratch, given.dtype)
            (Path(scratch) / "transformer" / target.name).replace(target)
    print(f"{target}: {given.weights} of step {training.step}, in {given.dtype or _dtypes(layout)}")
    return 0


def to_peft(given: argparse.Namespace, base: ReleasedModel, training: Training) -> int:
    """Run the command to-pytorch with --adapter: what a LoRA run has trained, as a folder that PEFT reads."""
    lora = training.lora
    if lora is None:
        raise WeightsError(f"{training.path} is of a run that trained all weights, not an adapter; use --output")
    training.check(base, given.weights, str(given.base))
    adapter = training.read_part(training.prefix(given.weights))
    write_adapter(given.adapter, adapter, lora.alpha)
    print(f"{given.adapter}: {given.weights} of step {training.step}, rank {lora.rank}, alpha {lora.alpha:g}")
    return 0


def rewrite(given: argparse.Namespace) -> int:
    """Run the command rewrite: a released folder with other transformer weights, or with its own in another dtype."""
    if not given.transformer and not given.dtype:
        raise WeightsError("rewrite without --transformer and --dtype would be a copy; give one of them or both")
    made = load_folder(given.base, transformer_weights=given.transformer)
    save_folder(made, given.output, given.dtype)
    where = given.transformer or given.base
    print(f"{given.output}: the transformer of {where} in {given.dtype or _dtypes(made.layouts['transformer'])}")
    return 0


def _dtypes(layout: Layout) -> str:
    return ", ".join(sorted(set(layout.dtypes.values())))


def describe_released(folder: Path) -> dict[str, Any]:
    """Return sizes, parameters, dtypes, schedule, tokenizer and files of a released folder; raises WeightsError."""
    found = [read_json(folder / name) for name in CONFIG_FILES]
    try:
        config, vq_config = TransformerConfig.from_json(found[0]), VQConfig.from_json(found[1])
        scheduler = Scheduler.from_json(found[2])
    except ValueError as error:
        raise WeightsError(f"{folder}: {error}") from error
    tokenizer = load_tokenizer(folder / "tokenizer")
    return {
        "kind": "released folder",
        "name": folder.resolve().name,
        "parts": {name: _counted(opened.infos.values()) for name, opened in open_released(folder).items()},
        "transformer": dataclasses.asdict(config),
        "vae": dataclasses.asdict(vq_config) | {"stride": vq_config.stride},
        "scheduler": dataclasses.asdict(scheduler),
        "tokenizer": {"length": tokenizer.length, "vocabulary": tokenizer.vocabulary},
    } | _files(folder)


def describe_training(path: epath.Path) -> dict[str, Any]:
    """Return what a checkpoint of training says of itself and the shapes of its transformer's parameters."""
    training, parts = open_training(path), dict[str, list[TensorInfo]]()
    for name, form in training.infos.items():
        parts.setdefault(part_of(name), []).append(form)
    trained = training.empty(training.prefix("params"))
    return {
        "kind": "training checkpoint",
        "name": training.path.name,
        "step": training.step,
        "ema": "state/ema" in parts,
        "parts": {name: _counted(forms) for name, forms in parts.items()},
        "lora": training.lora and dataclasses.asdict(training.lora),
        "transformer": {name: list(leaf.shape) for name, leaf in leaves_by_path(trained).items()},
        "fingerprint": training.meta.get("fingerprint"),
        "origin": training.meta.get("origin"),
    } | _files(Path(training.path))


def info(given: argparse.Namespace) -> int:
    """Run the command info; reads no tensor."""
    found = describe_released(Path(given.path)) if is_released(given.path) else describe_training(given.path)
    print(json.dumps(found) if given.json else "\n".join(_lines(found)))
    return 0


def open_released(folder: Path) -> dict[str, TensorFiles]:
    """Open the tensors of every part of a released folder; raises WeightsError for what is missing or damaged."""
    parts = {name: open_part(folder / name) for name in ("transformer", "vae")}
    return parts | {"scheduler": open_tensors(folder / "scheduler" / SCHEDULER_FILE)}


def tensors(path: epath.Path, weights: str) -> dict[str, Tensors]:
    """Return, part by part, what reads the tensors under their released names; training has the transformer alone."""
    if is_released(path):
        return {name: (opened.infos, opened.read) for name, opened in open_released(Path(path)).items()}
    tree = open_training(path).read(weights)
    wanted, leaves = sources(TRANSFORMER_TABLE, tree), leaves_by_path(tree)
    infos = {name: TensorInfo(source.shape, str(leaves[source.path].dtype)) for name, source in wanted.items()}
    return {"transformer": (infos, lambda name: from_tree(wanted[name], leaves))}


def difference(one: np.ndarray, other: np.ndarray) -> tuple[float, float] | None:
    """Return the largest |a - b| and |a - b| / max(|a|, |b|), infinite where there is NaN; None for equal bits."""
    gaps: list[tuple[float, ...]] = []
    flat, flat_other = one.reshape(-1), other.reshape(-1)
    for at in range(0, one.size, BLOCK):
        a, b = (side[at : at + BLOCK].astype(np.float64) for side in (flat, flat_other))  # exact from every dtype
        unequal = a.view(np.uint64) != b.view(np.uint64)
        if unequal.any():
            with np.errstate(invalid="ignore"):  # of infinite numbers
                gap, scale = np.abs(a - b)[unequal], np.maximum(np.abs(a), np.abs(b))[unequal]
                share = gap / np.where(scale == 0, 1, scale)
            gaps.append(tuple(float(np.where(x >= 0, x, np.inf).max()) for x in (gap, share)))
    return (max(gap[0] for gap in gaps), max(gap[1] for gap in gaps)) if gaps else None


def compare(part: str, one: Tensors, other: Tensors, tolerance: float) -> list[str]:
    """Print a line on a part of two checkpoints, and return one for every name, shape, value that differs.

    tolerance: of the absolute difference; 0 asks for equal bits, of a narrower dtype after widening, which is exact.
    """
    (here, read), (there, read_other), both = one, other, one[0].keys() & other[0].keys()
    lines = [f"missing in B: {name} {here[name].shape}" for name in here if name not in both]
    lines += [f"only in B: {name} {there[name].shape}" for name in there if name not in both]
    gaps: dict[str, tuple[float, float]] = {}
    with progress_bar(len(both), f"comparing {part}", "tensor") as bar:
        for name in (name for name in here if name in both):
            if here[name].shape != there[name].shape:
                lines.append(f"wrong shape: {name} is {here[name].shape} in A, {there[name].shape} in B")
            elif gap := difference(read(name), read_other(name)):
                gaps[name] = gap
            bar.update()
    over = {name: gap for name, gap in gaps.items() if not tolerance or gap[0] > tolerance}
    lines += [f"differs: {name} by {gap[0]:.3g}, relative {gap[1]:.3g}" for name, gap in over.items()]
    absolute, relative = (max((gap[i] for gap in gaps.values()), default=0.0) for i in (0, 1))
    numbers = f"largest difference {absolute:.3g}, relative {relative:.3g}"
    print(f"{part}: {len(both)} tensors in both, {len(gaps)} with other values; {numbers}")
    return [f"{part}: {line}" for line in lines]


def compare_forward(a: epath.Path, b: epath.Path) -> list[str]:
    """Print how far the torch model of folder A and ours of B are apart on random tokens; a line if it is too far."""
    if not (is_released(a) and is_released(b)):
        raise WeightsError(f"--forward: found {a} and {b}, wanted released folders; use to-pytorch first")
    checkpoint, random = load_folder(b), np.random.default_rng(0)
    config, length = checkpoint.transformer_config, checkpoint.tokenizer.length
    prompts = random.integers(0, config.lm_vocab_size, (2, length))
    prompts[0, : length // 2] = checkpoint.tokenizer.pad_id
    images = random.integers(0, config.lm_head_size, (2, 4, 6))  # not square: rows are not columns
    with tempfile.TemporaryDirectory() as scratch:
        inputs, output = Path(scratch) / "inputs.npz", Path(scratch) / "logits.npz"
        np.savez(inputs, prompt_ids=prompts, image_ids=images)
        done = subprocess.run([sys.executable, REFERENCE, a, inputs, output], capture_output=True, text=True)
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["nothing on stderr"])[-1]
            raise WeightsError(f"{REFERENCE} failed ({said}); it needs torch and transformers, see requirements.txt")
        with np.load(output) as made:
            wanted = made["logits"]
    with jax.default_matmul_precision("highest"):  # GPUs would round float32 to TF32
        found = np.asarray(Pipeline(checkpoint).logits(prompts, images))
    gap, largest = (float(np.abs(array).max()) for array in (found - wanted, wanted))
    text = f"forward: largest difference {gap:.3g}, largest logit {largest:.3g}"
    print(text)
    return [] if gap <= FORWARD_TOLERANCE * largest else [f"{text}; wanted a share of {FORWARD_TOLERANCE:g} at most"]


def verify(given: argparse.Namespace) -> int:
    """Run the command verify; the logits are compared once the tensors agree."""
    one, other = tensors(given.a, given.weights), tensors(given.b, given.weights)
    parts = [compare(part, one[part], other[part], given.tolerance) for part in one if part in other]
    lines = [line for found in parts for line in found]
    if given.forward and not lines:
        lines += compare_forward(given.a, given.b)
    print("\n".join(lines) or "equal" + (f" within {given.tolerance:g}" if given.tolerance else ""))
    return 1 if lines else 0


def _counted(infos: Iterable[TensorInfo]) -> dict[str, Any]:
    dtypes: dict[str, int] = {}
    for info in infos:
        dtypes[info.dtype] = dtypes.get(info.dtype, 0) + math.prod(info.shape)
    return {"parameters": sum(dtypes.values()), "dtypes": dtypes}


def _files(folder: Path) -> dict[str, Any]:
    files = {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    return {"bytes": sum(files.values()), "files": dict(sorted(files.items()))}


def _lines(found: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    for name, value in found.items():
        nested = isinstance(value, dict) and value
        yield f"{indent}{name}:" if nested else f"{indent}{name}: {value}"
        if nested:
            yield from _lines(value, indent + "  ")


def _free(text: str) -> Path:
    target = Path(text)
    if any(target.iterdir()) if target.is_dir() else target.exists() and target.stat().st_size > 0:
        raise argparse.ArgumentTypeError(f"{target} exists and is not empty; choose another or remove it first")
    return target


class _Parser(Parser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; {self.prog} --help says what is wanted\n")


def _parser() -> argparse.ArgumentParser:
    layout = argparse.RawDescriptionHelpFormatter
    parser = _Parser(prog="python -m udm_grpo.convert", description=__doc__, formatter_class=layout)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(run: Callable[[argparse.Namespace], int], name: str, text: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text)
        made.set_defaults(run=run)
        return made

    one = command(to_pytorch, "to-pytorch", "a checkpoint of training -> a released folder, or only its transformer")
    one.add_argument("--checkpoint", type=epath.Path, required=True, help="checkpoint of training")
    one.add_argument("--base", type=Path, required=True, help="released folder: all but the transformer's values")
    target = one.add_mutually_exclusive_group(required=True)
    target.add_argument("--output", type=_free, help="folder to write")
    target.add_argument("--transformer-only", type=_free, metavar="FILE", help="a .safetensors or .bin instead")
    target.add_argument("--adapter", type=_free, metavar="FOLDER", help="of a LoRA run, for PEFT, instead")
    two = command(rewrite, "rewrite", "a released folder with trained transformer weights or in another dtype")
    two.add_argument("--base", type=Path, required=True, help="released folder")
    two.add_argument("--output", type=_free, required=True, help="folder to write")
    for made in (one, two):
        words = "trained weights to take instead of those in --base: a file, its folder, or checkpoint-N of the release"
        made.add_argument("--transformer", type=Path, metavar="FILE|FOLDER", help=words)
        made.add_argument("--dtype", choices=DTYPES, help="of the transformer's tensors (default: that of the weights)")
    three = command(info, "info", "what a released folder or a checkpoint of training holds")
    three.add_argument("path", type=epath.Path)
    three.add_argument("--json", action="store_true", help="one JSON object")
    four = command(verify, "verify", "whether two checkpoints are the same, tensor by tensor")
    four.add_argument("a", type=epath.Path)
    four.add_argument("b", type=epath.Path)
    four.add_argument(
        "--tolerance", type=finite_number, default=0.0, help="absolute difference allowed; 0 asks for equal bits"
    )
    four.add_argument("--forward", action="store_true", help="also A's logits by transformers' Qwen3 against ours of B")
    for made in (one, four):
        made.add_argument("--weights", choices=tuple(PREFIXES), default="params", help="which ones of a training")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    prepare()
    given = _parser().parse_args(argv)
    try:
        check_flags(given, ("checkpoint",) if given.run is to_pytorch else ())
        target = next(filter(None, (vars(given).get(name) for name in TARGETS)), None)
        with lock_beside(target) if target else contextlib.nullcontext(), device_errors():
            return given.run(given)
    except (UserError, OSError) as error:
        print("error:", *str(error).split(), file=sys.stderr)
        return USER_ERROR_STATUS


if __name__ == "__main__":
    sys.exit(guarded(main))
