"""Scaling of the logits, in the layer that computes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..architectures.tasks import Predict, ProblemType
from ..calibration.streams import Stream
from ..common.processes import Processes
from ..model_layers.layer_stack import LayerStack
from ..samples.samples import require_finite
from .divergence import best_scale
from .predictions import Predictions


@torch.no_grad()
def scale_logits(
    stack: LayerStack,
    streams: Sequence[Stream],
    predict: Predict,
    found: Sequence[Predictions],
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
        found: The predictions of both models for this process's samples.
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
        for each in found:
            require_finite(each.own[each.counted], "the logits")
            require_finite(each.teacher[each.counted], "the original model's logits")
    every: dict[int, tuple[Tensor, Tensor]] = {}
    for each in chain.from_iterable(processes.gather(list(found))):
        every |= each.by_key()
    scale = best_scale([every[key] for key in sorted(every)], problem)
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
