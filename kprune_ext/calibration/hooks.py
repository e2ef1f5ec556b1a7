"""Contact with a running model: context managers that leave it as they found it, also after an error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..units.sublayers import SubLayer


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
