"""Samples of a weight, by which a base model is recognized."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Number of weight entries stored per module, by which the base model is recognized.
SAMPLE_SIZE = 32
# Two roundings of one weight to bfloat16 differ by less than this, relative to its magnitude.
SAMPLE_RTOL = 2.0**-7


@dataclass(frozen=True, eq=False)
class WeightSample:
    """Sample of a weight, to check that it is the one that was calibrated.

    Attributes:
        sample: Entries of the weight, from `sample_of`.
        shape: Shape of the weight, `(out, in)`.
        error: Largest absolute change of an entry that quantization may have caused.
    """

    sample: Tensor
    shape: tuple[int, int]
    error: float = 0.0


def sample_of(weight: Tensor) -> Tensor:
    """Returns `SAMPLE_SIZE` evenly spaced entries of a weight, in float32 on the CPU."""
    flat = weight.reshape(-1)
    positions = torch.linspace(0, flat.numel() - 1, SAMPLE_SIZE, dtype=torch.float64).long()
    return flat[positions.to(flat.device)].float().cpu()


def same_sample(seen: WeightSample, theirs: Tensor) -> bool:
    # A base model in another float dtype, or quantized, is still the same base model.
    least = float(theirs.abs().max()) * 1e-6
    return bool(torch.allclose(seen.sample, theirs, rtol=SAMPLE_RTOL, atol=max(least, seen.error)))
