"""Which tokens' states after the last layer predictions depend on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from ..architectures.tasks import Predict
from .device_map import input_device
from .layer_stack import LayerStack
from .samples import Sample

#: Logits of so many elements go backward at a time: 64 MiB in float32.
MOST_LOGITS = 2**24

#: All unmasked tokens, the first position alone, or whatever is found for each sample.
Reading = Literal["all", "first", "each"]


def reading_of(stack: LayerStack, samples: Sequence[Sample], predict: Predict) -> Reading:
    """How a task's own head reads the last layer, from its shortest and its longest sample.

    Args:
        stack: Of the model.
        samples: Calibration samples.
        predict: `(model, batch) -> logits`, of the task. Which tokens it reads must follow from their
            positions, and not from what they are; otherwise every sample is to be looked at.
    """
    lengths = [sample.tokens.shape[1] for sample in samples]
    if not lengths:
        return "each"
    probes = [samples[lengths.index(length)] for length in {min(lengths), max(lengths)}]
    found = [_reading_of_one(stack, sample, predict) for sample in probes]
    common = set.intersection(*found)
    # Where every sample has one token, both are the same.
    return "all" if "all" in common else "first" if "first" in common else "each"


def _reading_of_one(stack: LayerStack, sample: Sample, predict: Predict) -> set[Reading]:
    device = input_device(stack.model)
    inputs = {name: value.to(device) for name, value in sample.inputs.items()}
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
    """True at position 0, bool, of the shape of `tokens` `(batch, tokens)`."""
    first = torch.zeros_like(tokens)
    first[:, :1] = True
    return first


def read_by_each(
    stack: LayerStack, inputs: Mapping[str, Tensor], hidden: Tensor, predict: Predict
) -> Tensor:
    """Which positions of each sample have any part in its predictions, bool, `(batch, tokens)`.

    A classifier that looks at the first token alone has no gradient anywhere else.

    Args:
        stack: Of the model.
        inputs: Of the model, each `(batch, …)`.
        hidden: The state that takes the place of the last layer's, `(batch, tokens, hidden)`.
        predict: `(model, batch) -> logits`.
    """
    found: list[Tensor] = []
    start, rows = 0, 1  # the first alone tells how many logits there are
    while start < len(hidden):
        part = slice(start, start + rows)
        with torch.enable_grad():
            state = hidden[part].detach().requires_grad_()
            z = stack.predict(predict, {n: value[part] for n, value in inputs.items()}, state)
            (gradient,) = torch.autograd.grad(z.float().square().sum(), state)
        found.append(gradient.ne(0).any(2))
        start, rows = part.stop, max(1, MOST_LOGITS // (z.numel() // len(z)))
    return torch.cat(found)
