"""URSA's stages in plain PyTorch, written straight from the formulas, as the reference of scripts/benchmark.py.

The module reads weights from this project's parameter trees, shares no other code with it, and gives the same numbers
(a test compares them). Attention, softmax, convolutions and the optimizer are PyTorch's own.

Source: URSA, arXiv 2510.24717; UDM-GRPO, arXiv 2604.18518; kinetic optimal velocity, arXiv 2412.03487.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

Tree = Mapping[str, Any]
HEAD_DIM = 128
GROUPS = 32


def tensors(tree: Any) -> Any:
    """Return a tree of arrays as a tree of float32 or int64 tensors."""
    if isinstance(tree, Mapping):
        return {str(name): tensors(part) for name, part in tree.items()}
    if isinstance(tree, list | tuple):
        return [tensors(part) for part in tree]
    array = np.array(tree)
    return torch.from_numpy(array if array.dtype.kind == "f" else array.astype(np.int64))


def _norm(x: Tensor, scale: Tensor) -> Tensor:
    return functional.rms_norm(x, (x.shape[-1],), scale, 1e-6)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)


class Transformer:
    """The trunk and the head, on the parameters of `udm_grpo.model.transformer`."""

    def __init__(self, params: Tree, config: Mapping[str, Any], grid: tuple[int, int], text_length: int):
        self.params, self.config, self.tokens = params, config, grid[0] * grid[1]
        text = [(i, i, i) for i in range(text_length + 1)]
        image = [(text_length + 1, y, x) for y in range(grid[0]) for x in range(grid[1])]
        axes = [j % 3 for j in range(48)] + [1 + j % 2 for j in range(16)]
        frequency = 1.0 / config["rope_theta"] ** (torch.arange(0, HEAD_DIM, 2, dtype=torch.float32) / HEAD_DIM)
        angles = torch.tensor(text + image, dtype=torch.float32)[:, axes] * frequency
        self.cos, self.sin = angles.cos()[None, None], angles.sin()[None, None]

    def features(self, prompt_ids: Tensor, image_ids: Tensor) -> Tensor:
        """Return the rows that predict the image tokens, float32[B, N, D]."""
        bov = torch.full((len(prompt_ids), 1), self.config["bov_token_id"])
        ids = torch.cat([prompt_ids, bov, image_ids + self.config["lm_vocab_size"]], dim=1)
        x = functional.embedding(ids, self.params["embed"]["embedding"])
        for index in range(self.config["num_hidden_layers"]):
            x = self._block(x, index)
        return _norm(x, self.params["norm"]["scale"])[:, -self.tokens - 1 : -1]

    def logits(self, features: Tensor) -> Tensor:
        """Return float32 logits over the codes."""
        return features @ self.params["lm_head"]["kernel"]

    def token_mean_logp(self, prompt_ids: Tensor, noisy: Tensor, action: Tensor, rows: int) -> Tensor:
        """Return the mean over an image's tokens of log p(action | noisy), `rows` images of logits at a time."""
        parts = zip(self.features(prompt_ids, noisy).split(rows), action.split(rows), strict=True)
        picked = [
            functional.log_softmax(self.logits(x), dim=-1).gather(-1, y[..., None])[..., 0].mean(1) for x, y in parts
        ]
        return torch.cat(picked)

    def _block(self, x: Tensor, index: int) -> Tensor:
        layer = self.params["layers"]
        attn, mlp = layer["attn"], layer["mlp"]

        def heads(y: Tensor, name: str) -> Tensor:
            return (y @ attn[name]["kernel"][index]).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)

        y = _norm(x, layer["input_norm"]["scale"][index])
        q = _rotate(_norm(heads(y, "q"), attn["q_norm"]["scale"][index]), self.cos, self.sin)
        k = _rotate(_norm(heads(y, "k"), attn["k_norm"]["scale"][index]), self.cos, self.sin)
        mixed = functional.scaled_dot_product_attention(q, k, heads(y, "v"), enable_gqa=True)
        x = x + mixed.transpose(1, 2).flatten(2) @ attn["o"]["kernel"][index]
        y = _norm(x, layer["post_norm"]["scale"][index])
        gate, up, down = (mlp[name]["kernel"][index] for name in ("gate", "up", "down"))
        return x + (functional.silu(y @ gate) * (y @ up)) @ down


def sample_step(
    codebook: Tensor, logits: Tensor, z: Tensor, level: float, rate: float, dt: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Sample one step on the metric path for R tokens, with a V-wide velocity; return (next codes, the x_1 drawn)."""
    x_1 = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
    u = velocity(codebook, z, x_1, level, rate)
    jumps = torch.rand(len(z), generator=generator) < -torch.expm1(-dt * u.sum(-1))
    u = torch.where(u.sum(-1, keepdim=True) > 0, u, functional.one_hot(z, len(codebook)).to(u.dtype))
    return torch.where(jumps, torch.multinomial(u, 1, generator=generator)[:, 0], z), x_1


def velocity(codebook: Tensor, z: Tensor, x_1: Tensor, level: float, rate: float) -> Tensor:
    """Return u_t(x, z | x_1) for every code x, float32[R, V]."""
    distance = (2 - 2 * codebook[x_1] @ codebook.T).clamp(min=0)
    here = distance.gather(1, z[:, None])
    return (-level * distance).softmax(-1) * rate * (here - distance).clamp(min=0)


def rollout(
    model: Transformer, codebook: Tensor, prompt_ids: Tensor, times: Mapping[str, np.ndarray], rows: int, seed: int
) -> Tensor:
    """Return clean codes int64[B, N] of a rollout without guidance from uniform noise.

    Logits are computed for `rows` images at a time.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(len(codebook), (len(prompt_ids), model.tokens), generator=generator)
    for level, rate, dt, last in zip(*(times[name].tolist() for name in ("level", "rate", "dt", "last")), strict=True):
        parts = []
        for features, codes in zip(model.features(prompt_ids, x).split(rows), x.split(rows), strict=True):
            logits = model.logits(features).flatten(0, 1)
            moved, x_1 = sample_step(codebook, logits, codes.flatten(), level, rate, dt, generator)
            parts.append((x_1 if last else moved).view_as(codes))
        x = torch.cat(parts)
    return x


class Learner:
    """AdamW on the clipped surrogate with its KL penalty, over micro-batches."""

    def __init__(self, model: Transformer, config: Any, samples: Mapping[str, Tensor], micro_batch: int, rows: int):
        self.model, self.config, self.samples, self.micro_batch, self.rows = model, config, samples, micro_batch, rows
        self.leaves = [leaf.requires_grad_() for leaf in _leaves(model.params)]
        options = config.optimizer
        self.optimizer = torch.optim.AdamW(
            self.leaves, options.learning_rate, (options.beta1, options.beta2), 1e-8, options.weight_decay
        )

    def gradients(self) -> dict[str, Tensor]:
        """Accumulate the gradients in the leaves; return the loss and the norm of the gradients."""
        self.optimizer.zero_grad(set_to_none=True)
        total, states = torch.zeros(()), len(self.samples["advantage"])
        for first in range(0, states, self.micro_batch):
            part = {name: value[first : first + self.micro_batch] for name, value in self.samples.items()}
            logp = self.model.token_mean_logp(part["prompt_ids"], part["noisy"], part["action"], self.rows)
            ratio, clip = torch.exp(logp - logp.detach()), self.config.grpo.clip_range
            surrogate = torch.minimum(part["advantage"] * ratio, part["advantage"] * ratio.clamp(1 - clip, 1 + clip))
            difference = part["ref_logp"] - logp
            kl = torch.expm1(difference) - difference
            loss = (-surrogate + self.config.grpo.kl_weight * kl).sum() / states
            loss.backward()
            total = total + loss.detach()
        norm = torch.linalg.vector_norm(
            torch.stack([leaf.grad.norm() for leaf in self.leaves if leaf.grad is not None])
        )
        return {"loss": total, "grad_norm": norm}

    def step(self) -> dict[str, Tensor]:
        """Take one optimizer step; return the metrics of `gradients`."""
        metrics = self.gradients()
        torch.nn.utils.clip_grad_norm_(self.leaves, self.config.optimizer.max_grad_norm)
        self.optimizer.step()
        return metrics


def _leaves(tree: Any) -> list[Tensor]:
    return [leaf for part in tree.values() for leaf in _leaves(part)] if isinstance(tree, Mapping) else [tree]


def decode(params: Any, ids: Tensor) -> Tensor:
    """Return pixels float32[B, H, W, 3] for codes int64[B, h, w], with the decoder weights of `udm_grpo.model.vq`."""
    x = functional.embedding(ids, params["codebook"]["embedding"]).permute(0, 3, 1, 2)
    x, decoder = _conv(x, params["post_quant_conv"], 0), params["decoder"]
    x = _mid(_conv(x, decoder["conv_in"]), decoder["mid_block"])
    for block in _ordered(decoder["up_blocks"]):
        attentions = _ordered(block.get("attentions", {}))
        for index, resnet in enumerate(_ordered(block["resnets"])):
            x = _resnet(x, resnet)
            x = _attention(x, attentions[index]) if attentions else x
        for upsample in _ordered(block.get("upsamplers", {})):
            x = _conv(functional.interpolate(x, scale_factor=2.0, mode="nearest"), upsample["conv"])
    x = _conv(functional.silu(_group_norm(x, decoder["conv_norm_out"])), decoder["conv_out"])
    return x.permute(0, 2, 3, 1)


def _ordered(parts: Any) -> list[Any]:
    return [parts[name] for name in sorted(parts, key=int)] if isinstance(parts, Mapping) else list(parts)


def _conv(x: Tensor, part: Tree, padding: int = 1) -> Tensor:
    return functional.conv2d(x, part["kernel"].permute(3, 2, 0, 1), part["bias"], padding=padding)


def _group_norm(x: Tensor, part: Tree) -> Tensor:
    return functional.group_norm(x, GROUPS, part["scale"], part["bias"], 1e-6)


def _resnet(x: Tensor, part: Tree) -> Tensor:
    y = _conv(functional.silu(_group_norm(x, part["norm1"])), part["conv1"])
    y = _conv(functional.silu(_group_norm(y, part["norm2"])), part["conv2"])
    return y + (_conv(x, part["conv_shortcut"], 0) if "conv_shortcut" in part else x)


def _attention(x: Tensor, part: Tree) -> Tensor:
    rows = _group_norm(x, part["group_norm"]).flatten(2).transpose(1, 2)
    q, k, v = (rows @ part[name]["kernel"] + part[name]["bias"] for name in ("to_q", "to_k", "to_v"))
    (out,) = _ordered(part["to_out"])
    mixed = functional.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
    return x + (mixed @ out["kernel"] + out["bias"]).transpose(1, 2).unflatten(2, x.shape[2:])


def _mid(x: Tensor, part: Tree) -> Tensor:
    first, second = _ordered(part["resnets"])
    (attention,) = _ordered(part["attentions"])
    return _resnet(_attention(_resnet(x, first), attention), second)


def without_gradients(run: Callable[[], Any]) -> Callable[[], Any]:
    """Return the function wrapped in torch.inference_mode."""
    return torch.inference_mode()(run)
