"""Draw pictures for prompts with a released folder or a training run.

    python -m udm_grpo.sample --checkpoint udm_grpo/assets/ursa-shapes --output outputs/pictures \\
        --prompt "a photo of a red circle" --height 32 --width 32
    python -m udm_grpo.sample --run outputs/shapes --output outputs/geneval --prompts geneval.jsonl
    python -m udm_grpo.sample --checkpoint FOLDER --adapter outputs/mine/export_lora --output out --prompt "a star"
    python -m udm_grpo.sample --checkpoint FOLDER --transformer checkpoint-100 --output out --prompt "a star"

--layout geneval, which GenEval's evaluation reads, or --layout flat (--layout dpgbench: prompts.jsonl and OUTPUT/ID.png
with the four pictures of a prompt in a 2 x 2 grid, named by the prompt's id):

    OUTPUT/00000/metadata.jsonl          the prompt's line          OUTPUT/prompts.jsonl    a line per prompt
    OUTPUT/00000/samples/0000.png        its first picture          OUTPUT/00000_0.png      its first picture

It also writes settings.json and contact_sheet.png. Rerunning the command continues where it stopped. Image i of prompt
p depends on (seed, p, i) alone, not on --batch, --devices or the number of hosts (several share the work and the
folder, started as for training: udm_grpo/multihost/distributed.py); image 0 is what `Pipeline.generate` draws with that
seed.
"""

import argparse
import hashlib
import itertools
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from rewards_bridge.errors import USER_ERROR_STATUS, UserError
from rewards_bridge.flags import Parser, flag
from rewards_bridge.redaction import guarded
from udm_grpo import compiled
from udm_grpo import mesh as meshes
from udm_grpo.batches import padded
from udm_grpo.config import DistributedConfig, MeshConfig
from udm_grpo.data.prompt_files import PROMPT
from udm_grpo.data.prompts import UNTAGGED, PromptSet, read_prompts
from udm_grpo.devices import on_devices, prepare
from udm_grpo.diffusion.rollout import RolloutPlan
from udm_grpo.files.atomic import remove_unfinished, replace_file
from udm_grpo.files.buckets import local_prompts
from udm_grpo.files.places import check_flags
from udm_grpo.lifecycle.output_folder import lock_for_all
from udm_grpo.machine.progress import progress_bar
from udm_grpo.model.network import Network
from udm_grpo.models import Model, SamplingError, open_folder, open_run
from udm_grpo.multihost import distributed, hosts
from udm_grpo.released.weights import DTYPES, ReleasedModel
from udm_grpo.reporting.pictures import image_grid
from udm_grpo.run import path_of
from udm_grpo.scoring.layouts import GRID, LAYOUTS, QUARTERS, cut_grid, file_names, join_grid, picture_files, place_of
from udm_grpo.scoring.sample_settings import Settings, digest_of, open_output

MAX_PROMPTS, MAX_IMAGES_PER_PROMPT = 2**20, 2**11
"""Image i of prompt p has the number i * MAX_PROMPTS + p in the rollouts, which fits into 31 bits."""


def drawer(
    released: ReleasedModel, settings: Settings, texts: Sequence[str], batch: int, devices: list[Any]
) -> Callable[[Sequence[tuple[int, int]]], UInt8[jax.Array, "b hh ww 3"]]:
    """Return a function that starts drawing up to `batch` pictures, by (prompt, image); the last rows may be padding.

    Raises SamplingError for sizes that the tokens do not divide.
    """
    stride = released.vq_config.stride
    if min(settings.height, settings.width) < 1 or settings.height % stride or settings.width % stride:
        sizes = f"--height {settings.height} and --width {settings.width}"
        raise SamplingError(f"{sizes} must be multiples of {stride}, the pixels of a token.")
    mesh = meshes.make_mesh(asdict(MeshConfig()), devices)
    rows = padded(batch, meshes.batch_shards(mesh))
    grid = (settings.height // stride, settings.width // stride)
    network = Network(released.transformer_config, grid, rows=4 * meshes.batch_shards(mesh))
    shift = released.scheduler.shift
    plan = RolloutPlan(settings.steps, shift, settings.guidance_scale, settings.guidance_trunc)
    path = jax.device_put(path_of(released), meshes.replicated(mesh))
    rollout = compiled.free_rollout(network, path, plan)
    decode = compiled.tokenizer_codec(released.vq_config, meshes.batch_shards(mesh))[1]
    params = jax.tree.map(lambda leaf: np.asarray(leaf, settings.dtype), released.transformer)
    params = jax.device_put(params, meshes.shardings(mesh, params))
    vq_params = jax.device_put(released.vq, meshes.replicated(mesh))
    prompt_ids = released.tokenizer(texts)  # all at once, so that one warning counts those that are truncated
    empty_ids = jax.device_put(released.tokenizer.negative(settings.negative_prompt), meshes.replicated(mesh))
    key = jax.random.key(settings.seed)

    def draw(pairs: Sequence[tuple[int, int]]) -> UInt8[jax.Array, "b hh ww 3"]:
        prompt, image = np.pad(np.array(pairs, np.int32), ((0, rows - len(pairs)), (0, 0)), mode="edge").T
        ids, index = jax.device_put((prompt_ids[prompt], image * MAX_PROMPTS + prompt), meshes.over_batch(mesh))
        rolled = rollout(params, ids, empty_ids, index, key)
        return compiled.to_pixels(decode(vq_params, rolled.clean.reshape(-1, *grid)))

    return draw


def sample(model: Model, settings: Settings, prompts: PromptSet, output: Path, batch: int, devices: list[Any]) -> int:
    """Draw all pictures of `settings` that are not in `output` yet, `batch` at a time; return how many.

    Each of several processes draws its own share, on its own `devices`.

    Raises what `open_output` and `drawer` raise, and OSError if a picture cannot be written.
    """
    draw = drawer(model.released, settings, prompts.prompts, batch, devices)
    hosts.from_primary(lambda: open_output(settings, model.source, prompts, output))  # the others wait for its files
    names = file_names(settings.layout, prompts.metadata)
    files = picture_files(settings.layout, output, names, len(prompts), settings.images_per_prompt)
    files = files[jax.process_index() :: jax.process_count()]
    every = sum(len(pairs) for _, pairs in files)
    files = [(path, pairs) for path, pairs in files if not path.exists()]
    todo = [pair for _, pairs in files for pair in pairs]
    parts = [todo[at : at + batch] for at in range(0, len(todo), batch)]
    # The devices draw a part while the previous one is written.
    started = itertools.chain(map(draw, parts), [None])
    drawing = next(started)
    waiting: list[UInt8[np.ndarray, "hh ww 3"]] = []  # drawn in the order of todo, not yet a complete file
    with progress_bar(every, "drawing", "image", every - len(todo)) as bar:
        for part in parts:
            drawn, drawing = drawing, next(started)
            waiting += list(np.asarray(drawn)[: len(part)])
            while files and len(waiting) >= len(files[0][1]):
                (path, pairs), *files = files
                pixels = join_grid(waiting[:QUARTERS]) if settings.layout == GRID else waiting[0]
                del waiting[: len(pairs)]
                replace_file(path, partial(Image.fromarray(pixels).save, format="PNG"))
            bar.update(len(part))
    return len(todo)


def contact_sheet(settings: Settings, prompts: PromptSet, output: Path, count: int) -> None:
    """Write contact_sheet.png: the first picture of each of the first `count` prompts; no file for 0."""
    shown = min(count, len(prompts))
    names = file_names(settings.layout, prompts.metadata)
    places = [place_of(settings.layout, output, names, prompt, 0) for prompt in range(shown)]
    if places:
        drawn = ((np.asarray(Image.open(file).convert("RGB")), quarter) for file, quarter in places)
        images = np.stack([pixels if quarter is None else cut_grid(pixels, quarter) for pixels, quarter in drawn])
        image_grid(images, prompts.prompts[:shown], columns=4, path=output / "contact_sheet.png")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m udm_grpo.sample", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--checkpoint", metavar="FOLDER", help="folder in the released format")
    model.add_argument("--run", metavar="OUTPUT_DIR", help="output folder of a training run")
    parser.add_argument(
        "--transformer",
        metavar="FILE|FOLDER",
        help="trained weights to use instead of those in --checkpoint: a .safetensors or .bin, its folder, or a "
        "checkpoint-N folder of the public release",
    )
    parser.add_argument("--adapter", metavar="FOLDER", help="PEFT adapter for --checkpoint, e.g. a run's export_lora")
    parser.add_argument("--step", help="checkpoint of --run: a number, latest (the default) or best")
    parser.add_argument("--weights", choices=("params", "ema"), help="weights of --run; default: ema if it keeps one")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", metavar="TEXT", nargs="+", action="extend", help="one or more prompts, each quoted")
    what.add_argument("--prompts", metavar="FILE", help=".jsonl, .json, .txt, .csv; FOLDER:SPLIT of prepare_prompts")
    parser.add_argument("--prompt-key", metavar="KEY", help="key in --prompts of the text to draw (default: prompt)")
    parser.add_argument("--output", metavar="FOLDER", required=True)
    parser.add_argument("--layout", choices=LAYOUTS, default="geneval", help="default: geneval")
    for name, default, meaning in (
        ("images_per_prompt", 4, "pictures per prompt"),
        ("steps", 25, "denoising steps"),
        ("guidance_scale", 1.0, "1: no guidance"),
        ("guidance_trunc", 0.9, "guidance applies while t is below this"),
        ("seed", 0, "another seed draws other pictures"),
        ("batch", 32, "pictures to draw at a time, on all devices of a host"),
        ("sheet_prompts", 16, "prompts on contact_sheet.png; 0: none"),
    ):
        parser.add_argument(flag(name), type=type(default), default=default, help=f"{meaning} (default: %(default)s)")
    parser.add_argument(
        "--negative-prompt",
        metavar="TEXT",
        help="prompt that guidance contrasts with instead of the empty one",
    )
    for name in ("height", "width"):
        parser.add_argument(flag(name), type=int, help="pixels (default: the run's, else 32 tokens)")
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the transformer (default: the run's, else float32)")
    parser.add_argument("--devices", type=int, help="number of devices to use (default: all)")
    return parser


def _check(args: argparse.Namespace, available: int) -> None:
    """Raise SamplingError that lists everything that is wrong with the command line alone."""
    ranges = {
        "images_per_prompt": (1, MAX_IMAGES_PER_PROMPT),
        "steps": (1, 10_000),
        "guidance_scale": (1, 1000),
        "guidance_trunc": (0, 1),
        "seed": (0, 2**32 - 1),
        "batch": (1, 2**20),
        "sheet_prompts": (0, MAX_PROMPTS),
        "devices": (1, available),
    }
    named = vars(args)
    problems = [
        f"{flag(name)} is {named[name]}; choose {least} to {most}."
        for name, (least, most) in ranges.items()
        if named[name] is not None and not least <= named[name] <= most
    ]
    if args.checkpoint and (args.step or args.weights):
        problems.append("--step and --weights choose from a training run; give it as --run OUTPUT_DIR.")
    for name in ("adapter", "transformer"):
        if args.run and vars(args)[name]:
            problems.append(f"{flag(name)} belongs to a released folder; give that as --checkpoint instead of --run.")
    if args.negative_prompt and (args.guidance_scale == 1 or args.guidance_trunc == 0):
        problems.append("--negative-prompt changes nothing without guidance; give a --guidance-scale above 1 as well.")
    if args.layout == GRID and args.images_per_prompt != QUARTERS:
        problems.append(f"--layout {GRID} takes exactly {QUARTERS} --images-per-prompt, a 2 x 2 grid per prompt.")
    if problems:
        raise SamplingError("\n  ".join(problems))


def _read_prompts(args: argparse.Namespace) -> PromptSet:
    texts = args.prompt or []
    rows = tuple({"tag": UNTAGGED, "prompt": text} for text in texts)
    if args.prompt_key and not args.prompts:
        raise SamplingError("--prompt-key chooses a text of --prompts FILE; give that instead of --prompt.")
    key = args.prompt_key or PROMPT
    prompts = (
        read_prompts(local_prompts(args.prompts), key=key)
        if args.prompts
        else PromptSet(tuple(texts), rows, (UNTAGGED,) * len(rows))
    )
    if len(prompts) > MAX_PROMPTS:
        raise SamplingError(f"there are {len(prompts)} prompts; give at most {MAX_PROMPTS} at a time.")
    file_names(args.layout, prompts.metadata)  # raises for ids that are not file names, before anything is loaded
    return prompts


def _settings(args: argparse.Namespace, model: Model, prompts: PromptSet) -> Settings:
    asked = {field.name: vars(args).get(field.name) for field in fields(Settings)}
    read = {
        "weights": digest_of(model.released),
        "prompts": hashlib.sha256(json.dumps([prompts.prompts, prompts.metadata]).encode()).hexdigest(),
        "text_length": model.released.tokenizer.length,
    }
    return Settings(**{**model.defaults, **{name: value for name, value in asked.items() if value is not None}, **read})


def draw_all(args: argparse.Namespace) -> None:
    """Draw what the command line asks for; raises SamplingError, WeightsError and the like."""
    devices = jax.local_devices()
    _check(args, len(devices))
    prompts = _read_prompts(args)
    if args.run:
        model = open_run(args.run, args.step, args.weights)
    else:
        model = open_folder(args.checkpoint, args.adapter, args.transformer)
    settings, output = _settings(args, model, prompts), Path(args.output)
    drawn = sum(hosts.gather(sample(model, settings, prompts, output, args.batch, devices[: args.devices])))
    if hosts.is_primary():
        remove_unfinished(output)
        contact_sheet(settings, prompts, output, args.sheet_prompts)
        print(f"{settings.images_per_prompt} pictures of each prompt are in {output}; {drawn} are new", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status: 2 for a user error, which is reported without a traceback."""
    prepare()
    args = _parser().parse_args(argv)
    expected = (UserError, OSError)
    try:
        check_flags(args, ("checkpoint", "run", "adapter", "prompts"))
        with distributed.joined(DistributedConfig(), expected), on_devices(), lock_for_all(args.output):
            draw_all(args)
    except expected as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR_STATUS
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
