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

from .units.sublayers import SubLayer


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module in evaluation mode, and each back in its own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


class _Stop(Exception):
    """Ends a forward pass once the inputs of interest have been seen."""


@contextmanager
def stopping_before(module: nn.Module) -> Iterator[list[tuple[tuple[Any, ...], dict[str, Any]]]]:
    """End any forward pass in the block at ``module``, and record the arguments it would get.

    Yields:
        A list that receives one ``(args, kwargs)``; the block must hold one forward pass.
    """
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((args, kwargs))
        raise _Stop

    handle = module.register_forward_pre_hook(stop, with_kwargs=True, prepend=True)
    try:
        yield calls
    except _Stop:
        pass
    finally:
        handle.remove()


@dataclass
class Flow:
    """What went through a sub-layer's output projection in its last forward pass.

    Attributes:
        features: what entered it, ``(batch, tokens, units * unit_size)``.
        output: what it made of that, ``(batch, tokens, hidden)``.
    """

    features: Tensor | None = None
    output: Tensor | None = None

    def taken(self) -> tuple[Tensor, Tensor]:
        """Features and output of a forward pass.

        Raises:
            RuntimeError: no forward pass reached the sub-layer.
        """
        if self.features is None or self.output is None:
            raise RuntimeError("No forward pass went through the watched sub-layer.")
        return self.features, self.output


@contextmanager
def watching(sublayer: SubLayer) -> Iterator[Flow]:
    """Record what flows through a sub-layer's output projection."""
    flow = Flow()

    def at_output(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        flow.features, flow.output = args[0], output

    handle = sublayer.output.register_forward_hook(at_output)
    try:
        yield flow
    finally:
        handle.remove()


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
