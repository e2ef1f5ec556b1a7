"""The layer of a model whose outputs the logits are: finding it, and scaling it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kprune_ext.calibration import require_finite
from kprune_ext.encoder import Encoder
from kprune_ext.predictions import best_scale
from kprune_ext.streams import MOST_LOGITS, Stream
from kprune_ext.tasks import Predict, ProblemType
from peft_corda.processes import Processes


@torch.no_grad()
def scale_logits(
    encoder: Encoder,
    streams: Sequence[Stream],
    predict: Predict,
    problem: ProblemType,
    processes: Processes,
) -> float | None:
    """Multiply the logits by the one number that brings them nearest to the teacher's.

    The number goes into weight and bias of the layer that makes them, so the model stays as it is.

    Args:
        encoder: of the student, all of whose sub-layers are done.
        streams: both models' states behind the last sub-layer.
        predict: ``(model, batch) -> logits``.
        problem: what the logits mean.
        processes: that have the rest of the streams.

    Returns:
        The number; None where there are no classes, or no such layer.

    Raises:
        ValueError: logits are NaN or infinite.
    """
    if problem == "regression":
        return None
    with processes.together():
        layer = find_predictor(encoder, streams[0], predict) if streams else None
        names = [name for name, module in encoder.model.named_modules() if module is layer]
    name = processes.first(names[0] if layer is not None else None)
    if name is None:
        return None
    with processes.together():
        own = _predictions(encoder, streams, predict, MOST_LOGITS // processes.count)
    found = {key: pair for part in processes.gather(own) for key, pair in part.items()}
    scale = best_scale([found[key] for key in sorted(found)], problem)
    scale = float(processes.from_owner(torch.tensor(scale, dtype=torch.float64), 0))
    for parameter in encoder.model.get_submodule(name).parameters():
        parameter.mul_(scale)
    return scale


def find_predictor(encoder: Encoder, stream: Stream, predict: Predict) -> nn.Linear | None:
    """The plain linear layer that, giving twice as much, makes all logits twice as large.

    None if there is none, or it is the model's output embedding.
    """
    inputs = {name: value[:1] for name, value in stream.inputs.items()}
    hidden = stream.student[:1].to(stream.tokens.device)
    called: list[nn.Linear] = []
    linear = [module for module in encoder.model.modules() if type(module) is nn.Linear]
    with _hooked(linear, lambda module, output: called.append(module)):
        z = encoder.predict(predict, inputs, hidden)
    if not called or bool((z == 0).all()):
        return None
    last = called[-1]
    with _hooked([last], lambda _, output: 2 * output):
        doubled = encoder.predict(predict, inputs, hidden)
    masked = z == torch.finfo(z.dtype).min
    exact = torch.where(masked, z, 2 * z)  # twice is exact in any floating point format
    # What predicts tokens shares its weight with the input embeddings, or will when it is loaded.
    is_decoder = last is encoder.model.get_output_embeddings()
    return last if torch.equal(doubled, exact) and not is_decoder else None


def _predictions(
    encoder: Encoder, streams: Sequence[Stream], predict: Predict, most: int
) -> dict[int, tuple[Tensor, Tensor]]:
    """By key of the sample: logits ``(positions, classes)`` of student and teacher.

    Of the samples in the order of their keys, as many as have at most so many logits.
    """
    sizes: dict[int, int] = {}
    for stream in streams:
        one = {name: value[:1] for name, value in stream.inputs.items()}
        first = stream.student[:1].to(stream.tokens.device)
        sizes |= dict.fromkeys(stream.keys, encoder.predict(predict, one, first).numel())
    taken: set[int] = set()
    held = 0
    for key in sorted(sizes):
        held += sizes[key]
        if held > most and taken:
            break
        taken.add(key)
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for stream in streams:
        rows = [row for row, key in enumerate(stream.keys) if key in taken]
        if rows:
            found |= _compared(encoder, stream, rows, predict)
    return found


def _compared(
    encoder: Encoder, stream: Stream, rows: list[int], predict: Predict
) -> dict[int, tuple[Tensor, Tensor]]:
    inputs = {name: value[rows] for name, value in stream.inputs.items()}
    tokens = stream.tokens[rows]
    own, teacher = (
        _exact(encoder.predict(predict, inputs, state[rows].to(tokens.device))).cpu()
        for state in (stream.student, stream.teacher)
    )
    per_token = own.shape[1] > 1 and own.shape[1] == tokens.shape[1]
    counted = tokens.cpu() if per_token else torch.ones(own.shape[:2], dtype=torch.bool)
    require_finite(own[counted], "the logits")
    require_finite(teacher[counted], "the original model's logits")
    return {
        stream.keys[row]: (own[number, counted[number]], teacher[number, counted[number]])
        for number, row in enumerate(rows)
    }


def _exact(z: Tensor) -> Tensor:
    """At least float32; the least float64, a mask, would be infinite in that."""
    return z if z.dtype == torch.float64 else z.float()


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
