"""Masks on a running model's units, whose gradients and features are recorded.

The context manager restores the model, even after an error.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..units.sublayers import SubLayer


@dataclass
class MaskedUnits:
    """Mask on one sub-layer's units, and the features before masking.

    Attributes:
        mask: Mask of ones per sample, `(batch, units)`, with gradient.
        features: Input of the output projection, `(batch, tokens, units * unit_size)`.
    """

    mask: Tensor
    features: Tensor | None = None


@contextmanager
def unit_masks(sublayers: Sequence[SubLayer], batch: int) -> Iterator[list[MaskedUnits]]:
    """Multiplies the units of each sub-layer by a mask of ones, a separate one for each sample.

    As samples do not interact inside a model, the gradient of a sum over the batch with respect to
    the masks holds each sample's own gradient.

    Args:
        sublayers: The sub-layers to mask.
        batch: Number of samples in the forward passes of the block.

    Yields:
        One mask per sub-layer, with its features after a forward pass.
    """
    masked = []
    with ExitStack() as stack:
        for sublayer in sublayers:
            weight = sublayer.weight
            # In low precision, gradients that are summed over tokens would lose digits, or overflow.
            dtype = torch.promote_types(weight.dtype, torch.float32)
            mask = torch.ones(
                batch, sublayer.units, dtype=dtype, device=weight.device, requires_grad=True
            )
            entry = MaskedUnits(mask)
            hook = _masking_hook(entry, sublayer.unit_size)
            stack.callback(sublayer.output.register_forward_pre_hook(hook).remove)
            masked.append(entry)
        yield masked


def _masking_hook(entry: MaskedUnits, unit_size: int) -> Any:
    def multiply(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        entry.features = args[0].detach()
        masked = args[0] * entry.mask.repeat_interleave(unit_size, dim=1).unsqueeze(1)
        return (masked.to(args[0].dtype), *args[1:])

    return multiply
