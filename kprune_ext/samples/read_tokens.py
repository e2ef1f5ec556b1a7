"""The tokens whose hidden states after the last layer the predictions depend on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ..architectures.tasks import Predict
from ..model_layers.device_map import input_device
from ..model_layers.inputs import Inputs
from ..model_layers.layer_stack import LayerStack
from .samples import Sample

#: Largest number of elements of the logits in one backward pass: 64 MiB in float32.
MOST_LOGITS = 2**24

#: All unmasked tokens, only the first position, or the positions found for each sample.
Reading = Literal["all", "first", "each"]


def reading_of(stack: LayerStack, samples: Sequence[Sample], predict: Predict) -> Reading:
    """Returns which tokens a task's head reads, judged by its shortest and its longest sample.

    Args:
        stack: Layer stack of the model.
        samples: The calibration samples.
        predict: The task's predictions, `(model, batch) -> logits`. Which tokens it reads must depend
            only on their positions, not on their content; otherwise every sample must be examined.
    """
    lengths = [sample.tokens.shape[1] for sample in samples]
    if not lengths:
        return "each"
    probes = [samples[lengths.index(length)] for length in sorted({min(lengths), max(lengths)})]
    found = [_reading_of_one(stack, sample, predict) for sample in probes]
    common = set.intersection(*found)
    # Where every sample has one token, both are the same.
    return "all" if "all" in common else "first" if "first" in common else "each"


def _reading_of_one(stack: LayerStack, sample: Sample, predict: Predict) -> set[Reading]:
    device = input_device(stack.model)
    inputs = sample.inputs.to(device)
    hidden, _ = stack.enter(inputs)
    tokens = sample.tokens.to(hidden.device)
    read = tokens & read_by_each(stack, inputs, hidden, predict)
    found: set[Reading] = {"each"}
    if torch.equal(read, tokens):
        found.add("all")
    if torch.equal(read, tokens & first_position(tokens)):
        found.add("first")
    return found


def first_position(tokens: Tensor) -> Tensor:
    """Returns a mask that is True at position 0, of the shape of `tokens` `(batch, tokens)`."""
    first = torch.zeros_like(tokens)
    first[:, :1] = True
    return first


def read_by_each(stack: LayerStack, inputs: Inputs, hidden: Tensor, predict: Predict) -> Tensor:
    """Returns which positions of each sample its predictions depend on, by their gradients.

    A classifier that reads only the first token has no gradient anywhere else.

    Args:
        stack: Layer stack of the model.
        inputs: Inputs of the model.
        hidden: Hidden states that replace the last layer's, `(batch, tokens, hidden)`.
        predict: Computes the predictions, `(model, batch) -> logits`.

    Returns:
        A bool mask, `(batch, tokens)`.
    """
    found: list[Tensor] = []
    start, rows = 0, 1  # the first sample shows the number of logits
    while start < len(hidden):
        part = slice(start, start + rows)
        with torch.enable_grad():
            state = hidden[part].detach().requires_grad_()
            z = stack.predict(predict, inputs.part(part), state)
            (gradient,) = torch.autograd.grad(z.float().square().sum(), state)
        found.append(gradient.ne(0).any(2))
        start, rows = part.stop, max(1, MOST_LOGITS // (z.numel() // len(z)))
    return torch.cat(found)
