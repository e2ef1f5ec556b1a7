"""Predictions of student and teacher for the calibration samples, once all sub-layers are pruned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..architectures.tasks import Predict
from ..calibration.streams import Stream
from ..model_layers.layer_stack import LayerStack


@dataclass(frozen=True)
class Predictions:
    """Predictions of student and teacher for samples of equal length.

    Attributes:
        keys: Keys of the samples.
        own, teacher: Logits, `(batch, positions, classes)`.
        counted: Mask of the positions that count, `(batch, positions)`, bool.
    """

    keys: tuple[int, ...]
    own: Tensor
    teacher: Tensor
    counted: Tensor

    def by_key(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Logits `(positions, classes)` of student and teacher at positions that count, by sample."""
        rows = zip(self.own, self.teacher, self.counted, strict=True)
        pairs = [(own[counted], teacher[counted]) for own, teacher, counted in rows]
        return dict(zip(self.keys, pairs, strict=True))


def predictions_of(
    stack: LayerStack, streams: Sequence[Stream], predict: Predict, most: int
) -> list[Predictions]:
    """Returns predictions for samples in the order of their keys, up to a number of logits.

    Args:
        stack: Layer stack of the student, all of whose sub-layers are pruned.
        streams: Both models' hidden states after the last sub-layer.
        predict: Function `(model, batch) -> logits`.
        most: Largest number of logits of either model; one sample is taken whatever its number is.
    """
    examples = [_one(stack, stream, predict) for stream in streams]
    sizes = {
        key: example.numel()
        for stream, example in zip(streams, examples, strict=True)
        for key in stream.keys
    }
    taken: set[int] = set()
    held = 0
    for key in sorted(sizes):
        held += sizes[key]
        if held > most and taken:
            break
        taken.add(key)
    # Allocate what stays before the large temporary blocks, not between them: less fragmentation.
    waiting = [
        (stream, rows, _room(len(rows), example))
        for stream, example in zip(streams, examples, strict=True)
        if (rows := [row for row, key in enumerate(stream.keys) if key in taken])
    ]
    return [_compared(stack, *each, predict) for each in waiting]


def _one(stack: LayerStack, stream: Stream, predict: Predict) -> Tensor:
    """Logits of the stream's first sample alone."""
    inputs = stream.inputs.part(slice(1))
    return stack.predict(predict, inputs, stream.student[:1].to(stream.tokens.device))


def _compared(
    stack: LayerStack, stream: Stream, rows: list[int], found: Tensor, predict: Predict
) -> Predictions:
    part: Any = rows if len(rows) < len(stream.keys) else slice(None)  # a slice copies nothing
    inputs = stream.inputs.part(part)
    tokens = stream.tokens[part]
    for held, state in zip(found, (stream.student, stream.teacher), strict=True):
        held.copy_(stack.predict(predict, inputs, state[part].to(tokens.device)))
    own, teacher = found
    counted = counted_in(own, tokens)
    return Predictions(tuple(stream.keys[row] for row in rows), own, teacher, counted)


def counted_in(logits: Tensor, tokens: Tensor) -> Tensor:
    """Returns which predictions count, as a bool mask `(batch, positions)` on the CPU.

    Args:
        logits: Logits `(batch, positions, classes)`.
        tokens: Bool mask of the unmasked tokens, `(batch, tokens)`. Where there is one prediction per
            token, those of masked tokens do not count.
    """
    per_token = logits.shape[1] > 1 and logits.shape[1] == tokens.shape[1]
    return tokens.cpu() if per_token else torch.ones(logits.shape[:2], dtype=torch.bool)


def _room(rows: int, example: Tensor) -> Tensor:
    """Memory for logits of student and teacher, in a dtype that holds the logits' least value."""
    dtype = torch.promote_types(example.dtype, torch.float32)
    return torch.empty(2, rows, *example.shape[1:], dtype=dtype)
