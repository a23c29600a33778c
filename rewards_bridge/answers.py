"""Check the return value of a scorer and encode it as a reply: one-dimensional numbers that fit into f32, and texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from rewards_bridge.protocol import bridge_pb2
from rewards_bridge.protocol.messages import MAX_MESSAGE_BYTES
from rewards_bridge.scorers.base import Scores


class AnswerError(ValueError):
    """An invalid return value; the text says what a scorer must return."""


def encode_reply(batch_id: int, scores: Scores) -> bridge_pb2.ScoreReply:
    """Return the reply for a scorer's return value, without checking counts and values; AnswerError for other types.

    Accepts lists, torch tensors (with gradients, on a GPU, of any float type) and whatever numpy takes as numbers.
    """
    if not isinstance(scores, Scores):
        raise AnswerError(f"a scorer must return rewards_bridge.scorers.base.Scores; found {type(scores).__name__}")
    if not isinstance(scores.raw, Mapping):
        raise AnswerError(f"raw must be a dict of arrays, which may be empty; found {type(scores.raw).__name__}")
    reply = bridge_pb2.ScoreReply(batch_id=batch_id)
    reply.score.extend(_numbers("score", scores.score))
    for name, values in scores.raw.items():
        if not isinstance(name, str) or not name:
            raise AnswerError(f"the name of a raw value must be a non-empty str; found {name!r}")
        reply.raw[name].values.extend(_numbers(f"raw[{name!r}]", values))
    reply.reasons.extend(_texts("reasons", scores.reasons))
    reply.details.extend(_texts("details", scores.details))
    if reply.ByteSize() > MAX_MESSAGE_BYTES:
        raise AnswerError(f"the reply has {reply.ByteSize()} of at most {MAX_MESSAGE_BYTES} bytes; shorten its texts")
    return reply


def _numbers(name: str, values: Any) -> list[float]:
    if hasattr(values, "detach"):  # a torch tensor; this module does not import torch
        values = values.detach().cpu().double().numpy()
    try:
        array = np.asarray(values)
    except Exception as error:
        raise AnswerError(f"{name} must be f32[B], one number per image; {error}") from error
    if array.ndim != 1:
        raise AnswerError(f"{name} must be f32[B], one number per image; found shape {array.shape}")
    if array.dtype.kind in "OSUMmc":  # bfloat16 of ml_dtypes has a kind of its own
        wrong = [index for index, value in enumerate(array.tolist()) if type(value) not in (int, float, bool)]
        if wrong or array.dtype.kind != "O":
            shown = f"{name}[{wrong[0]}] = {array[wrong[0]]!r:.100}" if wrong else f"{array.dtype}"
            raise AnswerError(f"{name} must be f32[B], one number per image; found {shown}")
    try:
        exact = array.astype(np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise AnswerError(f"{name} must be f32[B], one number per image; {error}") from error
    with np.errstate(over="ignore"):
        floats = exact.astype(np.float32)
    too_large = np.flatnonzero(np.isfinite(exact) & ~np.isfinite(floats))
    if len(too_large):
        raise AnswerError(f"{name}[{too_large[0]}] = {exact[too_large[0]]:g} does not fit into float32")
    numbers: list[float] = floats.tolist()
    return numbers


def _texts(name: str, texts: Any) -> list[str]:
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        kind = type(texts).__name__
        if isinstance(texts, list | tuple):
            kind = f"one that contains {next(type(text).__name__ for text in texts if not isinstance(text, str))}"
        raise AnswerError(f"{name} must be a list of texts, one per image ('' if there is none); found {kind}")
    return [text.encode(errors="replace").decode() for text in texts]  # a lone surrogate cannot be sent
