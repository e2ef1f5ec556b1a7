"""Context managers around forward passes, which restore the model even after an error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..units.projections import linear_at
from ..units.sublayers import SubLayer


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts every module in evaluation mode, and restores each module's own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


class _Stop(BaseException):
    """Ends a forward pass once the inputs of interest are recorded.

    No `Exception`, which the user's `predict` might catch.
    """


@contextmanager
def stopping_before(module: nn.Module) -> Iterator[list[tuple[tuple[Any, ...], dict[str, Any]]]]:
    """Ends the forward pass in the block before `module`, and records the module's arguments.

    Yields:
        A list that receives one `(args, kwargs)`. The block must run exactly one forward pass.
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
    """Input and output of a sub-layer's output projection in its last forward pass.

    Attributes:
        features: Input of the projection, `(batch, tokens, units * unit_size)`.
        output: Output of the projection, `(batch, tokens, hidden)`.
    """

    features: Tensor | None = None
    output: Tensor | None = None

    def taken(self) -> tuple[Tensor, Tensor]:
        """Returns features and output of the last forward pass.

        Raises:
            RuntimeError: If no forward pass reached the sub-layer.
        """
        if self.features is None or self.output is None:
            raise RuntimeError("No forward pass went through the watched sub-layer.")
        return self.features, self.output


@contextmanager
def watching(sublayer: SubLayer) -> Iterator[Flow]:
    """Records input and output of a sub-layer's output projection."""
    flow = Flow()

    def at_output(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        flow.features, flow.output = args[0], output

    handle = sublayer.output.register_forward_hook(at_output)
    try:
        yield flow
    finally:
        handle.remove()


@contextmanager
def watching_inputs(sublayer: SubLayer) -> Iterator[dict[str, list[Tensor]]]:
    """Records the inputs of a sub-layer's linear layers that have weights.

    Yields:
        By the path in the transformer layer, the input of each call, in the order of the calls. The
        block is to clear it after each forward pass.
    """
    seen: dict[str, list[Tensor]] = {}
    with ExitStack() as block:
        for path in (*sublayer.paths.inputs, sublayer.paths.output):
            linear = linear_at(sublayer.module, path)
            if not linear.weight.numel():
                continue

            def see(_: nn.Module, args: tuple[Tensor, ...], path: str = path) -> None:
                seen.setdefault(path, []).append(args[0])

            block.callback(linear.register_forward_pre_hook(see).remove)
        yield seen
