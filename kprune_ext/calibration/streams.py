"""Hidden states of teacher and student, advanced in parallel, one sub-layer at a time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..architectures.row import Context
from ..architectures.tasks import Predict
from ..model_layers.device_map import input_device
from ..model_layers.inputs import Inputs, joined
from ..model_layers.layer_stack import LayerStack
from ..samples.read_tokens import Reading, first_position, read_by_each, reading_of
from ..samples.samples import CalibrationData, Sample, require_finite
from .state_memory import StateMemory


@dataclass(frozen=True)
class Stream:
    """Hidden states of both models before a sub-layer, for samples of equal length.

    Attributes:
        keys: Keys of the samples, from `sample_keys`.
        inputs: Inputs of the model, on its device.
        tokens: Bool mask, True at unmasked tokens, `(batch, tokens)`.
        scored: Whether knowledge is measured on these samples.
        read: Bool mask of the tokens whose hidden states after the last layer the predictions depend
            on, `(batch, tokens)`.
        teacher: Hidden states of the dense model, `(batch, tokens, hidden)`; written to in place.
        student: Hidden states of the model being pruned, of the same shape.
        contexts: Per layer its other arguments, if they take little memory.
        targets: For language models, the labels `(batch, tokens)`, -100 where none counts.
    """

    keys: tuple[int, ...]
    inputs: Inputs
    tokens: Tensor
    scored: bool
    read: Tensor
    teacher: Tensor
    student: Tensor
    contexts: list[Context] | None = None
    targets: Tensor | None = None

    def part(self, rows: slice) -> Stream:
        """Returns the stream of some of the samples, whose states are written to in place, too."""
        return Stream(
            self.keys[rows],
            self.inputs.part(rows),
            self.tokens[rows],
            self.scored,
            self.read[rows],
            self.teacher[rows],
            self.student[rows],
            targets=None if self.targets is None else self.targets[rows],
        )

    def contexts_in(self, stack: LayerStack) -> list[Context]:
        """Returns each layer's other arguments, stored or recomputed."""
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
    """Batches samples of equal length and computes their hidden states before the first layer.

    Args:
        stack: Layer stack of the model to prune.
        data: The samples.
        batch_tokens: Largest number of tokens per batch.
        memory: Memory for the hidden states.
        predict: Predictions that determine which hidden states after the last layer are read; without
            it, all unmasked tokens count as read.
        each_sample: Whether every sample is examined for that, because the tokens that `predict` reads
            may depend on their content; otherwise two samples are.

    Raises:
        ValueError: If hidden states are NaN or infinite.
    """
    scored = [key <= data.largest_scored for key in data.keys]
    reading: Reading = "all"
    if predict is not None:
        reading = "each" if each_sample else reading_of(stack, data.samples, predict)
    streams = []
    for members, is_scored in alike(data.samples, scored, batch_tokens):
        own, part = zip(*((data.keys[n], data.samples[n]) for n in members), strict=True)
        streams.append(_enter(stack, own, part, is_scored, memory, reading, predict))
    return streams


def alike(
    samples: Sequence[Sample], marks: Sequence[bool], batch_tokens: int
) -> Iterator[tuple[list[int], bool]]:
    """Yields batches of samples of equal length, kind and mark, as their numbers and the mark.

    Args:
        samples: The samples.
        marks: A mark per sample.
        batch_tokens: Largest number of tokens per batch, which has at least one sample.
    """
    groups: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for number, (sample, mark) in enumerate(zip(samples, marks, strict=True)):
        groups[sample.tokens.shape[1], mark, sample.inputs.kind()].append(number)
    for (length, mark, _), members in sorted(groups.items(), key=lambda item: item[0][:2]):
        size = max(1, batch_tokens // length)
        for start in range(0, len(members), size):
            yield members[start : start + size], mark


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
    inputs = joined([sample.inputs for sample in part]).to(device)
    tokens = torch.cat([sample.tokens for sample in part]).to(device)
    hidden, contexts = stack.enter(inputs)
    if hidden.shape[:2] != tokens.shape:
        raise ValueError(
            f"The model's layers get hidden states of shape {tuple(hidden.shape)} for calibration "
            f"inputs of {tuple(tokens.shape)} (batch, tokens). Each token needs one: call the model "
            "with the batch as it is."
        )
    require_finite(hidden[tokens.to(hidden.device)], "the input of the first transformer layer")
    # Position biases can be many times larger than the states, and are quickly recomputed.
    small = _bytes_in(contexts) <= hidden.numel() * hidden.element_size() // 4
    teacher, student = memory.hold(hidden), memory.hold(hidden)
    read = tokens
    if reading == "first":
        read = tokens & first_position(tokens)
    elif reading == "each" and predict is not None:
        read = tokens & read_by_each(stack, inputs, hidden, predict).to(device)
    kept = contexts if small else None
    return Stream(
        keys, inputs, tokens, scored, read, teacher, student, kept, joined_targets(part, device)
    )


def joined_targets(samples: Sequence[Sample], device: torch.device) -> Tensor | None:
    """Returns the labels of samples of equal length, `(batch, tokens)`; None without any."""
    found = [sample.targets for sample in samples if sample.targets is not None]
    return torch.cat(found).to(device) if found else None


def _bytes_in(contexts: Sequence[Context]) -> int:
    """Returns the bytes of all tensors' storages, each counted once."""
    found = {}
    for context in contexts:
        for value in context.values():
            for tensor in value if isinstance(value, tuple | list) else (value,):
                if isinstance(tensor, Tensor):
                    storage = tensor.untyped_storage()
                    found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())
