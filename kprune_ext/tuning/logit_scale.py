"""Scaling of the logits, in the layer that computes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..architectures.tasks import Predict, ProblemType
from ..calibration.streams import Stream
from ..common.processes import Processes
from ..model_layers.layer_stack import LayerStack
from ..samples.read_tokens import MOST_LOGITS
from ..samples.samples import require_finite
from .divergence import best_scale


@torch.no_grad()
def scale_logits(
    stack: LayerStack,
    streams: Sequence[Stream],
    predict: Predict,
    problem: ProblemType,
    processes: Processes,
) -> float | None:
    """Multiplies the logits by the factor that brings their predictions closest to the teacher's.

    The weight and bias of the layer that computes the logits are scaled, so the model's structure does
    not change.

    Args:
        stack: Layer stack of the student, all of whose sub-layers are pruned.
        streams: Both models' hidden states after the last sub-layer.
        predict: Function `(model, batch) -> logits`.
        problem: Meaning of the logits.
        processes: The processes that hold the other streams.

    Returns:
        The factor, or None if the model has no classes or no such layer.

    Raises:
        ValueError: If logits are NaN or infinite.
    """
    if problem == "regression":
        return None
    with processes.error_barrier():
        layer = find_predictor(stack, streams[0], predict) if streams else None
        names = [name for name, module in stack.model.named_modules() if module is layer]
    name = processes.first(names[0] if layer is not None else None)
    if name is None:
        return None
    with processes.error_barrier():
        own = _predictions(stack, streams, predict, MOST_LOGITS // processes.count)
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for each in chain.from_iterable(processes.gather(own)):
        found |= each.by_key()
    scale = best_scale([found[key] for key in sorted(found)], problem)
    scale = float(processes.from_owner(torch.tensor(scale, dtype=torch.float64), 0))
    for parameter in stack.model.get_submodule(name).parameters():
        parameter.mul_(scale)
    return scale


def find_predictor(stack: LayerStack, stream: Stream, predict: Predict) -> nn.Linear | None:
    """Finds the plain linear layer whose doubled output doubles all logits.

    Args:
        stack: Layer stack of the student.
        stream: Samples to predict from; one is used.
        predict: Function `(model, batch) -> logits`.

    Returns:
        The layer, or None if the model has none, or it is the model's output embedding.
    """
    inputs = stream.inputs.part(slice(1))
    hidden = stream.student[:1].to(stream.tokens.device)
    called: list[nn.Linear] = []
    linear = [module for module in stack.model.modules() if type(module) is nn.Linear]
    with _hooked(linear, lambda module, output: called.append(module)):
        z = stack.predict(predict, inputs, hidden)
    if not called or bool((z == 0).all()):
        return None
    last = called[-1]
    with _hooked([last], lambda _, output: 2 * output):
        doubled = stack.predict(predict, inputs, hidden)
    masked = z == torch.finfo(z.dtype).min
    exact = torch.where(masked, z, 2 * z)  # doubling is exact in any floating-point format
    # An output embedding shares its weight with the input embeddings, or will once it is loaded.
    is_decoder = last is stack.model.get_output_embeddings()
    return last if torch.equal(doubled, exact) and not is_decoder else None


@dataclass(frozen=True)
class _Predictions:
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


def _predictions(
    stack: LayerStack, streams: Sequence[Stream], predict: Predict, most: int
) -> list[_Predictions]:
    """Predictions for samples in the order of their keys, up to `most` logits (but at least one)."""
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
) -> _Predictions:
    part: Any = rows if len(rows) < len(stream.keys) else slice(None)  # a slice copies nothing
    inputs = stream.inputs.part(part)
    tokens = stream.tokens[part]
    for held, state in zip(found, (stream.student, stream.teacher), strict=True):
        held.copy_(stack.predict(predict, inputs, state[part].to(tokens.device)))
    own, teacher = found
    per_token = own.shape[1] > 1 and own.shape[1] == tokens.shape[1]
    counted = tokens.cpu() if per_token else torch.ones(own.shape[:2], dtype=torch.bool)
    require_finite(own[counted], "the logits")
    require_finite(teacher[counted], "the original model's logits")
    return _Predictions(tuple(stream.keys[row] for row in rows), own, teacher, counted)


def _room(rows: int, example: Tensor) -> Tensor:
    """Memory for logits of student and teacher, in a dtype that holds the logits' least value."""
    dtype = torch.promote_types(example.dtype, torch.float32)
    return torch.empty(2, rows, *example.shape[1:], dtype=dtype)


@contextmanager
def _hooked(modules: Sequence[nn.Module], look: Callable[[Any, Tensor], Any]) -> Iterator[None]:
    handles = [
        module.register_forward_hook(lambda module, _, output: look(module, output))
        for module in modules
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
