"""Make the base checkpoint of the shapes world from nothing: tokenizer, image tokens, transformer.

    python -m scripts.pretrain_shapes --output outputs/pretrain_shapes
    python -m scripts.pretrain_shapes --output outputs/pretrain_shapes --install   # and put it into udm_grpo/assets

Seeded; every stage leaves its result in --output and a killed run goes on from the last one, to the same end. The base
is meant to be imperfect in an honest way: short training, and one caption in ten is wrong in one element (another
class, colour, count or relation).
"""

import argparse
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from udm_grpo import pretrain, steps
from udm_grpo.batches import Params
from udm_grpo.host import shapes
from udm_grpo.host.checkpoint import Checkpoints
from udm_grpo.host.new_checkpoint import new_checkpoint
from udm_grpo.host.shapes_scenes import render_batch, scene_for
from udm_grpo.host.weights import Checkpoint, Scheduler, save_folder
from udm_grpo.model import transformer, vq

ASSETS = Path(__file__).resolve().parent.parent / "udm_grpo" / "assets"
CODES = 256
WIDTH_OF_A_CODE = 8
TAG_WEIGHTS = {"position": 3, "counting": 3, "color_attr": 5, "colors": 4, "two_object": 2, "single_object": 1}
"""How often the transformer sees each tag: most often those with the most prompts and the most to tell apart."""
PATH = Scheduler(alpha=0.9, c=15.0, eps=1e-5, shift=1.0)
"""256 codes on a sphere in 8 dimensions have near neighbours, so c is large: a token keeps its code with probability
0.2 at t = 0.5, 0.7 at t = 0.8, 0.96 at t = 0.9. With (0.9, 3) that would be 0.3 at t = 0.9, and most of a picture would
be decided in the last of ten steps, every token on its own."""
VQ_CONFIG = {
    "_quantizer_name": "VQuantizer",
    "attn_down_block": False,
    "attn_up_block": False,
    "block_out_channels": [32, 32, 64, 64],
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": WIDTH_OF_A_CODE,
    "layers_per_block": 1,
    "norm_num_groups": 32,
    "num_vq_embeddings": CODES,
    "vq_embed_dim": WIDTH_OF_A_CODE,
}


@dataclass(frozen=True)
class Plan:
    """How long each stage takes, and how wrong the captions are."""

    pool: int = 20_000
    """Pictures that the tokenizer sees."""
    continuous_updates: int = 700
    """Tokenizer updates before the codebook is set."""
    quantized_updates: int = 2_500
    """Tokenizer updates with codes."""
    tokenizer_batch: int = 32
    tokenizer_rate: float = 2e-3
    pictures: int = 40_000
    """Pictures that the transformer sees."""
    wrong_captions: float = 0.1
    """Share of captions that are wrong in one element."""
    updates: int = 4_000
    """Transformer updates."""
    batch: int = 64
    learning_rate: float = 3e-3
    shift: float = 3.0
    """Warp of pre-training times: half of them below t = 0.25, where only the words say what to draw."""


def as_pixels(images: np.ndarray) -> np.ndarray:
    """u8[B,H,W,3] -> f32 in [-1, 1]."""
    return images.astype(np.float32) / 127.5 - 1


class TokenizerTraining:
    """The tokenizer's two phases over one random stream, whose state is saved with the weights."""

    def __init__(self, plan: Plan, output: Path):
        self.plan, self.output = plan, output
        self.config = vq.VQConfig.from_json(VQ_CONFIG)
        self.rng = np.random.default_rng(0)
        prompts = shapes.sample_prompts(shapes.train_prompts(), plan.pool, self.rng, shapes.PRETRAIN_TAG_WEIGHTS)
        self.pool = render_batch([scene_for(metadata, self.rng) for metadata in prompts])

    def batch(self, count: int) -> jax.Array:
        """The next pictures f32[count,32,32,3] of the stream."""
        return jnp.asarray(as_pixels(self.pool[self.rng.integers(0, len(self.pool), count)]))

    def phase(self, name: str, params: Params, updates: int, quantized: bool) -> Params:
        """Train for `updates`, from the phase's last saved state if there is one."""
        peak = self.plan.tokenizer_rate
        schedule = optax.warmup_cosine_decay_schedule(0, peak, min(50, updates // 2), updates, peak * 0.05)
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, 0.9, 0.95, weight_decay=1e-4))
        step = steps.tokenizer_step(self.config, optimizer, quantized)
        opt_state, start = optimizer.init(params), 0
        states = Checkpoints(self.output / f"tokenizer_{name}", keep=1)
        latest = states.latest()
        if latest is not None:
            (params, opt_state), meta = states.restore(latest, (params, opt_state))
            self.rng.bit_generator.state = meta["random"]
            start = latest
        for update in range(start, updates):
            params, opt_state, metrics = step(params, opt_state, self.batch(self.plan.tokenizer_batch))
            done = update + 1
            if update % 100 == 0 or done == updates:
                row = {"phase": name, "update": done, **{key: round(float(value), 4) for key, value in metrics.items()}}
                print(row, flush=True)
                with (self.output / "tokenizer.jsonl").open("a", encoding="utf-8") as log:
                    print(json.dumps(row), file=log)
            if done % 250 == 0 or done == updates:
                states.save(done, (params, opt_state), {"random": self.rng.bit_generator.state})
        return params

    def codebook(self, params: Params) -> np.ndarray:
        """Codes f32[V,e] from the latents of 3,000 pictures, by spherical k-means."""
        encode = steps.tokenizer_latents(self.config)
        latents = [np.asarray(encode(params, self.batch(100))) for _ in range(30)]
        return spherical_k_means(np.concatenate(latents).reshape(-1, WIDTH_OF_A_CODE), CODES, self.rng)

    def run(self) -> Params:
        """Both phases, with the codebook set between them."""
        params = self.phase("continuous", vq.init(self.config, jax.random.key(0)), self.plan.continuous_updates, False)
        if Checkpoints(self.output / "tokenizer_quantized", keep=1).latest() is None:
            params["codebook"] = {"embedding": jnp.asarray(self.codebook(params))}
        return self.phase("quantized", params, self.plan.quantized_updates, True)


def spherical_k_means(points: np.ndarray, k: int, rng: np.random.Generator, rounds: int = 25) -> np.ndarray:
    """k centres of length 1 of points f32[M,e] of length 1: seeded as k-means++, then Lloyd's rounds by angle."""
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


def write_tokens(plan: Plan, params: Params, file: Path) -> None:
    """Render, encode and caption the transformer's training pictures: tokens.npz with prompts and images."""
    rng = np.random.default_rng(1)
    wanted = shapes.sample_prompts(shapes.train_prompts(), plan.pictures, rng, TAG_WEIGHTS)
    encode, _ = steps.tokenizer_codec(vq.VQConfig.from_json(VQ_CONFIG))
    ids = []
    for at in range(0, plan.pictures, 500):
        images = render_batch([scene_for(metadata, rng, "anchored") for metadata in wanted[at : at + 500]])
        ids.append(np.asarray(encode(params, jnp.asarray(as_pixels(images)))))
    captions = [
        shapes.corrupt_caption(metadata, rng) if rng.random() < plan.wrong_captions else metadata for metadata in wanted
    ]
    np.savez_compressed(file, prompts=[caption["prompt"] for caption in captions], images=np.concatenate(ids))


def write_text_tokenizer(folder: Path) -> list[str]:
    """A word-level tokenizer of the shapes world's prompts; returns its vocabulary."""
    texts = [metadata["prompt"] for metadata in shapes.all_prompts()]
    words = ["[PAD]", "[UNK]", "[BOV]", *sorted({word for text in texts for word in text.split()})]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        padding_side="left",
        model_max_length=max(len(text.split()) for text in texts),
    ).save_pretrained(folder)
    return words


def fresh_checkpoint(params: Params) -> Checkpoint:
    """The trained tokenizer with an untrained transformer of 0.86 M parameters."""
    with tempfile.TemporaryDirectory() as folder:
        words = write_text_tokenizer(Path(folder))
        config = transformer.TransformerConfig(
            hidden_size=128,
            intermediate_size=256,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_hidden_layers=4,
            rope_theta=1_000_000,
            vocab_size=len(words) + CODES,
            lm_vocab_size=len(words),
            lm_head_size=CODES,
            bov_token_id=words.index("[BOV]"),
        )
        return new_checkpoint(
            config,
            transformer.init(config, jax.random.key(0)),
            vq.VQConfig.from_json(VQ_CONFIG),
            params,
            params["codebook"]["embedding"],
            PATH,
            folder,
        )


def write_prompts(folder: Path) -> None:
    """The two prompt sets, in GenEval's format."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, prompts in (("train", shapes.train_prompts()), ("heldout", shapes.heldout_prompts())):
        lines = [json.dumps(metadata) for metadata in prompts]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def install(output: Path) -> None:
    """Put the checkpoint, the prompt sets and the logs into the package."""
    target = ASSETS / "ursa-shapes"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(output / "base" / "checkpoint", target)
    write_prompts(ASSETS / "shapes-prompts")
    logs = ASSETS / "ursa-shapes-log"
    logs.mkdir(exist_ok=True)
    shutil.copy(output / "tokenizer.jsonl", logs)
    shutil.copy(output / "base" / "pretrain.jsonl", logs)


def main(argv: Sequence[str] | None = None, plan: Plan | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Make the base checkpoint of the shapes world.")
    parser.add_argument("--output", required=True, help="folder for the checkpoint, its logs and its saved states")
    parser.add_argument("--install", action="store_true", help="put the result into udm_grpo/assets")
    arguments = parser.parse_args(argv)
    plan = plan or Plan()
    output = Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)
    params = TokenizerTraining(plan, output).run()
    tokens = output / "tokens.npz"
    if not tokens.exists():
        write_tokens(plan, params, tokens)
    save_folder(fresh_checkpoint(params), output / "start")
    options: dict[str, Any] = {
        "checkpoint": output / "start",
        "data": tokens,
        "output": output / "base",
        "updates": plan.updates,
        "batch": plan.batch,
        "learning_rate": plan.learning_rate,
        "shift": plan.shift,
    }
    pretrain.main([word for name, value in options.items() for word in (f"--{name}", str(value))])
    if arguments.install:
        install(output)


if __name__ == "__main__":
    main()
