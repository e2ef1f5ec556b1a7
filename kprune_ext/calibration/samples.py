"""Calibration data: single samples without padding, from a user's batches."""

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
    """One sequence without the padding after it.

    Attributes:
        inputs: The model's tensor arguments, each `(1, tokens, …)`, or `(1, …)` where they do not run
            along the sequence.
        tokens: Bool mask, True at unmasked tokens, `(1, tokens)`.
    """

    inputs: dict[str, Tensor]
    tokens: Tensor

    @property
    def count(self) -> int:
        """Number of unmasked tokens."""
        return int(self.tokens.sum())


@dataclass(frozen=True)
class CalibrationData:
    """One process's samples, with totals over all processes.

    Attributes:
        samples: Samples of this process.
        keys: Key of each of these samples, from `sample_keys`.
        largest_scored: Largest key of the samples on which knowledge is measured.
        count: Number of samples of all processes.
        tokens: Number of unmasked tokens of all processes.
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
    """Takes samples from the dataloader, in its order, up to `max_tokens` unmasked tokens.

    Padding at the end of a sequence is removed, samples without any unmasked token are left out,
    and labels and arguments that the model's forward does not accept are ignored. In a batch without
    an `attention_mask` every token counts, as in the model itself.

    Args:
        model: The model, which determines the arguments that are taken and whether they are text or
            images.
        dataloader: Batches as mappings from argument names to tensors.
        max_tokens: Largest number of unmasked tokens in total; the first sample is always taken.
        image_tokens: For images, returns the number of tokens that the model has per image of a batch.
        needed: Whether data without any unmasked token are an error.

    Raises:
        TypeError: If a batch is not a mapping of tensors.
        ValueError: If a batch lacks `input_ids` or `pixel_values` or has an `attention_mask` whose
            shape is not `(batch, tokens)`, or if needed data hold no unmasked token.
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
            "The calibration data are empty: the dataloader yielded no batch. Pass a dataloader over "
            "a few hundred inputs (an iterator that is already exhausted yields none)."
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
            "dicts with the DataCollatorWithPadding of transformers."
        )
    inputs = {
        name: value for name, value in batch.items() if name in accepted and value is not None
    }
    for name, value in inputs.items():
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{name!r} in a calibration batch is a {type(value).__name__}, but must be a "
                "tensor. Make the dataset or collator return PyTorch tensors."
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
    """Returns a 63-bit number per sample that depends only on its content and the seed.

    Random draws for a sample are thus the same in any process and any order of samples.
    """
    return [_key(sample, seed) for sample in samples]


def _key(sample: Sample, seed: int) -> int:
    content = hashlib.blake2b(str(seed).encode(), digest_size=8)
    for name, value in sorted(sample.inputs.items()):
        if value.shape[:2] == sample.tokens.shape:  # masked tokens make no difference
            value = value.clone()
            value[~sample.tokens] = 0
        content.update(f"{name}{tuple(value.shape)}".encode())
        content.update(
            value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        )
    return int.from_bytes(content.digest(), "little") >> 1


def largest_scored(keys: Sequence[int], fraction: float, least: int) -> int:
    """Returns the largest key of the samples on which knowledge is measured, -1 without any.

    Keys are pseudo-random, so the samples with keys up to a bound are a random subset.

    Args:
        keys: Keys of all samples.
        fraction: Fraction of the samples to choose.
        least: Smallest number of samples to choose, if there are as many.
    """
    count = max(round(fraction * len(keys)), min(len(keys), least))
    return sorted(keys)[count - 1] if count else -1


def require_finite(values: Tensor, name: str) -> None:
    """Refuses NaN and infinite values.

    Args:
        values: The values to check.
        name: Where they arise, for the message.

    Raises:
        ValueError: If a value is NaN or infinite.
    """
    if not bool(values.isfinite().all()):
        raise ValueError(
            f"NaN or infinite values at {name} on the calibration data. Check the model's weights "
            "and inputs; if the model is in float16, load it in float32 or bfloat16."
        )
