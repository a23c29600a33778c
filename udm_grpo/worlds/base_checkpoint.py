"""Pre-train the base model of a small world from scratch, whatever that world shows.

The image tokenizer is trained on images, these are encoded to tokens with captions of which some are wrong, and the
transformer is trained on both. Everything is seeded; each stage saves its result in the output folder, and a killed run
resumes from the last one with the same final result. Worlds: scripts/pretrain_shapes.py, scripts/pretrain_signs.py.
"""

import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tokenizers import Tokenizer, models, pre_tokenizers

from rewards_bridge.errors import USER_ERROR_STATUS, UserError
from rewards_bridge.flags import Parser
from udm_grpo import compiled, pretrain
from udm_grpo.batches import Params
from udm_grpo.checkpoints.checkpoint import Checkpoints
from udm_grpo.checkpoints.checkpoint_fallback import restore_newest
from udm_grpo.devices import on_devices, prepare
from udm_grpo.files.folder_lock import lock_inside
from udm_grpo.files.places import local_args
from udm_grpo.lifecycle.iteration_checks import check_finite
from udm_grpo.model import transformer
from udm_grpo.model.execution import TransformerConfig
from udm_grpo.model.vq import codec as vq
from udm_grpo.released.new_checkpoint import new_checkpoint
from udm_grpo.released.weights import ReleasedModel, Scheduler, save_folder

ASSETS = Path(__file__).resolve().parents[1] / "assets"

Metadata = dict[str, Any]
"""What a world records about a prompt; its text is under "prompt"."""


@dataclass(frozen=True)
class World:
    """What the stages need to know about a world. Images are u8[B,H,W,3]."""

    name: str
    """NAME in assets/ursa-NAME."""
    train: Sequence[Metadata]
    """Training prompts."""
    heldout: Sequence[Metadata]
    """Prompts kept for evaluation; their words are in the vocabulary."""
    varied_pictures: Callable[[int, np.random.Generator], np.ndarray]
    """Return that many images for the tokenizer."""
    sample: Callable[[int, np.random.Generator], list[Metadata]]
    """Return that many training prompts for the transformer."""
    pictures: Callable[[Sequence[Metadata], np.random.Generator], np.ndarray]
    """Return an image of each prompt, for the transformer."""
    corrupt: Callable[[Metadata, np.random.Generator], Metadata]
    """Return a caption that is wrong in one element."""
    word_splitter: pre_tokenizers.PreTokenizer
    """Splits a prompt into words, each of which gets a token."""
    vq_config: dict[str, Any]
    """The image tokenizer, as in the released vae/config.json."""
    path: Scheduler


@dataclass(frozen=True)
class Plan:
    """The length of each stage and the share of wrong captions; the defaults are those of the shapes world."""

    pool: int = 20_000
    """Images for training the tokenizer."""
    continuous_updates: int = 700
    """Tokenizer updates before the codebook is initialized."""
    codebook_batches: int = 30
    """Batches of 100 images whose latents initialize the codebook."""
    quantized_updates: int = 2_500
    """Tokenizer updates with the codebook."""
    tokenizer_batch: int = 32
    tokenizer_rate: float = 2e-3
    tokenizer_decay: int = 0
    """Updates with the codebook over which the rate decays by a cosine; 0: over all of them."""
    pictures: int = 40_000
    """Images for training the transformer."""
    wrong_captions: float = 0.1
    """Fraction of captions that are wrong in one element."""
    updates: int = 4_000
    """Transformer updates."""
    batch: int = 64
    learning_rate: float = 3e-3
    shift: float = 3.0
    """Warp of pre-training times: half of them are below t = 0.25, where only the prompt determines what to draw."""


def vq_config(codes: int, width_of_a_code: int) -> dict[str, Any]:
    """Return the config of an image tokenizer of stride 8 with this number and width of codes."""
    return {
        "_quantizer_name": "VQuantizer",
        "attn_down_block": False,
        "attn_up_block": False,
        "block_out_channels": [32, 32, 64, 64],
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": width_of_a_code,
        "layers_per_block": 1,
        "norm_num_groups": 32,
        "num_vq_embeddings": codes,
        "vq_embed_dim": width_of_a_code,
    }


def as_pixels(images: np.ndarray) -> np.ndarray:
    """Convert u8[B,H,W,3] to f32 in [-1, 1]."""
    return images.astype(np.float32) / 127.5 - 1


class TokenizerTraining:
    """The tokenizer's two training phases over one random stream, whose state is saved with the weights."""

    def __init__(self, world: World, plan: Plan, output: Path):
        self.plan, self.output = plan, output
        self.config = vq.VQConfig.from_json(world.vq_config)
        self.rng = np.random.default_rng(0)
        self.pool = world.varied_pictures(plan.pool, self.rng)

    def batch(self, count: int) -> jax.Array:
        """Return the next images f32[count,H,W,3] of the stream."""
        return jnp.asarray(as_pixels(self.pool[self.rng.integers(0, len(self.pool), count)]))

    def phase(self, name: str, params: Params, updates: int, quantized: bool) -> Params:
        """Train for `updates` in all, starting from the phase's last saved state if there is one."""
        peak, decay = self.plan.tokenizer_rate, (self.plan.tokenizer_decay if quantized else 0) or updates
        schedule = optax.warmup_cosine_decay_schedule(0, peak, min(50, decay // 2), decay, peak * 0.05)
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, 0.9, 0.95, weight_decay=1e-4))
        step = compiled.tokenizer_step(self.config, optimizer, quantized)
        opt_state, start = optimizer.init(params), 0
        states = Checkpoints(self.output / f"tokenizer_{name}", keep=2)
        saved = restore_newest(states.folder, (params, opt_state))
        if saved is not None:
            (params, opt_state), meta = saved
            self.rng.bit_generator.state = meta["random"]
            start = meta["updates"]
            states.set_aside_after(start)
        for update in range(start, updates):
            params, opt_state, metrics = step(params, opt_state, self.batch(self.plan.tokenizer_batch))
            done = update + 1
            logs, saves = update % 100 == 0 or done == updates, done % 250 == 0 or done == updates
            if logs or saves:
                values = {key: float(value) for key, value in metrics.items()}
                check_finite(f"{name} update", done, values, "Lower the tokenizer's learning rate and start over.")
            if logs:
                row = {"phase": name, "update": done, **{key: round(value, 4) for key, value in values.items()}}
                print(row, flush=True)
                with (self.output / "tokenizer.jsonl").open("a", encoding="utf-8") as log:
                    print(json.dumps(row), file=log)
            if saves:
                states.save(done, (params, opt_state), {"random": self.rng.bit_generator.state, "updates": done})
        return params

    def codebook(self, params: Params) -> np.ndarray:
        """Return codes f32[V,e], computed from the latents of the plan's images by spherical k-means."""
        encode = compiled.tokenizer_latents(self.config)
        latents = [np.asarray(encode(params, self.batch(100))) for _ in range(self.plan.codebook_batches)]
        points = np.concatenate(latents).reshape(-1, self.config.vq_embed_dim)
        return spherical_k_means(points, self.config.num_vq_embeddings, self.rng)

    def run(self) -> Params:
        """Run both phases, initializing the codebook between them; return the parameters."""
        params = self.phase("continuous", vq.init(self.config, jax.random.key(0)), self.plan.continuous_updates, False)
        if Checkpoints(self.output / "tokenizer_quantized", keep=2).latest() is None:
            params["codebook"] = {"embedding": jnp.asarray(self.codebook(params))}
        return self.phase("quantized", params, self.plan.quantized_updates, True)


def spherical_k_means(points: np.ndarray, k: int, rng: np.random.Generator, rounds: int = 25) -> np.ndarray:
    """Return k unit-length centres of unit-length points f32[M,e]: k-means++ seeding, then Lloyd rounds by angle."""
    centres = points[rng.permutation(len(points))[:1]]
    distance = 2 - 2 * points @ centres[0]
    for _ in range(k - 1):
        weight = np.maximum(distance, 0)
        centres = np.concatenate([centres, points[[rng.choice(len(points), p=weight / weight.sum())]]])
        distance = np.minimum(distance, 2 - 2 * points @ centres[-1])
    for _ in range(rounds):
        nearest = np.argmax(points @ centres.T, axis=1)
        for index in range(k):
            members = points[nearest == index]
            if len(members):
                centres[index] = members.mean(0) / np.linalg.norm(members.mean(0))
    return centres


def write_tokens(world: World, plan: Plan, params: Params, file: Path) -> None:
    """Render, encode and caption the transformer's training images; write prompts and images to tokens.npz."""
    rng = np.random.default_rng(1)
    prompts = world.sample(plan.pictures, rng)
    encode, _ = compiled.tokenizer_codec(vq.VQConfig.from_json(world.vq_config))
    ids = []
    for at in range(0, plan.pictures, 500):
        images = world.pictures(prompts[at : at + 500], rng)
        ids.append(np.asarray(encode(params, jnp.asarray(as_pixels(images)))))
    captions = [
        world.corrupt(metadata, rng) if rng.random() < plan.wrong_captions else metadata for metadata in prompts
    ]
    np.savez_compressed(file, prompts=[caption["prompt"] for caption in captions], images=np.concatenate(ids))


def write_text_tokenizer(folder: Path, texts: Iterable[str], splitter: pre_tokenizers.PreTokenizer) -> list[str]:
    """Write a left-padding tokenizer with one token for each word of the texts; return its vocabulary."""
    split = [[word for word, _ in splitter.pre_tokenize_str(text)] for text in texts]
    words = ["[PAD]", "[UNK]", "[BOV]", *sorted({word for text in split for word in text})]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = splitter
    backend.add_special_tokens(["[PAD]", "[UNK]"])
    backend.save(str(folder / "tokenizer.json"))
    config = {
        "model_max_length": max(len(text) for text in split),
        "pad_token": "[PAD]",
        "padding_side": "left",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "[UNK]",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return words


def fresh_checkpoint(world: World, params: Params) -> ReleasedModel:
    """Return the trained tokenizer with an untrained transformer of 0.86 M parameters."""
    codes = vq.VQConfig.from_json(world.vq_config)
    with tempfile.TemporaryDirectory() as folder:
        texts = [metadata["prompt"] for metadata in (*world.train, *world.heldout)]
        words = write_text_tokenizer(Path(folder), texts, world.word_splitter)
        config = TransformerConfig(
            hidden_size=128,
            intermediate_size=256,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_hidden_layers=4,
            rope_theta=1_000_000,
            vocab_size=len(words) + codes.num_vq_embeddings,
            lm_vocab_size=len(words),
            lm_head_size=codes.num_vq_embeddings,
            bov_token_id=words.index("[BOV]"),
        )
        return new_checkpoint(
            config,
            transformer.init(config, jax.random.key(0)),
            codes,
            params,
            params["codebook"]["embedding"],
            world.path,
            folder,
        )


def write_prompts(folder: Path, train: Sequence[Metadata], heldout: Sequence[Metadata]) -> None:
    """Write the two prompt sets, train.jsonl and heldout.jsonl, with one JSON object per line."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, prompts in (("train", train), ("heldout", heldout)):
        lines = [json.dumps(metadata) for metadata in prompts]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def install(world: World, output: Path, assets: Path = ASSETS) -> None:
    """Copy the model, the prompt sets and the logs into the package."""
    target = assets / f"ursa-{world.name}"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(output / "base" / "checkpoint", target)
    write_prompts(assets / f"{world.name}-prompts", world.train, world.heldout)
    logs = assets / f"ursa-{world.name}-log"
    logs.mkdir(exist_ok=True)
    shutil.copy(output / "tokenizer.jsonl", logs)
    shutil.copy(output / "base" / "pretrain.jsonl", logs)


def make_base(world: World, plan: Plan, output: Path) -> None:
    """Run every stage that is not finished yet; the resulting model is in output/base/checkpoint."""
    output.mkdir(parents=True, exist_ok=True)
    params = TokenizerTraining(world, plan, output).run()
    tokens = output / "tokens.npz"
    if not tokens.exists():
        write_tokens(world, plan, params, tokens)
    save_folder(fresh_checkpoint(world, params), output / "start")
    settings = pretrain.PretrainPlan(plan.updates, plan.batch, plan.learning_rate, shift=plan.shift)
    pretrain.pretrain_folder(output / "start", tokens, output / "base", settings)


def command_line(world: World, plan: Plan, argv: Sequence[str] | None) -> int:
    """Run the command line of a world's script; return the exit status."""
    parser = Parser(description=f"Pre-train the base model of the {world.name} world.")
    parser.add_argument("--output", required=True, help="folder for the model, its logs and its saved states")
    parser.add_argument("--install", action="store_true", help="copy the result into udm_grpo/assets")
    prepare()
    arguments = local_args(parser, argv)
    output = Path(arguments.output)
    try:
        with on_devices(), lock_inside(output):
            make_base(world, plan, output)
            if arguments.install:
                install(world, output)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR_STATUS
    return 0
