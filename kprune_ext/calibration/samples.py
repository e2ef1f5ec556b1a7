"""Calibration data: from a user's batches to single samples without padding."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..common.text_data import LABEL_KEYS


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


@dataclass(frozen=True)
class CalibrationData:
    """One process's samples, and what is known of those of all processes.

    Attributes:
        samples: of this process.
        keys: a number for each of them, see :func:`sample_keys`.
        largest_scored: knowledge is measured on samples whose key is at most this.
        count: samples of all processes.
        tokens: unmasked tokens of all processes.
    """

    samples: Sequence[Sample]
    keys: Sequence[int]
    largest_scored: int
    count: int
    tokens: int


def collect_samples(
    model: PreTrainedModel,
    dataloader: Iterable[Any],
    max_tokens: int,
    image_tokens: Callable[[Mapping[str, Tensor]], int] | None = None,
    needed: bool = True,
) -> list[Sample]:
    """Samples from the dataloader, in its order, until ``max_tokens`` unmasked tokens are reached.

    Padding at the end of a sequence is cut off, samples without any unmasked token are left out,
    and labels and arguments that the model's forward does not know are ignored. A batch without an
    ``attention_mask`` counts every token, as the model itself would.

    Args:
        model: decides which arguments are taken, and whether it reads text or images.
        dataloader: batches as mappings of tensors.
        max_tokens: unmasked tokens in all; the first sample is always taken.
        image_tokens: for images, how many tokens the model makes of each image of a batch.
        needed: whether there must be any data.

    Raises:
        TypeError: a batch is not a mapping of tensors.
        ValueError: a batch has no ``input_ids`` or ``pixel_values``, an ``attention_mask`` of a
            shape that is not ``(batch, tokens)``, or needed data hold no unmasked token.
    """
    accepted = set(inspect.signature(model.forward).parameters) - LABEL_KEYS
    images = model.main_input_name == "pixel_values" and image_tokens is not None
    samples: list[Sample] = []
    total = batches = 0
    for batch in dataloader:
        batches += 1
        inputs = _tensors(batch, accepted)
        for sample in _images(inputs, image_tokens) if images else _sequences(inputs, batch):
            if sample.count == 0:
                continue
            if samples and total + sample.count > max_tokens:
                return samples
            samples.append(sample)
            total += sample.count
    if batches == 0 and needed:
        raise ValueError(
            "The calibration data are empty: the dataloader gave no batch. Pass a dataloader over "
            "some hundreds of inputs (an iterator that was used up before gives none)."
        )
    if not samples and needed:
        raise ValueError(
            f"The calibration data hold no unmasked token: attention_mask is 0 everywhere in "
            f"{batches} batches. Check the collator: 1 marks tokens, 0 marks padding."
        )
    return samples


def _tensors(batch: Any, accepted: set[str]) -> dict[str, Tensor]:
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
    return inputs


def _images(
    inputs: dict[str, Tensor], image_tokens: Callable[[Mapping[str, Tensor]], int] | None
) -> list[Sample]:
    pixels = inputs.get("pixel_values")
    if pixels is None or pixels.ndim != 4 or image_tokens is None:
        raise ValueError(
            "A calibration batch needs 'pixel_values' of shape (batch, channels, height, width); "
            f"this one has { {name: tuple(value.shape) for name, value in inputs.items()} }."
        )
    if not len(pixels):
        return []
    tokens = torch.ones(1, image_tokens(inputs), dtype=torch.bool)
    return [
        Sample({name: value[row : row + 1] for name, value in inputs.items()}, tokens)
        for row in range(len(pixels))
    ]


def _sequences(inputs: dict[str, Tensor], batch: Mapping[Any, Any]) -> list[Sample]:
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


def sample_keys(samples: Sequence[Sample], seed: int) -> list[int]:
    """A number of 63 bits for each sample that depends on its content and the seed alone.

    So what is drawn at random for a sample is the same in whichever process and order it comes.
    """
    return [_key(sample, seed) for sample in samples]


def _key(sample: Sample, seed: int) -> int:
    content = hashlib.blake2b(str(seed).encode(), digest_size=8)
    for name, value in sorted(sample.inputs.items()):
        if value.shape[:2] == sample.tokens.shape:  # what is masked makes no difference
            value = value.clone()
            value[~sample.tokens] = 0
        content.update(f"{name}{tuple(value.shape)}".encode())
        content.update(
            value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        )
    return int.from_bytes(content.digest(), "little") >> 1


def largest_scored(keys: Sequence[int], fraction: float, least: int) -> int:
    """The largest key of the samples on which knowledge is measured, -1 if there are none.

    Keys are as good as random, so those up to a bound are a random part of the samples.

    Args:
        keys: of all samples.
        fraction: part of them that is chosen.
        least: how many at least, if there are as many.
    """
    count = max(round(fraction * len(keys)), min(len(keys), least))
    return sorted(keys)[count - 1] if count else -1


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
