"""Hidden states of two models that move up side by side, one sub-layer at a time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..architectures.row import Context
from ..architectures.tasks import Predict
from .device_map import input_device
from .layer_stack import LayerStack
from .read_tokens import Reading, first_position, read_by_each, reading_of
from .samples import CalibrationData, Sample, require_finite
from .state_memory import StateMemory


@dataclass(frozen=True)
class Stream:
    """Samples of equal length on their way up: the state of both models before a sub-layer.

    Attributes:
        keys: of the samples, by their content.
        inputs: of the model, each ``(batch, …)``, on its device.
        tokens: which positions count, bool, ``(batch, tokens)``.
        scored: whether knowledge is measured on these samples.
        read: whose state after the last layer predictions depend on, bool, ``(batch, tokens)``.
        teacher: hidden state of the dense model, ``(batch, tokens, hidden)``; written to in place.
        student: hidden state of the model being pruned, same shape.
        contexts: per layer its other arguments, where they take little memory.
    """

    keys: tuple[int, ...]
    inputs: dict[str, Tensor]
    tokens: Tensor
    scored: bool
    read: Tensor
    teacher: Tensor
    student: Tensor
    contexts: list[Context] | None = None

    def contexts_in(self, stack: LayerStack) -> list[Context]:
        """Per layer the arguments besides the hidden state, kept or made anew."""
        return self.contexts or stack.enter(self.inputs)[1]


def start_streams(
    stack: LayerStack,
    data: CalibrationData,
    batch_tokens: int,
    memory: StateMemory,
    predict: Predict | None = None,
    *,
    each_sample: bool = False,
) -> list[Stream]:
    """The samples in batches of equal length, as they enter the first transformer layer.

    Args:
        encoder: of the model that is pruned.
        data: the samples.
        batch_tokens: tokens of a batch at most.
        memory: for hidden states.
        predict: tells which states after the last layer are read; by default all count as such.
        each_sample: whether to look at every sample for that, since what `predict` reads may depend on
            the sample's tokens; otherwise two samples tell it.

    Raises:
        ValueError: hidden states are NaN or infinite.
    """
    groups: dict[tuple[Any, ...], list[tuple[int, Sample]]] = defaultdict(list)
    for key, sample in zip(data.keys, data.samples, strict=True):
        shapes = tuple((name, value.shape[1:]) for name, value in sorted(sample.inputs.items()))
        groups[sample.tokens.shape[1], key <= data.largest_scored, shapes].append((key, sample))
    reading: Reading = "all"
    if predict is not None:
        reading = "each" if each_sample else reading_of(stack, data.samples, predict)
    streams = []
    for (length, is_scored, _), members in sorted(groups.items(), key=lambda item: item[0][:2]):
        size = max(1, batch_tokens // length)
        for start in range(0, len(members), size):
            own, part = zip(*members[start : start + size], strict=True)
            streams.append(_enter(stack, own, part, is_scored, memory, reading, predict))
    return streams


def _enter(
    stack: LayerStack,
    keys: tuple[int, ...],
    part: Sequence[Sample],
    scored: bool,
    memory: StateMemory,
    reading: Reading,
    predict: Predict | None,
) -> Stream:
    device = input_device(stack.model)
    inputs = {
        name: torch.cat([sample.inputs[name] for sample in part]).to(device)
        for name in part[0].inputs
    }
    tokens = torch.cat([sample.tokens for sample in part]).to(device)
    hidden, contexts = stack.enter(inputs)
    require_finite(hidden[tokens.to(hidden.device)], "the input of the first transformer layer")
    # Position biases can be many times larger than the states, and are quickly made again.
    small = _bytes_in(contexts) <= hidden.numel() * hidden.element_size() // 4
    teacher, student = memory.hold(hidden), memory.hold(hidden)
    read = tokens
    if reading == "first":
        read = tokens & first_position(tokens)
    elif reading == "each" and predict is not None:
        read = tokens & read_by_each(stack, inputs, hidden, predict).to(device)
    return Stream(keys, inputs, tokens, scored, read, teacher, student, contexts if small else None)


def _bytes_in(contexts: Sequence[Context]) -> int:
    """Memory of all tensors, each counted once."""
    found = {}
    for context in contexts:
        for value in context.values():
            for tensor in value if isinstance(value, tuple | list) else (value,):
                if isinstance(tensor, Tensor):
                    storage = tensor.untyped_storage()
                    found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())
