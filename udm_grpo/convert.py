"""Convert, inspect and compare training checkpoints (Orbax) and released model folders (PyTorch).

    python -m udm_grpo.convert to-pytorch --checkpoint outputs/shapes --base udm_grpo/assets/ursa-shapes --output out
    python -m udm_grpo.convert to-pytorch --checkpoint outputs/lora --base FOLDER --adapter out
    python -m udm_grpo.convert rewrite --base FOLDER --transformer checkpoint-100 --output out
    python -m udm_grpo.convert info udm_grpo/assets/ursa-shapes
    python -m udm_grpo.convert verify out udm_grpo/assets/ursa-shapes --tolerance 0.1

A training checkpoint is given as a run's folder or a folder of checkpoints (the newest is taken), as its own folder, or
as checkpoints/best. Exit status: 0; 1 if `verify` finds a difference; 2 for an error, which is printed on one line.
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
from udm_grpo.model.execution import TransformerConfig
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
"""Largest difference of the logits that is allowed, relative to the largest logit."""
BLOCK = 1 << 22
"""Number of values that are compared at a time."""
TARGETS = ("output", "transformer_only", "adapter")
"""Flags that name the output."""
Tensors = tuple[Mapping[str, TensorInfo], Callable[[str], np.ndarray]]  # by name: shape and dtype, and what reads it


def to_pytorch(args: argparse.Namespace) -> int:
    """Run the command to-pytorch: write a released folder, or only the transformer as one file, atomically."""
    if args.transformer_only and args.transformer_only.suffix not in (".safetensors", ".bin"):
        raise WeightsError(
            f"--transformer-only is {args.transformer_only}; expected a name that ends with .safetensors or .bin"
        )
    if args.adapter and args.dtype:
        raise WeightsError("--dtype does not apply to --adapter, which is always written in float32; leave --dtype out")
    base = load_folder(args.base, transformer_weights=args.transformer)
    training = open_training(args.checkpoint)
    if args.adapter:
        return to_peft(args, base, training)
    layout = base.layouts["transformer"]
    released = exported(base, training.read_for(base, args.weights, str(args.base)))
    target = args.output or args.transformer_only
    if args.output:
        save_folder(released, target, args.dtype)
    else:
        alone = Layout({target.name: tuple(sorted(layout.dtypes))}, layout.dtypes, {target.name: {"format": "pt"}})
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as scratch:
            save_folder(
                dataclasses.replace(released, layouts={**released.layouts, "transformer": alone}), scratch, args.dtype
            )
            (Path(scratch) / "transformer" / target.name).replace(target)
    print(f"{target}: {args.weights} of step {training.step}, in {args.dtype or _dtypes(layout)}")
    return 0


def to_peft(args: argparse.Namespace, base: ReleasedModel, training: Training) -> int:
    """Run the command to-pytorch with --adapter: write what a LoRA run has trained as a folder that PEFT reads."""
    lora = training.lora
    if lora is None:
        raise WeightsError(f"{training.path} comes from a run that trained all weights, not an adapter; use --output")
    training.check(base, args.weights, str(args.base))
    adapter = training.read_part(training.prefix(args.weights))
    write_adapter(args.adapter, adapter, lora.alpha)
    print(f"{args.adapter}: {args.weights} of step {training.step}, rank {lora.rank}, alpha {lora.alpha:g}")
    return 0


def rewrite(args: argparse.Namespace) -> int:
    """Run the command rewrite: write a released folder with other transformer weights or in another dtype."""
    if not args.transformer and not args.dtype:
        raise WeightsError("rewrite needs --transformer or --dtype or both; without them it would only copy the folder")
    released = load_folder(args.base, transformer_weights=args.transformer)
    save_folder(released, args.output, args.dtype)
    where = args.transformer or args.base
    print(f"{args.output}: the transformer of {where} in {args.dtype or _dtypes(released.layouts['transformer'])}")
    return 0


def _dtypes(layout: Layout) -> str:
    return ", ".join(sorted(set(layout.dtypes.values())))


def describe_released(folder: Path) -> dict[str, Any]:
    """Return sizes, parameters, dtypes, schedule, tokenizer and files of a released folder. Raises WeightsError."""
    configs = [read_json(folder / name) for name in CONFIG_FILES]
    try:
        config, vq_config = TransformerConfig.from_json(configs[0]), VQConfig.from_json(configs[1])
        scheduler = Scheduler.from_json(configs[2])
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
    """Return the metadata of a training checkpoint and the shapes of its transformer's parameters."""
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


def info(args: argparse.Namespace) -> int:
    """Run the command info; no tensor is read."""
    description = describe_released(Path(args.path)) if is_released(args.path) else describe_training(args.path)
    print(json.dumps(description) if args.json else "\n".join(_lines(description)))
    return 0


def open_released(folder: Path) -> dict[str, TensorFiles]:
    """Open the tensors of every part of a released folder. Raises WeightsError if one is missing or damaged."""
    parts = {name: open_part(folder / name) for name in ("transformer", "vae")}
    return parts | {"scheduler": open_tensors(folder / "scheduler" / SCHEDULER_FILE)}


def tensors(path: epath.Path, weights: str) -> dict[str, Tensors]:
    """Return the tensors of each part by their released names; a training checkpoint has only the transformer."""
    if is_released(path):
        return {name: (opened.infos, opened.read) for name, opened in open_released(Path(path)).items()}
    tree = open_training(path).read(weights)
    expected, leaves = sources(TRANSFORMER_TABLE, tree), leaves_by_path(tree)
    infos = {name: TensorInfo(source.shape, str(leaves[source.path].dtype)) for name, source in expected.items()}
    return {"transformer": (infos, lambda name: from_tree(expected[name], leaves))}


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
    """Print a summary line for one part of two models, and return a line for every name, shape or value that differs.

    tolerance: largest allowed absolute difference; 0 requires equal bits, after an exact widening of a narrower dtype.
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
    """Compare A's logits by the torch model with B's by ours on random tokens; return a line if they differ."""
    if not (is_released(a) and is_released(b)):
        raise WeightsError(f"--forward compares released folders, not {a} and {b}; convert them with to-pytorch first")
    released, random = load_folder(b), np.random.default_rng(0)
    config, length = released.transformer_config, released.tokenizer.length
    prompts = random.integers(0, config.lm_vocab_size, (2, length))
    prompts[0, : length // 2] = released.tokenizer.pad_id
    images = random.integers(0, config.lm_head_size, (2, 4, 6))  # not square: rows are not columns
    with tempfile.TemporaryDirectory() as scratch:
        inputs, output = Path(scratch) / "inputs.npz", Path(scratch) / "logits.npz"
        np.savez(inputs, prompt_ids=prompts, image_ids=images)
        done = subprocess.run([sys.executable, REFERENCE, a, inputs, output], capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["nothing on stderr"])[-1]
            raise WeightsError(f"{REFERENCE} failed ({reason}); it needs torch and transformers, see requirements.txt")
        with np.load(output) as archive:
            expected = archive["logits"]
    with jax.default_matmul_precision("highest"):  # GPUs would round float32 to TF32
        logits = np.asarray(Pipeline(released).logits(prompts, images))
    gap, largest = (float(np.abs(array).max()) for array in (logits - expected, expected))
    text = f"forward: largest difference {gap:.3g}, largest logit {largest:.3g}"
    print(text)
    return [] if gap <= FORWARD_TOLERANCE * largest else [f"{text}; expected a ratio of at most {FORWARD_TOLERANCE:g}"]


def verify(args: argparse.Namespace) -> int:
    """Run the command verify; the logits are compared only if all tensors agree."""
    one, other = tensors(args.a, args.weights), tensors(args.b, args.weights)
    parts = [compare(part, one[part], other[part], args.tolerance) for part in one if part in other]
    lines = [line for differences in parts for line in differences]
    if args.forward and not lines:
        lines += compare_forward(args.a, args.b)
    print("\n".join(lines) or "equal" + (f" within {args.tolerance:g}" if args.tolerance else ""))
    return 1 if lines else 0


def _counted(infos: Iterable[TensorInfo]) -> dict[str, Any]:
    dtypes: dict[str, int] = {}
    for info in infos:
        dtypes[info.dtype] = dtypes.get(info.dtype, 0) + math.prod(info.shape)
    return {"parameters": sum(dtypes.values()), "dtypes": dtypes}


def _files(folder: Path) -> dict[str, Any]:
    files = {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    return {"bytes": sum(files.values()), "files": dict(sorted(files.items()))}


def _lines(fields: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    for name, value in fields.items():
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
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    layout = argparse.RawDescriptionHelpFormatter
    parser = _Parser(prog="python -m udm_grpo.convert", description=__doc__, formatter_class=layout)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(run: Callable[[argparse.Namespace], int], name: str, text: str) -> argparse.ArgumentParser:
        subparser = commands.add_parser(name, help=text, description=text)
        subparser.set_defaults(run=run)
        return subparser

    one = command(to_pytorch, "to-pytorch", "convert a training checkpoint to released weights or a PEFT adapter")
    one.add_argument("--checkpoint", type=epath.Path, required=True, help="training checkpoint")
    one.add_argument("--base", type=Path, required=True, help="released folder with everything but these weights")
    target = one.add_mutually_exclusive_group(required=True)
    target.add_argument("--output", type=_free, help="folder to write")
    target.add_argument("--transformer-only", type=_free, metavar="FILE", help="write one .safetensors or .bin file")
    target.add_argument("--adapter", type=_free, metavar="FOLDER", help="write a LoRA run's adapter in PEFT's format")
    two = command(rewrite, "rewrite", "write a released folder with other transformer weights or in another dtype")
    two.add_argument("--base", type=Path, required=True, help="released folder")
    two.add_argument("--output", type=_free, required=True, help="folder to write")
    for subcommand in (one, two):
        words = "weights to use instead of those in --base: a file, its folder, or a checkpoint-N of the public release"
        subcommand.add_argument("--transformer", type=Path, metavar="FILE|FOLDER", help=words)
        subcommand.add_argument("--dtype", choices=DTYPES, help="dtype of the transformer (default: unchanged)")
    three = command(info, "info", "describe a released folder or a training checkpoint")
    three.add_argument("path", type=epath.Path)
    three.add_argument("--json", action="store_true", help="print one JSON object")
    four = command(verify, "verify", "compare two released folders or training checkpoints, tensor by tensor")
    four.add_argument("a", type=epath.Path)
    four.add_argument("b", type=epath.Path)
    words = "largest absolute difference allowed; 0 requires equal bits"
    four.add_argument("--tolerance", type=finite_number, default=0.0, help=words)
    four.add_argument(
        "--forward", action="store_true", help="also compare A's logits by transformers' Qwen3 with ours of B"
    )
    for subcommand in (one, four):
        words = "which weights of a training checkpoint to read"
        subcommand.add_argument("--weights", choices=tuple(PREFIXES), default="params", help=words)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    prepare()
    args = _parser().parse_args(argv)
    try:
        check_flags(args, ("checkpoint",) if args.run is to_pytorch else ())
        target = next(filter(None, (vars(args).get(name) for name in TARGETS)), None)
        with lock_beside(target) if target else contextlib.nullcontext(), device_errors():
            return args.run(args)
    except (UserError, OSError) as error:
        print("error:", *str(error).split(), file=sys.stderr)
        return USER_ERROR_STATUS


if __name__ == "__main__":
    sys.exit(guarded(main))
