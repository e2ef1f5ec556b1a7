"""Forward and backward passes that give each sub-layer's features and the gradients of its units."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..calibration.streams import Stream
from ..model_layers.layer_stack import LayerStack
from ..samples.read_tokens import MOST_LOGITS
from ..samples.samples import require_finite
from ..units.sublayers import SubLayer
from .fisher import directions, divergence_gradient
from .next_token import upstream_gradients
from .signal import Signal
from .unit_masks import MaskedUnits, unit_masks


@dataclass(frozen=True)
class Passed:
    """What one batch tells of the units of one sub-layer.

    Attributes:
        number: Number of the sub-layer among those that are measured.
        gradients: Gradients with respect to the units' masks, `(batch, units)` each, whose squares are
            summed.
        features: Input of the output projection, `(batch, tokens, units * unit_size)`.
        after: Hidden states after the sub-layer, `(batch, tokens, hidden)`.
    """

    number: int
    gradients: list[Tensor]
    features: Tensor
    after: Tensor


def passes_over(
    sublayers: Sequence[SubLayer], stack: LayerStack, stream: Stream, signal: Signal
) -> Iterator[Passed]:
    """Runs the last sub-layers of a model forward and backward on one batch.

    Args:
        sublayers: The sub-layers, bottom-up.
        stack: Layer stack of the model.
        stream: The samples, with hidden states before the first sub-layer.
        signal: The predictions whose gradients are taken.

    Yields:
        What was found, once for each sub-layer, in any order.

    Raises:
        ValueError: If activations or logits are NaN or infinite; the message names the module.
    """
    run = _layerwise if signal.layerwise else _at_once
    yield from run(sublayers, stack, stream, signal)


def _at_once(
    sublayers: Sequence[SubLayer], stack: LayerStack, stream: Stream, signal: Signal
) -> Iterator[Passed]:
    """One backward pass through all sub-layers, whose activations are kept."""
    contexts, hidden = stream.contexts_in(stack), stream.student
    states = []
    with torch.enable_grad(), unit_masks(sublayers, len(stream.keys)) as masked:
        for sublayer in sublayers:
            hidden = sublayer.run(hidden, contexts[sublayer.layer])
            require_finite_states(hidden.detach(), sublayer, stream)
            states.append(hidden.detach())
        z = stack.predict(signal.predict, stream.inputs, hidden)
        z = z if z.dtype == torch.float64 else z.float()
        require_finite(z.detach(), "the logits")
        masks = [entry.mask for entry in masked]
        found: list[list[Tensor]] = [[] for _ in masks]
        for direction in _directions(z.detach(), stream, signal):
            every = torch.autograd.grad(
                (z * direction).sum(), masks, retain_graph=True, materialize_grads=True
            )
            for gradients, gradient in zip(found, every, strict=True):
                gradients.append(gradient)
    for number, (entry, sublayer) in enumerate(zip(masked, sublayers, strict=True)):
        features = _features(entry, sublayer)
        yield Passed(number, found[number], features, states[number])


def _layerwise(
    sublayers: Sequence[SubLayer], stack: LayerStack, stream: Stream, signal: Signal
) -> Iterator[Passed]:
    """A forward pass that keeps only hidden states, then each sub-layer again with its backward pass."""
    contexts = stream.contexts_in(stack)
    states = [stream.student]
    with torch.no_grad():
        for sublayer in sublayers:
            hidden = sublayer.run(states[-1], contexts[sublayer.layer])
            require_finite_states(hidden, sublayer, stream)
            states.append(hidden)
    upstream = _upstream(stack, stream, signal, states[-1])
    for number in reversed(range(len(sublayers))):
        sublayer, after = sublayers[number], states.pop()
        with torch.enable_grad(), unit_masks([sublayer], len(stream.keys)) as (entry,):
            before = states[-1].detach().to(sublayer.device).requires_grad_()
            own = sublayer.run(before, contexts[sublayer.layer])
            gradients, below = [], []
            for left, above in enumerate(upstream, 1 - len(upstream)):
                gradient, change = torch.autograd.grad(
                    own,
                    (entry.mask, before),
                    above.to(own.device),
                    retain_graph=left < 0,
                    materialize_grads=True,
                )
                gradients.append(gradient)
                below.append(change)
        upstream = below
        yield Passed(number, gradients, _features(entry, sublayer), after)


def _upstream(stack: LayerStack, stream: Stream, signal: Signal, hidden: Tensor) -> list[Tensor]:
    """Returns gradients with respect to the states after the last layer, one per backward pass."""
    hidden = hidden.to(stream.tokens.device)
    if signal.next_tokens:
        teacher = None
        if signal.teacher is not None:
            teacher = torch.stack([signal.teacher[key] for key in stream.keys])
        return upstream_gradients(
            stack,
            stream,
            hidden,
            temperature=signal.temperature,
            draws=signal.passes,
            teacher=teacher,
        )
    with torch.enable_grad():
        state = hidden.detach().requires_grad_()
        z = stack.predict(signal.predict, stream.inputs, state)
        z = z if z.dtype == torch.float64 else z.float()
        require_finite(z.detach(), "the logits")
        return [
            torch.autograd.grad((z * direction).sum(), state, retain_graph=True)[0]
            for direction in _directions(z.detach(), stream, signal)
        ]


def require_finite_states(hidden: Tensor, sublayer: SubLayer, stream: Stream) -> None:
    """Refuses NaN and infinite values in the hidden states after a sub-layer.

    Raises:
        ValueError: If an unmasked token has one.
    """
    counted = stream.tokens.to(hidden.device)
    require_finite(hidden[counted], f"the output of {sublayer.name}")


def _features(entry: MaskedUnits, sublayer: SubLayer) -> Tensor:
    if entry.features is None:
        raise RuntimeError(f"No forward pass reached {sublayer.name}.")
    return entry.features


def _directions(z: Tensor, stream: Stream, signal: Signal) -> Iterator[Tensor]:
    counted = torch.ones(z.shape[:2], dtype=torch.bool, device=z.device)
    if z.shape[1] == stream.tokens.shape[1]:  # a prediction for every token
        counted = stream.tokens.to(z.device) if z.shape[1] > 1 else counted
    if signal.teacher is not None:
        teacher = torch.stack([signal.teacher[key] for key in stream.keys]).to(z)
        gradient = divergence_gradient(z, teacher, signal.problem, signal.temperature)
        yield gradient * counted.unsqueeze(2)
        return
    yield from directions(
        z, counted, signal.problem, signal.temperature, signal.passes, list(stream.keys)
    )


def in_parts(
    streams: Sequence[Stream], depth: int, stack: LayerStack, signal: Signal
) -> Iterator[Stream]:
    """Yields the streams, split where activations of all sub-layers, or logits, need much memory."""
    for stream in streams:
        length = stream.tokens.shape[1]
        rows = signal.depth_tokens // (length * (1 if signal.layerwise else depth))
        if not signal.next_tokens:
            with torch.no_grad():
                one = stream.inputs.part(slice(1))
                first = stream.student[:1].to(stream.tokens.device)
                size = stack.predict(signal.predict, one, first).numel()
            rows = min(rows, MOST_LOGITS // size)
        rows = max(1, rows)
        if rows >= len(stream.keys):
            yield stream
            continue
        for start in range(0, len(stream.keys), rows):
            yield stream.part(slice(start, start + rows))
