"""Calibration data: from a user's batches to hidden states that move up two models side by side."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kprune_ext.architectures import Architecture
from kprune_ext.config import KPruneConfig
from kprune_ext.masking import stopping_before

_LABELS = frozenset(
    {"labels", "label", "label_ids", "next_sentence_label", "start_positions", "end_positions"}
)


@dataclass(frozen=True)
class Sample:
    """One sequence without the padding behind it.

    Attributes:
        inputs: the model's tensor arguments, each ``(1, tokens, …)``, or ``(1, …)`` where they do
            not run along the sequence.
        tokens: which positions count, bool, ``(1, tokens)``.
    """

    inputs: dict[str, Tensor]
    tokens: Tensor

    @property
    def count(self) -> int:
        """Unmasked tokens."""
        return int(self.tokens.sum())


@dataclass
class Stream:
    """Samples of equal length on their way up: the state of both models before a sub-layer.

    Attributes:
        teacher: hidden state of the dense model, ``(batch, tokens, hidden)``.
        student: hidden state of the model being pruned, same shape.
        tokens: which positions count, bool, ``(batch, tokens)``.
        attention_mask: as the model made it for its layers.
        scored: whether knowledge is measured on these samples.
    """

    teacher: Tensor
    student: Tensor
    tokens: Tensor
    attention_mask: Tensor | None
    scored: bool


def collect_samples(
    model: PreTrainedModel, dataloader: Iterable[Any], max_tokens: int
) -> list[Sample]:
    """Samples from the dataloader, in its order, until ``max_tokens`` unmasked tokens are reached.

    Padding at the end of a sequence is cut off, samples without any unmasked token are left out,
    and labels and arguments that the model's forward does not know are ignored. A batch without an
    ``attention_mask`` counts every token, as the model itself would.

    Raises:
        TypeError: a batch is not a mapping of tensors.
        ValueError: a batch has no ``input_ids``, an ``attention_mask`` of a shape that is not
            ``(batch, tokens)``, or the data hold no unmasked token.
    """
    accepted = set(inspect.signature(model.forward).parameters) - _LABELS
    samples: list[Sample] = []
    total = batches = 0
    for batch in dataloader:
        batches += 1
        for sample in _split(batch, accepted):
            if sample.count == 0:
                continue
            if samples and total + sample.count > max_tokens:
                return samples
            samples.append(sample)
            total += sample.count
    if batches == 0:
        raise ValueError(
            "The calibration data are empty: the dataloader gave no batch. Pass a dataloader over "
            "some hundreds of inputs (an iterator that was used up before gives none)."
        )
    if not samples:
        raise ValueError(
            f"The calibration data hold no unmasked token: attention_mask is 0 everywhere in "
            f"{batches} batches. Check the collator: 1 marks tokens, 0 marks padding."
        )
    return samples


def _split(batch: Any, accepted: set[str]) -> list[Sample]:
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"A calibration batch is a {type(batch).__name__}, but must be a mapping from argument "
            "names to tensors, such as {'input_ids': …, 'attention_mask': …}. Use a dataset of "
            "dicts with transformers' DataCollatorWithPadding."
        )
    inputs = {
        name: value for name, value in batch.items() if name in accepted and value is not None
    }
    for name, value in inputs.items():
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{name!r} in a calibration batch is a {type(value).__name__}, but must be a "
                "tensor. Let the dataset or collator return PyTorch tensors."
            )
    main = inputs.get("input_ids", inputs.get("inputs_embeds"))
    if main is None or main.ndim < 2:
        raise ValueError(
            f"A calibration batch needs 'input_ids' of shape (batch, tokens); this one has "
            f"{ {str(name): tuple(getattr(value, 'shape', ())) for name, value in batch.items()} }."
        )
    shape = main.shape[:2]
    mask = inputs.get("attention_mask", torch.ones(shape, dtype=torch.long, device=main.device))
    if mask.shape != shape:
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}, but the inputs have {tuple(shape)} "
            "(batch, tokens). Pass one value per token: 1 to attend, 0 for padding."
        )
    inputs["attention_mask"] = mask
    positions = torch.arange(1, shape[1] + 1, device=mask.device)
    lengths = ((mask != 0) * positions).amax(1).tolist() if shape[1] else [0] * shape[0]
    samples = []
    for row, length in enumerate(lengths):
        cut = {
            name: value[row : row + 1, :length] if value.shape[1:2] == shape[1:] else
            value[row : row + 1]
            for name, value in inputs.items()
        }  # fmt: skip
        samples.append(Sample(cut, cut["attention_mask"] != 0))
    return samples


def choose_scored(samples: int, fraction: float, seed: int) -> set[int]:
    """Numbers of the samples on which knowledge is measured: at least one, the same for a seed."""
    generator = torch.Generator().manual_seed(seed)
    count = max(1, round(fraction * samples))
    return set(torch.randperm(samples, generator=generator)[:count].tolist())


def start_streams(
    model: PreTrainedModel,
    architecture: Architecture,
    samples: list[Sample],
    config: KPruneConfig,
) -> list[Stream]:
    """The samples in batches of equal length, as they enter the first transformer layer."""
    scored = choose_scored(len(samples), config.score_fraction, config.seed)
    groups: dict[tuple[Any, ...], list[Sample]] = defaultdict(list)
    for number, sample in enumerate(samples):
        shapes = tuple((name, value.shape[1:]) for name, value in sorted(sample.inputs.items()))
        groups[sample.tokens.shape[1], number in scored, shapes].append(sample)
    streams = []
    for (length, is_scored, _), members in sorted(groups.items(), key=lambda item: item[0][:2]):
        size = max(1, config.batch_tokens // length)
        for start in range(0, len(members), size):
            part = members[start : start + size]
            streams.append(_enter(model, architecture, part, is_scored))
    return streams


@torch.no_grad()
def _enter(
    model: PreTrainedModel, architecture: Architecture, samples: list[Sample], scored: bool
) -> Stream:
    inputs = {
        name: torch.cat([sample.inputs[name] for sample in samples]).to(model.device)
        for name in samples[0].inputs
    }
    tokens = torch.cat([sample.tokens for sample in samples]).to(model.device)
    first = next(model.get_submodule(architecture.layers).children())
    with stopping_before(first) as calls:
        # Asked for outright, as a config that wants these makes transformers leave hooks behind.
        model(**inputs, output_hidden_states=False, output_attentions=False)
    args, kwargs = calls[0]
    arguments = inspect.signature(first.forward).bind(*args, **kwargs).arguments
    hidden: Tensor = arguments["hidden_states"]
    require_finite(hidden[tokens], f"the input of {architecture.layers}.0")
    return Stream(hidden, hidden, tokens, arguments.get("attention_mask"), scored)


def require_finite(values: Tensor, name: str) -> None:
    """Refuse NaN and infinity.

    Raises:
        ValueError: naming where they arose.
    """
    if not bool(values.isfinite().all()):
        raise ValueError(
            f"NaN or infinite values at {name} on the calibration data. Check the model's weights "
            "and inputs; if it runs in float16, load it in float32 or bfloat16."
        )
