"""Contact with a running model: masks on units, and a look at what flows through a sub-layer.

Everything here is a context manager that leaves the model as it found it, also after an error.
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
    """The mask that multiplies one sub-layer's units, and the unmasked features.

    Attributes:
        mask: ones, ``(batch, units)``, one mask per sample, with gradient.
        features: what entered the output projection, ``(batch, tokens, units * unit_size)``.
    """

    mask: Tensor
    features: Tensor | None = None


@contextmanager
def unit_masks(sublayers: Sequence[SubLayer], batch: int) -> Iterator[list[MaskedUnits]]:
    """Multiply the units of each sub-layer by a mask of ones of its own for every sample.

    As samples do not meet inside a model, the gradient of a batch's sum with respect to the masks
    holds each sample's own gradient.

    Args:
        sublayers: which to mask.
        batch: samples in the forward passes to come.
    """
    masked = []
    with ExitStack() as stack:
        for sublayer in sublayers:
            weight = sublayer.output.weight
            mask = torch.ones(
                batch, sublayer.units, dtype=weight.dtype, device=weight.device, requires_grad=True
            )
            entry = MaskedUnits(mask)
            hook = _masking_hook(entry, sublayer.unit_size)
            stack.callback(sublayer.output.register_forward_pre_hook(hook).remove)
            masked.append(entry)
        yield masked


def _masking_hook(entry: MaskedUnits, unit_size: int) -> Any:
    def multiply(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        entry.features = args[0].detach()
        return (args[0] * entry.mask.repeat_interleave(unit_size, dim=1).unsqueeze(1), *args[1:])

    return multiply
